//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017), a step of all tensors.
//!
//! Every operation is rounded once, in the order of `cpu::adamw`: both give the same bits.

use super::dynamic::{BLOCK, BYTES, Guide, NUMBERS};
use super::rows::{CHUNK, Chunk, load_f32, of_half, store_f32, store_half, walk};
use super::{Moments, Name, THREADS};
use crate::kernel::quantize::largest;
use crate::ptx::{Kernel, Reg, Source, Target};

/// Units of a thread in flight.
const TOGETHER: u32 = 2;
/// Lanes of a warp, which takes a block of codes.
const WARP: u32 = 32;
/// Elements of a lane.
const LANE: u32 = BLOCK / WARP;

/// The numbers of a tensor's step.
struct Step<'k> {
    scale: Reg<'k, f32>,
    beta1: Reg<'k, f32>,
    rest1: Reg<'k, f32>,
    beta2: Reg<'k, f32>,
    rest2: Reg<'k, f32>,
    epsilon: Reg<'k, f32>,
    rate: Reg<'k, f32>,
    keep: Reg<'k, f32>,
    unbias: Reg<'k, f32>,
}

impl<'k> Step<'k> {
    /// The next moments, of a gradient and the moments.
    fn moments(&self, grad: Reg<'k, f32>, [m, v]: [Reg<'k, f32>; 2]) -> [Reg<'k, f32>; 2] {
        let grad = grad.mul_rn(self.scale);
        let part = grad.mul_rn(self.rest1);
        let square = grad.mul_rn(self.rest2).mul_rn(grad);
        [m.mul_rn(self.beta1) + part, v.mul_rn(self.beta2) + square]
    }

    /// The next weight, of the weight, the first moment, and the root of the second one.
    fn weight(&self, p: Reg<'k, f32>, m: Reg<'k, f32>, root: Reg<'k, f32>) -> Reg<'k, f32> {
        let below = root.mul_rn(self.unbias) + self.epsilon;
        p.mul_rn(self.keep) - (m / below).mul_rn(self.rate)
    }
}

pub(super) fn emit(moments: Moments, clipped: bool) -> Source {
    let k = &Kernel::new("adamw", Target::Sm80, THREADS);
    k.blocks_per_sm(4);
    let states = k.pointer(Name::States);
    let scale = match clipped {
        true => {
            let [factor] = k.ld_global_nc::<f32, 1>(k.pointer(Name::Clip).at(4));
            factor
        }
        false => k.param::<f32>(Name::Scale),
    };
    let [beta1, rest1, beta2, rest2, epsilon] =
        [Name::Beta1, Name::Rest1, Name::Beta2, Name::Rest2, Name::Epsilon]
            .map(|name| k.param::<f32>(name));
    let books = (moments == Moments::Bits8).then(|| Books::load(k));
    let chunk = Chunk::of_block(k);
    let [rate, keep, unbias] = chunk.factors();
    let step = Step { scale, beta1, rest1, beta2, rest2, epsilon, rate, keep, unbias };
    let ([weights, copy, first, second, first_scales, second_scales], copy_kind) =
        chunk.state(states);
    let bytes = chunk.first * 4u64;
    let weights = weights + bytes;
    let copy = copy + chunk.first * 2u64;
    match books {
        None => {
            let [first, second] = [first + bytes, second + bytes];
            walk(&chunk, THREADS, TOGETHER, |at, unit| {
                let [p, m, v] = [weights, first, second].map(|from| {
                    let load = |&at| load_f32(from.element(at, 4), unit);
                    at.iter().flat_map(load).collect::<Vec<_>>()
                });
                let grads = chunk.load(at, unit);
                let next: Vec<_> = grads
                    .iter()
                    .zip(&p)
                    .zip(m.iter().zip(&v))
                    .map(|((&grad, &p), (&m, &v))| {
                        let [m, v] = step.moments(grad, [m, v]);
                        (step.weight(p, m, v.sqrt()), m, v)
                    })
                    .collect();
                for (&at, next) in at.iter().zip(next.chunks(unit as usize)) {
                    let p: Vec<_> = next.iter().map(|next| next.0).collect();
                    let m: Vec<_> = next.iter().map(|next| next.1).collect();
                    let v: Vec<_> = next.iter().map(|next| next.2).collect();
                    store_f32(weights.element(at, 4), &p);
                    store_f32(first.element(at, 4), &m);
                    store_f32(second.element(at, 4), &v);
                    of_half(copy_kind, |half| store_half(half, copy.element(at, 2), &p));
                }
            });
        }
        Some(books) => {
            let blocks = chunk.first / u64::from(BLOCK);
            Codes {
                chunk: &chunk,
                step: &step,
                books,
                weights,
                copy: (copy, copy_kind),
                codes: [first, second].map(|address| address + chunk.first),
                scales: [first_scales, second_scales].map(|address| address + blocks * 4u64),
            }
            .emit(k);
        }
    }
    k.finish()
}

