//! f16 and bf16 products.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::Fitted;
use super::operand::{Batch, Lines, element, factor, operand, row};
use super::plan::{Compiled, Plans};
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
            elements: [factor(a.dtype()), factor(b.dtype())],
            lhs: lhs.major,
            rhs: rhs.major,
            epilogue: gemm::Epilogue {
                out: element(epilogue.out_dtype),
                scale: gemm::Scale::None,
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
        let (device, problem) = (&self.device, &self.facts);
        let alloc = |len: usize, dtype| uninit(device, &Shape::from(len), dtype);
        let mut out = alloc(self.out_len, self.out_dtype)?;
        let partial = compiled.plan.partial_sums(problem);
        let mut partial = partial.map(|sums| alloc(sums as usize, DType::F32)).transpose()?;
        let [a, b] = &self.operands;
        let inputs = [Memory::of(a.storage(), device), Memory::of(b.storage(), device)];
        let bias = self.bias.as_ref();
        let bias = bias.map(|row| (Memory::of(row.storage(), device), row.offset(0)));
        let result = Memory::of_mut(&mut out, device);
        let partial = partial.as_mut().map(|sums| Memory::of_mut(sums, device));
        let products = problem.m * problem.n * problem.batch;
        self.order.run(|| {
            for (i, skipped) in (0..).zip(self.batch.launches()) {
                let operand = |side: usize| gemm::Operand {
                    address: inputs[side].at(self.operands[side].offset(0) + skipped[side]),
                    line: self.lines[side].stride as u64,
                    batch: self.batch.side(side).map(|(len, each)| (len as u64, each as u64)),
                };
                let arguments = gemm::Arguments {
                    problem,
                    plan: &compiled.plan,
                    operands: [operand(0), operand(1)],
                    scales: gemm::Scales::None,
                    bias: bias.as_ref().map(|(memory, first)| memory.at(*first)),
                    out: result.at((i * products) as usize),
                    partial: partial.as_ref().map(Memory::address),
                };
                compiled.launch(self.op, device, &arguments)?;
            }
            Ok(())
        })?;
        drop(result);
        Ok(out)
    }
}
