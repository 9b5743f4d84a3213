//! Tables of attention and its gradients.

use candle_core::DType::{self, BF16, F16, F32, F64};
use candle_core::{D, Device, Error, Result, Tensor, Var, bail};
use candle_nn::ops::softmax;
use kaio_candle::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::common::Layout::{self, *};
use crate::common::{Nd, Source, Tally, close, identical, ulp};

const DTYPES: [DType; 3] = [F32, F16, BF16];

/// `[]`, `[Hq]` or `[B, Hq]`; Hkv; `[Sq, Sk, D, Dv]`.
type Sizes = (&'static [usize], usize, [usize; 4]);

/// Rows and head dimensions around the tiles, causal rows that see nothing, keys shared by 1, 2, 4
/// and all query heads.
const SIZES: [Sizes; 20] = [
    (&[], 1, [1, 1, 1, 1]),
    (&[], 1, [1, 300, 64, 64]),
    (&[], 1, [300, 1, 8, 16]),
    (&[], 1, [65, 64, 80, 80]),
    (&[1], 1, [16, 16, 16, 16]),
    (&[3], 3, [15, 16, 8, 8]),
    (&[4], 2, [17, 15, 16, 40]),
    (&[6], 1, [1, 17, 128, 64]),
    (&[1, 1], 1, [64, 257, 256, 256]),
    (&[1, 1], 1, [257, 300, 1, 128]),
    (&[1, 1], 1, [300, 300, 64, 64]),
    (&[1, 2], 1, [257, 64, 40, 1]),
    (&[1, 2], 2, [65, 63, 64, 80]),
    (&[1, 2], 2, [128, 128, 128, 128]),
    (&[1, 4], 1, [128, 127, 8, 64]),
    (&[1, 8], 2, [63, 65, 16, 16]),
    (&[2, 1], 1, [127, 128, 80, 40]),
    (&[2, 4], 1, [16, 63, 40, 8]),
    (&[2, 6], 3, [17, 65, 8, 16]),
    (&[3, 2], 2, [1, 16, 64, 64]),
];

const EMPTY: [Sizes; 10] = [
    (&[], 1, [0, 4, 8, 8]),
    (&[], 1, [3, 0, 8, 8]),
    (&[], 1, [3, 4, 8, 0]),
    (&[], 1, [0, 0, 8, 0]),
    (&[0], 0, [3, 4, 8, 8]),
    (&[0], 2, [3, 4, 8, 8]),
    (&[2, 0], 0, [3, 4, 8, 8]),
    (&[0, 4], 2, [3, 4, 8, 8]),
    (&[2, 4], 2, [0, 4, 8, 8]),
    (&[2, 4], 2, [3, 0, 8, 8]),
];

const SMALL: Sizes = (&[2, 4], 2, [9, 13, 8, 24]);

pub fn sizes(device: &Device) {
    run("flash_attn sizes", device, grid(&SIZES));
}

pub fn empty(device: &Device) {
    run("flash_attn empty", device, grid(&EMPTY));
}

/// Views of all kinds, also of one tensor as q, k and v.
pub fn layouts(device: &Device) {
    let each = Layout::ALL.iter().flat_map(|&l| {
        [[l, l, l], [l, Plain, Plain], [Plain, l, Transposed], [Narrowed, Expanded, l]].map(Leaves::Each)
    });
    let problems = each.flat_map(|leaves| {
        let ranks: [Sizes; 3] = [(&[], 1, [9, 13, 8, 24]), (&[4], 2, [9, 13, 8, 24]), SMALL];
        grid(&ranks).map(move |problem| Problem { leaves, ..problem })
    });
    let square: Sizes = (&[2, 3], 3, [17, 17, 16, 16]);
    let one = [Leaves::Fused, Leaves::Shared].into_iter();
    let one = one.flat_map(|leaves| grid(&[square]).map(move |problem| Problem { leaves, ..problem }));
    run("flash_attn layouts", device, problems.chain(one.collect::<Vec<_>>()));
}

/// Upstream gradients of several forms, and each input alone tracked.
pub fn upstream(device: &Device) {
    let losses = [Loss::Weighted, Loss::Sum, Loss::Transposed, Loss::Cast(F16), Loss::Cast(F32)];
    let tracked = [[true; 3], [true, false, false], [false, true, false], [false, false, true]];
    let problems = losses.into_iter().flat_map(|loss| {
        let problems = tracked.into_iter();
        problems.flat_map(move |tracked| grid(&[SMALL]).map(move |p| Problem { loss, tracked, ..p }))
    });
    run("flash_attn upstream", device, problems);
}

/// Uniform, inverted and one-hot weights; the largest scores overflow a naive `exp`.
pub fn scales(device: &Device) {
    let problems = [0.0, -1.0, 1e-30, 0.1, 40.0, 1e3].into_iter().flat_map(|scale| {
        grid(&[SMALL, (&[2], 2, [40, 300, 8, 8])]).map(move |p| Problem { scale: Some(scale), ..p })
    });
    run("flash_attn scales", device, problems);
}

/// Random shapes and layouts.
pub fn random(device: &Device) {
    let mut tally = Tally::new("flash_attn random", device);
    let layout = || prop::sample::select(Layout::ALL.as_slice());
    let strategy = (
        prop::sample::select(DTYPES.as_slice()),
        (0..3usize, 0..3usize, 1..3usize, 1..4usize),
        [0..70usize, 0..70, 1..40, 0..40],
        [layout(), layout(), layout()],
        any::<bool>(),
    );
    let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
    let ran = TestRunner::new(config).run(&strategy, |(dtype, heads, [sq, sk, d, dv], layouts, causal)| {
        let (batch_rank, batch, hkv, group) = heads;
        let dims = |heads, rows, cols| [batch, heads, rows, cols][2 - batch_rank..].to_vec();
        let group = if batch_rank == 0 { 1 } else { group };
        let problem = Problem {
            dims: [dims(hkv * group, sq, d), dims(hkv, sk, d), dims(hkv, sk, dv)],
            leaves: Leaves::Each(layouts),
            causal,
            ..Problem::new(dtype, SMALL)
        };
        problem.check(device).map_err(|e| TestCaseError::fail(format!("{problem:?}: {e}")))
    });
    tally.case("64 random problems", || ran.map_err(Error::msg));
    tally.finish();
}

/// NaN and infinities in one row of q, k, v or the upstream gradient reach what sees that row, as in
/// the plain formula, and nothing else.
pub fn specials(device: &Device) {
    let mut tally = Tally::new("flash_attn specials", device);
    for problem in grid(&[(&[2], 1, [6, 20, 8, 8]), (&[], 1, [70, 300, 8, 8])]) {
        let mut source = Source::new(&format!("{problem:?}"), device);
        let clean = problem.inputs(&mut source).expect("inputs");
        let allowed = problem.reference(&clean).and_then(|want| problem.allowed(&clean, &want));
        let allowed = allowed.expect("plain formula");
        for (which, name) in ["q", "k", "v", "upstream"].into_iter().enumerate() {
            let mut dims = clean[which].dims().to_vec();
            let rows = dims.remove(dims.len() - 2);
            for row in [0, rows / 2, rows - 1] {
                for special in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    tally.case(format!("{special} in row {row} of {name}, {problem:?}"), || {
                        let mut inputs = clean.clone();
                        inputs[which] = replace(&clean[which], row..row + 1, special)?;
                        problem.compare(&inputs, &problem.reference(&inputs)?, &allowed)
                    });
                }
            }
        }
        // A whole block of keys without a usable score, before and behind usable ones.
        for keys in [0..problem.dims[1][problem.dims[1].len() - 2] - 2, 5..6] {
            tally.case(format!("NaN in keys {keys:?}, {problem:?}"), || {
                let mut inputs = clean.clone();
                inputs[1] = replace(&clean[1], keys, f64::NAN)?;
                problem.compare(&inputs, &problem.reference(&inputs)?, &allowed)
            });
        }
    }
    tally.finish();
}

