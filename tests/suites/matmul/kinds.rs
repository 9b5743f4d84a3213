//! A product of every kind of kernel, small.

use candle_core::{DType, Device, bail};
use kaio_candle::prelude::*;

use crate::suites::{Layout, Source, Tally, plain_product};

/// What `compute-sanitizer` and the emulator are run on. Nothing else touches what the kernels store.
///
/// ```sh
/// compute-sanitizer --tool racecheck target/release/deps/gpu-… tables::matmul_kinds
/// ```
pub fn kinds(device: &Device) {
    let plain = MatmulOptions::default();
    let full = plain.clone().activation(Activation::GeluErf).out_dtype(DType::BF16);
    let kinds: [(&str, [usize; 3], &MatmulOptions); 10] = [
        ("tiles stored by TMA, one for each block", [256, 512, 192], &plain),
        ("blocks that stay for several tiles", [2048, 2304, 64], &full),
        ("staged, ragged", [130, 131, 70], &full),
        ("one row of weights' products", [1, 512, 256], &plain),
        ("few rows, blocks that stay", [16, 20_000, 64], &full),
        ("few rows, the depth in two parts", [16, 1024, 4096], &full),
        ("one tile, the depth in many parts", [64, 64, 4096], &plain),
        ("few columns", [500, 7, 100], &plain),
        ("warpgroups that take turns", [3072, 3072, 192], &full),
        ("taking turns at the columns", [2560, 2568, 200], &plain),
    ];
    let mut tally = Tally::new("matmul kinds", device);
    for ((kind, [m, n, k], opts), transposed) in
        kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)])
    {
        tally.case(format!("{kind}, transposed: {transposed}"), || {
            let mut source = Source::new(kind, &Device::Cpu);
            let layout = if transposed { Layout::Transposed } else { Layout::Plain };
            let a = source.tensor(DType::BF16, &[m, k], layout)?;
            let b = source.tensor(DType::BF16, &[k, n], layout)?;
            let bias = source.tensor(DType::F32, &[n], Layout::Plain)?;
            let sums = plain_product(&a.to_dtype(DType::F32)?, &b.to_dtype(DType::F32)?)?;
            let mut opts = opts.clone().engine(Engine::Native);
            let want = match opts.activation {
                None => sums,
                Some(_) => {
                    opts.bias = Some(bias.to_device(device)?);
                    sums.broadcast_add(&bias)?.gelu_erf()?
                }
            };
            let got = a.to_device(device)?.kaio_matmul_with(&b.to_device(device)?, &opts)?;
            let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let worst = (got - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            // A rounding to bf16 of sums of about √k.
            let bound = 0.02 * (k as f32).sqrt();
            match worst <= bound {
                true => Ok(()),
                false => bail!("differs by {worst}, more than {bound}"),
            }
        });
    }
    tally.finish();
}
