//! From a word of the packed form to the registers of a left operand.
//!
//! Integers: bits of a 16-bit float whose exponent is such that its last bit is 1 are that number and a power of two.
//! One instruction puts two nibbles there, and one subtracts the power and the zero point, exactly.
//!
//! ```text
//!          nibbles 0 and 4, as they lie             nibbles 1 and 5, as they lie
//!  f16     1024 + q     · 1  − (1024 + zero)        1024 + 16 q  · 1/16  − (64 + zero)      then those of word >> 8
//!  bf16    128 + q      · 1  − (128 + zero)         has too few bits: word >> 4, >> 8, >> 12
//! ```
//!
//! Without an exponent, bits of a bf16 are that number, too, and the exponent's last one continues them: below 2⁻¹²⁵ all floats
//! are equally far apart. The largest power of two takes `q · 2⁻¹²⁹` to a quarter of `q`, so sums that are multiplied with 4 in
//! the end need no more shifts than those of f16:
//!
//! ```text
//!  bf16    128 + q  · 1/4  − (128 + zero) / 4       q · 2⁻¹²⁹  · 2¹²⁷  − zero / 4           then those of word >> 8
//! ```
//!
//! nf4: a table in shared memory has the pairs of all values, in each lane's bank a copy.

use super::Codes;
use super::bytes::Bytes;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Half, Kernel, Logic3, Reg};

/// The values of nf4 (bitsandbytes; QLoRA, Dettmers et al. 2023, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A zero point: a byte of a register.
#[derive(Clone, Copy)]
pub struct Zero<'k> {
    pub bytes: Reg<'k, u32>,
    /// Which one, the lowest being 0.
    pub byte: u32,
}

/// What is added to the floats that nibbles became.
#[derive(Clone, Copy)]
pub struct Offset<'k> {
    /// As they lie in the lower four bits of a byte.
    low: Reg<'k, u32>,
    /// In the upper four.
    high: Reg<'k, u32>,
}

/// Decodes words.
#[derive(Clone, Copy)]
pub struct Decoder<'k> {
    k: &'k Kernel,
    half: Half,
    how: How<'k>,
}