/// What codes stand for, in shared memory.
#[derive(Clone, Copy)]
struct Books<'k> {
    /// The signed one and the unsigned one.
    books: [Book<'k>; 2],
}

#[derive(Clone, Copy)]
struct Book<'k> {
    /// The addresses of its values, of its thresholds and of its guide.
    values: Reg<'k, u32>,
    thresholds: Reg<'k, u32>,
    codes: Reg<'k, u32>,
    guide: Guide,
}

impl<'k> Books<'k> {
    fn load(k: &'k Kernel) -> Self {
        const LINE: u32 = 16;
        let (from, shared) = (k.pointer(Name::Books), k.shared(BYTES));
        let thread = k.thread();
        for i in 0..BYTES.div_ceil(THREADS * LINE) {
            let at = (thread + i * THREADS) * LINE;
            let (to, from) = (shared + at, from + at.wide());
            k.when(at.lt(BYTES), || k.cp_async(to, from, LINE));
        }
        k.cp_async_commit();
        k.cp_async_wait(0);
        k.sync_block();
        let guides = [true, false].map(Guide::of);
        let first = 4 * NUMBERS;
        let codes = [first, first + guides[0].codes() as u32];
        let books = std::array::from_fn(|i| {
            let values = shared + 2 * i as u32 * NUMBERS;
            let thresholds = values + NUMBERS;
            Book { values, thresholds, codes: shared + codes[i], guide: guides[i] }
        });
        Self { books }
    }

