//! The score modification: what becomes of the products of queries and keys before the softmax, and what
//! of a gradient on its way back.
//!
//! A fragment's rows are queries and its columns keys, or, for a kernel that computes the scores'
//! transpose, the other way round: [`ScoreParams::of_queries`] and [`ScoreParams::of_keys`].

use super::Name;
use super::mask::column;
use super::softmax::Softmax;
use crate::kernel::Element;
use crate::ptx::{Half, Kernel, Reg};

/// The score modification: what is done to products, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ScoreMod {
    /// The scale is 0 or less: it is applied before the largest score is looked for.
    pub scale_first: bool,
    /// `cap·tanh(score/cap)`.
    pub softcap: bool,
    /// What is added.
    pub bias: Option<Bias>,
    /// A slope of each head times the distance from the query's place is subtracted.
    pub alibi: bool,
}

/// How a bias lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bias {
    /// Its type.
    pub element: Element,
    /// Neighbouring keys' are side by side, an even number of them, and pairs are aligned: its address
    /// and its other strides are multiples of two elements.
    pub pairs: bool,
}

impl ScoreMod {
    /// Whether the softmax may multiply the products with the scale: nothing is done to them.
    pub fn plain(&self) -> bool {
        *self == Self::default()
    }

    /// Registers of a thread for the bias of `scores` scores on its way, and for its addresses.
    pub fn registers(&self, scores: u32) -> u32 {
        match self.bias {
            None => 0,
            Some(Bias { element: Element::Half(_), pairs: true }) => scores / 2 + 28,
            Some(Bias { element: Element::F32, pairs: true }) => scores + 28,
            Some(Bias { pairs: false, .. }) => scores + scores / 2 + 28,
        }
    }
}

/// The parameters.
#[derive(Clone, Copy)]
pub struct ScoreParams<'k> {
    score_mod: ScoreMod,
    element: Element,
    /// What products are multiplied with.
    scale: Reg<'k, f32>,
    cap: Option<Reg<'k, f32>>,
    bias: Option<Strided<'k, 4>>,
    slopes: Option<Strided<'k, 2>>,
}

/// What is in memory, and its strides in elements.
#[derive(Clone, Copy)]
struct Strided<'k, const N: usize> {
    address: Reg<'k, u64>,
    strides: [Reg<'k, u64>; N],
}

impl<'k, const N: usize> Strided<'k, N> {
    fn params(k: &'k Kernel, at: Name, strides: [Name; N]) -> Self {
        Self { address: k.pointer(at), strides: strides.map(|stride| k.param(stride)) }
    }