#[derive(Clone, Copy)]
enum How<'k> {
    /// What floats of the lower four bits of a byte are multiplied with, and those of the upper ones.
    Integers([Reg<'k, u32>; 2]),
    /// The same, to quarters.
    Quarters([Reg<'k, u32>; 2]),
    /// Where it begins, and a line has what is the lane's.
    Table {
        table: Table,
        begin: Reg<'k, u32>,
        lane: Reg<'k, u32>,
    },
    Bytes(Bytes<'k>),
}

impl<'k> Decoder<'k> {
    /// Bytes of shared memory that it needs.
    pub const fn shared_bytes(codes: Codes, table: Table) -> u32 {
        match codes {
            Codes::Int4 | Codes::Int8 | Codes::E4m3 => 0,
            Codes::Nf4 => table.bytes(),
        }
    }

    /// For a thread of a block of `threads`, all of which come here and meet if there is a table, `begin`ning there.
    pub fn new(
        k: &'k Kernel,
        half: Half,
        codes: Codes,
        (table, begin): (Table, Reg<'k, u32>),
        threads: u32,
    ) -> Self {
        let how = match codes {
            Codes::Int4 => How::Integers([
                k.var(pair(half, 0x3c00, 0x3f80)),
                k.var(pair(half, 0x2c00, 0x3f80)),
            ]),
            Codes::Nf4 => {
                table.fill(k, half, begin, threads);
                How::Table { table, begin, lane: k.lane() * 4 }
            }
            Codes::Int8 | Codes::E4m3 => How::Bytes(Bytes::new(k, half, codes)),
        };
        Self { k, half, how }
    }

    /// The same, for products of which all sums are multiplied with [`of_sums`](Self::of_sums), not only whole columns'.
    pub fn for_sums(self) -> Self {
        let (k, half) = (self.k, self.half);
        let how = match (self.how, half) {
            (How::Integers(_), Half::Bf16) => {
                How::Quarters([k.var(0x3e80_3e80), k.var(0x7f00_7f00)])
            }
            (how, _) => how,
        };
        Self { how, ..self }
    }

    /// What sums of products are to be multiplied with, unless it is 1.
    pub fn of_sums(&self) -> Option<f32> {
        match &self.how {
            How::Quarters(_) => Some(4.0),
            How::Bytes(bytes) => bytes.of_sums(),
            How::Integers(_) | How::Table { .. } => None,
        }
    }

    /// Of codes without zero points.
    pub fn symmetric(&self) -> Offset<'k> {
        let k = self.k;
        match (self.half, self.how) {
            (Half::F16, _) => Offset { low: k.var(0xe408_e408), high: k.var(0xd480_d480) },
            (Half::Bf16, How::Quarters(_)) => {
                Offset { low: k.var(0xc208_c208), high: k.var(0xc000_c000) }
            }
            (Half::Bf16, _) => {
                let both = k.var(0xc308_c308);
                Offset { low: both, high: both }
            }
        }
    }

    /// Of a zero point from 0 to 16.
    pub fn zero(&self, zero: Zero<'k>) -> Offset<'k> {
        let (k, half) = (self.k, self.half);
        // Below an exponent's upper byte it is added to a power of two whose last bit is 1.
        let below = |exponent: u32| k.prmt(zero.bytes, exponent, 0x4040 | (zero.byte * 0x0101));
        let high =
            |low, less: u32| k.fma_x2(half, low, k.var(pair(half, 0x3c00, 0x3f80)), k.var(less));
        match (half, self.how) {
            (Half::F16, _) => {
                let low = below(0xe4);
                Offset { low, high: high(low, 0x6380_6380) }
            }
            (Half::Bf16, How::Quarters(_)) => {
                let low = below(0xc2);
                // Without the quarter of 128.
                Offset { low, high: high(low, 0x4200_4200) }
            }
            (Half::Bf16, _) => {
                let both = below(0xc3);
                Offset { low: both, high: both }
            }
        }
    }

    /// The left operand of 16 rows of `K`, given the offsets of both of the lane's columns of `W`.
    pub fn fragment(&self, word: Reg<'k, u32>, offsets: [Offset<'k>; 2]) -> [Reg<'k, u32>; 4] {
        let (k, half, [first, second]) = (self.k, self.half, offsets);
        let low = |word, by, offset: Offset<'k>| {
            k.fma_x2(half, self.exponent(word, 0x000f_000f), by, offset.low)
        };
        let next = || word >> 8;
        match (self.how, half) {
            (How::Integers([by, _]), Half::Bf16) => [
                low(word, by, first),
                low(word >> 4, by, second),
                low(next(), by, first),
                low(word >> 12, by, second),
            ],
            (How::Integers([by, high]), Half::F16) | (How::Quarters([by, high]), _) => {
                let bits = |word| match half {
                    Half::F16 => self.exponent(word, 0x00f0_00f0),
                    Half::Bf16 => word & 0x00f0_00f0,
                };
                let high = |word, offset: Offset<'k>| k.fma_x2(half, bits(word), high, offset.high);
                let next = next();
                [low(word, by, first), high(word, second), low(next, by, first), high(next, second)]
            }
            (How::Table { table, begin, lane }, _) => {
                [0, 1, 2, 3].map(|byte| table.pair(word, byte, begin, lane))
            }
            (How::Bytes(_), _) => unreachable!("bytes have no nibbles"),
        }
    }

    /// That of codes of eight bits.
    pub fn bytes(&self) -> Option<&Bytes<'k>> {
        match &self.how {
            How::Bytes(bytes) => Some(bytes),
            How::Integers(_) | How::Quarters(_) | How::Table { .. } => None,
        }
    }

    /// Bits of a word as those of two floats.
    fn exponent(&self, word: Reg<'k, u32>, mask: u32) -> Reg<'k, u32> {
        self.k.lop3(Logic3::AND_OR, word, mask, pair(self.half, 0x6400, 0x4300))
    }
}

/// Of nf4: a line for each pair of codes, which is a byte, and there a copy of both values for each lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// Lines follow each other: 32 KiB.
    Narrow,
    /// They are 256 bytes apart, so that a byte of a word is one of an address: one instruction makes that. 64 KiB.
    Wide,
}

impl Table {
    /// Pairs of values.
    const PAIRS: u32 = 256;
    /// Bytes of the values alone, in f32, from which the table is made.
    const VALUES: u32 = 4 * NF4.len() as u32;

    /// Bytes from line to line.
    const fn pitch(self) -> u32 {
        match self {
            Self::Narrow => 4 * WARP,
            Self::Wide => 256,
        }
    }

    const fn bytes(self) -> u32 {
        Self::PAIRS * self.pitch() + Self::VALUES
    }

    /// The pair that byte `byte` of a word stands for.
    fn pair<'k>(
        self,
        word: Reg<'k, u32>,
        byte: u32,
        begin: Reg<'k, u32>,
        lane: Reg<'k, u32>,
    ) -> Reg<'k, u32> {
        let k = word.kernel();
        let place = match self {
            Self::Narrow => k.prmt(word, 0, 0x4440 | byte) * self.pitch() + lane,
            // Above it are zeros, which `lane` has there.
            Self::Wide => k.prmt(word, lane, 0x5504 | (byte << 4)),
        };
        k.ld_shared::<u32, 1>(place + begin)[0]
    }

    /// Writes the table: a block's threads do it together.
    fn fill(self, k: &Kernel, half: Half, table: Reg<u32>, threads: u32) {
        let values = table + Self::PAIRS * self.pitch();
        let thread = k.thread();
        k.if_(thread.lt(NF4.len() as u32), || {
            k.st_shared(values + thread * 4, [nf4_value(k, thread)]);
        });
        k.sync_block();
        // Four banks at once.
        let quads = WARP / 4;
        k.for_(thread / quads, Self::PAIRS, threads / quads, |number| {
            let [low, high] = [number % 16, number / 16].map(|code| {
                let [value] = k.ld_shared::<f32, 1>(values + code * 4);
                value
            });
            let both = k.cvt_rn_x2(half, low, high);
            k.st_shared(table + number * self.pitch() + thread % quads * 16, [both; 4]);
        });
        k.sync_block();
    }
}

/// Twice the bits of a number.
fn pair(half: Half, f16: u32, bf16: u32) -> u32 {
    let bits = match half {
        Half::F16 => f16,
        Half::Bf16 => bf16,
    };
    bits << 16 | bits
}

/// The value of a code in a register, of which [`NF4`] has as many as a warp has lanes or fewer.
pub fn nf4_value<'k>(k: &'k Kernel, code: Reg<'k, u32>) -> Reg<'k, f32> {
    let value = k.var(NF4[0]);
    for (code_of, &of) in (0..).zip(&NF4).skip(1) {
        k.when(code.eq(code_of), || value.set(of));
    }
    value
}
