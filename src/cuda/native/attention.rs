//! Attention.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{self, Fitted, Want, fit};
use super::operand::element;
use super::plan::{Compiled, Plans};
use crate::kernel::attention::{
    Arguments, Bias, Extra, Inputs, Lengths, Limit, Operand, Output, Plan, Problem, ScoreMod,
    VALUE_UNIT, by_tma,
};
use crate::op::{AttentionInputs, AttentionProblem, AttentionResults, AttentionWants};
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// What of a problem the kernels cannot take, and what to do instead.
pub(crate) fn limit(p: &AttentionProblem) -> Option<(String, &'static str)> {
    let width = p.head_dim().max(p.value_dim());
    let length = p.seq_q().max(p.seq_k());
    let limit = Limit::of(p.q.count() as u64, width as u64, length as u64)?;
    let fix = match limit {
        Limit::HeadDim(_) => "run it on the CPU, or use narrower heads",
        Limit::Length(_) => "divide the keys, and join the results by their log-sum-exp",
        Limit::Tiles { .. } => "split the batch and join the results with `Tensor::cat`",
    };
    Some((limit.to_string(), fix))
}

/// The result, and what is wanted besides. Neither the result nor the keys are empty, and nothing is over a
/// [`limit`].
pub(crate) fn flash_attn(
    op: &'static str,
    p: &AttentionProblem,
    wants: AttentionWants,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<AttentionResults<CudaStorage>> {
    if let Some((problem, [])) = in_two_dims(p, []) {
        let call = Call::new(op, &problem, wants, inputs)?;
        return call.run(&problem, &*PLANS.get(op, &call.gpu, &call.facts)?);
    }
    let packed = Packed::new(op, p, inputs)?;
    flash_attn(op, &packed.problem, wants, &packed.inputs())
}

/// The problem, and other stacks of it, over two batch dimensions: as they are, or, where heads share no keys
/// and nothing else has batch dimensions, such that walk the same matrices, if there are any.
pub(super) fn in_two_dims<const N: usize>(
    p: &AttentionProblem,
    others: [&Stack; N],
) -> Option<(AttentionProblem, [Stack; N])> {
    if p.q.batch().len() == 2 {
        return Some((p.clone(), others.map(Stack::clone)));
    }
    let in_two = |inner: usize| {
        let [q, k, v, out] = [&p.q, &p.k, &p.v, &p.out].map(|stack| stack.in_two_dims(inner));
        let problem = AttentionProblem { q: q?, k: k?, v: v?, out: out?, ..p.clone() };
        let others = others.map(|stack| stack.in_two_dims(inner));
        let others: Option<Vec<_>> = others.into_iter().collect();
        Some((problem, others?.try_into().expect("as many as there were")))
    };
    (0..=p.q.batch().len()).find_map(in_two)
}

/// Copies of operands whose batch dimensions no two strides walk.
pub(super) struct Packed {
    pub problem: AttentionProblem,
    operands: [CudaStorage; 3],
}

impl Packed {
    pub fn new(
        op: &'static str,
        p: &AttentionProblem,
        inputs: &AttentionInputs<CudaStorage>,
    ) -> Result<Self> {
        let AttentionInputs { q, k, v, .. } = *inputs;
        let operands = [pack(op, q, &p.q)?, pack(op, k, &p.k)?, pack(op, v, &p.v)?];
        let [q, k, v] = [&p.q, &p.k, &p.v].map(Stack::packed);
        Ok(Self { problem: AttentionProblem { q, k, v, ..p.clone() }, operands })
    }

    /// The copies.
    pub fn inputs(&self) -> AttentionInputs<'_, CudaStorage> {
        let [q, k, v] = &self.operands;
        AttentionInputs { q, k, v, extras: Default::default() }
    }
}

/// A copy of all matrices, each as often as it is repeated.
pub(super) fn pack(op: &'static str, storage: &CudaStorage, stack: &Stack) -> Result<CudaStorage> {
    fit::copyable(op, stack.elements())?;
    fit::pack(storage, &stack.layout())
}

