//! Weights of four bits: their packed form; products of 16-bit activations with codes of four and of eight bits.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, elements, uninit};
use super::super::driver::order::Order;
use super::super::fit::{Fitted, Want, fit};
use super::bytes::CodeScales;
use super::limit::{SPLIT, countable};
use super::matmul::CallScales;
use super::operand::{element, row};
use super::plan::{Compiled, Plans};
use crate::kernel::gemm::Scale;
use crate::kernel::w4::{self, BLOCK_BYTES, Plan, Problem, Scheme, layout};
pub(super) use crate::kernel::w4::{Codes, INTERLEAVED};
use crate::kernel::{Element, gemm};
use crate::op::{Epilogue, View};
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();
static LAYOUTS: Plans<layout::Plan> = Plans::new();

/// Bytes at whose multiples rows begin.
const LINE: usize = 16;

/// A packed weight `[k, n]`.
#[derive(Clone)]
pub(crate) struct Weight<'a> {
    pub scheme: Scheme,
    pub k: usize,
    pub n: usize,
    /// From the first element of the storage on, unless they are bytes.
    pub codes: &'a CudaStorage,
    pub lines: CodeLines,
    pub scales: Groups<'a>,
    pub zeros: Option<Groups<'a>>,
}

/// Where codes of eight bits are, each column's along K: the first one, and from column to column, in bytes. Nothing of
/// others.
#[derive(Clone, Copy, Default)]
pub(crate) struct CodeLines {
    pub first: usize,
    pub line: usize,
}

/// A row of scales or zero points for each group.
pub(crate) type Groups<'a> = (&'a CudaStorage, Stack);

/// Words of the packed form of a weight `[k, n]`.
pub(crate) fn packed_words(k: usize, n: usize) -> usize {
    (w4::blocks(k as u64, n as u64) * u64::from(BLOCK_BYTES / 4)) as usize
}

/// Packed codes of plain ones, u32 `[⌈k/8⌉, n]` of any strides, or of the same in two's complement. No dimension is 0.
pub(crate) fn pack(
    op: &'static str,
    (storage, stack): Operand,
    [k, n]: [usize; 2],
    scheme: &Scheme,
    signed: bool,
) -> Result<CudaStorage> {
    let config = layout::Config::Pack { codes: scheme.codes, zero: scheme.zero_code(), signed };
    let (first, strides) = (stack.matrix_offset(0), [stack.row_stride, stack.col_stride]);
    convert(op, config, [k, n], storage, &[], (packed_words(k, n), DType::U32), |call| {
        layout::Arguments {
            problem: call.problem,
            plain: Some((call.input.at(first), strides.map(|stride| stride as u64))),
            codes: call.result,
            scales: None,
            zeros: None,
            out: None,
        }
    })
}

/// Plain codes, u32 `[⌈k/8⌉, n]`, of packed ones.
pub(crate) fn unpack(
    op: &'static str,
    storage: &CudaStorage,
    [k, n]: [usize; 2],
    codes: Codes,
) -> Result<CudaStorage> {
    let words = (k.div_ceil(8) * n, DType::U32);
    let config = layout::Config::Unpack { codes };
    convert(op, config, [k, n], storage, &[], words, |call| layout::Arguments {
        problem: call.problem,
        plain: Some((call.result, [n as u64, 1])),
        codes: call.input.address(),
        scales: None,
        zeros: None,
        out: None,
    })
}

/// The elements of a weight, `[k, n]`, or `[n, k]` where they are transposed.
pub(crate) fn dequantize(
    op: &'static str,
    weight: &Weight,
    dtype: DType,
    transposed: bool,
) -> Result<CudaStorage> {
    let &Weight { scheme, k, n, codes, ref scales, ref zeros, .. } = weight;
    let config = layout::Config::Elements { scheme, out: element(dtype), transposed };
    let others: Vec<_> = [Some(scales), zeros.as_ref()].into_iter().flatten().collect();
    convert(op, config, [k, n], codes, &others, (k * n, dtype), |call| layout::Arguments {
        problem: call.problem,
        plain: None,
        codes: call.input.address(),
        scales: call.others.first().copied(),
        zeros: call.others.get(1).copied(),
        out: Some((call.result, if transposed { k } else { n } as u64)),
    })
}

