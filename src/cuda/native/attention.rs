//! Attention of f16 and bf16 operands on Hopper.
#![allow(unsafe_code)]

use std::f32::consts::LOG2_E;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};

use super::super::fit::{self, Fitted, Want, fit};
use super::super::gpu::Gpu;
use super::super::launch::{Args, Function, Memory, TensorMap};
use super::super::order::Order;
use super::operand::{UNIT, element, half};
use crate::kernel::attention::sm90::{Config, Launch, MAX_LENGTH, Store};
use crate::kernel::attention::{Bias, Lengths, Mask, Problem, Scores, choose, combine};
use crate::kernel::hopper::SLAB;
use crate::kernel::{self, Element};
use crate::op::{AttentionInputs, AttentionProblem};
use crate::ptx::Target;
use crate::stack::Stack;

/// The widest heads.
const MAX_HEAD_DIM: usize = 256;

/// What of a problem the kernels cannot take, and what to do instead.
pub(crate) fn limit(
    op: &'static str,
    p: &AttentionProblem,
    q: &CudaStorage,
) -> Result<Option<(String, &'static str)>> {
    let gpu = Gpu::of(op, q.device())?;
    let width = p.head_dim().max(p.value_dim());
    let length = p.seq_q().max(p.seq_k());
    let limits = [
        (
            gpu.device.target != Target::Sm90a,
            "attention on a GPU that is not of compute capability 9.0".into(),
            "use Engine::Auto",
        ),
        (
            q.dtype() == DType::F32,
            "f32 operands".into(),
            "use f16 or bf16 operands, or Engine::Auto",
        ),
        (
            width > MAX_HEAD_DIM,
            format!("a head dimension of {width} (at most {MAX_HEAD_DIM})"),
            "run it on the CPU, or use narrower heads",
        ),
        (
            length as u64 >= MAX_LENGTH,
            format!("{length} positions (less than {MAX_LENGTH})"),
            "divide the keys, and join the results by their log-sum-exp",
        ),
        (
            p.q.count() as u64 * (length as u64).div_ceil(64) > u64::from(u32::MAX / 256),
            format!("{} heads of {length} positions", p.q.count()),
            "split the batch and join the results with `Tensor::cat`",
        ),
    ];
    let found = limits.into_iter().find(|(holds, ..)| *holds);
    Ok(found.map(|(_, what, fix)| (what, fix)))
}

/// The kernels for a problem, and the numbers of their launch.
pub(crate) struct Plan {
    config: Config,
    launch: Launch,
    function: Arc<Function>,
    /// Puts the parts together.
    combine: Option<Arc<Function>>,
}

impl Plan {
    fn chosen(op: &'static str, gpu: &Gpu, problem: &Problem) -> Result<Self> {
        Self::new(op, gpu, problem, choose::choose(problem, &gpu.device))
    }

    /// Of a configuration for the problem.
    pub(super) fn new(
        op: &'static str,
        gpu: &Gpu,
        problem: &Problem,
        config: Config,
    ) -> Result<Self> {
        let launch = Launch::new(&config, problem, gpu.device.multiprocessors);
        let function = gpu.native(op, &kernel::Config::FlashSm90(config))?;
        let combine = config.split.then(|| {
            let value_dim = config.value_dim;
            let config = combine::Config::new(problem.out, value_dim, launch.parts, problem.lse);
            gpu.native(op, &kernel::Config::FlashCombine(config))
        });
        Ok(Self { config, launch, function, combine: combine.transpose()? })
    }
}

