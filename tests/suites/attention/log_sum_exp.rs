//! The log-sum-exp that comes with a result.

use candle_core::DType::{BF16, F16, F32};
use candle_core::{Device, Var, bail};
use kaio_candle::prelude::*;

use crate::suites::Layout::Plain;
use crate::suites::{Nd, Source, Tally, close, pairs};

/// The log-sum-exp puts results over parts of the keys together, and is a constant.
pub fn log_sum_exp(device: &Device) {
    let name = "flash_attn log-sum-exp";
    let mut tally = Tally::new(name, device);
    for (dtype, causal) in pairs([F32, F16, BF16], [false, true]) {
        tally.case(format!("{dtype:?} causal {causal}"), || {
            let mut source = Source::new(name, device);
            let q = source.tensor(dtype, &[2, 4, 70, 16], Plain)?;
            let [k, v] = [0; 2].map(|_| source.tensor(dtype, &[2, 2, 90, 16], Plain));
            let (k, v) = (k?, v?);
            let opts = FlashAttnOptions::default().out_dtype(F32);
            let part = |from: usize, len: usize, causal: bool| {
                let (k, v) = (k.narrow(2, from, len)?, v.narrow(2, from, len)?);
                q.kaio_flash_attn_with_lse(&k, &v, &opts.clone().causal(causal))
            };
            // All queries see the first 20 keys; the others are a square and a row.
            let parts = [part(0, 20, false)?, part(20, 70, causal)?];
            let (out, lse) = part(0, 90, causal)?;
            let mut sum = out.zeros_like()?;
            for (part, part_lse) in parts {
                let weight = (part_lse - &lse)?.exp()?.unsqueeze(3)?;
                sum = (sum + part.broadcast_mul(&weight)?)?;
            }
            // Tensor cores round exponentials to the operands' dtype.
            let bound = match dtype {
                _ if device.is_cpu() => 1e-5,
                F16 => 5e-4,
                BF16 => 4e-3,
                _ => 1e-5,
            };
            close("sum of parts", &sum, &Nd::of(&out)?, |_| bound)
        });
    }
    tally.case("constant", || {
        let q = Var::zeros((4, 8), F32, device)?;
        let (_, lse) = q.kaio_flash_attn_with_lse(&q, &q, &FlashAttnOptions::default())?;
        match lse.track_op() || lse.sum_all()?.backward()?.get(&q).is_some() {
            true => bail!("it tracks a gradient"),
            false => Ok(()),
        }
    });
    tally.finish();
}