/// One launch of a kernel of layouts: what memory it is given.
struct Conversion<'a> {
    problem: layout::Problem,
    input: &'a Memory<'a>,
    /// Addresses, and elements from row to row.
    others: &'a [(u64, u64)],
    result: u64,
}

fn convert(
    op: &'static str,
    config: layout::Config,
    [k, n]: [usize; 2],
    input: &CudaStorage,
    others: &[&Groups],
    (len, dtype): (usize, DType),
    arguments: impl Fn(&Conversion) -> layout::Arguments,
) -> Result<CudaStorage> {
    let device = input.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let inputs = others.iter().map(|&&(storage, _)| storage);
    let order = Order::new(op, device.cuda_stream(), [input].into_iter().chain(inputs));
    let problem = layout::Problem { k: k as u64, n: n as u64, config };
    countable(op, ["this crate", "take"], problem.limit(), SPLIT)?;
    let compiled = LAYOUTS.get(op, &gpu, &problem)?;
    let others = others
        .iter()
        .map(|(storage, stack)| lines(op, (storage, stack)))
        .collect::<Result<Vec<_>>>()?;
    let mut result = uninit(&device, &Shape::from(len), dtype)?;
    {
        let memories: Vec<_> = others.iter().map(|o| Memory::of(o.storage(), &device)).collect();
        let others: Vec<_> = memories.iter().zip(&others).map(|(m, o)| placed(m, o)).collect();
        let (input, to) = (Memory::of(input, &device), Memory::of_mut(&mut result, &device));
        let call = Conversion { problem, input: &input, others: &others, result: to.address() };
        order.run(|| Ok(compiled.launch(op, &device, &arguments(&call))?))?;
    }
    Ok(result)
}

/// All rows of an operand as those of one matrix, which begin at multiples of 16 bytes. Copies are of so many: those of the last
/// row end in its memory as well.
pub(super) fn lines<'a>(
    op: &'static str,
    (storage, stack): (&'a CudaStorage, &Stack),
) -> Result<Fitted<'a>> {
    let unit = LINE / storage.dtype().size_in_bytes();
    let fits = |folded: &Stack| {
        let first = folded.matrix_offset(0);
        let last = first + folded.rows.saturating_sub(1) * folded.row_stride;
        (folded.cols <= 1 || folded.col_stride == 1)
            && first.is_multiple_of(unit)
            && (folded.rows <= 1 || folded.row_stride.is_multiple_of(unit))
            && last + folded.cols.next_multiple_of(unit) <= elements(storage)
    };
    match stack.fold_rows().filter(fits) {
        Some(folded) => Ok(Fitted::view(storage, folded)),
        None => {
            let cols = stack.cols.next_multiple_of(unit);
            fit(op, (storage, stack), Want { cols, align: LINE, folded: true, ..Want::default() })
        }
    }
}

/// The same of scales and zero points, of which those of whole columns are loaded one by one.
fn lines_of_groups<'a>(
    op: &'static str,
    scheme: &Scheme,
    (storage, stack): &Groups<'a>,
) -> Result<Fitted<'a>> {
    // Those of bytes are loaded one by one as well.
    let single = scheme.group.is_none() || scheme.codes.are_bytes();
    if single && (stack.cols <= 1 || stack.col_stride == 1) {
        return Ok(Fitted::view(storage, stack.clone()));
    }
    lines(op, (storage, stack))
}

/// Address and elements from row to row.
fn placed(memory: &Memory, fitted: &Fitted) -> (u64, u64) {
    let stack = &fitted.stack;
    // That of a single row is nothing.
    let line = if stack.rows <= 1 { 0 } else { stack.row_stride };
    (memory.at(fitted.offset(0)), line as u64)
}