/// Rows whose visible scores are all −∞ are NaN, as in the plain formula. Not so on the GPU.
pub fn all_minus_infinity(device: &Device) {
    let mut tally = Tally::new("flash_attn all -inf", device);
    for problem in grid(&[(&[2], 1, [6, 20, 8, 8]), (&[], 1, [70, 300, 8, 8])]) {
        tally.case(format!("{problem:?}"), || {
            let mut source = Source::new(&format!("{problem:?}"), device);
            let clean = problem.inputs(&mut source)?;
            let allowed = problem.allowed(&clean, &problem.reference(&clean)?)?;
            let mut inputs = clean.clone();
            let [sq, sk] = [0, 1].map(|i| problem.dims[i][problem.dims[i].len() - 2]);
            inputs[0] = replace(&clean[0], 0..sq, 1.0)?;
            for keys in [0..sk, 0..sk - 2, 0..sk - sq] {
                inputs[1] = replace(&clean[1], keys, f64::NEG_INFINITY)?;
                problem.compare(&inputs, &problem.reference(&inputs)?, &allowed)?;
            }
            Ok(())
        });
    }
    tally.finish();
}

/// A copy whose first column holds `value` in `rows`, in every head.
fn replace(t: &Tensor, rows: std::ops::Range<usize>, value: f64) -> Result<Tensor> {
    let mut nd = Nd::of(t)?;
    let (len, cols) = (nd.dims[nd.dims.len() - 2], nd.dims[nd.dims.len() - 1]);
    for (i, row) in nd.data.chunks_mut(cols).enumerate() {
        if rows.contains(&(i % len)) {
            row[0] = value;
        }
    }
    nd.tensor(t.dtype())?.to_device(t.device())
}

