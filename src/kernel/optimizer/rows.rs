//! The tables of tensors, as the host writes them and blocks read them.

use super::Name;
use crate::kernel::Element;
use crate::ptx::{Half, Kernel, Reg};

/// Elements of a block's part of a tensor. At 28 bytes an element it takes long beside the search for the tensor, and
/// a model of 100 M parameters has thousands of them.
pub const CHUNK: u32 = 1 << 14;

/// Elements that a thread takes at once, where a chunk is whole.
pub(super) const UNIT: u32 = 4;

/// Chunks of a tensor of `len` elements.
pub fn chunks(len: u64) -> u64 {
    len.div_ceil(CHUNK.into())
}

/// A tensor of a launch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Row {
    /// The address of its gradient, without gaps.
    pub grad: u64,
    /// Elements, at least 1.
    pub len: u64,
    /// The address of the sum or of the scaled gradient, if one is written.
    pub out: u64,
    /// The number of its first chunk among those of all tensors.
    pub first_chunk: u32,
    /// The gradient's type: see [`kind`].
    pub kind: u32,
    /// Whether the gradient begins at a multiple of 16 bytes. (All else does.)
    pub aligned: bool,
    /// Whether a sum begins with this gradient: there is nothing to add it to.
    pub begins: bool,
    /// AdamW: the learning rate over the first moment's bias correction.
    pub rate: f32,
    /// AdamW: what a weight is multiplied with, 1 − learning rate · weight decay.
    pub keep: f32,
    /// AdamW: 1 over the root of the second moment's bias correction.
    pub unbias: f32,
}

/// Words of a row: a multiple of 16 bytes.
const WORDS: usize = 6;
/// Where the number of the first chunk is.
const FIRST_CHUNK: i64 = 24;

/// An element type in a table; 0 where there is no tensor.
pub fn kind(element: Option<Element>) -> u32 {
    match element {
        None => 0,
        Some(Element::F32) => 1,
        Some(Element::Half(Half::F16)) => 2,
        Some(Element::Half(Half::Bf16)) => 3,
    }
}

impl Row {
    /// As kernels read it.
    pub fn words(&self) -> [u64; WORDS] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let flags = u32::from(self.aligned) | u32::from(self.begins) << 1;
        [
            self.grad,
            self.len,
            self.out,
            pair(self.first_chunk, self.kind),
            pair(flags, self.rate.to_bits()),
            pair(self.keep.to_bits(), self.unbias.to_bits()),
        ]
    }
}

/// What AdamW keeps of a tensor, in places that seldom change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The address of the f32 weights.
    pub weights: u64,
    /// The address of their copy in 16 bits.
    pub copy: u64,
    /// Its type: see [`kind`].
    pub copy_kind: u32,
    /// The addresses of the moments.
    pub moments: [u64; 2],
    /// The addresses of the scales of moments in eight bits.
    pub scales: [u64; 2],
}

/// Words of a state.
const STATE_WORDS: usize = 7;

impl State {
    /// As kernels read it.
    pub fn words(&self) -> [u64; STATE_WORDS] {
        let [first, second] = self.moments;
        let [first_scales, second_scales] = self.scales;
        let kind = u64::from(self.copy_kind);
        [self.weights, self.copy, first, second, first_scales, second_scales, kind]
    }
}

/// The tensor of a block, in registers.
pub(super) struct Chunk<'k> {
    /// The number of its tensor.
    tensor: Reg<'k, u32>,
    /// The chunk's first element in it.
    pub first: Reg<'k, u64>,
    /// The chunk's elements.
    pub len: Reg<'k, u32>,
    /// The address of the chunk's first element of the gradient.
    pub grad: Reg<'k, u64>,
    pub kind: Reg<'k, u32>,
    row: Reg<'k, u64>,
    /// Whether the chunk is whole, and its gradient begins at a multiple of 16 bytes.
    pub whole: Reg<'k, bool>,
    /// Whether the sum begins with it.
    pub begins: Reg<'k, bool>,
}

impl<'k> Chunk<'k> {
    /// The chunk that has the number of the block.
    pub fn of_block(k: &'k Kernel) -> Self {
        let (rows, tensors) = (k.pointer(Name::Rows), k.param::<u32>(Name::Tensors));
        let (block, bytes) = (k.block_x(), 8 * WORDS as u32);
        // The last tensor that does not begin after the block's chunk: it is in `low..low + span`.
        let (low, span) = (k.var(0u32), k.var(tensors));
        k.loop_(|exit| {
            exit.when(span.le(1));
            let half = span / 2;
            let [begin] = k.ld_global_nc::<u32, 1>(rows.element(low + half, bytes).at(FIRST_CHUNK));
            let after = begin.gt(block);
            low.set(k.select(after, low, low + half));
            span.set(k.select(after, half, span - half));
        });
        let row = rows.element(low, bytes);
        let [grad, len] = k.ld_global_nc::<u64, 2>(row);
        let [begin, kind] = k.ld_global_nc::<u32, 2>(row.at(FIRST_CHUNK));
        let [flags] = k.ld_global_nc::<u32, 1>(row.at(32));
        let first = (block - begin).wide() * u64::from(CHUNK);
        let rest = (len - first).min(u64::from(CHUNK)).low();
        let size = k.select(kind.eq(kind_of_f32()), k.var(4u32), 2);
        Self {
            tensor: low,
            first,
            len: rest,
            grad: grad + first * size.wide(),
            kind,
            row,
            whole: rest.eq(CHUNK) & (flags & 1).ne(0),
            begins: (flags & 2).ne(0),
        }
    }