/// One call: operands that fit, and the facts.
pub(super) struct Call<'a> {
    pub op: &'static str,
    pub device: &'a CudaDevice,
    pub order: Order,
    pub gpu: Arc<Gpu>,
    pub facts: Problem,
    /// Queries, keys and values.
    operands: [Fitted<'a>; 3],
    bias: Option<(&'a CudaStorage, &'a Stack)>,
    slopes: Option<(&'a CudaStorage, &'a Stack)>,
    lengths: Option<[Fitted<'a>; 2]>,
    scale: f32,
    softcap: Option<f32>,
}

impl<'a> Call<'a> {
    pub fn new(
        op: &'static str,
        p: &'a AttentionProblem,
        wants: AttentionWants,
        inputs: &AttentionInputs<'a, CudaStorage>,
    ) -> Result<Self> {
        let gpu = Gpu::of(op, inputs.q.device())?;
        // TMA writes zeros for what a row has not; the other kernel reads values by eight.
        let whole = !by_tma(&gpu.device, element(inputs.q.dtype()));
        let unit = if whole { VALUE_UNIT as usize } else { 1 };
        let call = Self::with_values(op, p, gpu, unit, inputs, &[])?;
        let value_dim = call.facts.value_dim.next_multiple_of(VALUE_UNIT);
        let AttentionWants { lse, stats } = wants;
        Ok(Self { facts: Problem { value_dim, lse, stats, ..call.facts }, ..call })
    }

    /// With values whose columns are a multiple of `unit`. `others` are read, too.
    pub fn with_values(
        op: &'static str,
        p: &'a AttentionProblem,
        gpu: Arc<Gpu>,
        unit: usize,
        inputs: &AttentionInputs<'a, CudaStorage>,
        others: &[&CudaStorage],
    ) -> Result<Self> {
        let &AttentionInputs { q, k, v, ref extras } = inputs;
        let device = q.device();
        let all = [q, k, v].into_iter().chain(extras.list().into_iter().copied());
        let order = Order::new(op, device.cuda_stream(), all.chain(others.iter().copied()));
        let operands = [heads(op, q, &p.q, 1)?, heads(op, k, &p.k, 1)?, heads(op, v, &p.v, unit)?];
        let bias = extras.bias.zip(p.extras.bias.as_ref());
        let slopes = extras.slopes.zip(p.extras.slopes.as_ref());
        let (lengths, kind) = Self::lengths(op, p, inputs)?;
        let [batch, heads] = [0, 1].map(|i| p.q.batch()[i].0 as u64);
        let facts = Problem {
            batch: p.packed.map_or(batch, |sequences| sequences as u64),
            heads,
            kv_heads: heads / p.group as u64,
            queries: p.seq_q() as u64,
            keys: p.seq_k() as u64,
            head_dim: p.head_dim() as u64,
            value_dim: p.value_dim() as u64,
            element: element(q.dtype()),
            out: element(p.out_dtype),
            left: p.mask.left.map(|keys| keys as u64),
            right: p.mask.right.map(|keys| keys as u64),
            score_mod: ScoreMod {
                scale_first: p.scale <= 0.0,
                softcap: p.softcap.is_some(),
                bias: bias.map(|(storage, stack)| Bias {
                    element: element(storage.dtype()),
                    pairs: stack.cols.is_multiple_of(2)
                        && stack.col_stride == 1
                        && stack.row_stride.is_multiple_of(2)
                        && stack.origins().all(|elements| elements.is_multiple_of(2)),
                }),
                alibi: slopes.is_some(),
            },
            lengths: kind,
            lse: false,
            stats: false,
        };
        let AttentionProblem { scale, softcap, .. } = *p;
        Ok(Self { op, device, order, gpu, facts, operands, bias, slopes, lengths, scale, softcap })
    }

    /// Both sides' lengths, if either has any: those of a side without are all of it.
    fn lengths(
        op: &'static str,
        p: &AttentionProblem,
        inputs: &AttentionInputs<'a, CudaStorage>,
    ) -> Result<(Option<[Fitted<'a>; 2]>, Lengths)> {
        let given = [0, 1].map(|i| inputs.extras.lengths[i].zip(p.extras.lengths[i].as_ref()));
        let kind = match p.packed {
            Some(_) => Lengths::Packed,
            None if given.iter().any(Option::is_some) => Lengths::Padded,
            None => return Ok((None, Lengths::Full)),
        };
        let side = |i: usize| match given[i] {
            Some((storage, stack)) => fit(op, (storage, stack), Want::default()),
            None => {
                let len = p.q.batch()[0].0;
                let all = [p.seq_q(), p.seq_k()][i] as u32;
                let mut same = uninit(inputs.q.device(), &Shape::from(len), DType::U32)?;
                same.const_set(Scalar::U32(all), &Layout::contiguous(len))?;
                Ok(Fitted::copy(same, Stack::row_major(1, len)))
            }
        };
        Ok((Some([side(0)?, side(1)?]), kind))
    }

    pub fn run(
        &self,
        p: &AttentionProblem,
        compiled: &Compiled<Plan>,
    ) -> Result<AttentionResults<CudaStorage>> {
        let (device, facts) = (self.device, &self.facts);
        let (rows, width) = (p.q.count() * p.seq_q(), facts.value_dim as usize);
        let alloc = |len: usize, dtype| uninit(device, &Shape::from(len), dtype);
        let mut out = alloc(rows * width, p.out_dtype)?;
        let mut lse = facts.lse.then(|| alloc(rows, DType::F32)).transpose()?;
        let mut stats = match facts.stats {
            true => Some([alloc(rows, DType::F32)?, alloc(rows, DType::F32)?]),
            false => None,
        };
        if facts.lengths == Lengths::Packed {
            // Rows of no sequence are nobody's to write, nor read by a backward pass.
            out.const_set(Scalar::zero(p.out_dtype), &Layout::contiguous(rows * width))?;
            if let Some(lse) = &mut lse {
                lse.const_set(Scalar::F32(f32::NEG_INFINITY), &Layout::contiguous(rows))?;
            }
        }
        // Results of the parts of a split, and their sums.
        let mut parts = match compiled.plan.combine {
            None => None,
            Some(_) => {
                let lines = compiled.plan.launch.parts as usize * rows;
                Some([alloc(lines * width, DType::F32)?, alloc(lines, DType::F32)?])
            }
        };
        let strides = [p.out.row_stride, p.out.batch()[1].1, p.out.batch()[0].1]
            .map(|stride| (stride / p.value_dim() * width) as u64);
        self.order.run(|| {
            let memory = Memory::of_mut(&mut out, device);
            let sums = lse.as_mut().map(|lse| Memory::of_mut(lse, device));
            let stats = stats.as_mut();
            let stats =
                stats.map(|stats| stats.each_mut().map(|each| Memory::of_mut(each, device)));
            let held = parts.as_mut();
            let held = held.map(|held| held.each_mut().map(|part| Memory::of_mut(part, device)));
            let parts = held.as_ref().map(|[out, lse]| {
                let rows = [1, facts.queries, facts.heads * facts.queries];
                output(out, Some(lse), rows.map(|rows| rows * facts.value_dim))
            });
            let stats = stats.as_ref().map(|stats| stats.each_ref().map(Memory::address));
            let out = Output { stats, ..output(&memory, sums.as_ref(), strides) };
            self.submit(compiled, out, parts)
        })?;
        if width != p.value_dim() {
            let mut cut = alloc(rows * p.value_dim(), p.out_dtype)?;
            out.copy2d(&mut cut, rows, p.value_dim(), width, p.value_dim(), 0, 0)?;
            out = cut;
        }
        Ok(AttentionResults { out, lse, stats })
    }

    fn submit(&self, compiled: &Compiled<Plan>, out: Output, parts: Option<Output>) -> Result<()> {
        let (problem, plan) = (&self.facts, &compiled.plan);
        self.with_inputs(|inputs| {
            let arguments = Arguments { problem, plan, inputs, out, parts };
            Ok(compiled.launch(self.op, self.device, &arguments)?)
        })
    }

    /// Runs `submit`, until whose return all inputs live.
    pub fn with_inputs(&self, submit: impl FnOnce(Inputs) -> Result<()>) -> Result<()> {
        let device = self.device;
        let operands = self.operands.each_ref().map(|fitted| memory(fitted, device));
        let lengths = self.lengths.as_ref();
        let lengths =
            lengths.map(|sides| sides.each_ref().map(|side| (memory(side, device), side)));
        let [bias, slopes] = [self.bias, self.slopes]
            .map(|extra| extra.map(|(storage, stack)| (Memory::of(storage, device), stack)));
        submit(Inputs {
            operands: [0, 1, 2].map(|i| operand(&operands[i], &self.operands[i])),
            scale: self.scale,
            softcap: self.softcap,
            bias: bias.as_ref().map(|(memory, s)| {
                extra(memory, s, [s.batch()[0].1, s.batch()[1].1, s.row_stride, s.col_stride])
            }),
            slopes: slopes
                .as_ref()
                .map(|(memory, s)| extra(memory, s, [s.batch()[0].1, s.batch()[1].1])),
            lengths: lengths
                .as_ref()
                .map(|sides| sides.each_ref().map(|(memory, side)| memory.at(side.offset(0)))),
        })
    }
}

/// That of an operand, to be read.
pub(super) fn memory<'m>(fitted: &'m Fitted, device: &CudaDevice) -> Memory<'m> {
    Memory::of(fitted.storage(), device)
}