/// Gradients, and the closed form that the other suites compare with, against central differences.
pub fn finite_differences(device: &Device) {
    let mut tally = Tally::new("flash_attn finite differences", device);
    let sizes: [Sizes; 4] = [
        (&[], 1, [1, 3, 2, 2]),
        (&[], 1, [4, 3, 3, 1]),
        (&[4], 2, [3, 5, 2, 3]),
        (&[2, 2], 1, [2, 2, 3, 2]),
    ];
    for problem in grid(&sizes) {
        tally.case(format!("{problem:?}"), || {
            let mut source = Source::new(&format!("{problem:?}"), device);
            let inputs = problem.inputs(&mut source)?;
            let mut want = problem.reference(&inputs)?;
            let mut loops = Loops::new(&problem.qkv(&inputs)?, problem.causal, None)?;
            let weights = Nd::of(&inputs[3])?.data;
            for leaf in 0..3 {
                for i in 0..loops.x[leaf].data.len() {
                    let mut slope = 0.0;
                    for step in [-1e-5, 1e-5] {
                        let kept = loops.x[leaf].data[i];
                        loops.x[leaf].data[i] += step;
                        slope += dot(&loops.forward().data, &weights) / (2.0 * step);
                        loops.x[leaf].data[i] = kept;
                    }
                    let closed = std::mem::replace(&mut want[1 + leaf].data[i], slope);
                    if (slope - closed).abs() > 1e-9 {
                        bail!("the loops' gradient {leaf} at {i} is {closed}, wanted {slope}");
                    }
                }
            }
            problem.compare(&inputs, &want, &problem.allowed(&inputs, &want)?)
        });
    }
    tally.finish();
}

