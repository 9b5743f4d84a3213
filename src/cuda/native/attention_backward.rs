//! The gradients of attention.

use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_core::{CudaStorage, DType, Layout, Result, Shape};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::fit::Fitted;
use super::attention::{Call, Packed, heads, in_two_dims, memory, operand, pack};
use super::plan::Plans;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::backward::{Arguments, BiasGrad, Gradient, Plan, Problem};
use crate::op::{AttentionGrads, AttentionInputs, AttentionProblem, AttentionUpstream};
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// Floats that begin at multiples of 16 bytes.
const ALIGN: usize = 4;

/// What columns of gradients are a multiple of where kernels store them.
const UNIT: usize = 8;

/// The gradients of q, k and v, which lie as `places` says, each in a storage that has no other elements, and of
/// a bias of shape `bias` (up to `[B, Hq, Sq, Sk]`), packed. Nothing is empty, nor over a
/// [`limit`](super::flash_limit).
pub(crate) fn attention_backward(
    op: &'static str,
    p: &AttentionProblem,
    deterministic: bool,
    inputs: &AttentionInputs<CudaStorage>,
    upstream: &AttentionUpstream<CudaStorage>,
    places: [&Stack; 3],
    bias: Option<&[usize]>,
) -> Result<AttentionGrads<CudaStorage>> {
    let &AttentionUpstream { out, grad: (grad, ref grad_stack), stats, .. } = upstream;
    let [dq, dk, dv] = places;
    if let Some((p, [grad_stack, dq, dk, dv])) = in_two_dims(p, [grad_stack, dq, dk, dv]) {
        let lse_grad = upstream.lse_grad.clone();
        let upstream = AttentionUpstream { out, grad: (grad, grad_stack), stats, lse_grad };
        return gradients(op, &p, deterministic, inputs, &upstream, [&dq, &dk, &dv], bias);
    }
    let packed = Packed::new(op, p, inputs)?;
    let grad = pack(op, grad, grad_stack)?;
    let upstream =
        AttentionUpstream { out, grad: (&grad, grad_stack.packed()), stats, lse_grad: None };
    attention_backward(
        op,
        &packed.problem,
        deterministic,
        &packed.inputs(),
        &upstream,
        places,
        bias,
    )
}