/// Where results go.
fn output(memory: &Memory, lse: Option<&Memory>, strides: [u64; 3]) -> Output {
    Output { address: memory.address(), strides, lse: lse.map(Memory::address), stats: None }
}

/// Where what is added to scores begins, and its strides.
fn extra<const N: usize>(memory: &Memory, stack: &Stack, strides: [usize; N]) -> Extra<N> {
    (memory.at(stack.matrix_offset(0)), strides.map(|stride| stride as u64))
}

/// How a kernel reads an operand.
pub(super) fn operand(memory: &Memory, fitted: &Fitted) -> Operand {
    let stack = &fitted.stack;
    let [(batch, each_batch), (heads, each_head)] = [0, 1].map(|i| stack.batch()[i]);
    Operand {
        address: memory.at(fitted.offset(0)),
        cols: stack.cols as u64,
        lens: [stack.rows, heads, batch].map(|len| len as u64),
        strides: [stack.row_stride, each_head, each_batch].map(|stride| stride as u64),
    }
}

/// An operand whose rows are contiguous, begin at multiples of 16 bytes and are a multiple of `columns`
/// long: as it is, or a copy padded with zeros.
pub(super) fn heads<'a>(
    op: &'static str,
    storage: &'a CudaStorage,
    stack: &Stack,
    columns: usize,
) -> Result<Fitted<'a>> {
    const ALIGN: usize = 16;
    let unit = ALIGN / storage.dtype().size_in_bytes();
    let contiguous = stack.cols == 1 || stack.col_stride == 1;
    let rows = if stack.rows > 1 { stack.row_stride } else { 0 };
    let aligned = stack.origins().chain([rows]).all(|elements| elements.is_multiple_of(unit));
    if contiguous && aligned && stack.cols.is_multiple_of(columns) {
        return Ok(Fitted::view(storage, stack.clone()));
    }
    let cols = stack.cols.next_multiple_of(unit.max(columns));
    let mut copy = fit(op, (storage, stack), Want { cols, align: ALIGN, ..Want::default() })?;
    copy.stack = copy.stack.narrow(stack.rows, stack.cols);
    Ok(copy)
}