    /// The address of the chunk in what is written, whose elements are of a type or else of the gradient's.
    pub fn out(&self, element: Option<Element>) -> Reg<'k, u64> {
        let k = self.first.kernel();
        let [out] = k.ld_global_nc::<u64, 1>(self.row.at(16));
        let size = k.var(element.unwrap_or(Element::F32).size());
        let size = match element {
            Some(_) => size,
            None => k.select(self.kind.eq(kind_of_f32()), size, 2),
        };
        out + self.first * size.wide()
    }

    /// AdamW's three numbers of the tensor: rate, keep, unbias.
    pub fn factors(&self) -> [Reg<'k, f32>; 3] {
        let k = self.first.kernel();
        let [rate] = k.ld_global_nc::<f32, 1>(self.row.at(36));
        let [keep, unbias] = k.ld_global_nc::<f32, 2>(self.row.at(40));
        [rate, keep, unbias]
    }

    /// The addresses of the tensor's state, of which those of elements are the chunk's: weights, copy, moments, scales;
    /// and the copy's type.
    pub fn state(&self, states: Reg<'k, u64>) -> ([Reg<'k, u64>; 6], Reg<'k, u32>) {
        let k = self.first.kernel();
        let at = states.element(self.tensor, 8 * STATE_WORDS as u32);
        let words = std::array::from_fn(|i| k.ld_global_nc::<u64, 1>(at.at(8 * i as i64))[0]);
        let [kind] = k.ld_global_nc::<u32, 1>(at.at(48));
        (words, kind)
    }

    /// Elements of the gradient from one of the chunk on, in f32: `UNIT` or one for each of `at`.
    pub fn load(&self, at: &[Reg<'k, u32>], unit: u32) -> Vec<Reg<'k, f32>> {
        let k = self.first.kernel();
        let values: Vec<Reg<f32>> = (0..at.len() as u32 * unit).map(|_| k.reg()).collect();
        let set = |loaded: Vec<Reg<'k, f32>>| {
            values.iter().zip(loaded).for_each(|(value, x)| value.set(x));
        };
        k.if_else(
            self.kind.eq(kind_of_f32()),
            || set(at.iter().flat_map(|&at| load_f32(self.grad.element(at, 4), unit)).collect()),
            || {
                let from = |&at| load_bits(self.grad.element(at, 2), unit);
                let bits: Vec<Reg<u16>> = at.iter().flat_map(from).collect();
                let widen = |half| set(bits.iter().map(|&bits| k.widen(half, bits)).collect());
                k.if_else(
                    self.kind.eq(kind(Some(Element::Half(Half::F16)))),
                    || widen(Half::F16),
                    || widen(Half::Bf16),
                );
            },
        );
        values
    }
}

fn kind_of_f32() -> u32 {
    kind(Some(Element::F32))
}

/// `unit` elements of f32 from an address on.
pub(super) fn load_f32<'k>(from: Reg<'k, u64>, unit: u32) -> Vec<Reg<'k, f32>> {
    let k = from.kernel();
    match unit {
        1 => k.ld_global::<f32, 1>(from).into(),
        _ => k.ld_global::<f32, 4>(from).into(),
    }
}

/// The same of 16 bits.
fn load_bits<'k>(from: Reg<'k, u64>, unit: u32) -> Vec<Reg<'k, u16>> {
    let k = from.kernel();
    match unit {
        1 => k.ld_global_nc::<u16, 1>(from).into(),
        _ => k.ld_global_nc::<u32, 2>(from).into_iter().flat_map(|pair| k.halves(pair)).collect(),
    }
}

/// Stores one element or `UNIT` of them in f32.
pub(super) fn store_f32<'k>(to: Reg<'k, u64>, values: &[Reg<'k, f32>]) {
    let k = to.kernel();
    match *values {
        [x] => k.st_global(to, [x]),
        [a, b, c, d] => k.st_global(to, [a, b, c, d]),
        _ => unreachable!("a unit is one element or {UNIT}"),
    }
}

/// The same rounded to 16 bits.
pub(super) fn store_half<'k>(half: Half, to: Reg<'k, u64>, values: &[Reg<'k, f32>]) {
    let k = to.kernel();
    match *values {
        [x] => k.st_global(to, [k.cvt_rn(half, x)]),
        [a, b, c, d] => k.st_global(to, [k.cvt_rn_x2(half, a, b), k.cvt_rn_x2(half, c, d)]),
        _ => unreachable!("a unit is one element or {UNIT}"),
    }
}

/// Runs `store` for the 16-bit type that a table has, if it has one.
pub(super) fn of_half<'k>(kind_is: Reg<'k, u32>, store: impl Fn(Half)) {
    let k = kind_is.kernel();
    for half in [Half::F16, Half::Bf16] {
        k.if_(kind_is.eq(kind(Some(Element::Half(half)))), || store(half));
    }
}

/// Walks a block's chunk: whole chunks by units of four elements, `together` at a time; others by single ones.
/// `body` gets the numbers of the first elements of units, and the elements of a unit.
pub(super) fn walk<'k>(
    chunk: &Chunk<'k>,
    threads: u32,
    together: u32,
    body: impl Fn(&[Reg<'k, u32>], u32),
) {
    let k = chunk.first.kernel();
    let thread = k.thread();
    k.if_else(
        chunk.whole,
        || {
            let stride = threads * UNIT;
            k.for_(thread * UNIT, CHUNK, stride * together, |at| {
                let units: Vec<_> = (0..together).map(|i| at + i * stride).collect();
                body(&units, UNIT);
            });
        },
        || k.for_(thread, chunk.len, threads, |at| body(&[at], 1)),
    );
}
