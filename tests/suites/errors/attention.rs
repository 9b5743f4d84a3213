//! Mistakes in calls of attention.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kaio_candle::{Error, prelude::*};

use super::{ADD, On};
use crate::suites::Tally;

const MASK: &str = "a mask becomes a bias of 0 where a key is visible and -inf where not: \
                    `mask.where_cond(&zeros, &minus_infinities)?`; cast, it would add 1 to their scores";
const HEADS: &str =
    "give heads a dimension of their own with `.reshape(..)?` and `.transpose(..)?`";

pub fn attention_tc(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of attention_tc", device);
    let op = "kaio_attention_tc";
    let (q, k, v) = (&on.f16([4, 8]), &on.f16([5, 8]), &on.f16([5, 6]));
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| q.kaio_attention_tc(k, v, false);
    let f16 = |batch, rows, cols| on.f16([batch, rows, cols]);
    refused! { tally;
        run(&on.f16([8]), k, v) => Rank, "{op}: `q` has shape [8] (rank 1), wanted [.., S, D]; {ADD}";
        run(q, &on.f16([8]), v) => Rank, "{op}: `k` has shape [8] (rank 1), wanted [.., S, D]; {ADD}";
        run(q, k, &on.f16([])) => Rank, "{op}: `v` has shape [] (rank 0), wanted [.., S, D]; {ADD}";
        run(&on.f32([4, 8]), k, v) => DType, "{op}: `q` is f32, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        run(q, &on.bf16([5, 8]), v) => DType, "{op}: `k` is bf16, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        run(q, k, &on.f32([5, 6])) => DType, "{op}: `v` is f32, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        run(q, &on.f16([5, 9]), v) => Dimension, "{op}: `k` has D = 9, wanted 8, the head dimension of `q`; {HEADS}";
        run(q, k, q) => Dimension, "{op}: `v` has Sk = 4, wanted 5, the keys of `k`; give `v` one row for each key";
        run(&on.f16([4, 0]), &on.f16([5, 0]), v) => Dimension, "{op}: `q` has D = 0, wanted at least 1; give `q` and `k` at least one column";
        run(&f16(2, 4, 8), &f16(3, 5, 8), v) => Batch, "{op}: batch dimensions [3] of `k` do not broadcast with [2] of `q`; make them equal or 1";
        run(q, &f16(2, 5, 8), &f16(3, 5, 6)) => Batch, "{op}: batch dimensions [3] of `v` do not broadcast with [2] of `k`; make them equal or 1";
        run(&f16(2, 4, 8), k, &f16(3, 5, 6)) => Batch, "{op}: batch dimensions [3] of `v` do not broadcast with [2] of `q`; make them equal or 1";
    }
    tally.finish();
}

