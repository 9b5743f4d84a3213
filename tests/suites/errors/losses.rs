//! Wrong calls of losses and embeddings.

use candle_core::{DType, Device, Tensor, Var, bail};
use kaio_candle::{Error, prelude::*};

use super::On;
use crate::suites::Tally;

pub fn losses(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of losses", device);
    let opts = CrossEntropyOptions::default;
    let (z, t) = (on.f16([4, 8]), on.u32([4]));
    let loss = |z: &Tensor, t: &Tensor| z.kaio_cross_entropy(t, &opts());
    let tracked = |op: &str, arg: &str| {
        format!(
            "{op}: `{arg}` tracks a gradient, but this op has none for it; `.detach()` makes it a constant, and what it was computed from (the layers below) then gets no gradient through it"
        )
    };
    let var = |t: &Tensor| Ok::<_, candle_core::Error>(Var::from_tensor(t)?.into_inner());
    refused! { tally;
        loss(&on.u8([4, 8]), &t) => DType, "kaio_cross_entropy: `logits` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        loss(&z, &on.u8([4])) => DType, "kaio_cross_entropy: `targets` is u8, wanted u32 or i64; cast it with `.to_dtype(DType::U32)?`";
        loss(&z, &on.u32([4, 1])) => Dimension, "kaio_cross_entropy: `targets` has rank = 2, wanted 1, one less than the rank of `logits` [4, 8]; give one target for each row";
        loss(&z, &on.u32([5])) => Dimension, "kaio_cross_entropy: `targets` has a dimension = 5, wanted 4, in [5], as `logits` [4, 8]; give one target for each row";
        loss(&z.sum_all()?, &t) => Rank, "kaio_cross_entropy: `logits` has shape [] (rank 0), wanted [.., V]; give a score for each class";
        z.kaio_cross_entropy(&t, &opts().label_smoothing(1.5)) => Value, "kaio_cross_entropy: `label_smoothing` is 1.5, wanted 0 to 1; it is a probability";
        z.kaio_cross_entropy(&t, &opts().label_smoothing(f32::NAN)) => Value, "kaio_cross_entropy: `label_smoothing` is NaN, wanted 0 to 1; it is a probability";
        z.kaio_cross_entropy(&t, &opts().z_loss(-1.0)) => Value, "kaio_cross_entropy: `z_loss` is -1, wanted a finite number of at least 0; leave it out for none";
        z.kaio_cross_entropy(&t, &opts().compute_dtype(DType::BF16)) => Value, "kaio_cross_entropy: `compute_dtype` is bf16, wanted none, for nothing is multiplied; see `kaio_linear_cross_entropy`";
        z.kaio_cross_entropy(&t, &opts().softcap(0.0)) => Value, "kaio_cross_entropy: `softcap` is 0, wanted a finite number above 0; leave it out for none";
        loss(&z, &var(&t)?) => Tracked, "{}", tracked("kaio_cross_entropy", "targets");
    }
    let linear = |x: &Tensor, w: &Tensor, t: &Tensor| x.kaio_linear_cross_entropy(w, t, &opts());
    let (x, w) = (on.f16([4, 16]), on.f16([8, 16]));
    let op = "kaio_linear_cross_entropy";
    refused! { tally;
        linear(&on.u8([4, 16]), &w, &t) => DType, "{op}: `hidden` is u8, wanted f16 or bf16; {}", super::HALF;
        linear(&x, &on.bf16([8, 16]), &t) => DType, "{op}: `weight` is bf16, wanted f16, the dtype of `hidden`; cast it with `.to_dtype(DType::F16)?`";
        linear(&x, &on.f16([8, 2, 8]), &t) => Rank, "{op}: `weight` has shape [8, 2, 8] (rank 3), wanted [V, H]; a weight is one matrix";
        linear(&x, &on.f16([16, 8]), &t) => Dimension, "{op}: `weight` has H = 8, wanted 16, the H of `hidden` [4, 16]; transpose it with `.t()?`";
        linear(&x, &w, &on.u32([3])) => Dimension, "{op}: `targets` has a dimension = 3, wanted 4, in [3], as `hidden` [4, 16]; give one target for each row";
        linear(&x, &w, &var(&t)?) => Tracked, "{}", tracked(op, "targets");
    }
    let op = "kaio_embedding";
    refused! { tally;
        on.u8([4, 8]).kaio_embedding(&t) => DType, "{op}: `table` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        z.kaio_embedding(&on.u8([4])) => DType, "{op}: `ids` is u8, wanted u32 or i64; cast it with `.to_dtype(DType::U32)?`";
        on.f16([4, 8, 2]).kaio_embedding(&t) => Rank, "{op}: `table` has shape [4, 8, 2] (rank 3), wanted [V, H]; a table has a row for each id";
        z.kaio_embedding(&var(&t)?) => Tracked, "{}", tracked(op, "ids");
    }
    // On a GPU nobody waits to see it.
    if device.is_cpu() {
        let high = |dtype| Tensor::new(&[1u32, 8, 0, 2], device)?.to_dtype(dtype);
        let low = Tensor::new(&[1i64, 2, -1, 2], device);
        let fix = "check the vocabulary's size and what fills up batches";
        refused! { tally;
            loss(&z, &high(DType::U32)?) => Value, "kaio_cross_entropy: `targets` is 8 in row 1, wanted 0 to V − 1 with V = 8, or the ignore_index -100; {fix}";
            loss(&z, &high(DType::I64)?) => Value, "kaio_cross_entropy: `targets` is 8 in row 1, wanted 0 to V − 1 with V = 8, or the ignore_index -100; {fix}";
            z.kaio_embedding(&low?) => Value, "kaio_embedding: `ids` is -1 at 2, wanted 0 to V − 1 with V = 4; check the vocabulary's size";
        }
    }
    tally.finish();
}
