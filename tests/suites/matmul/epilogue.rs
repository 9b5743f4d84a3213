//! Tables of what follows a product of f16 or bf16: bias, activation, the dtype of the result.

use candle_core::cpu::erf::erfc_f64;
use candle_core::{DType, Device, Error, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::{BATCHES, DTYPES, EMPTY};
use crate::suites::Layout::*;
use crate::suites::{
    Nd, Source, Tally, backward_of_sum, close, identical, pairs, plain_product, product,
    product_within, results_alone, ulp,
};

const OUT_DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

const ACTIVATIONS: [Option<Activation>; 5] = [
    None,
    Some(Activation::Relu),
    Some(Activation::GeluTanh),
    Some(Activation::GeluErf),
    Some(Activation::Silu),
];

/// Single rows and columns, and what hangs over the tiles.
const SINGLE: [[&[usize]; 2]; 5] = [
    [&[1, 1], &[1, 1]],
    [&[1, 129], &[129, 70]],
    [&[64, 17], &[17, 1]],
    [&[65, 63], &[63, 64]],
    [&[127, 128], &[128, 129]],
];

/// Where a vector lies: a name, and one of a dtype and length.
type Vector = (&'static str, fn(&mut Source, DType, usize) -> Result<Tensor>);

const VECTORS: [Vector; 5] = [
    ("plain", |s, dtype, n| s.tensor(dtype, &[1, n], Plain)?.squeeze(0)),
    ("inner row", |s, dtype, n| s.tensor(dtype, &[3, n], Narrowed)?.get(1)),
    ("column", |s, dtype, n| s.tensor(dtype, &[n, 3], Narrowed)?.narrow(1, 1, 1)?.squeeze(1)),
    ("every second", |s, dtype, n| s.tensor(dtype, &[1, n], Columns)?.squeeze(0)),
    ("one element", |s, dtype, n| s.tensor(dtype, &[1], Plain)?.broadcast_as(n)),
];

/// Does not begin with a batch of its own, so that it is one for all: [`VECTORS`]'s first.
const PLAIN: Vector = VECTORS[0];

fn all_dims() -> impl Iterator<Item = [&'static [usize]; 2]> {
    SINGLE.into_iter().chain(BATCHES).chain(EMPTY)
}

/// The formula.
fn act(activation: Option<Activation>, x: f64) -> f64 {
    match activation {
        None => x,
        // `f64::max` would turn NaN into 0.
        Some(Activation::Relu) if x <= 0.0 => 0.0,
        Some(Activation::Relu) => x,
        Some(Activation::GeluTanh) => {
            let slope = (2.0 / std::f64::consts::PI).sqrt();
            x / 2.0 * (1.0 + (slope * (x + 0.044715 * x * x * x)).tanh())
        }
        // 1 + erf(z), with all digits.
        Some(Activation::GeluErf) => x / 2.0 * erfc_f64(-x / 2f64.sqrt()),
        Some(Activation::Silu) => x / (1.0 + (-x).exp()),
        Some(other) => unreachable!("{other:?}"),
    }
}

/// The slope of the formula: a difference of it, but for the kink.
fn slope(activation: Option<Activation>, x: f64) -> f64 {
    const STEP: f64 = 1e-4;
    match activation {
        Some(Activation::Relu) => f64::from(x > 0.0),
        _ => (act(activation, x + STEP) - act(activation, x - STEP)) / (2.0 * STEP),
    }
}

/// candle's function.
fn plain_act(activation: Option<Activation>, t: &Tensor) -> Result<Tensor> {
    match activation {
        None => Ok(t.clone()),
        Some(Activation::Relu) => t.relu(),
        Some(Activation::GeluTanh) => t.gelu(),
        Some(Activation::GeluErf) => t.gelu_erf(),
        Some(Activation::Silu) => t.silu(),
        Some(other) => unreachable!("{other:?}"),
    }
}

fn add_row(c: &Nd, bias: Option<&Nd>) -> Nd {
    let mut c = c.clone();
    if let Some(bias) = bias {
        let n = bias.data.len().max(1);
        c.data.iter_mut().enumerate().for_each(|(i, x)| *x += bias.data[i % n]);
    }
    c
}

fn options(dtype: DType, bias: Option<&Tensor>, activation: Option<Activation>) -> MatmulOptions {
    let mut opts = MatmulOptions::default().out_dtype(dtype);
    opts.bias = bias.cloned();
    opts.activation = activation;
    opts
}

/// A bias of every stride, in f32 and the operands' dtype.
pub fn biases(device: &Device) {
    let mut tally = Tally::new("matmul biases", device);
    for (dtype, dims) in pairs(DTYPES, all_dims()) {
        for (bias_dtype, vector) in pairs([DType::F32, dtype], VECTORS) {
            let case = format!("{dtype:?} {dims:?} bias {bias_dtype:?} {}", vector.0);
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let a = source.tensor(dtype, dims[0], Plain)?;
                let b = source.tensor(dtype, dims[1], Transposed)?;
                let bias = (vector.1)(source, bias_dtype, dims[1][dims[1].len() - 1])?;
                check_forward(&a, &b, Some(&bias), None)
            });
        }
    }
    tally.finish();
}