pub fn flash_attn(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of flash_attn", device);
    let with = |q: &Tensor, k: &Tensor, v: &Tensor| {
        q.kaio_flash_attn_with(k, v, &FlashAttnOptions::default())
    };
    let plain = |q: &Tensor, k: &Tensor, v: &Tensor| q.kaio_flash_attn(k, v, true);
    type Named<'a> = (&'a str, &'a dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>);
    let methods: [Named; 2] = [("kaio_flash_attn", &plain), ("kaio_flash_attn_with", &with)];

    let (shapes, fix) =
        ("[S, D], [H, S, D] or [B, H, S, D]", "reshape it, or use `.unsqueeze(..)?`");
    let (group, pair) = (
        "equally many query heads share a key head: repeat or drop key heads",
        "give `v` as many heads as `k`",
    );
    let (q, k, v) = (&on.f32([2, 4, 3, 8]), &on.f32([2, 2, 5, 8]), &on.f32([2, 2, 5, 6]));
    let f32 = |heads, rows, cols| on.f32([2, heads, rows, cols]);
    for (op, run) in methods {
        refused! { tally;
            run(&on.f32([8]), k, v) => Rank, "{op}: `q` has shape [8] (rank 1), wanted {shapes}; {fix}";
            run(q, &on.f32([1, 2, 2, 5, 8]), v) => Rank, "{op}: `k` has shape [1, 2, 2, 5, 8] (rank 5), wanted {shapes}; {fix}";
            run(q, k, &on.f32([])) => Rank, "{op}: `v` has shape [] (rank 0), wanted {shapes}; {fix}";
            run(q, &on.f32([2, 5, 8]), v) => Dimension, "{op}: `k` has rank = 3, wanted 4, the rank of `q`; add the missing dimensions with `.unsqueeze(..)?`";
            run(q, k, &on.f32([5, 6])) => Dimension, "{op}: `v` has rank = 2, wanted 4, the rank of `q`; add the missing dimensions with `.unsqueeze(..)?`";
            run(&on.zeros(DType::F64, [2, 4, 3, 8]), k, v) => DType, "{op}: `q` is f64, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
            run(q, &on.f16([2, 2, 5, 8]), v) => DType, "{op}: `k` is f16, wanted f32, the dtype of `q`; cast it with `.to_dtype(DType::F32)?`";
            run(q, k, &on.bf16([2, 2, 5, 6])) => DType, "{op}: `v` is bf16, wanted f32, the dtype of `q`; cast it with `.to_dtype(DType::F32)?`";
            run(q, &f32(2, 5, 4), v) => Dimension, "{op}: `k` has D = 4, wanted 8, the head dimension of `q`; {HEADS}";
            run(q, k, &f32(2, 3, 6)) => Dimension, "{op}: `v` has Sk = 3, wanted 5, the keys of `k`; give `v` one row for each key";
            run(&f32(4, 3, 0), &f32(2, 5, 0), v) => Dimension, "{op}: `q` has D = 0, wanted at least 1; give `q` and `k` at least one column";
            run(&on.f32([1, 4, 3, 8]), k, v) => Dimension, "{op}: `k` has B = 2, wanted 1, the batch of `q`; expand a batch of 1 with `.broadcast_as(..)?`";
            run(q, k, &on.f32([1, 2, 5, 6])) => Dimension, "{op}: `v` has B = 1, wanted 2, the batch of `q`; expand a batch of 1 with `.broadcast_as(..)?`";
            run(q, k, &f32(4, 5, 6)) => Dimension, "{op}: `v` has heads = 4, wanted 2, the heads of `k`; {pair}";
            run(q, &f32(3, 5, 8), &f32(3, 5, 6)) => Dimension, "{op}: `k` has heads = 3, wanted a divisor of 4, the heads of `q`; {group}";
            run(q, &f32(0, 5, 8), &f32(0, 5, 6)) => Dimension, "{op}: `k` has heads = 0, wanted a divisor of 4, the heads of `q`; {group}";
        }
    }
    let scale = |s| q.kaio_flash_attn_with(k, v, &FlashAttnOptions::default().softmax_scale(s));
    refused! { tally;
        scale(f32::NAN) => Value, "kaio_flash_attn_with: `softmax_scale` is NaN, wanted a finite number; check how it was computed";
        scale(f32::INFINITY) => Value, "kaio_flash_attn_with: `softmax_scale` is inf, wanted a finite number; check how it was computed";
    }
    tally.finish();
}

