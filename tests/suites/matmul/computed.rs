//! Operands that are cast inside.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kaio_candle::{prelude::*, train};

use super::{DTYPES, EMPTY};
use crate::suites::Layout::*;
use crate::suites::{Nd, Source, Tally, backward_of_sum, close, pairs, results_alone, ulp};

const DIMS: [[&[usize]; 2]; 4] = [
    [&[5, 40], &[40, 24]],
    [&[2, 3, 7, 16], &[16, 9]],
    [&[3, 5, 7], &[2, 3, 7, 4]],
    [&[1, 1], &[1, 1]],
];

/// What the same product of operands that were cast before gives, to the bit, and its gradients, but for their rounding.
pub fn computed(device: &Device) {
    let mut tally = Tally::new("matmul compute dtypes", device);
    if results_alone() {
        return tally.inapplicable("gradients take more kernels than this crate's");
    }
    let operands = [[DType::F32, DType::F32], [DType::BF16, DType::F32], [DType::F32, DType::F16]];
    for ((compute, of), (dims, layout)) in
        pairs(pairs(DTYPES, operands), pairs(DIMS.into_iter().chain(EMPTY), [Plain, Transposed]))
    {
        let case = format!("{of:?} in {compute:?} {dims:?} {layout:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let n = dims[1][dims[1].len() - 1];
            let bias = source.tensor(DType::F32, &[1, n], Plain)?.squeeze(0)?;
            let vars = [
                Var::from_tensor(&source.tensor(of[0], dims[0], Plain)?)?,
                Var::from_tensor(&base(source, of[1], dims[1], layout)?)?,
                Var::from_tensor(&bias)?,
            ];
            for activation in [None, Some(Activation::Silu)] {
                check(&vars, compute, layout, activation, source)?;
            }
            Ok(())
        });
    }
    tally.case("once", || once(&mut Source::new("once", device)));
    tally.finish();
}

/// Of which the operand is a view.
fn base(
    source: &mut Source,
    dtype: DType,
    dims: &[usize],
    layout: crate::suites::Layout,
) -> Result<Tensor> {
    let mut dims = dims.to_vec();
    if let Transposed = layout {
        let last = dims.len() - 1;
        dims.swap(last - 1, last);
    }
    source.tensor(dtype, &dims, Plain)
}

fn check(
    vars: &[Var; 3],
    compute: DType,
    layout: crate::suites::Layout,
    activation: Option<Activation>,
    source: &mut Source,
) -> Result<()> {
    let [a, b, bias] = vars.each_ref().map(Var::as_tensor);
    let b = if let Transposed = layout { b.t()? } else { b.clone() };
    let mut opts = MatmulOptions::default().bias(bias.clone());
    opts.activation = activation;
    let cast = |t: &Tensor| match t.elem_count() {
        0 => Tensor::zeros(t.shape(), compute, t.device()),
        _ => t.to_dtype(compute),
    };
    // In the memory order that the operand has.
    let cast_b = cast(vars[1].as_tensor())?;
    let cast_b = if let Transposed = layout { cast_b.t()? } else { cast_b };
    let want = cast(a)?.kaio_matmul_with(&cast_b, &opts)?;
    let got = a.kaio_matmul_with(&b, &opts.clone().compute_dtype(compute))?;
    close("result", &got, &Nd::of(&want)?, |_| 0.0)?;
    let opts = MatmulOptions::default().compute_dtype(compute);
    let untracked = a.detach().kaio_matmul_with(&b.detach(), &opts);
    if untracked?.track_op() {
        bail!("a product of constants tracks a gradient");
    }
    let weight = source.tensor(DType::F32, got.dims(), Plain)?;
    let [got, want] = [backward_of_sum(&(got * &weight)?)?, backward_of_sum(&(want * &weight)?)?];
    for (i, var) in vars.iter().enumerate() {
        let Some(grad) = got.get(var) else { bail!("no gradient of {i}") };
        if grad.dtype() != var.dtype() {
            bail!("the gradient of {i} is {grad:?}");
        }
        // A cast of nothing has no gradient.
        let Some(want) = want.get(var) else { continue };
        let (want, least) = (Nd::of(want)?, [compute, var.dtype()]);
        let rounding =
            |x: f64| if i == 2 { 0.0 } else { least.map(|of| ulp(of, x)).into_iter().sum() };
        close(&format!("gradient {i}"), grad, &want, |j| rounding(want.data[j]))?;
        // What is summed in f32 is not rounded to what was multiplied.
        let rounded = grad.to_dtype(compute)?.to_dtype(DType::F32)?;
        let exact = (grad.to_dtype(DType::F32)? - rounded)?.abs()?.sum_all()?.to_scalar::<f32>()?;
        let many = i < 2 && grad.elem_count() > 20 && want.peak() > 0.0;
        if many && var.dtype() == DType::F32 && exact == 0.0 {
            bail!("the gradient of {i} was rounded to {compute:?}");
        }
    }
    Ok(())
}

/// Within `cast_once` a weight is what it was when it was first used, and after it what it is.
fn once(source: &mut Source) -> Result<()> {
    let x = source.tensor(DType::F32, &[4, 16], Plain)?;
    let w = Var::from_tensor(&source.tensor(DType::F32, &[16, 16], Plain)?)?;
    let opts = MatmulOptions::default().compute_dtype(DType::BF16);
    let products = || -> Result<[Tensor; 2]> {
        Ok([x.kaio_matmul_with(&w, &opts)?, x.kaio_matmul_with(&w.t()?, &opts)?])
    };
    let same = |name: &str, got: [Tensor; 2], want: &[Tensor; 2]| {
        got.iter().zip(want).try_for_each(|(got, want)| close(name, got, &Nd::of(want)?, |_| 0.0))
    };
    let before = products()?;
    let after = train::cast_once(|| -> Result<_> {
        same("first", products()?, &before)?;
        w.set(&(w.as_tensor() * 2.0)?)?;
        train::cast_once(|| same("remembered", products()?, &before))?;
        same("still remembered", products()?, &before)
    });
    after?;
    let twice = [(&before[0] * 2.0)?, (&before[1] * 2.0)?];
    same("forgotten", products()?, &twice)?;
    // Of two tensors that are there one after the other, each is itself.
    train::cast_once(|| {
        (0..8).try_for_each(|i| {
            let w = (w.as_tensor().detach() * f64::from(1 << i))?;
            let want = x.kaio_matmul_with(&w.to_dtype(DType::BF16)?, &opts)?;
            close("its own", &x.kaio_matmul_with(&w, &opts)?, &Nd::of(&want)?, |_| 0.0)
        })
    })
}
