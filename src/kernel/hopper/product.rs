//! Products by wgmma: how it finds operands, and its steps along K.

use super::{LINE, SLAB_BYTES};
use crate::ptx::{Factor, Kernel, Operand, Reg, Scalar, Value, Wgmma, WgmmaRegs};

/// Lines along K of one wgmma, where K is from line to line: 16-bit elements alone can lie so.
const STEP: u32 = 16;
/// Bytes along K of one wgmma, where lines are along K.
const STEP_BYTES: u32 = 32;

/// How wgmma finds an operand in shared memory: columns of 128 bytes, one after the other, each of
/// swizzled lines.
#[derive(Clone, Copy)]
pub struct Descriptor<'k> {
    low: Reg<'k, u32>,
    /// Bytes of a column.
    column: u32,
    /// Lines are along M or N, and K is from line to line.
    transposed: bool,
}

impl<'k> Descriptor<'k> {
    /// Swizzle of 128 bytes, 1024 bytes between groups of eight lines.
    const HIGH: u32 = 0x4000_0040;

    /// Lines are along K: of columns of `lines` lines that begin at a shared address.
    pub fn along_k(address: Reg<'k, u32>, lines: u32) -> Self {
        // The leading offset is ignored.
        Self { low: address.bfe(4, 14) | (1 << 16), column: lines * LINE, transposed: false }
    }

    /// Lines are along M or N: of columns of `lines` lines that begin at a shared address.
    pub fn across_k(address: Reg<'k, u32>, lines: u32) -> Self {
        let column = lines * LINE;
        Self { low: address.bfe(4, 14) | ((column / 16) << 16), column, transposed: true }
    }

    /// The descriptor of a stage, each of `bytes`.
    pub fn stage(self, stage: Reg<'k, u32>, bytes: u32) -> Self {
        Self { low: stage * (bytes / 16) + self.low, ..self }
    }

    /// The descriptor this many bytes further, a multiple of 1024.
    pub fn further(self, bytes: Reg<'k, u32>) -> Self {
        Self { low: self.low + bytes / 16, ..self }
    }

    /// The descriptor from row or column 64 · `block` on.
    pub fn rows(self, block: u32) -> Self {
        let bytes = match self.transposed {
            false => block * SLAB_BYTES,
            true => block * self.column,
        };
        let low = if bytes == 0 { self.low } else { self.low + bytes / 16 };
        Self { low, ..self }
    }

    /// The elements along K of a step.
    pub fn operand(self, step: u32) -> Operand<'k> {
        let bytes = match self.transposed {
            false => {
                let steps = LINE / STEP_BYTES;
                step / steps * self.column + step % steps * STEP_BYTES
            }
            true => step * STEP * LINE,
        };
        let low = if bytes == 0 { self.low } else { self.low + bytes / 16 };
        Operand { descriptor: low.with_high(Self::HIGH), transposed: self.transposed }
    }
}

/// A left operand of 64 rows for each warpgroup.
#[derive(Clone, Copy)]
pub enum Left<'k, 'a> {
    Shared(Descriptor<'k>),
    /// In registers, as the accumulators of a product before it lie when they are packed in pairs: four for each
    /// step.
    Registers(&'a [Reg<'k, u32>]),
}

/// The left operand of one step.
#[derive(Clone, Copy)]
pub enum LeftStep<'k> {
    Shared(Operand<'k>),
    Registers([Reg<'k, u32>; 4]),
}

impl<'k> Left<'k, '_> {
    fn step(&self, step: u32) -> LeftStep<'k> {
        match self {
            Self::Shared(descriptor) => LeftStep::Shared(descriptor.operand(step)),
            Self::Registers(all) => {
                let four = all.chunks(4).nth(step as usize).expect("K has the step");
                LeftStep::Registers(four.try_into().expect("K is a multiple of 16"))
            }
        }
    }
}

/// Begins `accumulators = a·b`, or `accumulators += a·b` where `accumulate` holds, over `depth` elements of K, a multiple
/// of a [step](Factor::step). The accumulators are ready after a [wait](Kernel::wgmma_wait).
pub fn product<'k, S: Scalar>(
    factor: impl Into<Factor>,
    accumulators: &[Reg<'k, S>],
    a: Left<'k, '_>,
    b: Descriptor<'k>,
    depth: u32,
    accumulate: impl Into<Value<'k, bool>>,
) {
    products(factor, &[accumulators], depth, accumulate, |step| ([a.step(step)], b.operand(step)));
}

/// The same for several blocks of 64 rows, which have accumulators of their own and share the right operand.
/// `operands` gives a step's.
pub fn products<'k, S: Scalar, Sums: AsRef<[Reg<'k, S>]>, A: IntoIterator<Item = LeftStep<'k>>>(
    factor: impl Into<Factor>,
    accumulators: &[Sums],
    depth: u32,
    accumulate: impl Into<Value<'k, bool>>,
    operands: impl Fn(u32) -> (A, Operand<'k>),
) {
    let k: &'k Kernel = accumulators[0].as_ref()[0].kernel();
    let (factor, first) = (factor.into(), accumulate.into());
    k.wgmma_fence();
    for step in 0..depth / factor.step() {
        let accumulate = if step == 0 { first } else { true.into() };
        let (left, b) = operands(step);
        for (accumulators, a) in accumulators.iter().zip(left) {
            match a {
                LeftStep::Shared(a) => {
                    k.wgmma(accumulators.as_ref(), Wgmma { factor, a, b, accumulate })
                }
                LeftStep::Registers(a) => {
                    k.wgmma_regs(accumulators.as_ref(), WgmmaRegs { factor, a, b, accumulate });
                }
            }
        }
    }
    k.wgmma_commit();
}
