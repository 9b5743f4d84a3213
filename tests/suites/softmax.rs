//! Softmax over the last dimension and its gradient.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{D, Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::Layout::{self, Plain};
use super::{Nd, Source, Tally, close, identical, pairs, plain_on, results_alone, ulp};

#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    dims: Vec<usize>,
    /// Of x and of the upstream gradient.
    layouts: [Layout; 2],
    scale: f64,
}

fn plain(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(F32)?;
    let powers = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

impl Case {
    fn check(&self, device: &Device) -> Result<()> {
        let Self { dtype, ref dims, layouts, scale } = *self;
        let source = &mut Source::new(&format!("{self:?}"), device);
        let base = layouts[0].base(dims);
        let var = Var::from_tensor(&source.tensor_of(dtype, &base, Plain, |s| s.unit() * scale)?)?;
        let x = layouts[0].view(var.as_tensor(), dims)?;
        let upstream = source.tensor(dtype, dims, layouts[1])?;
        let mut out = None;
        let backward = Backward::of(|| {
            out = Some(x.kaio_softmax()?);
            Ok(())
        })?;
        let out = out.expect("it was computed");
        if !out.is_contiguous() || out.dtype() != dtype || out.dims() != dims.as_slice() {
            bail!("the result is {:?} {:?}", out.dtype(), out.layout());
        }
        let matrix = |t: &Tensor| if t.rank() < 2 { t.unsqueeze(0) } else { Ok(t.clone()) };
        let grads = backward.run(&[Some(matrix(&upstream)?)])?;
        let Some(Some(grad)) = grads.into_iter().next() else { bail!("no gradient") };
        let grad = grad.reshape(dims.as_slice())?;

        let exact = Nd::of(&x)?;
        let width = *dims.last().expect("a dimension");
        let mut want = exact.clone();
        for row in want.data.chunks_exact_mut(width) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = row.iter().map(|x| (x - max).exp()).sum::<f64>();
            row.iter_mut().for_each(|x| *x = (*x - max).exp() / sum);
        }
        let device = plain_on(device);
        let leaf = Var::from_tensor(&x.detach().to_device(&device)?.contiguous()?)?;
        let of_plain = plain(&leaf)?.to_dtype(dtype)?;
        let near = |name: &str, got: &Tensor, want: &Nd, plain: &Tensor, peak: f64| {
            let allowed = 2.0 * want.max_error(plain)?;
            // An approximate power, and another order of the sum.
            let order = (width as f64).sqrt() * ulp(F32, peak);
            close(name, got, want, |i| {
                allowed + ulp(dtype, want.data[i]) + 16.0 * ulp(F32, want.data[i]) + order
            })
        };
        near("out", &out, &want, &of_plain, want.peak())?;

        // Of the rounded result, from which the gradient is computed.
        let (y, dy) = (Nd::of(&out)?, Nd::of(&upstream)?);
        let mut of_x = y.clone();
        for (of_x, (y, dy)) in of_x
            .data
            .chunks_exact_mut(width)
            .zip(y.data.chunks_exact(width).zip(dy.data.chunks_exact(width)))
        {
            let sum = y.iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>();
            of_x.iter_mut().zip(dy).for_each(|(x, dy)| *x *= dy - sum);
        }
        let upstream = upstream.to_device(&device)?.contiguous()?;
        let grads = (&of_plain * &upstream)?.to_dtype(F32)?.sum_all()?.backward()?;
        let Some(of_plain) = grads.get(&leaf) else { bail!("no gradient of the plain formula") };
        near("dx", &grad, &of_x, of_plain, y.peak() * dy.peak())?;
        identical("x", &x, &exact)
    }
}

pub fn softmax(device: &Device) {
    let mut tally = Tally::new("softmax", device);
    let sizes: [&[usize]; 11] = [
        &[1],
        &[13],
        &[5, 1],
        &[140, 8],
        &[70, 7],
        &[2, 3, 24],
        &[3, 264],
        &[2, 2, 3, 130],
        &[7, 515],
        &[2, 8195],
        &[2, 16_392],
    ];
    let plain = |dtype, dims: &[usize]| Case {
        dtype,
        dims: dims.to_vec(),
        layouts: [Plain; 2],
        scale: 4.0,
    };
    let mut cases: Vec<_> =
        pairs([F32, F16, BF16], sizes).map(|(dtype, dims)| plain(dtype, dims)).collect();
    for (dtype, (i, j)) in pairs([F32, BF16], pairs(Layout::ALL, Layout::ALL)) {
        cases.push(Case { layouts: [i, j], ..plain(dtype, &[2, 6, 16]) });
    }
    for (dtype, scale) in [(F32, 1e4), (F32, 3e38), (F16, 6e4), (BF16, 1e30)] {
        cases.push(Case { scale, ..plain(dtype, &[4, 64]) });
    }
    for case in cases {
        tally.case(format!("{case:?}"), || case.check(device));
    }
    for dims in [&[0][..], &[3, 0], &[0, 8]] {
        tally.case(format!("{dims:?}"), || empty(dims, device));
    }
    tally.case("NaN and infinities", || specials(device));
    tally.finish();
}

fn empty(dims: &[usize], device: &Device) -> Result<()> {
    let x = Var::zeros(dims, F16, device)?;
    let out = x.detach().kaio_softmax()?;
    close("out", &out, &Nd::full(dims, 0.0), |_| 0.0)?;
    if !results_alone() {
        let grads = x.kaio_softmax()?.sum_all()?.backward()?;
        let Some(grad) = grads.get(&x) else { bail!("no gradient") };
        close("gradient", grad, &Nd::full(dims, 0.0), |_| 0.0)?;
    }
    Ok(())
}

/// A row with −∞, which weighs nothing; rows of −∞, with ∞, with NaN.
fn specials(device: &Device) -> Result<()> {
    const MINUS: f32 = f32::NEG_INFINITY;
    let rows = [[MINUS, 1.0, 1.0], [MINUS; 3], [f32::INFINITY, 0.0, 0.0], [0.0, f32::NAN, 0.0]];
    let got = Tensor::new(&rows, device)?.kaio_softmax()?.to_vec2::<f32>()?;
    let nan = got[1..].iter().flatten().filter(|x| x.is_nan()).count();
    match got[0] == [0.0, 0.5, 0.5] && nan >= 7 {
        true => Ok(()),
        false => bail!("{got:?}"),
    }
}
