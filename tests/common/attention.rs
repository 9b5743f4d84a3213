//! Tables of attention and its gradients.

use std::ops::Range;

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
    let layouts = [Plain, Narrowed, Rows, Columns, Expanded].map(|l| Leaves::Each([l; 3]));
    let problems = layouts.into_iter().flat_map(|leaves| {
        grid(&EMPTY).map(move |problem| Problem { leaves, ..problem })
    });
    run("flash_attn empty", device, problems);
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
        let mut case = |which: usize, rows: Range<usize>, special: f64| {
            let name = ["q", "k", "v", "upstream"][which];
            tally.case(format!("{special} in rows {rows:?} of {name}, {problem:?}"), || {
                let mut inputs = clean.clone();
                inputs[which] = replace(&clean[which], rows, special)?;
                problem.compare(&inputs, &problem.reference(&inputs)?, &allowed)
            });
        };
        let ([sq, _], [sk, _]) = (matrix(&problem.dims[0]), matrix(&problem.dims[1]));
        for (which, rows) in [sq, sk, sk].into_iter().enumerate() {
            for row in [0, rows / 2, rows - 1] {
                case(which, row..row + 1, f64::NAN);
                case(which, row..row + 1, f64::INFINITY);
                case(which, row..row + 1, f64::NEG_INFINITY);
            }
        }
        // An infinite one would give NaN or infinities, as sums are ordered.
        case(3, 0..1, f64::NAN);
        case(3, sq - 1..sq, f64::NAN);
        // Whole blocks of keys without a score that is a number, before and behind such that have one.
        for block in [4, 16, 32, 64, 128, 256].into_iter().filter(|&len| len < sk) {
            case(1, 0..block, f64::NAN);
            case(1, sk - block..sk, f64::NAN);
            case(1, 0..block, f64::NEG_INFINITY);
            case(1, sk - block..sk, f64::NEG_INFINITY);
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
            let ([sq, _], [sk, _]) = (matrix(&problem.dims[0]), matrix(&problem.dims[1]));
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
fn replace(t: &Tensor, rows: Range<usize>, value: f64) -> Result<Tensor> {
    let mut nd = Nd::of(t)?;
    let [len, cols] = matrix(&nd.dims);
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
            let x = nds(&problem.qkv(&inputs)?)?;
            let weights = Nd::of(&inputs[3])?.data;
            for leaf in 0..3 {
                for i in 0..x[leaf].data.len() {
                    let moved = |by: f64| {
                        let mut x = x.clone();
                        x[leaf].data[i] += by;
                        dot(&Loops::new(x, problem.causal, None).forward().data, &weights)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let closed = std::mem::replace(&mut want[1 + leaf].value.data[i], slope);
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
                    let before = nds(&inputs)?;
                    let out = inputs[0].kaio_attention_tc(&inputs[1], &inputs[2], causal)?;
                    if out.dtype() != F32 {
                        bail!("the result is {:?}", out.dtype());
                    }
                    let wide = |i: usize| {
                        let matrix = &dims[i][dims[i].len() - 2..];
                        inputs[i].broadcast_as([batch, matrix].concat())
                    };
                    let wide = [wide(0)?, wide(1)?, wide(2)?];
                    let want = Loops::new(nds(&wide)?, causal, None).forward();
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

/// An exact result.
struct Want {
    value: Nd,
    /// The sum of the magnitudes of its terms.
    size: Nd,
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

    /// Whether a dimension is zero: then all gradients are.
    fn is_empty(&self) -> bool {
        self.dims.iter().flatten().any(|&len| len == 0)
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
                Some(0.0) if !self.is_empty() => f64::NAN,
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
    fn reference(&self, inputs: &[Tensor]) -> Result<Vec<Want>> {
        let exact = inputs.iter().map(Nd::of).collect::<Result<Vec<_>>>()?;
        let (weights, leaves) = exact.split_last().expect("the weights come last");
        if self.is_empty() {
            let zeros = std::iter::once(weights).chain(leaves).map(|nd| Nd::full(&nd.dims, 0.0));
            return Ok(zeros.map(|zero| Want { size: zero.clone(), value: zero }).collect());
        }
        let tensors = leaves.iter().map(|leaf| leaf.tensor(F64)).collect::<Result<Vec<_>>>()?;
        let loops = Loops::new(nds(&self.qkv(&tensors)?)?, self.causal, self.scale);
        let value = loops.forward();
        let out = Var::from_tensor(&value.tensor(F64)?)?;
        let grads = self.loss.of(&out, &weights.tensor(F64)?)?.backward()?;
        let grad = Nd::of(grads.get(&out).expect("the loss depends on it"))?;
        let grads = self.pull(leaves, &loops.backward(&grad, &value, -1.0))?;

        let sizes = loops.sizes();
        let size = sizes.forward();
        // The gradients start from a result that was rounded to the dtype.
        let mut rounded = value.map(|x| x.abs() * ulp(self.dtype, 1.0) / ulp(F32, 1.0));
        rounded.data.iter_mut().zip(&size.data).for_each(|(x, size)| *x += size);
        let grad_sizes = self.pull(leaves, &sizes.backward(&grad.map(f64::abs), &rounded, 1.0))?;
        let grads = grads.into_iter().zip(grad_sizes).map(|(value, size)| Want { value, size });
        Ok(std::iter::once(Want { value, size }).chain(grads).collect())
    }

    /// The leaves' gradients, given those of q, k and v: sums over what the views repeat.
    fn pull(&self, leaves: &[Nd], grads: &[Nd; 3]) -> Result<Vec<Nd>> {
        if self.is_empty() {
            return Ok(leaves.iter().map(|leaf| Nd::full(&leaf.dims, 0.0)).collect());
        }
        let var = |leaf: &Nd| Ok(Var::from_tensor(&leaf.tensor(F64)?)?.into_inner());
        let vars = leaves.iter().map(var).collect::<Result<Vec<_>>>()?;
        let mut sum = Tensor::zeros((), F64, &Device::Cpu)?;
        for (view, grad) in self.qkv(&vars)?.iter().zip(grads) {
            sum = (sum + (view * grad.tensor(F64)?)?.sum_all()?)?;
        }
        let store = sum.backward()?;
        vars.iter().map(|var| Nd::of(store.get(var).expect("the sum depends on it"))).collect()
    }

    /// Twice the largest error of the plain formula in the same dtype.
    fn allowed(&self, inputs: &[Tensor], want: &[Want]) -> Result<Vec<f64>> {
        if self.is_empty() {
            return Ok(vec![0.0; want.len()]);
        }
        let got = self.run(inputs, |qkv| plain(qkv, self.causal, self.scale))?;
        let error = |(want, got): (&Want, &Option<Tensor>)| match got {
            Some(got) => Ok(2.0 * want.value.max_error(got)?),
            None => Ok(0.0),
        };
        want.iter().zip(&got).map(error).collect()
    }

    fn compare(&self, inputs: &[Tensor], want: &[Want], allowed: &[f64]) -> Result<()> {
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
                    let Want { value, size } = &want[i];
                    let rounding = |at: usize| {
                        ulp(self.dtype, value.data[at]) + ulp(F32, 1.0) * size.data[at]
                    };
                    close(name, &got, value, |at| allowed[i] + rounding(at))?;
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
    let matrices = |t: &Tensor| t.reshape(((), t.dim(D::Minus2)?, t.dim(D::Minus1)?));
    let (shape, q, k, v) = (q.dims(), matrices(q)?, matrices(k)?, matrices(v)?);
    let ((heads, sq, d), (kv_heads, sk, dv)) = (q.dims3()?, v.dims3()?);
    let repeat = |t: Tensor| {
        let (rows, cols) = (t.dim(1)?, t.dim(2)?);
        let wide = t.unsqueeze(1)?.broadcast_as((kv_heads, heads / kv_heads, rows, cols))?;
        wide.reshape((heads, rows, cols))
    };
    let blind = if causal { sq.saturating_sub(sk) } else { 0 };
    let q = q.narrow(1, blind, sq - blind)?.contiguous()?;
    let scale = scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
    let mut scores = (q.matmul(&repeat(k)?.t()?.contiguous()?)? * scale)?;
    if causal {
        let hidden = |i, j| if j + sq > i + sk { f32::NEG_INFINITY } else { 0.0 };
        let mask = (blind..sq).flat_map(|i| (0..sk).map(move |j| hidden(i, j)));
        let mask = Tensor::from_iter(mask, q.device())?.reshape((sq - blind, sk))?;
        scores = scores.broadcast_add(&mask.to_dtype(q.dtype())?)?;
    }
    let out = softmax(&scores, D::Minus1)?.matmul(&repeat(v)?)?.pad_with_zeros(1, blind, 0)?;
    out.reshape([&shape[..shape.len() - 1], &[dv]].concat())
}

/// Attention and its gradients by loops in f64 over the keys that each row sees.
struct Loops {
    /// q, k and v.
    x: [Nd; 3],
    scale: f64,
    /// For each query row, counted over all heads: the key rows that it sees and their weights.
    weights: Vec<Vec<(usize, f64)>>,
}

impl Loops {
    fn new(x: [Nd; 3], causal: bool, scale: Option<f32>) -> Self {
        let heads = |nd: &Nd| nd.dims[..nd.dims.len() - 2].iter().product::<usize>();
        let ([sq, d], [sk, _]) = (matrix(&x[0].dims), matrix(&x[1].dims));
        let group = heads(&x[0]) / heads(&x[1]).max(1);
        let scale = scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
        let weights = |i: usize| {
            let seen = if causal { (i % sq + 1 + sk).saturating_sub(sq) } else { sk };
            let keys = (0..seen).map(|j| i / sq / group * sk + j);
            let scores: Vec<_> =
                keys.map(|j| (j, scale * dot(x[0].row(i), x[1].row(j)))).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |max, &(_, s)| max.max(s));
            let sum: f64 = scores.iter().map(|(_, s)| (s - max).exp()).sum();
            scores.into_iter().map(|(j, s)| (j, (s - max).exp() / sum)).collect()
        };
        let weights = (0..heads(&x[0]) * sq).map(weights).collect();
        Self { x, scale, weights }
    }

    /// The same sums over the magnitudes of their terms, to which rounding errors are in proportion.
    /// A score that is off by its ulp takes its weight with it.
    fn sizes(&self) -> Self {
        let (x, scale) = (self.x.each_ref().map(|nd| nd.map(f64::abs)), self.scale.abs());
        let size = |i, (j, p)| match p {
            0.0 => (j, 0.0),
            _ => (j, p * (1.0 + scale * dot(x[0].row(i), x[1].row(j)))),
        };
        let sizes = |(i, weights): (usize, &Vec<_>)| weights.iter().map(|&w| size(i, w)).collect();
        let weights = self.weights.iter().enumerate().map(sizes).collect();
        Self { x, scale, weights }
    }

    fn forward(&self) -> Nd {
        let (q, [_, dv]) = (&self.x[0].dims, matrix(&self.x[2].dims));
        let mut out = Nd::full(&[&q[..q.len() - 1], &[dv]].concat(), 0.0);
        for (i, weights) in self.weights.iter().enumerate() {
            for &(j, p) in weights {
                out.add(i, p, self.x[2].row(j));
            }
        }
        out
    }

    /// `sign` is that of the term which all scores of a row lose: −1, or 1 for sizes.
    fn backward(&self, grad: &Nd, out: &Nd, sign: f64) -> [Nd; 3] {
        let [q, k, v] = &self.x;
        let [mut dq, mut dk, mut dv] = self.x.each_ref().map(|nd| Nd::full(&nd.dims, 0.0));
        for (i, weights) in self.weights.iter().enumerate() {
            let (grad, out) = (grad.row(i), out.row(i));
            let shared = sign * dot(grad, out);
            for &(j, p) in weights {
                let ds = p * (dot(grad, v.row(j)) + shared) * self.scale;
                dq.add(i, ds, k.row(j));
                dk.add(j, ds, q.row(i));
                dv.add(j, p, grad);
            }
        }
        [dq, dk, dv]
    }
}

/// Rows and columns.
fn matrix(dims: &[usize]) -> [usize; 2] {
    [dims[dims.len() - 2], dims[dims.len() - 1]]
}

/// Row `i` of all rows of all matrices.
impl Nd {
    fn row(&self, i: usize) -> &[f64] {
        let [_, cols] = matrix(&self.dims);
        &self.data[i * cols..][..cols]
    }

    fn add(&mut self, i: usize, factor: f64, row: &[f64]) {
        let out = &mut self.data[i * row.len()..][..row.len()];
        out.iter_mut().zip(row).for_each(|(out, x)| *out += factor * x);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn nds(qkv: &[Tensor; 3]) -> Result<[Nd; 3]> {
    Ok([Nd::of(&qkv[0])?, Nd::of(&qkv[1])?, Nd::of(&qkv[2])?])
}
