//! Gradients added to sums over micro-batches, and gradients times a factor.

use super::rows::{Chunk, kind, load_f32, of_half, store_f32, store_half, walk};
use super::{Name, THREADS};
use crate::kernel::Element;
use crate::ptx::{Half, Kernel, Reg, Source, Target};

/// Units of a thread in flight.
const TOGETHER: u32 = 2;

/// `sum + grad`, in f32.
pub(super) fn emit_accumulate() -> Source {
    let k = &Kernel::new("accumulate", Target::Sm80, THREADS);
    let chunk = Chunk::of_block(k);
    let out = chunk.out(Some(Element::F32));
    each_unit(&chunk, |at, grads| {
        let to = out.element(at, 4);
        // What no gradient was written to yet is not read as a number.
        k.if_(!chunk.begins, || {
            let sums = load_f32(to, grads.len() as u32);
            grads.iter().zip(sums).for_each(|(&grad, sum)| grad.set(grad + sum));
        });
        store_f32(to, grads);
    });
    k.finish()
}

/// `grad · factor`, in a type or in the gradient's.
pub(super) fn emit_scale(to: Option<Half>) -> Source {
    let k = &Kernel::new("scale", Target::Sm80, THREADS);
    let clip = k.pointer(Name::Clip);
    let chunk = Chunk::of_block(k);
    let out = chunk.out(to.map(Element::Half));
    let [factor] = k.ld_global_nc::<f32, 1>(clip.at(4));
    each_unit(&chunk, |at, grads| {
        let scaled: Vec<_> = grads.iter().map(|&grad| grad * factor).collect();
        if let Some(half) = to {
            return store_half(half, out.element(at, 2), &scaled);
        }
        k.if_(chunk.kind.eq(kind(Some(Element::F32))), || {
            store_f32(out.element(at, 4), &scaled);
        });
        of_half(chunk.kind, |half| store_half(half, out.element(at, 2), &scaled));
    });
    k.finish()
}

/// Calls `body` for the number of the first element of each unit of a chunk, and its gradients.
fn each_unit<'k>(chunk: &Chunk<'k>, body: impl Fn(Reg<'k, u32>, &[Reg<'k, f32>])) {
    walk(chunk, THREADS, TOGETHER, |at, unit| {
        let grads = chunk.load(at, unit);
        at.iter().zip(grads.chunks(unit as usize)).for_each(|(&at, grads)| body(at, grads));
    });
}