/// Every activation with and without a bias, where inputs track gradients and where none does.
pub fn activations(device: &Device) {
    let mut tally = Tally::new("matmul activations", device);
    for (dtype, dims) in pairs(DTYPES, all_dims()) {
        for (activation, biased) in pairs(ACTIVATIONS, [false, true]) {
            let case = format!("{dtype:?} {dims:?} {activation:?} bias {biased}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                // Far out into the tails.
                let a = source.tensor_of(dtype, dims[0], Narrowed, |s| s.unit() * 8.0)?;
                let b = source.tensor(dtype, dims[1], Plain)?;
                let bias = (PLAIN.1)(source, DType::F32, dims[1][dims[1].len() - 1])?;
                check_forward(&a, &b, biased.then_some(&bias), activation)
            });
        }
    }
    tally.finish();
}

/// Infinities and NaN give what the formula gives.
pub fn activated_specials(device: &Device) {
    let mut tally = Tally::new("matmul activated specials", device);
    let sizes: [[usize; 3]; 4] = [[5, 7, 3], [16, 16, 16], [33, 1, 65], [300, 1, 7]];
    for ((dtype, [m, k, n]), activation) in pairs(pairs(DTYPES, sizes), ACTIVATIONS) {
        let case = format!("{dtype:?} {m}x{k}x{n} {activation:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let a = source.tensor_of(dtype, &[m, k], Narrowed, Source::special)?;
            let b = source.tensor_of(dtype, &[k, n], Plain, Source::unit)?;
            let bias = source.tensor_of(dtype, &[1, n], Columns, Source::special)?.squeeze(0)?;
            check_forward(&a, &b, None, activation)?;
            check_forward(&a, &b, Some(&bias), activation)
        });
    }
    tally.finish();
}

/// Every result dtype, untracked and tracked, against the f64 formula.
fn check_forward(
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    activation: Option<Activation>,
) -> Result<()> {
    let (na, nb, nbias) = (Nd::of(a)?, Nd::of(b)?, bias.map(Nd::of).transpose()?);
    let (sums, allowed) = product_within(&na, &nb, &nb)?;
    let before = add_row(&sums, nbias.as_ref());
    let want = before.map(|x| act(activation, x));
    let plain = {
        let sums = plain_product(&na.tensor(DType::F32)?, &nb.tensor(DType::F32)?)?;
        let before = match &nbias {
            Some(bias) => sums.broadcast_add(&bias.tensor(DType::F32)?)?,
            None => sums,
        };
        want.max_error(&plain_act(activation, &before)?)?
    };
    // No slope is over 1.13. The argument of the function is rounded, and so is what it is made of.
    let tolerance = |dtype: DType, i: usize| {
        let argument = ulp(DType::F32, before.data[i]) + ulp(DType::F32, sums.data[i]);
        1.13 * allowed + 2.0 * plain + argument + ulp(dtype, want.data[i])
    };
    for dtype in OUT_DTYPES {
        let opts = options(dtype, bias, activation);
        let tracked = Var::from_tensor(a)?;
        let mut results = vec![
            ("result", a.kaio_matmul_with(b, &opts)?),
            ("result of a tracked lhs", tracked.kaio_matmul_with(b, &opts)?),
        ];
        if let Some(bias) = bias {
            let opts = opts.bias(Var::from_tensor(bias)?.into_inner());
            results.push(("result of a tracked bias", a.kaio_matmul_with(b, &opts)?));
        }
        for (i, (name, c)) in results.iter().enumerate() {
            if c.dtype() != dtype {
                bail!("{name} is {:?}, wanted {dtype:?}", c.dtype());
            }
            if c.track_op() != (i > 0) {
                bail!("{name} tracks: {}", c.track_op());
            }
            // Where a gradient is tracked, what the activation is applied to is kept, rounded like the result.
            let kept = |i: usize| match activation {
                Some(_) if c.track_op() => 1.13 * ulp(dtype, before.data[i]),
                _ => 0.0,
            };
            close(name, c, &want, |i| tolerance(dtype, i) + kept(i))?;
        }
    }
    identical("lhs", a, &na)?;
    identical("rhs", b, &nb)?;
    match (bias, &nbias) {
        (Some(bias), Some(nbias)) => identical("bias", bias, nbias),
        _ => Ok(()),
    }
}