    /// The address of the element at the first indices.
    fn at<const I: usize>(&self, at: [Reg<'k, u32>; I], size: u32) -> Reg<'k, u64> {
        let elements = at.into_iter().zip(self.strides).map(|(i, stride)| i.wide() * stride);
        let elements = elements.reduce(|a, b| a + b).expect("there is an index");
        self.address + elements * u64::from(size)
    }
}

/// The modification of the scores of two rows of a fragment.
#[derive(Clone, Copy)]
pub struct FragmentScores<'k> {
    params: ScoreParams<'k>,
    /// Where the rows' biases begin, and the bytes from column to column.
    bias: Option<([Reg<'k, u64>; 2], Reg<'k, u64>)>,
    /// Whether neighbouring columns' biases are loaded together.
    pairs: bool,
    /// Minus ALiBi's slopes, to base 2.
    slopes: Option<[Reg<'k, f32>; 2]>,
    /// The columns that are the rows' places: those at no distance.
    places: [Reg<'k, i32>; 2],
}

/// A query.
#[derive(Clone, Copy)]
pub struct Query<'k> {
    /// The sequence.
    pub batch: Reg<'k, u32>,
    /// The head, of those of the queries.
    pub head: Reg<'k, u32>,
    /// The position in its sequence.
    pub row: Reg<'k, i32>,
}

impl<'k> ScoreParams<'k> {
    /// Declares the parameters that the scores need. The queries' elements say how exact scores have to be.
    pub fn params(k: &'k Kernel, score_mod: ScoreMod, element: Element) -> Self {
        let bias = [Name::BiasBatch, Name::BiasHead, Name::BiasQuery, Name::BiasKey];
        let slopes = [Name::SlopesBatch, Name::SlopesHead];
        Self {
            score_mod,
            element,
            scale: k.param(Name::Scale),
            cap: score_mod.softcap.then(|| k.param(Name::Cap)),
            bias: score_mod.bias.map(|_| Strided::params(k, Name::Bias, bias)),
            slopes: score_mod.alibi.then(|| Strided::params(k, Name::Slopes, slopes)),
        }
    }

    /// What scores are still to be multiplied with to be to base 2: the scale, where nothing else is done
    /// to products.
    pub fn scale_left(&self) -> Option<Reg<'k, f32>> {
        self.score_mod.plain().then_some(self.scale)
    }

    /// The softmax of scores, which scales them if nothing else is done to them.
    pub(super) fn softmax(&self) -> Softmax<'k> {
        Softmax::new(self.scale.kernel(), self.scale_left())
    }

    /// For fragments whose rows are queries, of a sequence that has `queries`: these two, which are
    /// `offset` keys before their places. A query past the last has the last one's bias.
    pub fn of_queries(
        &self,
        rows: [Query<'k>; 2],
        queries: Reg<'k, i32>,
        offset: Reg<'k, i32>,
    ) -> FragmentScores<'k> {
        let size = self.bias_size();
        let bias = self.bias.map(|memory| {
            let begins = rows.map(|Query { batch, head, row }| {
                memory.at([batch, head, row.min(queries - 1).or_zero()], size)
            });
            (begins, memory.strides[3] * u64::from(size))
        });
        let slopes = self
            .slopes
            .map(|memory| rows.map(|Query { batch, head, .. }| Self::slope(memory, batch, head)));
        FragmentScores {
            params: *self,
            bias,
            pairs: self.score_mod.bias.is_some_and(|bias| bias.pairs),
            slopes,
            places: rows.map(|query| query.row + offset),
        }
    }

    /// For fragments whose rows are keys, of a sequence that has `keys`: these two; the columns are queries
    /// of one head, which are `offset` keys before their places. A key past the last has the last one's
    /// bias.
    pub fn of_keys(
        &self,
        rows: [Reg<'k, i32>; 2],
        (batch, head): (Reg<'k, u32>, Reg<'k, u32>),
        keys: Reg<'k, i32>,
        offset: Reg<'k, i32>,
    ) -> FragmentScores<'k> {
        let size = self.bias_size();
        let bias = self.bias.map(|memory| {
            let [.., query, key] = memory.strides;
            let start = memory.at([batch, head], size);
            let key_bytes = key * u64::from(size);
            let begins = rows.map(|row| start + row.min(keys - 1).or_zero().wide() * key_bytes);
            (begins, query * u64::from(size))
        });
        let slopes = self.slopes.map(|memory| [Self::slope(memory, batch, head); 2]);
        let places = rows.map(|row| row - offset);
        FragmentScores { params: *self, bias, pairs: false, slopes, places }
    }

    /// A score to base 2 and its bias, which is to base e.
    ///
    /// −∞ hides a key. A finite number that stands for it, such as f32's lowest one, does not: log₂e would carry
    /// it to −∞, and a row that has no other would give 0 where the formula gives the mean of the values.
    fn add_bias(&self, bias: Reg<'k, f32>, score: Reg<'k, f32>) -> Reg<'k, f32> {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        // What is still finite to base 2.
        const LOWEST: f32 = -2.358e38;
        match self.score_mod.bias.map(|bias| bias.element) {
            // f16 ends at 65504.
            Some(Element::Half(Half::F16)) => bias.fma(LOG2_E, score),
            // The last term is −∞ again where that was raised, and NaN where that was lost; of a finite bias it
            // is at most 4, and lost in the rounding.
            _ => bias.fma(f32::MIN_POSITIVE, bias.max(LOWEST).fma(LOG2_E, score)),
        }
    }

