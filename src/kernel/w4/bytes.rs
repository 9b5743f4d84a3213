//! From bytes to the registers of a left operand.
//!
//! int8: in f16 a byte, its topmost bit flipped, is the last bits of 1024 + 128 + code. bf16 has too few bits for that; but
//! without an exponent, such a byte is (128 + code) · 2⁻¹³³, as the exponent's last bit continues the others below 2⁻¹²⁵. One
//! product with the largest power of two, less 2, makes code / 64 of it, and the sums are multiplied with 64.
//!
//! e4m3: its bits are those of a 16-bit float with another bias of the exponent, a power of two that one product takes
//! away, subnormal numbers included. NaN, all bits but the sign set, carries into the exponent when one is added. Hopper
//! has an instruction for f16, from which bf16 is one rounding, of nothing.

use super::Codes;
use crate::ptx::{Half, Kernel, Logic3, Reg, Target};

/// Decodes words of four codes.
#[derive(Clone, Copy)]
pub struct Bytes<'k> {
    k: &'k Kernel,
    half: Half,
    codes: Codes,
    /// What a pair is multiplied with.
    factor: Reg<'k, u32>,
    /// What is added to one.
    offset: Reg<'k, u32>,
}

impl<'k> Bytes<'k> {
    pub fn new(k: &'k Kernel, half: Half, codes: Codes) -> Self {
        let (factor, offset): (u32, u32) = match (codes, half) {
            (Codes::E4m3, Half::F16) => (0x5c00, 0x8000),
            (Codes::E4m3, Half::Bf16) => (0x7b80, 0x8000),
            (_, Half::F16) => (0x3c00, 0xe480),
            (_, Half::Bf16) => (0x7f00, 0xc000),
        };
        let both = |bits: u32| k.var(bits << 16 | bits);
        Self { k, half, codes, factor: both(factor), offset: both(offset) }
    }

    /// What sums of products are to be multiplied with, unless it is 1.
    pub fn of_sums(&self) -> Option<f32> {
        matches!((self.codes, self.half), (Codes::Int8, Half::Bf16)).then_some(64.0)
    }

    /// The two lower codes of a word, or its two upper ones, as floats, over [`of_sums`](Self::of_sums).
    pub fn pair(&self, word: Reg<'k, u32>, upper: bool) -> Reg<'k, u32> {
        let k = self.k;
        // Each byte in the lower, or in the upper half of 16 bits.
        let (low, high) = if upper { (0x4342, 0x3424) } else { (0x4140, 0x1404) };
        match (self.codes, self.half) {
            (Codes::E4m3, half) if k.target() == Target::Sm90a => {
                let floats = k.cvt_f16x2_e4m3x2(k.halves(word)[usize::from(upper)]);
                match half {
                    Half::F16 => floats,
                    Half::Bf16 => {
                        let [first, second] = k.unpack(Half::F16, floats);
                        k.cvt_rn_x2(Half::Bf16, first, second)
                    }
                }
            }
            (Codes::E4m3, half) => {
                let bits = k.prmt(word, 0, high);
                let (shift, mask, one, exponent) = match half {
                    Half::F16 => (1, 0x3f80_3f80, 0x0080_0080, 0x4000_4000),
                    Half::Bf16 => (4, 0x07f0_07f0, 0x0010_0010, 0x0800_0800),
                };
                let magnitude = (bits >> shift) & mask;
                let float = k.lop3(Logic3::AND_OR, bits, 0x8000_8000, magnitude);
                let nan = (magnitude + one) & exponent;
                let nan = match half {
                    Half::F16 => nan,
                    // All bits of the exponent from there on.
                    Half::Bf16 => nan * 15,
                };
                k.fma_x2(half, float | nan, self.factor, self.offset)
            }
            (_, half) => {
                let above = match half {
                    Half::F16 => 0x6464_6464,
                    Half::Bf16 => 0,
                };
                let float = k.prmt(word ^ 0x8080_8080, above, low);
                k.fma_x2(half, float, self.factor, self.offset)
            }
        }
    }

    /// The two lower codes of a word of e4m3, times a number, each rounded once. Hopper's.
    pub fn scaled(&self, codes: Reg<'k, u32>, by: Reg<'k, f32>) -> Reg<'k, u32> {
        let k = self.k;
        let floats = k.cvt_f16x2_e4m3x2(k.halves(codes)[0]);
        let [first, second] = k.unpack(Half::F16, floats);
        k.cvt_rn_x2(self.half, first * by, second * by)
    }

    /// The left operand of 16 rows of `K` in an order in which each lane has four that follow each other: `words` of
    /// both of its columns of `W`.
    pub fn fragment(&self, [first, second]: [Reg<'k, u32>; 2]) -> [Reg<'k, u32>; 4] {
        [(first, false), (second, false), (first, true), (second, true)]
            .map(|(word, upper)| self.pair(word, upper))
    }
}