/// Batch dimensions of q, k, v and the result; `[Sq, Sk, D, Dv]`.
type Cross = ([&'static [usize]; 4], [usize; 4]);

const CROSS: [Cross; 16] = [
    ([&[], &[], &[], &[]], [1, 1, 1, 1]),
    ([&[], &[], &[], &[]], [16, 16, 16, 16]),
    ([&[], &[], &[], &[]], [17, 65, 64, 40]),
    ([&[], &[], &[], &[]], [64, 385, 64, 64]),
    ([&[], &[], &[], &[]], [5, 777, 128, 128]),
    ([&[], &[], &[], &[]], [129, 40, 80, 16]),
    ([&[3], &[3], &[3], &[3]], [15, 33, 8, 8]),
    ([&[3], &[], &[], &[3]], [15, 33, 8, 8]),
    ([&[], &[3], &[2, 1], &[2, 3]], [15, 33, 8, 24]),
    ([&[2, 1], &[3], &[3], &[2, 3]], [33, 15, 8, 8]),
    ([&[2, 1, 1], &[3, 1], &[4], &[2, 3, 4]], [7, 9, 5, 3]),
    ([&[2, 2, 2], &[1, 2, 1], &[2, 1, 2], &[2, 2, 2]], [7, 9, 5, 3]),
    ([&[0], &[1], &[0], &[0]], [7, 9, 5, 3]),
    ([&[2], &[2], &[2], &[2]], [0, 9, 5, 3]),
    ([&[2], &[2], &[2], &[2]], [7, 0, 5, 3]),
    ([&[2], &[2], &[2], &[2]], [7, 9, 5, 0]),
];

/// f16 to f32 over broadcast batches, in every layout.
pub fn attention_tc(device: &Device) {
    let mut tally = Tally::new("attention_tc", device);
    for ([q, k, v, batch], [sq, sk, d, dv]) in CROSS {
        let dims = [[q, &[sq, d]].concat(), [k, &[sk, d]].concat(), [v, &[sk, dv]].concat()];
        for (i, layout) in Layout::ALL.into_iter().enumerate() {
            let layouts = [layout, Layout::ALL[(i + 2) % 8], Layout::ALL[(i + 5) % 8]];
            for causal in [false, true] {
                let case = format!("{dims:?} {layouts:?} causal {causal}");
                tally.case(&case, || {
                    let mut source = Source::new(&case, device);
                    let mut input = |i: usize| source.tensor(F16, &dims[i], layouts[i]);
                    let inputs = [input(0)?, input(1)?, input(2)?];
                    let before = [Nd::of(&inputs[0])?, Nd::of(&inputs[1])?, Nd::of(&inputs[2])?];
                    let out = inputs[0].kaio_attention_tc(&inputs[1], &inputs[2], causal)?;
                    if out.dtype() != F32 {
                        bail!("the result is {:?}", out.dtype());
                    }
                    let wide = |i: usize| {
                        let matrix = &dims[i][dims[i].len() - 2..];
                        inputs[i].broadcast_as([batch, matrix].concat())
                    };
                    let wide = [wide(0)?, wide(1)?, wide(2)?];
                    let want = Loops::new(&wide, causal, None)?.forward();
                    let allowed = match want.data.is_empty() || sk == 0 {
                        true => 0.0,
                        false => 2.0 * want.max_error(&plain(&wide, causal, None)?)?,
                    };
                    close("out", &out, &want, |i| allowed + ulp(F32, want.data[i]))?;
                    (0..3).try_for_each(|i| identical("input", &inputs[i], &before[i]))
                });
            }
        }
    }
    tally.finish();
}

fn run(suite: &'static str, device: &Device, problems: impl IntoIterator<Item = Problem>) {
    let mut tally = Tally::new(suite, device);
    for problem in problems {
        tally.case(format!("{problem:?}"), || problem.check(device));
    }
    tally.finish();
}

/// All sizes in all dtypes, causal and not.
fn grid(sizes: &[Sizes]) -> impl Iterator<Item = Problem> + Clone + use<> {
    let sizes = sizes.to_vec();
    sizes.into_iter().flat_map(|sizes| {
        DTYPES.into_iter().flat_map(move |dtype| {
            [false, true].map(|causal| Problem { causal, ..Problem::new(dtype, sizes) })
        })
    })
}

/// How q, k and v are views of the tensors that track gradients.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    /// A tensor for each.
    Each([Layout; 3]),
    /// One `[B, S, 3, H, D]`.
    Fused,
    /// One tensor is all three.
    Shared,
}

/// A scalar that is linear in the result: what its gradient looks like when it arrives.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Weighted,
    Sum,
    Transposed,
    Cast(DType),
}

impl Loss {
    fn of(self, out: &Tensor, weights: &Tensor) -> Result<Tensor> {
        match self {
            Self::Weighted => (out * weights)?.sum_all(),
            Self::Sum => out.sum_all(),
            Self::Transposed => (out.t()? * weights.t()?)?.sum_all(),
            Self::Cast(dtype) => (out.to_dtype(dtype)? * weights.to_dtype(dtype)?)?.sum_all(),
        }
    }
}

#[derive(Clone, Debug)]
struct Problem {
    dtype: DType,
    /// Of q, k and v.
    dims: [Vec<usize>; 3],
    causal: bool,
    scale: Option<f32>,
    leaves: Leaves,
    tracked: [bool; 3],
    loss: Loss,
}

