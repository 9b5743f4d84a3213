//! Gated linear units, in f32.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::epilogue::{gelu_tanh, gelu_tanh_slope, silu, silu_slope};
use super::widen::{narrow_to, packed};
use crate::op::View;
use crate::options::Gate;
use crate::stack::Stack;

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// `act(gate) · up`, packed, in the operands' dtype.
pub(crate) fn glu(kind: Gate, gate: View<CpuStorage>, up: View<CpuStorage>) -> Result<CpuStorage> {
    let dtype = gate.0.dtype();
    let (gate, up) = (elements(gate)?, elements(up)?);
    let mut out = vec![0f32; gate.len()];
    let operands = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK));
    out.par_chunks_mut(CHUNK).zip(operands).for_each(|(out, (gate, up))| match kind {
        Gate::Silu => each(out, gate, up, silu),
        Gate::GeluTanh => each(out, gate, up, gelu_tanh),
    });
    narrow_to(dtype, out)
}

/// All elements of a view, in f32.
fn elements((storage, at): View<'_, CpuStorage>) -> Result<Cow<'_, [f32]>> {
    packed(storage, &Stack::new(at))
}

/// One loop for each function, so that each is vectorised on its own.
#[inline(always)]
fn each(out: &mut [f32], x: &[f32], factor: &[f32], f: impl Fn(f32) -> f32) {
    for ((out, x), factor) in out.iter_mut().zip(x).zip(factor) {
        *out = f(*x) * factor;
    }
}

/// The gradients of both operands, likewise.
pub(crate) fn glu_backward(
    kind: Gate,
    gate: View<CpuStorage>,
    up: View<CpuStorage>,
    grad: View<CpuStorage>,
) -> Result<[CpuStorage; 2]> {
    let dtype = gate.0.dtype();
    let (gate, up, grad) = (elements(gate)?, elements(up)?, elements(grad)?);
    let mut of_both = [vec![0f32; gate.len()], vec![0f32; gate.len()]];
    let [of_gate, of_up] = &mut of_both;
    let operands = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(grad.par_chunks(CHUNK));
    let results = of_gate.par_chunks_mut(CHUNK).zip(of_up.par_chunks_mut(CHUNK));
    results.zip(operands).for_each(|((of_gate, of_up), ((gate, up), grad))| {
        match kind {
            Gate::Silu => {
                each(of_up, gate, grad, silu);
                each(of_gate, gate, grad, silu_slope);
            }
            Gate::GeluTanh => {
                each(of_up, gate, grad, gelu_tanh);
                each(of_gate, gate, grad, gelu_tanh_slope);
            }
        }
        of_gate.iter_mut().zip(up).for_each(|(grad, up)| *grad *= up);
    });
    let [of_gate, of_up] = of_both;
    Ok([narrow_to(dtype, of_gate)?, narrow_to(dtype, of_up)?])
}