/// `act(x·W + bias)`, packed, for the rows of `x`, with sums that may be multiplied with scales of lines first. Neither the result nor the depth is empty.
pub(crate) fn matmul(
    op: &'static str,
    x: Operand,
    weight: &Weight,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
    scales: Option<CodeScales>,
) -> Result<CudaStorage> {
    let weights = std::slice::from_ref(weight);
    let products =
        Call::new(op, x, weights, Results::Each, epilogue, bias, scales)?.run_chosen()?;
    Ok(products.into_iter().next().expect("one for the weight"))
}

/// What becomes of the products with several weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Results {
    /// Each is a result.
    Each,
    /// The first one, activated, times the second.
    Gated,
}

/// The products with weights of one scheme, if one kernel makes all of them.
pub(crate) fn matmul_all(
    op: &'static str,
    x: Operand,
    weights: &[Weight],
    results: Results,
    epilogue: Epilogue,
) -> Result<Option<Vec<CudaStorage>>> {
    let gpu = Gpu::of(op, x.0.device())?;
    if weights.len() > w4::MOST_WEIGHTS
        || !w4::together(&facts(x, weights, results, epilogue, None, Scale::None), &gpu.device)
    {
        return Ok(None);
    }
    Call::new(op, x, weights, results, epilogue, None, None)?.run_chosen().map(Some)
}

/// The facts of a product with weights of as many rows and one scheme.
fn facts(
    (x, rows): Operand,
    weights: &[Weight],
    results: Results,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
    scale: Scale,
) -> Problem {
    let Element::Half(half) = element(x.dtype()) else {
        unreachable!("activations are f16 or bf16")
    };
    let columns = |i: usize| weights.get(i).map_or(0, |weight| weight.n as u64);
    let Weight { scheme, k, .. } = weights[0];
    Problem {
        m: (rows.count() * rows.rows) as u64,
        n: columns(0),
        others: [columns(1), columns(2)],
        gated: results == Results::Gated,
        k: k as u64,
        half,
        scheme,
        epilogue: gemm::Epilogue {
            out: element(epilogue.out_dtype),
            scale,
            bias: bias.map(|(storage, _)| element(storage.dtype())),
            activation: epilogue.activation,
            adds: false,
        },
    }
}

/// What a weight brings to a product.
struct Part<'a> {
    n: usize,
    codes: &'a CudaStorage,
    code_lines: CodeLines,
    scales: Fitted<'a>,
    zeros: Option<Fitted<'a>>,
}

/// One product: operands that fit, and the facts.
pub(super) struct Call<'a> {
    op: &'static str,
    device: CudaDevice,
    order: Order,
    pub gpu: Arc<Gpu>,
    pub facts: Problem,
    x: Fitted<'a>,
    weights: Vec<Part<'a>>,
    scales: CallScales<'a>,
    bias: Option<Fitted<'a>>,
    out_dtype: DType,
}