/// The result, which lies as the problem says, and if wanted the log-sum-exp. Neither the result nor the
/// keys are empty, and nothing is over a [`limit`].
pub(crate) fn flash_attn(
    op: &'static str,
    p: &AttentionProblem,
    wants_lse: bool,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<(CudaStorage, Option<CudaStorage>)> {
    let call = Call::new(op, p, wants_lse, inputs)?;
    let plan = call.gpu.attention(&call.facts, || Plan::chosen(op, &call.gpu, &call.facts))?;
    call.run(p, &plan)
}

/// The same over any batch dimensions, all of them in q, k and v.
pub(crate) fn attention_tc(
    op: &'static str,
    p: &AttentionProblem,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<CudaStorage> {
    let stacks = [&p.q, &p.k, &p.v, &p.out];
    let in_two = |inner: usize| {
        let [q, k, v, out] = stacks.map(|stack| stack.in_two_dims(inner));
        Some(AttentionProblem { q: q?, k: k?, v: v?, out: out?, ..p.clone() })
    };
    if let Some(problem) = (0..=p.q.batch().len()).find_map(in_two) {
        return Ok(flash_attn(op, &problem, false, inputs)?.0);
    }
    // Batch dimensions that no two strides walk: copies.
    let AttentionInputs { q, k, v, .. } = *inputs;
    let pack = |storage: &CudaStorage, stack: &Stack| {
        fit::copyable(op, stack.elements())?;
        fit::pack(storage, &stack.layout())
    };
    let (q, k, v) = (pack(q, &p.q)?, pack(k, &p.k)?, pack(v, &p.v)?);
    let [ps, ks, vs] = [&p.q, &p.k, &p.v].map(Stack::packed);
    let problem = AttentionProblem { q: ps, k: ks, v: vs, ..p.clone() };
    let inputs = AttentionInputs { q: &q, k: &k, v: &v, extras: inputs.extras.clone() };
    attention_tc(op, &problem, &inputs)
}

/// One call: operands that fit, and the facts.
pub(super) struct Call<'a> {
    op: &'static str,
    device: CudaDevice,
    order: Order,
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
        wants_lse: bool,
        inputs: &AttentionInputs<'a, CudaStorage>,
    ) -> Result<Self> {
        let &AttentionInputs { q, k, v, ref extras } = inputs;
        let device = q.device().clone();
        let gpu = Gpu::of(op, &device)?;
        let all = [q, k, v].into_iter().chain(extras.list().into_iter().copied());
        let order = Order::new(op, device.cuda_stream(), all);
        let operands = [heads(op, q, &p.q)?, heads(op, k, &p.k)?, heads(op, v, &p.v)?];
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
            value_dim: p.value_dim().next_multiple_of(UNIT) as u64,
            half: half(q.dtype()),
            out: element(p.out_dtype),
            left: p.mask.left.map(|keys| keys as u64),
            right: p.mask.right.map(|keys| keys as u64),
            scores: Scores {
                shrunk: p.scale <= 0.0,
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
            lse: wants_lse,
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
                let mut same = fit::uninit(inputs.q.device(), &Shape::from(len), DType::U32)?;
                same.const_set(Scalar::U32(all), &Layout::contiguous(len))?;
                Ok(Fitted::copy(same, Stack::row_major(1, len)))
            }
        };
        Ok((Some([side(0)?, side(1)?]), kind))
    }

    pub fn run(
        &self,
        p: &AttentionProblem,
        plan: &Plan,
    ) -> Result<(CudaStorage, Option<CudaStorage>)> {
        let (device, facts, config) = (&self.device, &self.facts, &plan.config);
        let (rows, width) = (p.q.count() * p.seq_q(), facts.value_dim as usize);
        let alloc = |len: usize, dtype| fit::uninit(device, &Shape::from(len), dtype);
        let mut out = alloc(rows * width, p.out_dtype)?;
        let mut lse = facts.lse.then(|| alloc(rows, DType::F32)).transpose()?;
        if facts.lengths == Lengths::Packed {
            // Rows of no sequence are nobody's to write.
            out.const_set(Scalar::zero(p.out_dtype), &Layout::contiguous(rows * width))?;
            if let Some(lse) = &mut lse {
                lse.const_set(Scalar::F32(f32::NEG_INFINITY), &Layout::contiguous(rows))?;
            }
        }
        let parts = if config.split { plan.launch.parts as usize } else { 0 };
        let mut part_out = alloc(parts * rows * width, DType::F32)?;
        let mut part_lse = alloc(parts * rows, DType::F32)?;
        {
            let memory = Memory::of_mut(&mut out, device);
            let sums = lse.as_mut().map(|lse| Memory::of_mut(lse, device));
            let [part_out, part_lse] =
                [&mut part_out, &mut part_lse].map(|part| Memory::of_mut(part, device));
            let whole = Place {
                address: memory.address(),
                strides: [p.out.row_stride, p.out.batch()[1].1, p.out.batch()[0].1]
                    .map(|stride| stride / p.value_dim() * width),
                lse: sums.as_ref().map(Memory::address),
            };
            let [heads, queries] = [facts.heads, facts.queries].map(|n| n as usize);
            self.order.run(|| match &plan.combine {
                None => self.attend(plan, &whole, rows),
                Some(combine) => {
                    let parts = Place {
                        address: part_out.address(),
                        strides: [width, queries * width, heads * queries * width],
                        lse: Some(part_lse.address()),
                    };
                    self.attend(plan, &parts, rows)?;
                    self.combine(plan, combine, &parts, &whole, rows)
                }
            })?;
        }
        if width != p.value_dim() {
            let mut cut = alloc(rows * p.value_dim(), p.out_dtype)?;
            out.copy2d(&mut cut, rows, p.value_dim(), width, p.value_dim(), 0, 0)?;
            out = cut;
        }
        Ok((out, lse))
    }

    /// The parameters of `kernel::attention::sm90::emit`.
    fn attend(&self, plan: &Plan, out: &Place, rows: usize) -> Result<()> {
        let (Plan { config, launch, .. }, facts, device) = (plan, &self.facts, &self.device);
        let inputs = self.operands.each_ref().map(|fitted| Memory::of(fitted.storage(), device));
        let begin = |i: usize| inputs[i].at(self.operands[i].offset(0));
        let [q, k, v] = self.operands.each_ref().map(|fitted| Lines::of(&fitted.stack));
        let (pack, half) = (config.pack, Element::Half(facts.half));
        let rows_of = |lines: &Lines, element, address, cols| match pack {
            1 => lines.map(element, address, [cols, SLAB]),
            _ => lines.packed(element, address, [cols, pack, config.positions()]),
        };
        let mut args = Args::new();
        args.tensor_map(rows_of(&q, half, begin(0), SLAB)?)
            .tensor_map(k.map(half, begin(1), [SLAB, config.keys])?)
            .tensor_map(v.map(half, begin(2), [SLAB, config.keys])?);
        if config.store == Store::Tma {
            let lines = Lines { cols: facts.value_dim as usize, strides: out.strides, ..q };
            args.tensor_map(rows_of(&lines, config.out, out.address, config.slab_cols())?);
        }
        let part = |args: &mut Args, each: usize| {
            if config.split {
                args.value(each as u64);
            }
        };
        if config.store == Store::Direct || config.lengths == Lengths::Packed {
            args.pointer(out.address);
            strides(&mut args, &out.strides);
            part(&mut args, rows * facts.value_dim as usize);
        }
        if let Some(lse) = out.lse {
            args.pointer(lse);
            part(&mut args, rows);
        }
        args.value(facts.queries as i32).value(facts.keys as i32);
        args.value(facts.heads as u32).value((facts.heads / facts.kv_heads) as u32);
        match self.softcap {
            None => _ = args.value(self.scale * LOG2_E),
            Some(cap) => _ = args.value(self.scale / cap).value(cap * LOG2_E),
        }
        let [bias, slopes] = [self.bias, self.slopes]
            .map(|extra| extra.map(|(storage, stack)| (Memory::of(storage, device), stack)));
        if let Some((memory, s)) = &bias {
            args.pointer(memory.at(s.matrix_offset(0)));
            strides(&mut args, &[s.batch()[0].1, s.batch()[1].1, s.row_stride, s.col_stride]);
        }
        if let Some((memory, s)) = &slopes {
            args.pointer(memory.at(s.matrix_offset(0)));
            strides(&mut args, &[s.batch()[0].1, s.batch()[1].1]);
        }
        match config.mask {
            Mask::None => {}
            Mask::Right => _ = args.value(launch.right),
            Mask::Window => _ = args.value(launch.right).value(launch.left),
        }
        let lengths = self.lengths.as_ref().map(|sides| {
            sides.each_ref().map(|side| (Memory::of(side.storage(), device), side.offset(0)))
        });
        for (memory, first) in lengths.iter().flatten() {
            args.pointer(memory.at(*first));
        }
        if config.lengths == Lengths::Packed {
            args.value(facts.batch as u32);
        }
        if config.split {
            args.value(launch.parts);
        }
        let order = &launch.order;
        args.value(order.heads).value(order.columns).value(order.tiles).value(order.section);
        // SAFETY: the descriptors span the operands' views, inside their storages; the result and its
        // sums have this size; bias, slopes and lengths are read within their views; all live until
        // the work is submitted.
        unsafe { plan.function.submit(self.op, device, [launch.blocks, 1, 1], &args)? };
        Ok(())
    }

    /// The parameters of `kernel::attention::combine::emit`.
    fn combine(
        &self,
        plan: &Plan,
        function: &Function,
        parts: &Place,
        out: &Place,
        rows: usize,
    ) -> Result<()> {
        let mut args = Args::new();
        args.pointer(parts.address).pointer(parts.lse.expect("parts have sums"));
        args.pointer(out.address);
        strides(&mut args, &out.strides);
        if let Some(lse) = out.lse {
            args.pointer(lse);
        }
        args.value(plan.launch.parts).value(self.facts.queries as u32);
        args.value(self.facts.heads as u32).value(rows as u32);
        let blocks = combine::Config::blocks(rows as u32);
        // SAFETY: parts, result and sums have this size; all live until the work is submitted.
        unsafe { function.submit(self.op, &self.device, [blocks, 1, 1], &args)? };
        Ok(())
    }
}