/// A loss that sends the result `w` as it is, or ones by a layout that repeats one.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Weighted,
    Sum,
}

/// Gradients of a, b and bias through every activation, from upstream gradients of every dtype.
pub fn epilogue_gradients(device: &Device) {
    let mut tally = Tally::new("matmul epilogue gradients", device);
    for (dtype, out_dtype) in pairs(DTYPES, OUT_DTYPES) {
        let base = Gradient {
            device,
            dims: [&[], &[]],
            dtype,
            bias: Some((DType::F32, PLAIN)),
            out_dtype,
            activation: None,
            tracked: [true; 3],
            loss: Loss::Weighted,
        };
        for (dims, activation) in pairs(all_dims(), ACTIVATIONS) {
            base.with(|case| (case.dims, case.activation) = (dims, activation)).check(&mut tally);
        }
        for (dims, loss) in pairs(BATCHES, [Loss::Weighted, Loss::Sum]) {
            base.with(|case| (case.dims, case.bias, case.loss) = (dims, None, loss))
                .check(&mut tally);
        }
        for (activation, (bias_dtype, vector)) in
            pairs(ACTIVATIONS, pairs([DType::F32, dtype], VECTORS))
        {
            let mut case = base.with(|case| case.activation = activation);
            case.dims = [&[2, 3, 17, 32], &[32, 5]];
            case.bias = Some((bias_dtype, vector));
            case.check(&mut tally);
            case.with(|case| case.loss = Loss::Sum).check(&mut tally);
        }
        for i in 0..8u8 {
            let tracked = [i & 1 != 0, i & 2 != 0, i & 4 != 0];
            let activation = ACTIVATIONS[i as usize % ACTIVATIONS.len()];
            let dims: [&[usize]; 2] = [&[3, 5, 7], &[2, 3, 7, 4]];
            base.with(|case| {
                (case.dims, case.activation, case.tracked) = (dims, activation, tracked)
            })
            .check(&mut tally);
        }
    }
    tally.finish();
}

/// The kernels of activations and of their gradients, of which each has a small case: rows that begin at multiples of 16 bytes
/// and others, some and many, with and without sums of columns.
pub fn activation_kinds(device: &Device) {
    let mut tally = Tally::new("matmul activation kinds", device);
    let sizes: [[&[usize]; 2]; 4] =
        [[&[5, 16], &[16, 40]], [&[300, 16], &[16, 24]], [&[70, 8], &[8, 3]], [&[1, 8], &[8, 1]]];
    for ((dtype, out_dtype), (dims, activation)) in
        pairs(pairs(DTYPES, OUT_DTYPES), pairs(sizes, ACTIVATIONS))
    {
        if results_alone() && dtype == DType::F16 && out_dtype != dtype {
            // To scale such a gradient takes more kernels than this crate's.
            continue;
        }
        for bias in [None, Some((DType::F32, PLAIN)), Some((dtype, PLAIN))] {
            let (tracked, loss) = ([true; 3], Loss::Weighted);
            Gradient { device, dims, dtype, bias, out_dtype, activation, tracked, loss }
                .check(&mut tally);
        }
    }
    tally.finish();
}

/// One gradient problem.
#[derive(Clone, Copy)]
struct Gradient<'a> {
    device: &'a Device,
    dims: [&'a [usize]; 2],
    dtype: DType,
    bias: Option<(DType, Vector)>,
    out_dtype: DType,
    activation: Option<Activation>,
    tracked: [bool; 3],
    loss: Loss,
}