impl Problem {
    fn new(dtype: DType, (heads, hkv, [sq, sk, d, dv]): Sizes) -> Self {
        let mut shared = heads.to_vec();
        shared.last_mut().into_iter().for_each(|h| *h = hkv);
        Self {
            dtype,
            dims: [[heads, &[sq, d]].concat(), [&shared[..], &[sk, d]].concat(), [&shared[..], &[sk, dv]].concat()],
            causal: false,
            scale: None,
            leaves: Leaves::Each([Plain; 3]),
            tracked: [true; 3],
            loss: Loss::Weighted,
        }
    }

    fn check(&self, device: &Device) -> Result<()> {
        let inputs = self.inputs(&mut Source::new(&format!("{self:?}"), device))?;
        let want = self.reference(&inputs)?;
        self.compare(&inputs, &want, &self.allowed(&inputs, &want)?)
    }

    /// The leaves, NaN where no view shows them, and behind them the loss's weights.
    fn inputs(&self, source: &mut Source) -> Result<Vec<Tensor>> {
        let (q, v) = (&self.dims[0], &self.dims[2]);
        let leaves = match (self.leaves, &q[..]) {
            (Leaves::Each(layouts), _) => (0..3).map(|i| layouts[i].base(&self.dims[i])).collect(),
            (Leaves::Fused, &[b, h, s, d]) => vec![vec![b, s, 3, h, d]],
            _ => vec![q.clone()],
        };
        let blank: Vec<_> = leaves.iter().map(|dims| Nd::full(dims, 0.0)).collect();
        let shown = self.pull(&blank, &self.dims.each_ref().map(|dims| Nd::full(dims, 1.0)))?;
        let leaf = |(dims, shown): (Vec<_>, Nd)| {
            let mut shown = shown.data.into_iter();
            source.tensor_of(self.dtype, &dims, Plain, |source| match shown.next() {
                Some(0.0) => f64::NAN,
                _ => source.unit(),
            })
        };
        let mut inputs = leaves.into_iter().zip(shown).map(leaf).collect::<Result<Vec<_>>>()?;
        let out = [&q[..q.len() - 1], &v[v.len() - 1..]].concat();
        inputs.push(source.tensor(self.dtype, &out, Plain)?);
        Ok(inputs)
    }