/// Where results go.
struct Place {
    address: u64,
    /// Between rows, heads and sequences, in elements.
    strides: [usize; 3],
    lse: Option<u64>,
}

fn strides(args: &mut Args, strides: &[usize]) {
    strides.iter().for_each(|&stride| _ = args.value(stride as u64));
}

/// The matrices of `[B, H, S, D]`, as rows of contiguous elements.
#[derive(Clone, Copy)]
struct Lines {
    cols: usize,
    /// Rows, heads and sequences.
    lens: [usize; 3],
    strides: [usize; 3],
}

impl Lines {
    fn of(stack: &Stack) -> Self {
        let [(batch, each_batch), (heads, each_head)] = [0, 1].map(|i| stack.batch()[i]);
        Self {
            cols: stack.cols,
            lens: [stack.rows, heads, batch],
            strides: [stack.row_stride, each_head, each_batch],
        }
    }

    /// With boxes of some columns and rows.
    fn map(&self, element: Element, address: u64, [cols, rows]: [u32; 2]) -> Result<TensorMap> {
        let [len, heads, batch] = self.lens;
        descriptor(
            element,
            address,
            [self.cols, len, heads, batch],
            self.strides,
            [cols, rows, 1, 1],
        )
    }

    /// With boxes of some columns, heads and rows of each.
    fn packed(
        &self,
        element: Element,
        address: u64,
        [cols, pack, rows]: [u32; 3],
    ) -> Result<TensorMap> {
        let ([len, heads, batch], [row, head, each]) = (self.lens, self.strides);
        let together = pack as usize;
        let dims = [self.cols, together, len, heads / together, batch];
        descriptor(
            element,
            address,
            dims,
            [head, row, head * together, each],
            [cols, pack, rows, 1, 1],
        )
    }
}

