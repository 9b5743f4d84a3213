//! Gradients of what is multiplied with a quantised weight.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::{SCHEMES, as_multiplied, value_of, weight};
use crate::suites::Layout::{Plain, Transposed};
use crate::suites::{Nd, Source, Tally, close, pairs, product, product_within, results_alone, ulp};

pub fn transposed(t: &Nd) -> Nd {
    let [k, n] = [t.dims[0], t.dims[1]];
    let data = (0..n).flat_map(|j| (0..k).map(move |i| t.data[i * n + j])).collect();
    Nd { dims: vec![n, k], data }
}

pub fn gradients(device: &Device) {
    let mut tally = Tally::new("gradients through quantised weights", device);
    if results_alone() {
        return tally.inapplicable("gradients take more kernels than this crate's");
    }
    let dtypes = [DType::F16, DType::BF16];
    for (scheme, (dtype, (rows, order))) in
        pairs(SCHEMES, pairs(dtypes, pairs([[1, 1], [2, 3], [4, 17]], [false, true])))
    {
        let out = if rows[0] == 2 { DType::F32 } else { dtype };
        let case = format!("{scheme:?} {dtype:?} {rows:?} {order} {out:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let dims = [&rows[..], &[137]].concat();
            let x = Var::from_tensor(&source.tensor(dtype, &dims, Plain)?)?;
            let bias = Var::from_tensor(&source.tensor(DType::F32, &[40], Plain)?)?;
            let w = weight(source, device, scheme, [137, 40], DType::F16, order)?;
            let opts = MatmulOptions::default().bias(bias.as_tensor().clone()).out_dtype(out);
            let y = x.kaio_matmul_quant_with(&w, &opts)?;
            let upstream = source.tensor(out, y.dims(), Transposed)?;
            let grads = (y * &upstream)?.sum_all()?.backward()?;
            let (upstream, value) = (Nd::of(&upstream)?, value_of(&w)?);
            let plain = as_multiplied(device, dtype, &value);
            let (want, allowed) =
                product_within(&upstream, &transposed(&value), &transposed(&plain))?;
            let Some(dx) = grads.get(&x) else { bail!("x has no gradient") };
            // On a GPU upstream gradients of another dtype are rounded to that of x.
            let rounding = if device.is_cpu() || out == dtype {
                0.0
            } else {
                ulp(dtype, 1.0) * 40.0 * value.peak()
            };
            close("dx", dx, &want, |i| allowed + rounding + ulp(dtype, want.data[i]))?;
            let Some(dbias) = grads.get(&bias) else { bail!("the bias has no gradient") };
            let ones = Nd::full(&[1, upstream.data.len() / 40], 1.0);
            let rows = Nd { dims: vec![upstream.data.len() / 40, 40], data: upstream.data.clone() };
            let want = Nd { dims: vec![40], ..product(&ones, &rows) };
            close("dbias", dbias, &want, |_| 1e-5 * ones.data.len() as f64)
        });
    }
    for dtype in dtypes {
        tally.case(format!("{dtype:?} activation"), || activated(device, dtype));
        tally.case(format!("{dtype:?} projections"), || projected(device, dtype));
    }
    tally.finish();
}

/// The gradient through an activation is what it is through candle's, after a product in f32.
fn activated(device: &Device, dtype: DType) -> Result<()> {
    let source = &mut Source::new("activated", device);
    let w = weight(source, device, SCHEMES[1], [64, 24], DType::F16, false)?;
    let x = Var::from_tensor(&source.tensor(dtype, &[5, 64], Plain)?)?;
    let opts = MatmulOptions::default().out_dtype(DType::F32);
    let gradient = |y: &Tensor| -> Result<Nd> {
        match y.sqr()?.sum_all()?.backward()?.get(&x) {
            Some(grad) => Nd::of(grad),
            None => bail!("x has no gradient"),
        }
    };
    let want = gradient(&x.kaio_matmul_quant_with(&w, &opts)?.silu()?)?;
    let got = gradient(&x.kaio_matmul_quant_with(&w, &opts.activation(Activation::Silu))?)?;
    if want.peak() == 0.0 {
        bail!("nothing to compare");
    }
    // Slopes differ in their last bit, and what is then rounded to be multiplied by one of its own.
    close("dx", &got.tensor(DType::F64)?, &want, |_| 2.0 * ulp(dtype, want.peak()))
}

/// The gradients of three projections and of a gated unit are sums of those of their products.
fn projected(device: &Device, dtype: DType) -> Result<()> {
    let source = &mut Source::new("projected", device);
    let mut make = |i: usize, n| weight(source, device, SCHEMES[i], [96, n], DType::F16, i == 3);
    let w = [make(5, 32)?, make(9, 8)?, make(12, 8)?, make(3, 32)?];
    let x = Var::from_tensor(&Source::new("x", device).tensor(dtype, &[2, 7, 96], Plain)?)?;
    let gradient = |y: Vec<Tensor>| -> Result<Nd> {
        let sums = y
            .iter()
            .map(|y| y.to_dtype(DType::F32)?.sqr()?.sum_all())
            .collect::<Result<Vec<_>>>()?;
        match Tensor::stack(&sums, 0)?.sum_all()?.backward()?.get(&x) {
            Some(grad) => Nd::of(grad),
            None => bail!("x has no gradient"),
        }
    };
    let one = |w: &QuantWeight| x.kaio_matmul_quant(w);
    let (q, k, v) = x.kaio_qkv_project([&w[0], &w[1], &w[2]])?;
    let (got, want) =
        (gradient(vec![q, k, v])?, gradient(vec![one(&w[0])?, one(&w[1])?, one(&w[2])?])?);
    // Three terms are added before they are rounded, or after.
    close("dx", &got.tensor(DType::F64)?, &want, |_| 4.0 * ulp(dtype, want.peak()))?;
    let got = gradient(vec![x.kaio_swiglu_project(&w[0], &w[3])?])?;
    let want = gradient(vec![one(&w[0])?.kaio_swiglu(&one(&w[3])?)?])?;
    close("gated dx", &got.tensor(DType::F64)?, &want, |_| 4.0 * ulp(dtype, want.peak()))
}
