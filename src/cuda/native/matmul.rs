//! Products.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::Fitted;
use super::bytes::CodeScales;
use super::limit::{SPLIT, countable};
use super::operand::{Batch, Lines, Source, element, factor, operand, row};
use super::plan::{Compiled, Launches, Plans};
use crate::kernel::gemm::{self, Plan, Problem};
use crate::op::{Epilogue, MatmulProblem, View};
use crate::ptx::Factor;

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
    Call::new(op, problem, epilogue, a, b, bias)?.run_chosen()
}

/// The same with sums that are multiplied with scales of lines first.
pub(super) fn matmul_scaled(
    op: &'static str,
    problem: &MatmulProblem,
    epilogue: Epilogue,
    operands: [&CudaStorage; 2],
    bias: Option<View<CudaStorage>>,
    scales: CodeScales,
) -> Result<CudaStorage> {
    let gemm = gemm_epilogue(epilogue, bias);
    Call::with(op, problem, gemm, epilogue.out_dtype, operands, bias, Some(scales))?.run_chosen()
}

fn gemm_epilogue(epilogue: Epilogue, bias: Option<View<CudaStorage>>) -> gemm::Epilogue {
    gemm::Epilogue {
        bias: bias.map(|(storage, _)| element(storage.dtype())),
        activation: epilogue.activation,
        ..gemm::Epilogue::round(element(epilogue.out_dtype))
    }
}

/// `A·B` to element `first` and those after it, or added to these if they are f32; neither the product nor its depth is empty.
pub(crate) fn product_to(
    op: &'static str,
    problem: &MatmulProblem,
    [a, b]: [&CudaStorage; 2],
    (out, first): (&mut CudaStorage, usize),
    adds: bool,
) -> Result<()> {
    let epilogue = match adds {
        true => gemm::Epilogue::add(),
        false => gemm::Epilogue::round(element(out.dtype())),
    };
    let call = Call::with(op, problem, epilogue, out.dtype(), [a, b], None, None)?;
    let compiled = PLANS.get(op, &call.gpu, &call.facts)?;
    call.run_to(&compiled, (out, first), Launches::default())
}

/// What the sums of 8-bit operands are multiplied with: see [`Scale`](gemm::Scale).
// One for each call, on the stack.
#[allow(clippy::large_enum_variant)]
pub(super) enum CallScales<'a> {
    None,
    /// f32 of 1×128 blocks of A and of 128×128 of B.
    Blocks {
        rows: Source<'a>,
        cols: Source<'a>,
    },
    /// A number, f32 of rows, one or each, and of columns; and a zero point of A with the i32 sums of the
    /// columns of B.
    Lines {
        one: f32,
        rows: Source<'a>,
        cols: Source<'a>,
        zero: Option<(i32, Source<'a>)>,
    },
}

