//! The launches of the portable matmul.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::Result;

use super::super::launch::{Args, Function, Memory};
use super::matmul::{Addresses, Call};
use crate::kernel;
use crate::kernel::gemm::Problem;
use crate::kernel::gemm::sm80::{Config, Reduce};

pub(crate) struct Plan {
    config: Config,
    tile_rows: u32,
    tile_cols: u32,
    function: Arc<Function>,
    /// Adds the parts of a split.
    reduce: Option<(Reduce, Arc<Function>)>,
}

impl Plan {
    pub(super) fn new(call: &Call, config: Config) -> Result<Self> {
        let Call { op, gpu, facts: problem, .. } = call;
        let function = gpu.native(op, &kernel::Config::MatmulSm80(config))?;
        let reduce = config.reduce().map(|reduce| {
            gpu.native(op, &kernel::Config::MatmulReduce(reduce)).map(|function| (reduce, function))
        });
        Ok(Self {
            config,
            tile_rows: problem.m.div_ceil(config.rows.into()) as u32,
            tile_cols: problem.n.div_ceil(config.cols.into()) as u32,
            function,
            reduce: reduce.transpose()?,
        })
    }

    pub(super) fn launch(&self, call: &Call, at: &Addresses) -> Result<()> {
        let Call { op, device, .. } = call;
        let Problem { m, n, batch, .. } = call.facts;
        let tiles = self.tile_rows * self.tile_cols * batch as u32;
        let blocks = tiles * self.config.split;
        let Some((reduce, function)) = &self.reduce else {
            let args = self.args(call, at, at.out, at.bias);
            // SAFETY: the operands' views lie inside their storages; the result has this size; all
            // live until the work is submitted.
            unsafe { self.function.submit(op, device, [blocks, 1, 1], &args)? };
            return Ok(());
        };
        let parts = u64::from(self.config.split);
        // SAFETY: the first kernel writes all of it before the second reads it.
        let mut partial = unsafe { device.alloc::<f32>((parts * batch * m * n) as usize)? };
        let partial = Memory::of_slice_mut(&mut partial, device);
        let args = self.args(call, at, partial.address(), None);
        let rows = (batch * m) as u32;
        let mut sum = Args::new();
        sum.pointer(partial.address()).pointer(at.out);
        if let Some(bias) = at.bias {
            sum.pointer(bias);
        }
        sum.value(rows).value(n as u32);
        let grid = [rows, (n as u32).div_ceil(reduce.cols()), 1];
        // SAFETY: as above, for both.
        unsafe {
            self.function.submit(op, device, [blocks, 1, 1], &args)?;
            function.submit(op, device, grid, &sum)?;
        }
        Ok(())
    }

    /// The parameters of `kernel::gemm::sm80::emit`.
    fn args(&self, call: &Call, at: &Addresses, out: u64, bias: Option<u64>) -> Args {
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
        args.value(self.tile_rows)
            .value(self.tile_cols)
            .value(self.tile_rows * self.tile_cols * batch as u32)
            .value(self.tile_rows.min(8));
        if self.config.batched {
            args.value(call.batch.inner_len() as u32);
            for side in 0..2 {
                for (_, stride) in call.batch.side(side) {
                    args.value(stride as u64);
                }
            }
            if self.config.split > 1 {
                args.value(batch as u32);
            }
        }
        args
    }
}
