//! The launches of the portable matmul.
#![allow(unsafe_code)]

use candle_core::Result;

use super::super::launch::{Args, Memory};
use super::matmul::{Addresses, Call};
use super::plan::Ready;
use crate::kernel::gemm::Problem;
use crate::kernel::gemm::sm80::{Config, Launch};

pub(super) fn launch(
    call: &Call,
    config: &Config,
    launch: &Launch,
    kernel: &Ready,
    at: &Addresses,
) -> Result<()> {
    let args = args(call, config, launch, at, at.out, at.bias);
    // SAFETY: the operands' views lie inside their storages; the result has this size; all live until
    // the work is submitted.
    unsafe { kernel.function.submit(call.op, &call.device, kernel.grid, &args)? };
    Ok(())
}

pub(super) fn launch_split(
    call: &Call,
    config: &Config,
    launch: &Launch,
    [kernel, add]: [&Ready; 2],
    at: &Addresses,
) -> Result<()> {
    let Call { op, device, .. } = call;
    let Problem { m, n, batch, .. } = call.facts;
    let parts = u64::from(config.split);
    // SAFETY: the first kernel writes all of it before the second reads it.
    let mut partial = unsafe { device.alloc::<f32>((parts * batch * m * n) as usize)? };
    let partial = Memory::of_slice_mut(&mut partial, device);
    let args = args(call, config, launch, at, partial.address(), None);
    let mut sum = Args::new();
    sum.pointer(partial.address()).pointer(at.out);
    if let Some(bias) = at.bias {
        sum.pointer(bias);
    }
    sum.value((batch * m) as u32).value(n as u32);
    // SAFETY: as above, for both.
    unsafe {
        kernel.function.submit(op, device, kernel.grid, &args)?;
        add.function.submit(op, device, add.grid, &sum)?;
    }
    Ok(())
}

/// The parameters of `kernel::gemm::sm80::emit`.
fn args(
    call: &Call,
    config: &Config,
    launch: &Launch,
    at: &Addresses,
    out: u64,
    bias: Option<u64>,
) -> Args {
    let Problem { m, n, k, batch, .. } = call.facts;
    let mut args = Args::new();
    args.pointer(at.operands[0]).pointer(at.operands[1]).pointer(out);
    if let Some(bias) = bias {
        args.pointer(bias);
    }
    args.value(m as u32).value(n as u32).value(k as u32);
    for lines in &call.lines {
        args.value(lines.stride as u64);
    }
    args.value(launch.tile_rows).value(launch.tile_cols).value(launch.tiles).value(launch.group);
    if config.batched {
        args.value(call.batch.inner_len() as u32);
        for side in 0..2 {
            for (_, stride) in call.batch.side(side) {
                args.value(stride as u64);
            }
        }
        if config.split > 1 {
            args.value(batch as u32);
        }
    }
    args
}