/// Options that are wrong by themselves, for the tensors, or together.
pub fn flash_options(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of flash_attn options", device);
    let op = "kaio_flash_attn_with";
    let opts = FlashAttnOptions::default;
    let (q, k) = (&on.f16([2, 4, 3, 8]), &on.f16([2, 2, 5, 8]));
    let run = |opts: FlashAttnOptions| q.kaio_flash_attn_with(k, k, &opts);
    refused! { tally;
        run(opts().softcap(0.)) => Value, "{op}: `softcap` is 0, wanted a finite number above 0; leave it out for none";
        run(opts().softcap(-2.5)) => Value, "{op}: `softcap` is -2.5, wanted a finite number above 0; leave it out for none";
        run(opts().softcap(f32::NAN)) => Value, "{op}: `softcap` is NaN, wanted a finite number above 0; leave it out for none";
        run(opts().softcap(f32::INFINITY)) => Value, "{op}: `softcap` is inf, wanted a finite number above 0; leave it out for none";
        run(opts().causal(true).window_size_right(1)) => Conflict, "{op}: `causal` and `window_size_right` exclude each other; `causal` is a `window_size_right` of 0";
        run(opts().out_dtype(DType::BF16)) => Value, "{op}: `out_dtype` is bf16, wanted f16, the dtype of `q`, or f32; leave it out for the dtype of `q`";
        on.f32([3, 8]).kaio_flash_attn_with(&on.f32([3, 8]), &on.f32([3, 8]), &opts().out_dtype(DType::F16)) => Value, "{op}: `out_dtype` is f16, wanted f32, the dtype of `q`; leave it out for the dtype of `q`";
        q.kaio_flash_attn_with_lse(k, k, &opts().softcap(0.)) => Value, "{op}_lse: `softcap` is 0, wanted a finite number above 0; leave it out for none";
    }
    tally.case("causal and a window_size_right of 0", || {
        let bounds = opts().causal(true).window_size_right(0);
        run(bounds).map(drop)
    });

    let (shapes, fix) =
        ("[S, D], [S, H, D] or [B, S, H, D]", "reshape it, or use `.unsqueeze(..)?`");
    let turned = |q: &Tensor, k: &Tensor, v: &Tensor| {
        q.kaio_flash_attn_with(k, v, &opts().layout(AttnLayout::Bshd))
    };
    let turned_with = |q: &Tensor, k: &Tensor, opts: FlashAttnOptions| {
        q.kaio_flash_attn_with(k, k, &opts.layout(AttnLayout::Bshd))
    };
    let (tq, tk) = (&on.f16([2, 3, 4, 8]), &on.f16([2, 5, 2, 8]));
    refused! { tally;
        turned(&on.f16([8]), tk, tk) => Rank, "{op}: `q` has shape [8] (rank 1), wanted {shapes}; {fix}";
        turned(tq, tk, &on.f16([2, 6, 2, 8])) => Dimension, "{op}: `v` has Sk = 6, wanted 5, the keys of `k`; give `v` one row for each key";
        turned(tq, &on.f16([2, 5, 3, 8]), &on.f16([2, 5, 3, 8])) => Dimension, "{op}: `k` has heads = 3, wanted a divisor of 4, the heads of `q`; equally many query heads share a key head: repeat or drop key heads";
    }

    let each = "give it the shape of the scores, with 1 for what is shared";
    let biased = |bias: Tensor| run(opts().bias(bias));
    refused! { tally;
        biased(on.bf16([5])) => DType, "{op}: `bias` is bf16, wanted f32 or f16; cast it with `.to_dtype(DType::F32)?`";
        on.f32([3, 8]).kaio_flash_attn_with(&on.f32([3, 8]), &on.f32([3, 8]), &opts().bias(on.f16([3]))) => DType, "{op}: `bias` is f16, wanted f32; cast it with `.to_dtype(DType::F32)?`";
        biased(on.u8([5])) => DType, "{op}: `bias` is u8, wanted f32 or f16; {MASK}";
        biased(on.u32([3, 5])) => DType, "{op}: `bias` is u32, wanted f32 or f16; {MASK}";
        on.f32([3, 8]).kaio_flash_attn_with(&on.f32([3, 8]), &on.f32([3, 8]), &opts().bias(on.u8([3]))) => DType, "{op}: `bias` is u8, wanted f32; {MASK}";
        biased(on.f32([])) => Rank, "{op}: `bias` has shape [] (rank 0), wanted [B or 1, Hq or 1, Sq or 1, Sk]; {each}";
        biased(on.f32([1, 1, 1, 1, 5])) => Rank, "{op}: `bias` has shape [1, 1, 1, 1, 5] (rank 5), wanted [B or 1, Hq or 1, Sq or 1, Sk]; {each}";
        biased(on.f32([1])) => Dimension, "{op}: `bias` has Sk = 1, wanted 5; {each}";
        biased(on.f32([2, 5])) => Dimension, "{op}: `bias` has Sq = 2, wanted 3 or 1; {each}";
        biased(on.f32([2, 3, 5])) => Dimension, "{op}: `bias` has heads = 2, wanted 4 or 1; {each}";
        biased(on.f32([3, 1, 1, 5])) => Dimension, "{op}: `bias` has B = 3, wanted 2 or 1; {each}";
        turned_with(tq, tk, opts().bias(on.f32([3, 4, 5]))) => Dimension, "{op}: `bias` has heads = 3, wanted 4 or 1; {each}";
    }

    let each = "give each head a slope, or each batch and head";
    let sloped = |slopes: Tensor| run(opts().alibi_slopes(slopes));
    let var = |t: Tensor| Var::from_tensor(&t).expect("var").into_inner();
    let tracked = "tracks a gradient, but this op has none for it; `.detach()` makes it a constant, and what it was computed from (the layers below) then gets no gradient through it";
    refused! { tally;
        sloped(on.f16([4])) => DType, "{op}: `alibi_slopes` is f16, wanted f32; cast it with `.to_dtype(DType::F32)?`";
        sloped(on.f32([1, 2, 4])) => Rank, "{op}: `alibi_slopes` has shape [1, 2, 4] (rank 3), wanted [Hq] or [B, Hq]; {each}";
        sloped(on.f32([2])) => Dimension, "{op}: `alibi_slopes` has heads = 2, wanted 4, the heads of `q`; {each}";
        sloped(on.f32([1, 4])) => Dimension, "{op}: `alibi_slopes` has B = 1, wanted 2, the batch of `q`; {each}";
        sloped(var(on.f32([4]))) => Tracked, "{op}: `alibi_slopes` {tracked}";
        sloped(var(on.f32([4, 1])).squeeze(1).expect("squeeze")) => Tracked, "{op}: `alibi_slopes` {tracked}";
    }

    let u32s = |values: &[u32]| Tensor::new(values, device).expect("u32");
    let of_q = |lengths: Tensor| run(opts().seqlens_q(lengths));
    let three = (&on.f16([4, 3, 8]), &on.f16([2, 5, 8]));
    let flatten = "flatten it with `.flatten_all()?`";
    let missing = "add the missing dimensions with `.unsqueeze(..)?`";
    refused! { tally;
        of_q(on.f32([2])) => DType, "{op}: `seqlens_q` is f32, wanted u32; cast it with `.to_dtype(DType::U32)?`";
        of_q(on.u32([1, 2])) => Rank, "{op}: `seqlens_q` has shape [1, 2] (rank 2), wanted [B]; {flatten}";
        of_q(on.u32([3])) => Dimension, "{op}: `seqlens_q` has B = 3, wanted 2, the batch of `q`; give it one length for each batch";
        of_q(var(on.u32([2]))) => Tracked, "{op}: `seqlens_q` {tracked}";
        three.0.kaio_flash_attn_with(three.1, three.1, &opts().seqlens_k(on.u32([1]))) => Rank, "{op}: `q` has shape [4, 3, 8] (rank 3), wanted [B, H, S, D] with `seqlens_k`; {missing}";
        turned_with(&on.f16([3, 4, 8]), &on.f16([5, 2, 8]), opts().seqlens_q(on.u32([1]))) => Rank, "{op}: `q` has shape [3, 4, 8] (rank 3), wanted [B, S, H, D] with `seqlens_q`; {missing}";
    }

    let packed = |opts: FlashAttnOptions| three.0.kaio_flash_attn_with(three.1, three.1, &opts);
    let both = |q: Tensor, k: Tensor| opts().cu_seqlens_q(q).cu_seqlens_k(k);
    let pack = "put all sequences one after another";
    refused! { tally;
        packed(opts().cu_seqlens_q(on.u32([1]))) => Value, "{op}: `cu_seqlens_k` is missing, wanted a tensor beside `cu_seqlens_q`; a packed batch needs both";
        packed(opts().cu_seqlens_k(on.u32([1]))) => Value, "{op}: `cu_seqlens_q` is missing, wanted a tensor beside `cu_seqlens_k`; a packed batch needs both";
        run(both(on.u32([1]), on.u32([1]))) => Rank, "{op}: `q` has shape [2, 4, 3, 8] (rank 4), wanted [H, T, D] with `cu_seqlens_q`; {pack}";
        turned_with(tq, tk, both(on.u32([1]), on.u32([1]))) => Rank, "{op}: `q` has shape [2, 3, 4, 8] (rank 4), wanted [T, H, D] with `cu_seqlens_q`; {pack}";
        packed(both(on.u8([2]), on.u32([2]))) => DType, "{op}: `cu_seqlens_q` is u8, wanted u32; cast it with `.to_dtype(DType::U32)?`";
        packed(both(on.u32([2]), on.u32([2, 1]))) => Rank, "{op}: `cu_seqlens_k` has shape [2, 1] (rank 2), wanted [B + 1]; {flatten}";
        packed(both(on.u32([0]), on.u32([0]))) => Dimension, "{op}: `cu_seqlens_q` has entries = 0, wanted at least 1; begin with 0, then give the end of each sequence";
        packed(both(on.u32([2]), on.u32([3]))) => Dimension, "{op}: `cu_seqlens_k` has entries = 3, wanted 2, the entries of `cu_seqlens_q`; give `q` and `k` equally many sequences; they may be empty";
        packed(both(on.u32([2]), on.u32([2])).bias(on.f32([5]))) => Conflict, "{op}: `bias` and `cu_seqlens_q` exclude each other; pad the sequences and give `seqlens_q` and `seqlens_k`";
        packed(both(on.u32([2]), on.u32([2])).seqlens_k(on.u32([1]))) => Conflict, "{op}: `seqlens_k` and `cu_seqlens_q` exclude each other; one is for padded batches, the other for packed ones";
        packed(both(on.u32([3]), on.u32([3])).alibi_slopes(on.f32([1, 4]))) => Dimension, "{op}: `alibi_slopes` has B = 1, wanted 2, the sequences of `cu_seqlens_q`; {each}";
        packed(both(on.u32([2]), var(on.u32([2])))) => Tracked, "{op}: `cu_seqlens_k` {tracked}";
    }

    // On a GPU lengths are not read back.
    if device.is_cpu() {
        let check = "check how it was computed";
        let zeros = || on.u32([4]);
        refused! { tally;
            of_q(u32s(&[3, 4])) => Value, "{op}: `seqlens_q` is 4 at entry 1, wanted at most 3, the rows that there are; {check}";
            run(opts().seqlens_k(u32s(&[6, 0]))) => Value, "{op}: `seqlens_k` is 6 at entry 0, wanted at most 5, the rows that there are; {check}";
            packed(both(u32s(&[1, 1, 2, 3]), zeros())) => Value, "{op}: `cu_seqlens_q` is 1 at entry 0, wanted 0, where the first sequence begins; {check}";
            packed(both(zeros(), u32s(&[0, 3, 2, 5]))) => Value, "{op}: `cu_seqlens_k` is 2 at entry 2, wanted at least 3, the entry before; {check}";
            packed(both(u32s(&[0, 1, 2, 4]), zeros())) => Value, "{op}: `cu_seqlens_q` is 4 at entry 3, wanted at most 3, the rows that there are; {check}";
        }
    }
    tally.finish();
}
