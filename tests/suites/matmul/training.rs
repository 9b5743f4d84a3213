//! Training with products.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer};
use kaio_candle::prelude::*;

use super::{DTYPES, Method};
use crate::suites::Layout::Plain;
use crate::suites::{Source, Tally, plain_product};

/// Two layers with f32 master weights under AdamW learn as they do on candle's own product.
pub fn training(device: &Device) {
    let mut tally = Tally::new("matmul training", device);
    for dtype in DTYPES {
        let case = format!("{dtype:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let mut input = |dims: &[usize]| source.tensor(DType::F32, dims, Plain);
            let (x, y) = (input(&[4, 8, 12])?, input(&[4, 8, 3])?);
            let weights = [input(&[12, 32])?, input(&[32, 3])?];
            let losses = |product: Method| {
                let vars = [Var::from_tensor(&weights[0])?, Var::from_tensor(&weights[1])?];
                let mut adam = AdamW::new_lr(vars.to_vec(), 0.01)?;
                let step = |_| {
                    let layer =
                        |x: &Tensor, w: &Var| product(&x.to_dtype(dtype)?, &w.to_dtype(dtype)?);
                    let out = layer(&layer(&x, &vars[0])?.relu()?, &vars[1])?;
                    let loss = (out - &y)?.sqr()?.mean_all()?;
                    adam.backward_step(&loss)?;
                    loss.to_scalar::<f32>()
                };
                (0..40).map(step).collect::<Result<Vec<_>>>()
            };
            let ours = losses(|a, b| a.kaio_matmul_tc(b))?;
            let plain =
                losses(|a, b| plain_product(&a.to_dtype(DType::F32)?, &b.to_dtype(DType::F32)?))?;
            let apart = ours.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 0.02 * b);
            if apart || ours[39] > ours[0] / 2.0 {
                bail!("losses {ours:?}, with candle's product {plain:?}");
            }
            Ok(())
        });
    }
    tally.finish();
}
