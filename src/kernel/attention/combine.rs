//! The results of the parts of the keys, put together: `Σ exp(lseᵢ - lse)·Oᵢ`, in the order of the
//! parts.

use super::Name;
use crate::kernel::Element;
use crate::kernel::name::given;
use crate::ptx::{Kernel, Reg, Source, Target};

/// Rows of a block, each of a warp.
const ROWS: u32 = 4;
const LANES: u32 = 32;
/// Columns of a lane.
const UNIT: u32 = 4;
/// Parts that are loaded together.
const TOGETHER: u32 = 4;
/// The most parts.
pub const MAX_PARTS: u32 = 128;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The result's type.
    pub out: Element,
    /// Elements of a value, a multiple of 8, at most 256.
    pub value_dim: u32,
    /// Parts, in units of 32: up to 4.
    pub rounds: u32,
    /// Whether the logarithms of the sums are stored.
    pub lse: bool,
}

impl Config {
    /// The kernel that combines `parts` parts.
    pub fn new(out: Element, value_dim: u32, parts: u32, lse: bool) -> Self {
        Self { out, value_dim, rounds: parts.div_ceil(LANES), lse }
    }

    /// `combine d128 parts32, →bf16 lse`
    pub fn name(&self) -> String {
        let (dim, parts) = (self.value_dim, LANES * self.rounds);
        let lse = given(self.lse, " lse");
        format!("combine d{dim} parts{parts}, →{}{lse}", self.out.name())
    }

    /// Blocks of the grid for `rows` rows.
    pub fn blocks(rows: u32) -> u32 {
        rows.div_ceil(ROWS)
    }
}

/// The kernel. Its parameters are those of [`Name`]; strides of the result are multiples of 16 bytes.
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("combine", Target::Sm80, ROWS * LANES);
    // Without a bound ptxas takes 32 or 40 registers for sm_80, and spills.
    k.blocks_per_sm(4);
    let (partial, sums) = (k.pointer(Name::PartsAt), k.pointer(Name::LseAt));
    let out = k.pointer(Name::Out);
    let strides = [Name::OutRow, Name::OutHead, Name::OutBatch].map(|name| k.param::<u64>(name));
    let lse = config.lse.then(|| k.pointer(Name::Lse));
    let parts = k.param::<u32>(Name::Parts);
    let (queries, heads, rows) =
        (k.param(Name::Queries), k.param(Name::Heads), k.param(Name::Rows));
    let (thread, lane) = (k.thread(), k.lane());
    let row: Reg<u32> = k.block_x() * ROWS + k.shfl_idx(thread / LANES, 0);
    k.if_(row.lt(rows), || {
        let weights: Vec<_> = (0..config.rounds)
            .map(|round| {
                let part = lane + round * LANES;
                let at = sums + (part.min(parts - 1).mul_wide(rows) + row.wide()) * 4u64;
                let [sum] = k.ld_global_nc::<f32, 1>(at);
                k.select(part.lt(parts), sum, f32::NEG_INFINITY)
            })
            .collect();
        // Of rows without keys all are -∞.
        let max = across_warp(&weights, |a, b| a.max(b));
        let used = k.select(max.gt(f32::NEG_INFINITY), max, 0.0);
        let weights: Vec<_> = weights
            .into_iter()
            .map(|sum| ((sum - used) * std::f32::consts::LOG2_E).exp2_ftz())
            .collect();
        let sum = across_warp(&weights, |a, b| a + b);
        let none = sum.eq(0.0);
        let inverse = k.select(none, k.var(0f32), sum.recip());
        if let Some(lse) = lse {
            let total = sum.log2().fma(std::f32::consts::LN_2, used);
            let total = k.select(none, k.var(f32::NEG_INFINITY), total);
            k.when(lane.eq(0), || k.st_global(lse.element(row, 4), [total]));
        }

        let width = config.value_dim;
        let columns: Vec<_> =
            (0..width.div_ceil(LANES * UNIT)).map(|i| (lane + i * LANES) * UNIT).collect();
        let begins: Vec<_> = columns
            .iter()
            .map(|&col| {
                let at = row.mul_wide(width) + col.min(width - UNIT).wide();
                partial + at * 4u64
            })
            .collect();
        let result: Vec<_> =
            columns.iter().map(|_| [0f32; UNIT as usize].map(|x| k.var(x))).collect();
        let stride = rows.mul_wide(width) * 4u64;
        for (round, &weight) in (0..).zip(&weights) {
            let first = round * LANES;
            k.for_(first, parts.min(first + LANES), TOGETHER, |part| {
                let loaded: Vec<_> = (0..TOGETHER)
                    .map(|i| {
                        // Parts past the last one weigh nothing.
                        let at = (part + i).min(parts - 1).wide() * stride;
                        let weight = k.shfl_idx(weight.cast(), part + i - first).cast::<f32>();
                        let values =
                            begins.iter().map(|&begin| k.ld_global_nc::<f32, 4>(begin + at));
                        (weight, values.collect::<Vec<_>>())
                    })
                    .collect();
                for (weight, values) in loaded {
                    for (sums, values) in result.iter().zip(values) {
                        sums.iter().zip(values).for_each(|(sum, x)| sum.set(x.fma(weight, *sum)));
                    }
                }
            });
        }

        let (query, head) = (row % queries, row / queries);
        let index = [query, head % heads, head / heads];
        let start = index.into_iter().zip(strides).map(|(i, stride)| i.wide() * stride);
        let start = start.reduce(|a, b| a + b).expect("three of them");
        for (&col, sums) in columns.iter().zip(&result) {
            let at = out + (start + col.wide()) * u64::from(config.out.size());
            let values = sums.map(|sum| sum * inverse);
            k.if_(col.lt(width), || match config.out {
                Element::F32 => k.st_global(at, values),
                Element::Half(half) => {
                    let [a, b, c, d] = values;
                    k.st_global(at, [k.cvt_rn_x2(half, a, b), k.cvt_rn_x2(half, c, d)]);
                }
            });
        }
    });
    k.finish()
}

/// Combines the values of all lanes.
fn across_warp<'k>(
    values: &[Reg<'k, f32>],
    combine: impl Fn(Reg<'k, f32>, Reg<'k, f32>) -> Reg<'k, f32>,
) -> Reg<'k, f32> {
    let mine = values.iter().copied().reduce(&combine).expect("there is a value");
    let others = [1, 2, 4, 8, 16].into_iter();
    others.fold(mine, |x, xor| combine(x, x.kernel().shfl_bfly(x, xor)))
}