    /// Bytes of an element of the bias.
    fn bias_size(&self) -> u32 {
        self.score_mod.bias.map_or(0, |bias| bias.element.size())
    }

    /// Minus a head's slope, to base 2.
    fn slope(memory: Strided<'k, 2>, batch: Reg<'k, u32>, head: Reg<'k, u32>) -> Reg<'k, f32> {
        let [slope] = batch.kernel().ld_global_nc::<f32, 1>(memory.at([batch, head], 4));
        slope * -std::f32::consts::LOG2_E
    }
}

/// A bias on its way to the scores.
pub struct LoadedBias<'k>(Loaded<'k>);

enum Loaded<'k> {
    Nothing,
    Pairs(Half, Vec<Reg<'k, u32>>),
    Halves(Half, Vec<Reg<'k, u16>>),
    Floats(Vec<Reg<'k, f32>>),
}

impl<'k> Loaded<'k> {
    fn get(&self, i: usize) -> Option<Reg<'k, f32>> {
        match self {
            Self::Nothing => None,
            Self::Pairs(half, pairs) => {
                let pair = pairs[i / 2];
                Some(pair.kernel().unpack(*half, pair)[i % 2])
            }
            Self::Halves(half, all) => Some(all[i].kernel().widen(*half, all[i])),
            Self::Floats(all) => Some(all[i]),
        }
    }
}

impl<'k> FragmentScores<'k> {
    /// Begins to load the bias of `count` scores, the first of which is of column `first`; where there is
    /// a limit, only of columns before that.
    pub fn load(
        &self,
        count: usize,
        first: Reg<'k, i32>,
        limit: Option<Reg<'k, i32>>,
    ) -> LoadedBias<'k> {
        LoadedBias(self.load_bias(count, first, limit))
    }

    fn load_bias(
        &self,
        count: usize,
        first: Reg<'k, i32>,
        limit: Option<Reg<'k, i32>>,
    ) -> Loaded<'k> {
        let (Some((rows, stride)), Some(bias)) = (self.bias, self.params.score_mod.bias) else {
            return Loaded::Nothing;
        };
        let k = stride.kernel();
        let rows = rows.map(|row| row + first.cast::<u32>().wide() * stride);
        let left = limit.map(|limit| limit - first);
        match (bias.element, self.pairs) {
            (Element::Half(half), true) => {
                let all = (0..count / 2).map(|pair| {
                    let (row, col) = (rows[pair % 2], column(2 * pair));
                    let [both] = guarded(left, col, || k.ld_global_nc(row.at(2 * i64::from(col))));
                    both
                });
                Loaded::Pairs(half, all.collect())
            }
            (Element::F32, true) => {
                let all = (0..count / 2).flat_map(|pair| {
                    let (row, col) = (rows[pair % 2], column(2 * pair));
                    guarded(left, col, || k.ld_global_nc::<f32, 2>(row.at(4 * i64::from(col))))
                });
                Loaded::Floats(all.collect())
            }
            (element, false) => {
                let mut next = rows;
                let mut addresses = Vec::with_capacity(count);
                for quad in 0..count / 4 {
                    for row in &mut next {
                        if quad > 0 {
                            *row = *row + stride * 8u64;
                        }
                        addresses.extend([*row, *row + stride]);
                    }
                }
                let all = addresses.into_iter().enumerate();
                match element {
                    Element::F32 => Loaded::Floats(
                        all.flat_map(|(i, at)| {
                            guarded(left, column(i), || k.ld_global_nc::<f32, 1>(at))
                        })
                        .collect(),
                    ),
                    Element::Half(half) => Loaded::Halves(
                        half,
                        all.flat_map(|(i, at)| {
                            guarded(left, column(i), || k.ld_global_nc::<u16, 1>(at))
                        })
                        .collect(),
                    ),
                }
            }
        }
    }

    /// Turns products into scores to base 2, in place, unless that is left to the softmax
    /// ([`ScoreParams::scale_left`]). The thread's first column is `first`.
    pub fn apply(&self, scores: &[Reg<'k, f32>], bias: &LoadedBias<'k>, first: Reg<'k, i32>) {
        self.modify(scores, bias, first, |_| ());
    }

    /// The same, and gives by what each score changes with its product, beside the scale.
    pub fn apply_with_slopes(
        &self,
        scores: &[Reg<'k, f32>],
        bias: &LoadedBias<'k>,
        first: Reg<'k, i32>,
    ) -> ScoreSlopes<'k> {
        let mut slopes = Vec::new();
        self.modify(scores, bias, first, |tanh| slopes.push((tanh * tanh).fma(-1.0, 1.0)));
        ScoreSlopes(slopes)
    }

    /// `capped` is given each score's hyperbolic tangent, if there is a soft cap.
    fn modify(
        &self,
        scores: &[Reg<'k, f32>],
        bias: &LoadedBias<'k>,
        first: Reg<'k, i32>,
        mut capped: impl FnMut(Reg<'k, f32>),
    ) {
        let ScoreParams { score_mod: what, scale, cap, .. } = self.params;
        if what.plain() {
            return;
        }
        let distances = self.slopes.map(|slopes| {
            std::array::from_fn::<_, 2, _>(|row| {
                (slopes[row], (self.places[row] - first).to_float())
            })
        });
        for (i, score) in scores.iter().enumerate() {
            let mut x = *score * scale;
            if let Some(cap) = cap {
                let tanh = match self.params.element {
                    Element::Half(_) => tanh(x),
                    Element::F32 => tanh_relative(x),
                };
                capped(tanh);
                x = tanh * cap;
            }
            if let Some(bias) = bias.0.get(i) {
                x = self.params.add_bias(bias, x);
            }
            if let Some(rows) = distances {
                let (slope, place) = rows[i / 2 % 2];
                x = (place - column(i) as f32).abs().fma(slope, x);
            }
            score.set(x);
        }
    }
}

/// By what scores change with their products, beside the scale: `1 - tanh²` under a soft cap, else 1.
pub struct ScoreSlopes<'k>(Vec<Reg<'k, f32>>);

impl<'k> ScoreSlopes<'k> {
    /// Turns the gradients of scores, which are those of the bias, too, into those of the products, but for
    /// the scale: in place.
    pub fn back(&self, gradients: &[Reg<'k, f32>]) {
        gradients.iter().zip(&self.0).for_each(|(gradient, &slope)| gradient.scale(slope));
    }
}

/// Loads what is before the limit.
fn guarded<'k, T>(left: Option<Reg<'k, i32>>, col: i32, load: impl FnOnce() -> T) -> T {
    match left {
        None => load(),
        Some(left) => left.kernel().when(left.gt(col), load),
    }
}

/// `1 - 2 / (1 + e^2x)`: to a few times 2^-24, absolutely. (`tanh.approx` is good to 2^-11.)
fn tanh(x: Reg<f32>) -> Reg<f32> {
    let t = (x * (2.0 * std::f32::consts::LOG2_E)).exp2_ftz();
    (t + 1.0).recip().fma(-2.0, 1.0)
}

/// The same, but relatively: near 0 an odd polynomial, a minimax fit to 1.6 · 2^-24.
pub(in crate::kernel) fn tanh_relative(x: Reg<f32>) -> Reg<f32> {
    const NEAR: f32 = 0.55;
    let square = x * x;
    let [third, fifth, seventh, ninth] =
        [-0.333_329_6, 0.133_209_42, -0.052_684_143, 0.016_458_757];
    let p = square.fma(ninth, seventh).fma(square, fifth).fma(square, third);
    let near = (square * x).fma(p, x);
    let far = tanh(x);
    x.kernel().select(x.abs().ge(NEAR), far, near)
}
