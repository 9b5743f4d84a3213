//! Rows whose keys are all hidden by a finite number that stands for −∞, and rows of equal scores far from 0.
//!
//! Their probabilities are equal, whatever the number: −10⁹ plus anything small is −10⁹ in f32, and so is a
//! log-sum-exp, from which ln n has gone.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{Device, Result, Tensor, Var, bail};
use half::bf16;
use kaio_candle::prelude::*;

use crate::suites::Layout::Plain;
use crate::suites::{Nd, Source, Tally, close, pairs, results_alone, ulp};

/// Queries of zeros under a mask of one number; queries and keys that all have one large product.
pub fn stand_ins(device: &Device) {
    let mut tally = Tally::new("flash_attn stand-ins for -inf", device);
    tally.case("the example of four keys", || four_keys(device));
    let sizes = [[1, 4, 1], [1, 300, 24], [70, 90, 64], [130, 257, 128]];
    for (dtype, (size, causal)) in
        [F32, F16, BF16].into_iter().flat_map(|d| pairs(sizes, [false, true]).map(move |x| (d, x)))
    {
        for stand_in in [0.0, -1e4, -1e5, -1e9, f32::MIN, 1e9] {
            let case = Case { dtype, size, causal, product: 0.0, bias: Some((F32, stand_in)) };
            tally.case(format!("{case:?}"), || case.check(device));
            if dtype == BF16 {
                // Its own lowest number: that of f32 is -inf in it.
                let bias = Some((BF16, stand_in.max(bf16::MIN.to_f32())));
                let case = Case { bias, ..case };
                tally.case(format!("{case:?}"), || case.check(device));
            }
        }
        for product in [-1e3, -1e5, -1e6, 1e6] {
            // Products of f16 and bf16 are exact in f32.
            let case = Case { dtype, size, causal, product, bias: None };
            tally.case(format!("{case:?}"), || case.check(device));
        }
    }
    tally.finish();
}

fn four_keys(device: &Device) -> Result<()> {
    let q = Var::zeros((1, 1, 1, 1), F32, device)?;
    let k = Tensor::zeros((1, 1, 4, 1), F32, device)?;
    let v = Var::from_tensor(&Tensor::new(&[[[[1f32], [2.], [3.], [4.]]]], device)?)?;
    let bias = Var::from_tensor(&Tensor::full(-1e9f32, (1, 1, 1, 4), device)?)?;
    let tracked = !results_alone();
    let bias_input = if tracked { bias.as_tensor().clone() } else { bias.as_tensor().detach() };
    let (q_input, v_input) = if tracked {
        (q.as_tensor().clone(), v.as_tensor().clone())
    } else {
        (q.detach(), v.detach())
    };
    let opts = FlashAttnOptions::default().bias(bias_input);
    let out = q_input.kaio_flash_attn_with(&k, &v_input, &opts)?;
    let exactly = |name: &str, got: &Tensor, want: &[f64]| {
        close(name, got, &Nd { dims: got.dims().to_vec(), data: want.to_vec() }, |_| 1e-6)
    };
    exactly("out", &out, &[2.5])?;
    if !tracked {
        return Ok(());
    }
    let grads = out.sum_all()?.backward()?;
    let of = |var: &Var| grads.get(var).cloned().ok_or(candle_core::Error::msg("no gradient"));
    exactly("dq", &of(&q)?, &[0.0])?;
    exactly("dv", &of(&v)?, &[0.25; 4])?;
    exactly("dbias", &of(&bias)?, &[-0.375, -0.125, 0.125, 0.375])
}

/// One head whose visible scores are all the same.
#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    /// Sq, Sk, D = Dv.
    size: [usize; 3],
    causal: bool,
    /// Of each query and key.
    product: f32,
    bias: Option<(DType, f32)>,
}

impl Case {
    fn check(&self, device: &Device) -> Result<()> {
        let [sq, sk, d] = self.size;
        let mut source = Source::new(&format!("{self:?}"), device);
        // Powers of two whose product over D columns is exact: a column has it all.
        let column = |rows: usize, value: f32| {
            let mut data = vec![0f32; rows * d];
            data.chunks_mut(d).for_each(|row| row[0] = value);
            Tensor::from_vec(data, (rows, d), device)?.to_dtype(self.dtype)
        };
        let q = column(sq, if self.product == 0.0 { 0.0 } else { 1024.0 })?;
        let k = column(sk, 1.0)?;
        let v = source.tensor(self.dtype, &[sk, d], Plain)?;
        let weights = source.tensor(self.dtype, &[sq, d], Plain)?;
        let mut opts = FlashAttnOptions::default().causal(self.causal);
        if self.product != 0.0 {
            opts = opts.softmax_scale(self.product / 1024.0);
        }
        if let Some((dtype, value)) = self.bias {
            let bias = Tensor::full(value, (sq, sk), device)?.to_dtype(dtype)?;
            opts = opts.bias(bias);
        }
        let tracked = !results_alone();
        let input = |t: &Tensor| match tracked {
            true => Ok(Var::from_tensor(t)?.into_inner()),
            false => Ok::<_, candle_core::Error>(t.clone()),
        };
        let [q, k, v_var] = [input(&q)?, input(&k)?, input(&v)?];
        let bias = opts.bias.as_ref().map(&input).transpose()?;
        if let Some(bias) = &bias {
            opts = opts.bias(bias.clone());
        }
        let out = q.kaio_flash_attn_with(&k, &v_var, &opts)?;

        let seen = |i: usize| if self.causal { (i + 1 + sk).saturating_sub(sq) } else { sk };
        let (v, w) = (Nd::of(&v)?, Nd::of(&weights)?);
        let mut want = Nd::full(&[sq, d], 0.0);
        let [mut dv, mut dbias] = [[sk, d], [sq, sk]].map(|dims| Nd::full(&dims, 0.0));
        for i in 0..sq {
            let n = seen(i);
            for j in 0..n {
                (0..d).for_each(|c| want.data[i * d + c] += v.data[j * d + c] / n as f64);
            }
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let shared = dot(&w.data[i * d..][..d], &want.data[i * d..][..d]);
            for j in 0..n {
                (0..d).for_each(|c| dv.data[j * d + c] += w.data[i * d + c] / n as f64);
                let own = dot(&w.data[i * d..][..d], &v.data[j * d..][..d]);
                dbias.data[i * sk + j] = (own - shared) / n as f64;
            }
        }
        // Tensor cores multiply probabilities in the operands' dtype, sums have at most that many terms of 1,
        // and results are rounded.
        let step =
            if self.dtype == F32 { 64.0 * ulp(F32, 1.0) } else { 4.0 * ulp(self.dtype, 1.0) };
        let near = |name: &str, got: &Tensor, want: &Nd| {
            close(name, got, want, |at| step * (0.1 + want.data[at].abs()))
        };
        near("out", &out, &want)?;
        if !tracked {
            return Ok(());
        }
        let grads = (out.to_dtype(F32)? * weights.to_dtype(F32)?)?.sum_all()?.backward()?;
        let Some(grad) = grads.get(&v_var) else { bail!("v has no gradient") };
        near("dv", grad, &dv)?;
        if let Some(bias) = &bias {
            let Some(grad) = grads.get(bias) else { bail!("the bias has no gradient") };
            let step = step.max(4.0 * ulp(bias.dtype(), 1.0));
            close("dbias", grad, &dbias, |at| {
                step * (d as f64).sqrt() * (0.1 + dbias.data[at].abs())
            })?;
        }
        Ok(())
    }
}