/// The same over two batch dimensions.
fn gradients(
    op: &'static str,
    p: &AttentionProblem,
    deterministic: bool,
    inputs: &AttentionInputs<CudaStorage>,
    upstream: &AttentionUpstream<CudaStorage>,
    places: [&Stack; 3],
    bias: Option<&[usize]>,
) -> Result<AttentionGrads<CudaStorage>> {
    let gpu = Gpu::of(op, inputs.q.device())?;
    let AttentionUpstream { out, grad: (grad, grad_stack), stats, lse_grad } = upstream;
    let others = [*out, *grad].into_iter().chain(*stats);
    let others: Vec<_> = others.chain(lse_grad.as_ref().map(|(grad, _)| *grad)).collect();
    let call = Call::with_values(op, p, gpu, 1, inputs, &others)?;
    let out = Fitted::view(out, p.out.clone());
    let grad = heads(op, grad, grad_stack, 1)?;
    let facts = Problem {
        attention: call.facts,
        aligned: aligned([&out.stack, &grad.stack]),
        lse_grad: lse_grad.is_some(),
        bias_grad: bias.map(|dims| bias_grad(p, dims)),
        deterministic,
    };
    let compiled = PLANS.get(op, &call.gpu, &facts)?;

    let device = call.device;
    let alloc = |len: usize, dtype| uninit(device, &Shape::from(len), dtype);
    let dtype = inputs.q.dtype();
    let mut grads = Vec::with_capacity(3);
    for place in places {
        let len = place.count() * place.rows * place.cols.next_multiple_of(UNIT);
        let mut grad = alloc(len, dtype)?;
        if facts.attention.lengths == Lengths::Packed {
            // Rows of no sequence are nobody's to write.
            grad.const_set(Scalar::zero(dtype), &Layout::contiguous(len))?;
        }
        grads.push(grad);
    }
    let mut bias_grad = match (bias, inputs.extras.bias) {
        (Some(dims), Some(like)) => Some(alloc(dims.iter().product(), like.dtype())?),
        _ => None,
    };
    // Each query's delta, and after those, at a multiple of 16 bytes, what kernels add to.
    let deltas = (p.q.count() * p.seq_q()).next_multiple_of(ALIGN);
    let zeroed = compiled.plan.zeroed.units() as usize * ALIGN;
    let mut scratch = alloc(deltas + zeroed, DType::F32)?;
    call.order.run(|| {
        let written: Vec<_> = grads.iter_mut().map(|grad| Memory::of_mut(grad, device)).collect();
        let bias_grad = bias_grad.as_mut().map(|grad| Memory::of_mut(grad, device));
        let scratch = Memory::of_mut(&mut scratch, device);
        let [out_memory, grad_memory] = [&out, &grad].map(|fitted| memory(fitted, device));
        let stats = stats.map(|storage| Memory::of(storage, device));
        let lse_grad = lse_grad.as_ref();
        let lse_grad =
            lse_grad.map(|(storage, stack)| (Memory::of(storage, device), stack.matrix_offset(0)));
        call.with_inputs(|inputs| {
            let arguments = Arguments {
                problem: &facts,
                plan: &compiled.plan,
                inputs,
                out: operand(&out_memory, &out),
                grad: operand(&grad_memory, &grad),
                stats: stats.each_ref().map(Memory::address),
                lse_grad: lse_grad.as_ref().map(|(memory, offset)| memory.at(*offset)),
                delta: scratch.address(),
                grads: [0, 1, 2].map(|i| gradient(&written[i], places[i])),
                bias_grad: bias_grad.as_ref().map(Memory::address),
                zeroed: scratch.at(deltas),
            };
            Ok(compiled.launch(op, device, &arguments)?)
        })
    })?;
    let mut cut = grads.into_iter().zip(places).map(|(grad, place)| {
        let (rows, width) = (place.count() * place.rows, place.cols.next_multiple_of(UNIT));
        if width == place.cols {
            return Ok(grad);
        }
        let mut cut = alloc(rows * place.cols, dtype)?;
        grad.copy2d(&mut cut, rows, place.cols, width, place.cols, 0, 0)?;
        Ok::<_, candle_core::Error>(cut)
    });
    let mut next = || cut.next().expect("three gradients");
    Ok(AttentionGrads { q: next()?, k: next()?, v: next()?, bias: bias_grad })
}

/// Elements of which rows begin at multiples, up to what a thread loads together.
fn aligned(stacks: [&Stack; 2]) -> u32 {
    let rows = |stack: &Stack| if stack.rows > 1 { stack.row_stride } else { 0 };
    let all = |unit: usize| {
        let mut of = stacks.iter().flat_map(|stack| stack.origins().chain([rows(stack)]));
        of.all(|elements| elements.is_multiple_of(unit))
    };
    [8, 4, 2].into_iter().find(|&unit| all(unit)).unwrap_or(1) as u32
}

/// What shares a bias of a shape.
fn bias_grad(p: &AttentionProblem, dims: &[usize]) -> BiasGrad {
    let mut own = [1; 4];
    own[4 - dims.len()..].copy_from_slice(dims);
    let all = [p.q.batch()[0].0, p.q.batch()[1].0, p.seq_q()];
    BiasGrad { repeated: [0, 1, 2].map(|i| (all[i] / own[i]) as u64) }
}

/// Where a gradient goes whose columns are rounded up.
fn gradient(memory: &Memory, place: &Stack) -> Gradient {
    let width = place.cols.next_multiple_of(UNIT);
    let strides = [place.row_stride, place.batch()[1].1, place.batch()[0].1];
    let strides = strides.map(|stride| (stride / place.cols * width) as u64);
    Gradient { address: memory.address(), strides }
}
