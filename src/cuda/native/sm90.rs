//! The launch of Hopper's matmul.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::Result;

use super::super::launch::{Args, Function, TensorMap};
use super::matmul::{Addresses, Call};
use crate::kernel::gemm::Problem;
use crate::kernel::gemm::sm90::{Config, Launch, Order, Store};

pub(crate) struct Plan {
    config: Config,
    launch: Launch,
    function: Arc<Function>,
}

impl Plan {
    pub(super) fn new(call: &Call, config: Config) -> Result<Self> {
        let Call { op, gpu, facts, .. } = call;
        let launch = Launch::new(&config, facts, gpu.device.multiprocessors);
        let function = gpu.native(op, &crate::kernel::Config::MatmulSm90(config))?;
        Ok(Self { config, launch, function })
    }

    pub(super) fn launch(&self, call: &Call, at: &Addresses) -> Result<()> {
        let mut args = Args::new();
        self.args(&mut args, call, at)?;
        // SAFETY: the descriptors span the operands' views, inside their storages; the result has
        // this size; all live until the work is submitted.
        unsafe { self.function.submit(call.op, &call.device, self.launch.grid, &args)? };
        Ok(())
    }

    /// The parameters of `kernel::gemm::sm90::emit`.
    fn args(&self, args: &mut Args, call: &Call, at: &Addresses) -> Result<()> {
        let Self { config, launch, .. } = self;
        let [left, right] = config.orient.order([0, 1]);
        let map = |side: usize, lines: u32| {
            let batch = config.batched.then(|| call.batch.side(side));
            call.lines[side].map(config.half, at.operands[side], batch, lines)
        };
        args.tensor_map(map(left, config.lhs_boxes().lines)?)
            .tensor_map(map(right, config.rhs_boxes().lines)?);
        match config.store {
            Store::Tma => args.tensor_map(self.result_map(&call.facts, at.out)?),
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

    fn result_map(&self, facts: &Problem, out: u64) -> Result<TensorMap> {
        let config = &self.config;
        let element = config.epilogue.out;
        let row = facts.n * u64::from(element.size());
        let dims = [facts.n, facts.m, facts.batch];
        let [cols, rows] = config.result_box();
        let (strides, boxed) = ([row, row * facts.m], [cols, rows, 1]);
        let rank = if config.batched { 3 } else { 2 };
        Ok(TensorMap::new(element, out, &dims[..rank], &strides[..rank - 1], &boxed[..rank])?)
    }
}
