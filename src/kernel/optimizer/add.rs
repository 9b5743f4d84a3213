//! Gradients added to sums over micro-batches, and gradients times the factor that clips them.

use super::rows::{Chunk, kind, load_f32, of_half, store_f32, store_half, walk};
use super::{Name, THREADS};
use crate::kernel::Element;
use crate::ptx::{Kernel, Source, Target};

/// Units of a thread in flight.
const TOGETHER: u32 = 2;

/// `sum + grad` in f32, if `sums`, or `grad · factor` in the gradient's type.
pub(super) fn emit(sums: bool) -> Source {
    let k = &Kernel::new(if sums { "accumulate" } else { "scale" }, Target::Sm80, THREADS);
    let clip = (!sums).then(|| k.pointer(Name::Clip));
    let chunk = Chunk::of_block(k);
    let out = chunk.out(!sums);
    let factor = clip.map(|clip| {
        let [factor] = k.ld_global_nc::<f32, 1>(clip.at(4));
        factor
    });
    walk(&chunk, THREADS, TOGETHER, |at, unit| {
        let grads = chunk.load(at, unit);
        for (&at, grads) in at.iter().zip(grads.chunks(unit as usize)) {
            let Some(factor) = factor else {
                let to = out.element(at, 4);
                // What no gradient was written to yet is not read as a number.
                k.if_(!chunk.begins, || {
                    let sums = load_f32(to, unit);
                    grads.iter().zip(sums).for_each(|(&grad, sum)| grad.set(grad + sum));
                });
                store_f32(to, grads);
                continue;
            };
            let scaled: Vec<_> = grads.iter().map(|&grad| grad * factor).collect();
            k.if_(chunk.kind.eq(kind(Some(Element::F32))), || {
                store_f32(out.element(at, 4), &scaled);
            });
            of_half(chunk.kind, |half| store_half(half, out.element(at, 2), &scaled));
        }
    });
    k.finish()
}