impl Gradient<'_> {
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn check(self, tally: &mut Tally) {
        let Self { dims, dtype, out_dtype, activation, tracked, loss, .. } = self;
        if tracked == [false; 3] {
            return;
        }
        let bias = self.bias.map(|(dtype, (name, _))| (dtype, name));
        let case = format!(
            "{dtype:?} {dims:?} {bias:?} {out_dtype:?} {activation:?} {tracked:?} {loss:?}"
        );
        tally.case(&case, || self.run(&mut Source::new(&case, self.device)));
    }

    fn run(self, source: &mut Source) -> Result<()> {
        let Self { dims, dtype, out_dtype, activation, .. } = self;
        let n = dims[1][dims[1].len() - 1];
        let mut leaves = vec![
            source.tensor_of(dtype, dims[0], Plain, |s| s.unit() * 2.0)?,
            source.tensor(dtype, dims[1], Plain)?,
        ];
        if let Some((dtype, (_, vector))) = self.bias {
            leaves.push(vector(source, dtype, n)?);
        }
        let exact = leaves.iter().map(Nd::of).collect::<Result<Vec<_>>>()?;
        let before = add_row(&product(&exact[0], &exact[1]), exact.get(2));
        let weight = match self.loss {
            Loss::Weighted => source.tensor(out_dtype, &before.dims, Plain)?,
            Loss::Sum => Tensor::ones(before.dims.as_slice(), out_dtype, self.device)?,
        };
        // The gradient of what the activation is applied to, given that.
        let weights = Nd::of(&weight)?;
        let through = |before: &Nd| {
            let mut upstream = weights.clone();
            let pairs = upstream.data.iter_mut().zip(&before.data);
            pairs.for_each(|(w, &x)| *w *= slope(activation, x));
            upstream
        };
        let upstream = through(&before);

        let got = backward(&leaves, &self.tracked, |leaves| {
            let opts = options(out_dtype, leaves.get(2).copied(), activation);
            let c = leaves[0].kaio_matmul_with(leaves[1], &opts)?;
            match self.loss {
                // A backward pass from a tensor is that from its sum.
                Loss::Weighted => c * &weight,
                Loss::Sum => c.sum_all(),
            }
        })?;

        let cast = |dtype| exact.iter().map(|t| t.tensor(dtype)).collect::<Result<Vec<_>>>();
        let linear = |dtype, upstream: &Tensor| {
            backward(&cast(dtype)?, &[true; 3], |leaves| {
                (formula(leaves, None)? * upstream)?.sum_all()
            })
        };
        let want = linear(DType::F64, &upstream.tensor(DType::F64)?)?;
        // What the plain formula loses in f32, and what a kernel of the operands' dtype may lose
        // besides, which takes the upstream gradient in that dtype, of what was kept in the result's.
        let kept = through(&Nd::of(&before.tensor(out_dtype)?)?);
        let rounded = linear(DType::F32, &kept.tensor(dtype)?.to_dtype(DType::F32)?)?;
        let kept = linear(DType::F64, &kept.tensor(DType::F64)?)?;
        let plain = backward(&cast(DType::F32)?, &[true; 3], |leaves| {
            (formula(leaves, activation)? * Nd::of(&weight)?.tensor(DType::F32)?)?.sum_all()
        })?;
        for (i, name) in ["lhs", "rhs", "bias"].into_iter().enumerate().take(leaves.len()) {
            let (got, leaf) = (&got[i], leaves[i].dtype());
            // candle has no gradient for a row that was added to nothing.
            let or_zeros = |gradient: &Option<Tensor>| match gradient {
                Some(gradient) => Ok(gradient.clone()),
                None if before.data.is_empty() => {
                    Tensor::zeros(leaves[i].shape(), leaf, &Device::Cpu)
                }
                None => bail!("the formula has no gradient of {name}"),
            };
            let want = Nd::of(&or_zeros(&want[i])?)?;
            let error = |formula: &[Option<Tensor>]| {
                want.max_error(&or_zeros(&formula[i])?.to_dtype(leaf)?)
            };
            let mut allowed = 2.0 * error(&plain)?;
            match i {
                2 => {
                    allowed += 2.0 * error(&kept)?;
                    // The order of a sum in f32.
                    let rows = before.data.len() / n.max(1);
                    allowed += ulp(DType::F32, 1.0) / 2.0 * rows as f64 * upstream.peak();
                }
                _ => allowed += 2.0 * error(&rounded)?,
            }
            match got {
                Some(_) if !self.tracked[i] => bail!("a gradient of an untracked {name}"),
                Some(got) if got.dtype() != leaf => bail!("the gradient of {name} is {got:?}"),
                Some(got) => {
                    close(name, got, &want, |j| allowed + ulp(leaf, want.data[j]))?;
                }
                None if self.tracked[i] => bail!("no gradient of {name}"),
                None => {}
            }
        }
        Ok(())
    }
}

/// `act(a·b + bias)` in candle's ops.
fn formula(leaves: &[&Tensor], activation: Option<Activation>) -> Result<Tensor> {
    let sums = plain_product(leaves[0], leaves[1])?;
    let before = match leaves.get(2) {
        Some(bias) => sums.broadcast_add(bias)?,
        None => sums,
    };
    plain_act(activation, &before)
}

/// The gradients of what is lost, in sum, in its tracked leaves.
fn backward(
    leaves: &[Tensor],
    tracked: &[bool],
    loss: impl FnOnce(&[&Tensor]) -> Result<Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let vars = leaves.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let inputs: Vec<_> = vars
        .iter()
        .zip(tracked)
        .map(|(var, &tracked)| match tracked {
            true => var.as_tensor().clone(),
            false => var.as_detached_tensor(),
        })
        .collect();
    let grads = backward_of_sum(&loss(&inputs.iter().collect::<Vec<_>>())?)?;
    Ok::<_, Error>(vars.iter().map(|var| grads.get(var).cloned()).collect())
}
