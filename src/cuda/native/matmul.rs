//! f16 and bf16 products.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape};

use super::super::fit::{self, Fitted};
use super::super::gpu::Gpu;
use super::super::launch::Memory;
use super::super::order::Order;
use super::operand::{Batch, Lines, element, half, operand, row};
use super::plan::{Compiled, Plans};
use super::{sm80, sm90};
use crate::error::Error;
use crate::kernel::gemm::{self, Plan, Problem};
use crate::op::{Epilogue, MatmulProblem, View};

static PLANS: Plans<Plan> = Plans::new();

/// `act(A·B + bias)`; neither the result nor the depth is empty.
pub(crate) fn matmul(
    op: &'static str,
    problem: &MatmulProblem,
    epilogue: Epilogue,
    a: &CudaStorage,
    b: &CudaStorage,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    let call = Call::new(op, problem, epilogue, a, b, bias)?;
    call.run(&*PLANS.get(op, &call.gpu, &call.facts)?)
}

fn countable(op: &'static str, facts: &Problem) -> Result<()> {
    let Some((got, most)) = facts.limit() else { return Ok(()) };
    let (what, limit) = ("Engine::Native".into(), format!("cannot take {got} (at most {most})"));
    let fix = "split it and join the results with `Tensor::cat`".into();
    Err(Error::Unsupported { op, what, limit, fix }.into())
}

/// One call: operands that fit, and the facts.
pub(super) struct Call<'a> {
    pub op: &'static str,
    pub device: CudaDevice,
    order: Order,
    pub gpu: Arc<Gpu>,
    pub facts: Problem,
    pub batch: Batch,
    /// How A and B lie.
    pub lines: [Lines; 2],
    operands: [Fitted<'a>; 2],
    bias: Option<Fitted<'a>>,
    out_dtype: DType,
    out_len: usize,
}

/// Where one launch reads and writes.
pub(super) struct Addresses {
    pub operands: [u64; 2],
    pub bias: Option<u64>,
    pub out: u64,
}

impl<'a> Call<'a> {
    pub fn new(
        op: &'static str,
        problem: &MatmulProblem,
        epilogue: Epilogue,
        a: &'a CudaStorage,
        b: &'a CudaStorage,
        bias: Option<View<'a, CudaStorage>>,
    ) -> Result<Self> {
        let device = a.device().clone();
        let gpu = Gpu::of(op, &device)?;
        let inputs = [Some(a), Some(b), bias.map(|(storage, _)| storage)];
        let order = Order::new(op, device.cuda_stream(), inputs.into_iter().flatten());
        let (fit_a, lhs) = operand(op, a, &problem.lhs)?;
        let (fit_b, rhs) = operand(op, b, &problem.rhs.t())?;
        let bias = bias.map(|bias| row(op, bias)).transpose()?;
        let batch = Batch::new(&fit_a.stack, &fit_b.stack);
        let facts = Problem {
            m: lhs.outer as u64,
            n: rhs.outer as u64,
            k: lhs.depth as u64,
            batch: batch.count() as u64,
            half: half(a.dtype()),
            lhs: lhs.major,
            rhs: rhs.major,
            epilogue: gemm::Epilogue {
                out: element(epilogue.out_dtype),
                bias: bias.as_ref().map(|bias| element(bias.storage().dtype())),
                activation: epilogue.activation,
            },
        };
        countable(op, &facts)?;
        Ok(Self {
            op,
            device,
            order,
            gpu,
            facts,
            batch,
            lines: [lhs, rhs],
            operands: [fit_a, fit_b],
            bias,
            out_dtype: epilogue.out_dtype,
            out_len: problem.out.elem_count(),
        })
    }

    pub fn run(&self, compiled: &Compiled<Plan>) -> Result<CudaStorage> {
        let device = &self.device;
        let mut out = fit::uninit(device, &Shape::from(self.out_len), self.out_dtype)?;
        let [a, b] = &self.operands;
        let inputs = [Memory::of(a.storage(), device), Memory::of(b.storage(), device)];
        let bias = self
            .bias
            .as_ref()
            .map(|fitted| (Memory::of(fitted.storage(), device), fitted.offset(0)));
        let result = Memory::of_mut(&mut out, device);
        let Problem { m, n, batch, ref epilogue, .. } = self.facts;
        let result_bytes = m * n * batch * u64::from(epilogue.out.size());
        self.order.run(|| {
            for (i, skipped) in self.batch.launches().enumerate() {
                let begin =
                    |side: usize| inputs[side].at(self.operands[side].offset(0) + skipped[side]);
                let at = Addresses {
                    operands: [begin(0), begin(1)],
                    bias: bias.as_ref().map(|(memory, first)| memory.at(*first)),
                    out: result.address() + i as u64 * result_bytes,
                };
                match (&compiled.plan, compiled.steps.as_slice()) {
                    (Plan::Sm90(config, launch), [kernel]) => {
                        sm90::launch(self, config, launch, kernel, &at)?;
                    }
                    (Plan::Sm80(config, launch), [kernel]) => {
                        sm80::launch(self, config, launch, kernel, &at)?;
                    }
                    (Plan::Split(config, launch, _), [kernel, sum]) => {
                        sm80::launch_split(self, config, launch, [kernel, sum], &at)?;
                    }
                    _ => unreachable!("a split has two kernels, others one"),
                }
            }
            Ok(())
        })?;
        drop(result);
        Ok(out)
    }
}