    fn qkv(&self, leaves: &[Tensor]) -> Result<[Tensor; 3]> {
        let view = |i: usize| match self.leaves {
            Leaves::Each(layouts) => layouts[i].view(&leaves[i], &self.dims[i]),
            Leaves::Fused => leaves[0].narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2),
            Leaves::Shared => Ok(leaves[0].clone()),
        };
        Ok([view(0)?, view(1)?, view(2)?])
    }

    /// The result and the gradients of the tracked leaves.
    fn run(&self, inputs: &[Tensor], op: impl Fn(&[Tensor; 3]) -> Result<Tensor>) -> Result<Vec<Option<Tensor>>> {
        let (weights, leaves) = inputs.split_last().expect("the weights come last");
        let mut vars = leaves.to_vec();
        for (var, _) in vars.iter_mut().zip(self.tracked).filter(|(_, tracked)| *tracked) {
            *var = Var::from_tensor(var)?.into_inner();
        }
        let out = op(&self.qkv(&vars)?)?;
        let grads = self.loss.of(&out, weights)?.backward()?;
        for (var, leaf) in vars.iter().zip(leaves) {
            identical("input", var, &Nd::of(leaf)?)?;
        }
        Ok(std::iter::once(Some(out)).chain(vars.iter().map(|var| grads.get(var).cloned())).collect())
    }

    /// What [`run`](Self::run) gives, by loops in f64.
    fn reference(&self, inputs: &[Tensor]) -> Result<Vec<Nd>> {
        let exact = inputs.iter().map(Nd::of).collect::<Result<Vec<_>>>()?;
        let (weights, leaves) = exact.split_last().expect("the weights come last");
        let tensors = leaves.iter().map(|leaf| leaf.tensor(F64)).collect::<Result<Vec<_>>>()?;
        let loops = Loops::new(&self.qkv(&tensors)?, self.causal, self.scale)?;
        let out = loops.forward();
        let leaf = Var::from_tensor(&out.tensor(F64)?)?;
        let grads = self.loss.of(&leaf, &weights.tensor(F64)?)?.backward()?;
        let grads = loops.backward(&Nd::of(grads.get(&leaf).expect("the loss depends on it"))?);
        Ok(std::iter::once(out).chain(self.pull(leaves, &grads)?).collect())
    }

    /// The leaves' gradients, given those of q, k and v: sums over what the views repeat.
    fn pull(&self, leaves: &[Nd], grads: &[Nd; 3]) -> Result<Vec<Nd>> {
        let var = |leaf: &Nd| Ok(Var::from_tensor(&leaf.tensor(F64)?)?.into_inner());
        let vars = leaves.iter().map(var).collect::<Result<Vec<_>>>()?;
        let mut sum = Tensor::zeros((), F64, &Device::Cpu)?;
        for (view, grad) in self.qkv(&vars)?.iter().zip(grads) {
            sum = (sum + (view * grad.tensor(F64)?)?.sum_all()?)?;
        }
        let store = sum.backward()?;
        vars.iter().map(|var| Nd::of(store.get(var).expect("the sum depends on it"))).collect()
    }

    /// Twice the largest error of the plain formula in the same dtype, and f32's rounding of terms
    /// that cancel: all inputs are within ±1.
    fn allowed(&self, inputs: &[Tensor], want: &[Nd]) -> Result<Vec<f64>> {
        if self.dims.iter().flatten().any(|&len| len == 0) {
            return Ok(vec![0.0; want.len()]);
        }
        let got = self.run(inputs, |qkv| plain(qkv, self.causal, self.scale))?;
        let scale = self.scale.map_or(1.0, |s| f64::from(s).abs().max(1.0));
        let unit = ulp(F32, 1.0) * scale * self.dims[2][self.dims[2].len() - 1] as f64;
        let error = |(want, got): (&Nd, &Option<Tensor>)| match got {
            Some(got) => Ok(2.0 * want.max_error(got)? + unit),
            None => Ok(0.0),
        };
        want.iter().zip(&got).map(error).collect()
    }

    fn compare(&self, inputs: &[Tensor], want: &[Nd], allowed: &[f64]) -> Result<()> {
        let got = self.run(inputs, |[q, k, v]| match self.scale {
            None => q.kaio_flash_attn(k, v, self.causal),
            Some(scale) => {
                let opts = FlashAttnOptions::default().causal(self.causal).softmax_scale(scale);
                q.kaio_flash_attn_with(k, v, &opts)
            }
        })?;
        for (i, got) in got.into_iter().enumerate() {
            let name = ["out", "gradient 0", "gradient 1", "gradient 2"][i];
            match (got, i == 0 || self.tracked[i - 1]) {
                (None, false) => {}
                (Some(got), true) if got.dtype() == self.dtype => {
                    let tol = |at: usize| allowed[i] + ulp(self.dtype, want[i].data[at]);
                    close(name, &got, &want[i], tol)?;
                }
                (got, _) => bail!("{name} is {:?}", got.map(|t| t.dtype())),
            }
        }
        Ok(())
    }
}

/// The formula in candle's ops, in the dtype of its inputs. Rows that see no key are left out and
/// become zeros.
fn plain([q, k, v]: &[Tensor; 3], causal: bool, scale: Option<f32>) -> Result<Tensor> {
    let (rows, sq, sk) = (q.rank() - 2, q.dim(D::Minus2)?, k.dim(D::Minus2)?);
    let repeat = |t: &Tensor| {
        let (head, matrix) = (rows.saturating_sub(1), &t.dims()[rows..]);
        let group = q.dims()[head] / t.dims()[head].max(1);
        match rows {
            0 => t.contiguous(),
            _ => {
                let wide = [&t.dims()[..rows], &[group], matrix].concat();
                t.unsqueeze(rows)?.broadcast_as(wide)?.reshape([&q.dims()[..rows], matrix].concat())
            }
        }
    };
    let (k, v) = (repeat(k)?, repeat(v)?);
    let blind = if causal { sq.saturating_sub(sk) } else { 0 };
    let q = q.narrow(rows, blind, sq - blind)?.contiguous()?;
    let scale = scale.map_or(1.0 / (q.dim(D::Minus1)? as f64).sqrt(), f64::from);
    let mut scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
    if causal {
        let hidden = |i, j| if j + sq > i + sk { f32::NEG_INFINITY } else { 0.0 };
        let mask = (blind..sq).flat_map(|i| (0..sk).map(move |j| hidden(i, j)));
        let mask = Tensor::from_iter(mask, q.device())?.reshape((sq - blind, sk))?;
        scores = scores.broadcast_add(&mask.to_dtype(q.dtype())?)?;
    }
    softmax(&scores, D::Minus1)?.matmul(&v)?.pad_with_zeros(rows, blind, 0)
}