impl CallScales<'_> {
    /// Calls `with` for what a launch on a device passes.
    pub fn on<T>(&self, device: &CudaDevice, with: impl FnOnce(gemm::Scales) -> T) -> T {
        match self {
            Self::None => with(gemm::Scales::None),
            Self::Blocks { rows, cols } => {
                let [rows, cols] = [rows, cols].map(|vector| vector.on(device));
                with(gemm::Scales::Blocks { rows: rows.address(), cols: cols.address() })
            }
            Self::Lines { one, rows, cols, zero } => {
                let each = rows.stack().cols > 1;
                let [rows, cols] = [rows, cols].map(|vector| vector.on(device));
                let zero = zero.as_ref().map(|(zero, sums)| (*zero, sums.on(device)));
                with(gemm::Scales::Lines {
                    one: *one,
                    rows: gemm::PerRow { address: rows.address(), each },
                    cols: cols.address(),
                    zero: zero.as_ref().map(|(zero, sums)| (*zero, sums.address())),
                })
            }
        }
    }

    /// What is read.
    pub fn inputs(&self) -> impl Iterator<Item = &CudaStorage> {
        let all = match self {
            Self::None => [None; 3],
            Self::Blocks { rows, cols } => [Some(rows), Some(cols), None],
            Self::Lines { rows, cols, zero, .. } => {
                [Some(rows), Some(cols), zero.as_ref().map(|(_, sums)| sums)]
            }
        };
        all.into_iter().flatten().filter_map(Source::storage)
    }
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
    operands: [Source<'a>; 2],
    scales: CallScales<'a>,
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
        let gemm = gemm_epilogue(epilogue, bias);
        Self::with(op, problem, gemm, epilogue.out_dtype, [a, b], bias, None)
    }

    fn with(
        op: &'static str,
        problem: &MatmulProblem,
        epilogue: gemm::Epilogue,
        out_dtype: DType,
        [a, b]: [&'a CudaStorage; 2],
        bias: Option<View<'a, CudaStorage>>,
        scales: Option<CodeScales<'a>>,
    ) -> Result<Self> {
        let (scale, scales) = CodeScales::fit_if_any(op, scales)?;
        let epilogue = gemm::Epilogue { scale, ..epilogue };
        let operands = [
            (operand(op, a, &problem.lhs)?, factor(a.dtype())),
            (operand(op, b, &problem.rhs.t())?, factor(b.dtype())),
        ];
        let operands = operands.map(|((fitted, lines), factor)| ((fitted.into(), lines), factor));
        let out = (out_dtype, problem.out.elem_count());
        Self::of(op, a.device(), operands, epilogue, scales, bias, out)
    }

    /// Of operands that fit, with their types, and the result's dtype and length.
    pub fn of(
        op: &'static str,
        device: &CudaDevice,
        [(a, lhs), (b, rhs)]: [((Source<'a>, Lines), Factor); 2],
        epilogue: gemm::Epilogue,
        scales: CallScales<'a>,
        bias: Option<View<'a, CudaStorage>>,
        (out_dtype, out_len): (DType, usize),
    ) -> Result<Self> {
        let elements = [lhs, rhs];
        let ([a, b], [lhs, rhs]) = ([a.0, b.0], [a.1, b.1]);
        let device = device.clone();
        let gpu = Gpu::of(op, &device)?;
        let inputs = [a.storage(), b.storage(), bias.map(|(storage, _)| storage)];
        let inputs = inputs.into_iter().flatten().chain(scales.inputs());
        let order = Order::new(op, device.cuda_stream(), inputs);
        let bias = bias.map(|bias| row(op, bias)).transpose()?;
        let batch = Batch::new(a.stack(), b.stack());
        let facts = Problem {
            m: lhs.outer as u64,
            n: rhs.outer as u64,
            k: lhs.depth as u64,
            batch: batch.count() as u64,
            elements,
            lhs: lhs.major,
            rhs: rhs.major,
            epilogue,
        };
        countable(op, ["Engine::Native", "take"], facts.limit(), SPLIT)?;
        Ok(Self {
            op,
            device,
            order,
            gpu,
            facts,
            batch,
            lines: [lhs, rhs],
            operands: [a, b],
            scales,
            bias,
            out_dtype,
            out_len,
        })
    }

    /// By the kernels that are chosen for it.
    pub fn run_chosen(&self) -> Result<CudaStorage> {
        self.run(&*PLANS.get(self.op, &self.gpu, &self.facts)?)
    }

    pub fn run(&self, compiled: &Compiled<Plan>) -> Result<CudaStorage> {
        let mut out = uninit(&self.device, &Shape::from(self.out_len), self.out_dtype)?;
        self.run_to(compiled, (&mut out, 0), Launches::default())?;
        Ok(out)
    }

    /// By the kernels that are chosen for it, after `before`, to the beginning of a storage.
    pub fn run_chosen_after(&self, before: Launches, out: &mut CudaStorage) -> Result<()> {
        self.run_to(&*PLANS.get(self.op, &self.gpu, &self.facts)?, (out, 0), before)
    }

    /// To where the result begins in a storage of its dtype, after other launches.
    fn run_to(
        &self,
        compiled: &Compiled<Plan>,
        (out, first): (&mut CudaStorage, usize),
        mut launches: Launches,
    ) -> Result<()> {
        let (device, problem) = (&self.device, &self.facts);
        let partial = compiled.plan.partial_sums(problem);
        let partial = partial.map(|sums| uninit(device, &Shape::from(sums as usize), DType::F32));
        let mut partial = partial.transpose()?;
        let inputs = self.operands.each_ref().map(|source| source.on(device));
        let bias = self.bias.as_ref();
        let bias = bias.map(|row| (Memory::of(row.storage(), device), row.offset(0)));
        let result = Memory::of_mut(out, device);
        let partial = partial.as_mut().map(|sums| Memory::of_mut(sums, device));
        let products = problem.m * problem.n * problem.batch;
        let launch = |scales: gemm::Scales| {
            for (i, skipped) in (0..).zip(self.batch.launches()) {
                let operand = |side: usize| gemm::Operand {
                    address: inputs[side].after(skipped[side]),
                    line: self.lines[side].stride as u64,
                    batch: self.batch.side(side).map(|(len, each)| (len as u64, each as u64)),
                };
                let arguments = gemm::Arguments {
                    problem,
                    plan: &compiled.plan,
                    operands: [operand(0), operand(1)],
                    scales,
                    bias: bias.as_ref().map(|(memory, first)| memory.at(*first)),
                    out: result.at(first + (i * products) as usize),
                    partial: partial.as_ref().map(Memory::address),
                };
                compiled.add_to(&mut launches, self.op, &arguments)?;
            }
            Ok(launches.submit(self.op, device)?)
        };
        self.order.run(|| self.scales.on(device, launch))
    }
}
