//! The launch of Hopper's matmul.
#![allow(unsafe_code)]

use candle_core::Result;

use super::super::launch::{Args, TensorMap};
use super::matmul::{Addresses, Call};
use super::plan::Ready;
use crate::kernel::gemm::Problem;
use crate::kernel::gemm::sm90::{Config, Launch, Order, Store};

pub(super) fn launch(
    call: &Call,
    config: &Config,
    launch: &Launch,
    kernel: &Ready,
    at: &Addresses,
) -> Result<()> {
    let mut args = Args::new();
    fill(&mut args, call, config, launch, at)?;
    // SAFETY: the descriptors span the operands' views, inside their storages; the result has this
    // size; all live until the work is submitted.
    unsafe { kernel.function.submit(call.op, &call.device, kernel.grid, &args)? };
    Ok(())
}

/// The parameters of `kernel::gemm::sm90::emit`.
fn fill(
    args: &mut Args,
    call: &Call,
    config: &Config,
    launch: &Launch,
    at: &Addresses,
) -> Result<()> {
    let [left, right] = config.orient.order([0, 1]);
    let map = |side: usize, lines: u32| {
        let batch = config.batched.then(|| call.batch.side(side));
        call.lines[side].map(config.half, at.operands[side], batch, lines)
    };
    args.tensor_map(map(left, config.lhs_boxes().lines)?)
        .tensor_map(map(right, config.rhs_boxes().lines)?);
    match config.store {
        Store::Tma => args.tensor_map(result_map(config, &call.facts, at.out)?),
        Store::Staged { .. } => args.pointer(at.out),
    };
    args.value(call.facts.m as u32).value(call.facts.n as u32);
    if let Some(bias) = at.bias {
        args.pointer(bias);
    }
    args.value(launch.depth);
    if config.order == Order::Raster {
        args.value(launch.tile_rows)
            .value(launch.tile_cols)
            .value(launch.tiles)
            .value(launch.group);
    }
    if config.batched {
        args.value(call.batch.inner_len() as u32);
    }
    Ok(())
}

fn result_map(config: &Config, facts: &Problem, out: u64) -> Result<TensorMap> {
    let element = config.epilogue.out;
    let row = facts.n * u64::from(element.size());
    let dims = [facts.n, facts.m, facts.batch];
    let [cols, rows] = config.result_box();
    let (strides, boxed) = ([row, row * facts.m], [cols, rows, 1]);
    let rank = if config.batched { 3 } else { 2 };
    Ok(TensorMap::new(element, out, &dims[..rank], &strides[..rank - 1], &boxed[..rank])?)
}