    /// What a code stands for.
    fn value(&self, book: usize, code: Reg<'k, u32>) -> Reg<'k, f32> {
        let [value] = code.kernel().ld_shared::<f32, 1>(self.books[book].values + code * 4);
        value
    }

    /// The nearest code: `dynamic::Book::code`, by its guide.
    fn code(&self, book: usize, part: Reg<'k, f32>) -> Reg<'k, u32> {
        let Book { thresholds, codes, guide, .. } = self.books[book];
        let (k, bits) = (part.kernel(), part.cast::<u32>());
        let least = guide.least();
        let beginning = (bits & (u32::MAX >> 1)) >> guide.shift;
        let at = beginning.max(least).min(least + guide.len - 1) - least;
        let at = if guide.signed { at + (bits >> 31) * guide.len } else { at };
        let code = k.ld_shared_u8(codes + at);
        let [threshold] = k.ld_shared::<f32, 1>(thresholds + code * 4);
        k.select(part.gt(threshold), code + 1, code)
    }
}

/// A chunk whose moments are codes: the first moment, and the root of the second one.
struct Codes<'a, 'k> {
    chunk: &'a Chunk<'k>,
    step: &'a Step<'k>,
    books: Books<'k>,
    weights: Reg<'k, u64>,
    copy: (Reg<'k, u64>, Reg<'k, u32>),
    /// The chunk's, of both moments; there are whole blocks of them.
    codes: [Reg<'k, u64>; 2],
    /// The chunk's.
    scales: [Reg<'k, u64>; 2],
}

impl<'k> Codes<'_, 'k> {
    fn emit(&self, k: &'k Kernel) {
        let (thread, chunk) = (k.thread(), self.chunk);
        k.if_else(
            chunk.whole,
            || {
                k.for_(thread / WARP, CHUNK / BLOCK, THREADS / WARP, |block| {
                    self.block(block, true)
                })
            },
            || {
                let blocks = chunk.len.div_ceil(BLOCK);
                k.for_(thread / WARP, blocks, THREADS / WARP, |block| self.block(block, false));
            },
        );
    }

    /// A block of codes; all of its elements exist if it is `whole`, and the gradient is aligned.
    fn block(&self, block: Reg<'k, u32>, whole: bool) {
        let (k, chunk, step) = (block.kernel(), self.chunk, self.step);
        let first = block * BLOCK + k.lane() * LANE;
        let units: Vec<_> = match whole {
            true => vec![first, first + 4],
            false => (0..LANE).map(|i| first + i).collect(),
        };
        let unit = if whole { 4 } else { 1 };
        let exist: Vec<_> = (0..LANE).map(|i| (first + i).lt(chunk.len)).collect();
        // Of what does not exist the chunk's last element is read, and counts as 0.
        let read: Vec<_> = match whole {
            true => units.clone(),
            false => units.iter().map(|&at| at.min(chunk.len - 1)).collect(),
        };
        let codes = self.codes.map(|codes| k.ld_global::<u32, 2>(codes + first.wide()));
        let scales = self.scales.map(|scales| k.ld_global::<f32, 1>(scales.element(block, 4))[0]);
        let p: Vec<_> =
            read.iter().flat_map(|&at| load_f32(self.weights.element(at, 4), unit)).collect();
        let grads = chunk.load(&read, unit);

        let next: Vec<_> = (0..LANE as usize)
            .map(|i| {
                let value = |book: usize| {
                    let code = codes[book][i / 4].bfe(8 * (i as u32 % 4), 8);
                    self.books.value(book, code).mul_rn(scales[book])
                };
                let (m, root) = (value(0), value(1));
                let [m, v] = step.moments(grads[i], [m, root.mul_rn(root)]);
                let root = v.sqrt();
                let p = step.weight(p[i], m, root);
                match whole {
                    true => (p, [m, root]),
                    false => (p, [m, root].map(|x| k.select(exist[i], x, 0.0))),
                }
            })
            .collect();

        let p: Vec<_> = next.iter().map(|(p, _)| *p).collect();
        let (copy, copy_kind) = self.copy;
        let store = |at: Reg<'k, u32>, p: &[Reg<'k, f32>]| {
            store_f32(self.weights.element(at, 4), p);
            of_half(copy_kind, |half| store_half(half, copy.element(at, 2), p));
        };
        for ((&at, p), &exists) in units.iter().zip(p.chunks(unit as usize)).zip(&exist) {
            match whole {
                true => store(at, p),
                false => k.if_(exists, || store(at, p)),
            }
        }
        for book in [0, 1] {
            let values: Vec<_> = next.iter().map(|(_, moments)| moments[book]).collect();
            // The largest magnitude by its bits, so that NaN is the largest of all.
            let bits = values.iter().map(|x| x.abs().cast::<u32>());
            let peak = bits.reduce(|peak, bits| peak.max(bits)).expect("a lane has elements");
            // Of smaller ones 1/scale is infinite.
            let peak = largest(peak, WARP);
            let least = peak.max(f32::MIN_POSITIVE.to_bits());
            let scale = k.select(peak.eq(0), peak, least).cast::<f32>();
            let inverse = k.select(peak.eq(0), k.var(0f32), k.var(1f32) / scale);
            let coded: Vec<_> =
                values.iter().map(|&x| self.books.code(book, x.mul_rn(inverse))).collect();
            let words = [0, 4].map(|i| {
                coded[i] | (coded[i + 1] << 8) | (coded[i + 2] << 16) | (coded[i + 3] << 24)
            });
            k.st_global(self.codes[book] + first.wide(), words);
            k.when(k.lane().eq(0), || k.st_global(self.scales[book].element(block, 4), [scale]));
        }
    }
}