fn descriptor<const N: usize, const M: usize>(
    element: Element,
    address: u64,
    dims: [usize; N],
    strides: [usize; M],
    boxed: [u32; N],
) -> Result<TensorMap> {
    let dims = dims.map(|len| len as u64);
    // The stride of a single row or matrix may be anything.
    let mut bytes = strides.map(|stride| stride as u64 * u64::from(element.size()));
    for (stride, &len) in bytes.iter_mut().zip(&dims[1..]) {
        if len == 1 {
            *stride = 16;
        }
    }
    Ok(TensorMap::new(element, address, &dims, &bytes, &boxed)?)
}

/// An operand whose rows are contiguous and begin at multiples of 16 bytes: as it is, or a padded copy.
fn heads<'a>(op: &'static str, storage: &'a CudaStorage, stack: &Stack) -> Result<Fitted<'a>> {
    let contiguous = stack.cols == 1 || stack.col_stride == 1;
    let rows = if stack.rows > 1 { stack.row_stride } else { 0 };
    let aligned = stack.origins().chain([rows]).all(|elements| elements.is_multiple_of(UNIT));
    if contiguous && aligned {
        return Ok(Fitted::view(storage, stack.clone()));
    }
    let cols = stack.cols.next_multiple_of(UNIT);
    let mut copy = fit(op, (storage, stack), Want { cols, align: 2 * UNIT, ..Want::default() })?;
    copy.stack = copy.stack.narrow(stack.rows, stack.cols);
    Ok(copy)
}