impl<'a> Call<'a> {
    /// Of weights of as many rows and one scheme; with several there is no bias.
    pub fn new(
        op: &'static str,
        (x, rows): Operand<'a>,
        weights: &[Weight<'a>],
        results: Results,
        epilogue: Epilogue,
        bias: Option<View<'a, CudaStorage>>,
        scales: Option<CodeScales<'a>>,
    ) -> Result<Self> {
        let device = x.device().clone();
        let gpu = Gpu::of(op, &device)?;
        let scheme = weights[0].scheme;
        let (scale, scales) = CodeScales::fit_if_any(op, scales)?;
        let facts = facts((x, rows), weights, results, epilogue, bias, scale);
        let operands = weights.iter().flat_map(|weight| {
            let zeros = weight.zeros.as_ref().map(|(storage, _)| *storage);
            [Some(weight.codes), Some(weight.scales.0), zeros]
        });
        let others = [Some(x), bias.map(|(storage, _)| storage)];
        let inputs = others.into_iter().chain(operands).flatten().chain(scales.inputs());
        let order = Order::new(op, device.cuda_stream(), inputs);
        let x = lines(op, (x, rows))?;
        let of_groups = |groups: &Groups<'a>| lines_of_groups(op, &scheme, groups);
        let part = |weight: &Weight<'a>| -> Result<Part<'a>> {
            let zeros = weight.zeros.as_ref().map(of_groups).transpose()?;
            let &Weight { n, codes, lines: code_lines, .. } = weight;
            Ok(Part { n, codes, code_lines, scales: of_groups(&weight.scales)?, zeros })
        };
        let parts = weights.iter().map(part).collect::<Result<Vec<_>>>()?;
        let bias = bias.map(|bias| row(op, bias)).transpose()?;
        countable(op, ["this crate", "take"], facts.limit(), SPLIT)?;
        let out_dtype = epilogue.out_dtype;
        Ok(Self { op, device, order, gpu, facts, x, weights: parts, scales, bias, out_dtype })
    }

    /// By what the chooser says.
    pub fn run_chosen(&self) -> Result<Vec<CudaStorage>> {
        self.run(&*PLANS.get(self.op, &self.gpu, &self.facts)?)
    }

    /// A product for each weight, or the only result.
    pub fn run(&self, compiled: &Compiled<Plan>) -> Result<Vec<CudaStorage>> {
        let (device, problem) = (&self.device, &self.facts);
        let alloc = |len: u64, dtype| uninit(device, &Shape::from(len as usize), dtype);
        let results = if problem.gated { 1 } else { self.weights.len() };
        let results = self.weights[..results].iter();
        let products = results.map(|w| alloc(problem.m * w.n as u64, self.out_dtype));
        let mut products = products.collect::<Result<Vec<_>>>()?;
        let partial = compiled.plan.partial_sums(problem);
        let mut partial = partial.map(|sums| alloc(sums, DType::F32)).transpose()?;
        let panel = compiled.plan.panel_elements(problem);
        let mut panel = panel.map(|len| alloc(len, self.x.storage().dtype())).transpose()?;
        {
            // What is held until the launch is submitted.
            let x = Memory::of(self.x.storage(), device);
            let bias = self.bias.as_ref().map(|bias| (Memory::of(bias.storage(), device), bias));
            let results: Vec<_> =
                products.iter_mut().map(|out| Memory::of_mut(out, device)).collect();
            let held = self.weights.iter().map(|part| {
                let zeros = part.zeros.as_ref();
                (
                    (Memory::of(part.codes, device), part.code_lines),
                    (Memory::of(part.scales.storage(), device), &part.scales),
                    zeros.map(|zeros| (Memory::of(zeros.storage(), device), zeros)),
                )
            });
            let held: Vec<_> = held.collect();
            let last = results.len() - 1;
            let weights = held.iter().enumerate().map(|(i, (codes, (scales, lines), zeros))| {
                let out = results[i.min(last)].address();
                w4::Weight {
                    codes: codes.0.at(codes.1.first),
                    codes_line: codes.1.line as u64,
                    scales: placed(scales, lines),
                    scale_each: lines.stack.cols > 1,
                    zeros: zeros.as_ref().map(|(zeros, lines)| placed(zeros, lines)),
                    out,
                }
            });
            let weights: Vec<_> = weights.collect();
            let [partial, panel] = [&mut partial, &mut panel]
                .map(|scratch| scratch.as_mut().map(|storage| Memory::of_mut(storage, device)));
            let launch = |sum_scales| {
                let arguments = w4::Arguments {
                    problem,
                    plan: &compiled.plan,
                    x: placed(&x, &self.x),
                    weights: &weights,
                    sum_scales,
                    bias: bias.as_ref().map(|(memory, bias)| placed(memory, bias).0),
                    partial: partial.as_ref().map(Memory::address),
                    panel: panel.as_ref().map(Memory::address),
                };
                Ok(compiled.launch(self.op, device, &arguments)?)
            };
            self.order.run(|| self.scales.on(device, launch))?;
        }
        Ok(products)
    }
}