/// Attention and its gradients by loops in f64 over the keys that each row sees.
struct Loops {
    /// q, k and v.
    x: [Nd; 3],
    group: usize,
    causal: bool,
    scale: f64,
}

impl Loops {
    fn new(qkv: &[Tensor; 3], causal: bool, scale: Option<f32>) -> Result<Self> {
        let x = [Nd::of(&qkv[0])?, Nd::of(&qkv[1])?, Nd::of(&qkv[2])?];
        let heads = |nd: &Nd| nd.dims[..nd.dims.len() - 2].iter().product::<usize>();
        let group = heads(&x[0]) / heads(&x[1]).max(1);
        let d = x[0].dims[x[0].dims.len() - 1] as f64;
        Ok(Self { x, group, causal, scale: scale.map_or(1.0 / d.sqrt(), f64::from) })
    }

    /// Row `i` of q, k or v, counted over all heads.
    fn row(&self, which: usize, i: usize) -> &[f64] {
        let cols = self.cols(which);
        &self.x[which].data[i * cols..][..cols]
    }

    fn cols(&self, which: usize) -> usize {
        *self.x[which].dims.last().expect("rank 2 and more")
    }

    /// The query rows over all heads, each with the key rows that it sees and their weights.
    fn rows(&self) -> impl Iterator<Item = (usize, Vec<(usize, f64)>)> + '_ {
        let len = |nd: &Nd| nd.dims[nd.dims.len() - 2];
        let (sq, sk) = (len(&self.x[0]), len(&self.x[1]));
        let count = self.x[0].dims[..self.x[0].dims.len() - 1].iter().product();
        (0..count).map(move |i| {
            let seen = if self.causal { (i % sq + 1 + sk).saturating_sub(sq) } else { sk };
            let keys = (0..seen).map(|j| i / sq / self.group * sk + j);
            let score = |j| self.scale * dot(self.row(0, i), self.row(1, j));
            let scores: Vec<_> = keys.map(|j| (j, score(j))).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |max, &(_, s)| max.max(s));
            let sum: f64 = scores.iter().map(|(_, s)| (s - max).exp()).sum();
            (i, scores.into_iter().map(|(j, s)| (j, (s - max).exp() / sum)).collect())
        })
    }

    fn forward(&self) -> Nd {
        let (q, dv) = (&self.x[0].dims, self.cols(2));
        let mut out = Nd::full(&[&q[..q.len() - 1], &[dv]].concat(), 0.0);
        for (i, weights) in self.rows() {
            for (j, p) in weights {
                add(&mut out.data[i * dv..][..dv], p, self.row(2, j));
            }
        }
        out
    }

    fn backward(&self, grad: &Nd) -> [Nd; 3] {
        let (d, dv) = (self.cols(0), self.cols(2));
        let [mut dq, mut dk, mut dval] = self.x.each_ref().map(|nd| Nd::full(&nd.dims, 0.0));
        for (i, weights) in self.rows() {
            let grad = &grad.data[i * dv..][..dv];
            let dp = |j| dot(grad, self.row(2, j));
            let mean: f64 = weights.iter().map(|&(j, p)| p * dp(j)).sum();
            for (j, p) in weights {
                let ds = p * (dp(j) - mean) * self.scale;
                add(&mut dq.data[i * d..][..d], ds, self.row(1, j));
                add(&mut dk.data[j * d..][..d], ds, self.row(0, i));
                add(&mut dval.data[j * dv..][..dv], p, grad);
            }
        }
        [dq, dk, dval]
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(out: &mut [f64], factor: f64, row: &[f64]) {
    out.iter_mut().zip(row).for_each(|(out, x)| *out += factor * x);
}
