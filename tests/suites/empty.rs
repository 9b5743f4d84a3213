//! Every method and helper with sizes of zero, on views whose offset lies past the end of their storage.

use candle_core::DType::{F16, F32, U8, U32};
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kaio_candle::{prelude::*, quant};

use super::{Nd, Tally, pairs, results_alone};

/// What a call takes and gives, and the call.
struct Row {
    inputs: Vec<(DType, Vec<usize>)>,
    outputs: Vec<Vec<usize>>,
    call: fn(&[Tensor]) -> Result<Vec<Tensor>>,
    /// Of how many inputs, from the first on, there are gradients.
    tracked: usize,
}

/// Zeros; the view of an empty one begins past the end of its storage.
fn past_the_end(dtype: DType, dims: &[usize], device: &Device) -> Result<Tensor> {
    let base = dims.iter().map(|len| len + 2).chain([2]).collect::<Vec<_>>();
    let mut t = Tensor::zeros(base, dtype, device)?;
    for (axis, &len) in dims.iter().enumerate() {
        t = t.narrow(axis, 2, len)?;
    }
    t.narrow(dims.len(), 1, 1)?.squeeze(dims.len())
}

/// Results of the right shape, all zeros: as many as are listed, with no panic on the way.
fn run(tally: &mut Tally, device: &Device, name: &str, row: Row) {
    let Row { inputs, outputs, call, tracked } = row;
    tally.case(format!("{name} {inputs:?}"), || {
        let views = inputs.iter().map(|(dtype, dims)| past_the_end(*dtype, dims, device));
        let views = views.collect::<Result<Vec<_>>>()?;
        let results = call(&views)?;
        if results.len() != outputs.len() {
            bail!("{} results", results.len());
        }
        for (got, dims) in results.iter().zip(&outputs) {
            let got = Nd::of(got)?;
            if got.dims != *dims {
                bail!("a result of shape {:?}, not {dims:?}", got.dims);
            }
            if let Some(x) = got.data.iter().find(|&&x| x != 0.0) {
                bail!("{x} where all is zero");
            }
        }
        if tracked == 0 || results_alone() {
            return Ok(());
        }
        let mut inputs = views;
        let vars = inputs[..tracked].iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        for (input, var) in inputs.iter_mut().zip(&vars) {
            *input = var.as_tensor().clone();
        }
        let grads = call(&inputs)?[0].sum_all()?.backward()?;
        for (i, var) in vars.iter().enumerate() {
            let Some(grad) = grads.get(var) else { bail!("input {i} has no gradient") };
            if grad.shape() != var.shape() || grad.dtype() != var.dtype() {
                bail!("the gradient of input {i} is {:?} {:?}", grad.dtype(), grad.shape());
            }
            // A bias of rows without terms has a gradient of ones, and scores without values one of zeros.
            if let Some(x) = Nd::of(grad)?.data.iter().find(|x| !x.is_finite()) {
                bail!("{x} in the gradient of input {i}");
            }
        }
        Ok(())
    });
}

const BATCHES: [&[usize]; 3] = [&[], &[2], &[0]];

pub fn products(device: &Device) {
    let mut tally = Tally::new("empty products", device);
    // Kernels differ by what of a problem is empty, and by its batch.
    for ((m, k), (n, batch)) in pairs(pairs([0, 3], [0, 128]), pairs([0, 5, 80], BATCHES)) {
        let of = |dims: [usize; 2]| [batch, &dims].concat();
        let (rows, out) = (of([m, k]), of([m, n]));
        let cast = Row {
            inputs: vec![(F32, rows.clone()), (U8, vec![k, n])],
            outputs: vec![out.clone()],
            call: |t| {
                let weight = QuantWeight::from_int8(&t[1], &Tensor::new(&[1f32], t[1].device())?)?;
                let opts = MatmulOptions::default().compute_dtype(DType::BF16);
                Ok(vec![t[0].kaio_matmul_quant_with(&weight, &opts)?])
            },
            tracked: 1,
        };
        run(&mut tally, device, "kaio_matmul_quant_with", cast);
        let mut check = |name, inputs: &[(DType, Vec<usize>)], outputs, call| {
            // Products of floats alone have gradients.
            let differentiable = inputs.iter().all(|(dtype, _)| dtype.is_float()) && outputs == 1;
            let tracked = if differentiable { inputs.len() } else { 0 };
            let outputs = vec![out.clone(); outputs];
            run(&mut tally, device, name, Row { inputs: inputs.to_vec(), outputs, call, tracked });
        };
        for rhs in [vec![k, n], of([k, n])] {
            let operands = [(F16, rows.clone()), (F16, rhs)];
            check("kaio_matmul_tc", &operands, 1, |t| Ok(vec![t[0].kaio_matmul_tc(&t[1])?]));
            let biased = [operands.as_slice(), &[(F32, vec![n])]].concat();
            check("kaio_matmul_with", &biased, 1, |t| {
                let opts = MatmulOptions::default()
                    .bias(t[2].clone())
                    .activation(Activation::Silu)
                    .out_dtype(F16);
                Ok(vec![t[0].kaio_matmul_with(&t[1], &opts)?])
            });
        }
        let int8 = (U8, vec![k, n]);
        check("kaio_matmul_int8", &[(U8, rows.clone()), int8.clone()], 1, |t| {
            Ok(vec![t[0].kaio_matmul_int8(&t[1], 1.0)?])
        });
        let (words, steps) = ((U32, vec![k / 8, n]), (F16, vec![k / 128, n]));
        check("kaio_matmul_int4", &[(F16, rows.clone()), words.clone(), steps.clone()], 1, |t| {
            Ok(vec![t[0].kaio_matmul_int4(&t[1], &t[2])?])
        });
        check("kaio_qkv_project_int8", &[(F16, rows.clone()), int8], 3, |t| {
            let (q, k, v) = t[0].kaio_qkv_project_int8([&t[1]; 3], [1.0; 3])?;
            Ok(vec![q, k, v])
        });
        check("kaio_qkv_project_int4", &[(F16, rows.clone()), words, steps], 3, |t| {
            let (q, k, v) = t[0].kaio_qkv_project_int4([&t[1]; 3], [&t[2]; 3])?;
            Ok(vec![q, k, v])
        });
    }
    tally.finish();
}

fn flash(t: &[Tensor], opts: FlashAttnOptions) -> Result<Vec<Tensor>> {
    Ok(vec![t[0].kaio_flash_attn_with(&t[1], &t[2], &opts)?])
}

pub fn norms(device: &Device) {
    let mut tally = Tally::new("empty norms", device);
    for dims in [&[0][..], &[0, 8], &[3, 0], &[2, 0, 8], &[0, 0]] {
        let (rows, vector) = ((F16, dims.to_vec()), (F16, vec![dims[dims.len() - 1]]));
        let mut check = |name, inputs: &[&(DType, Vec<usize>)], outputs, call| {
            let inputs: Vec<_> = inputs.iter().copied().cloned().collect();
            let (tracked, outputs) = (inputs.len(), vec![dims.to_vec(); outputs]);
            run(&mut tally, device, name, Row { inputs, outputs, call, tracked });
        };
        check("kaio_rms_norm", &[&rows, &vector], 1, |t| {
            Ok(vec![t[0].kaio_rms_norm(&t[1], 1e-5)?])
        });
        check("kaio_layer_norm", &[&rows, &vector, &vector], 1, |t| {
            Ok(vec![t[0].kaio_layer_norm(&t[1], Some(&t[2]), 1e-5)?])
        });
        check("kaio_add_rms_norm", &[&rows, &rows, &vector], 2, |t| {
            let (normed, sum) = t[0].kaio_add_rms_norm(&t[1], &t[2], 1e-5)?;
            Ok(vec![normed, sum])
        });
    }
    tally.finish();
}

pub fn attention(device: &Device) {
    let mut tally = Tally::new("empty attention", device);
    let sizes = pairs(pairs([0, 3], [0, 4]), pairs([0, 8], [[2, 2], [0, 2], [2, 0], [0, 0]]));
    for ((sq, sk), (dv, [b, h])) in sizes {
        let dims = |heads: &[usize], matrix: [usize; 2]| [heads, &matrix].concat();
        let rows = |dtype, heads: &[usize]| {
            vec![
                (dtype, dims(heads, [sq, 8])),
                (dtype, dims(heads, [sk, 8])),
                (dtype, dims(heads, [sk, dv])),
            ]
        };
        let mut check = |name, inputs: Vec<_>, heads: &[usize], call| {
            let outputs = vec![dims(heads, [sq, dv])];
            let tracked = match name {
                "kaio_attention_tc" => 0,
                "bias" => 4,
                _ => 3,
            };
            run(&mut tally, device, name, Row { inputs, outputs, call, tracked });
        };
        check("kaio_attention_tc", rows(F16, &[b, h]), &[b, h], |t| {
            Ok(vec![t[0].kaio_attention_tc(&t[1], &t[2], true)?])
        });
        check("kaio_flash_attn", rows(F32, &[b, h]), &[b, h], |t| {
            Ok(vec![t[0].kaio_flash_attn(&t[1], &t[2], true)?])
        });
        let with =
            |extra: Vec<(DType, Vec<usize>)>, heads: &[usize]| [rows(F16, heads), extra].concat();
        check("bias", with(vec![(F32, vec![b, h, sq, sk])], &[b, h]), &[b, h], |t| {
            flash(t, FlashAttnOptions::default().bias(t[3].clone()))
        });
        check("alibi_slopes", with(vec![(F32, vec![b, h])], &[b, h]), &[b, h], |t| {
            flash(t, FlashAttnOptions::default().alibi_slopes(t[3].clone()))
        });
        check("seqlens", with(vec![(U32, vec![b]); 2], &[b, h]), &[b, h], |t| {
            let opts = FlashAttnOptions::default().seqlens_q(t[3].clone());
            flash(t, opts.seqlens_k(t[4].clone()))
        });
        // So many sequences, of no rows.
        check("cu_seqlens", with(vec![(U32, vec![b + 1]); 2], &[h]), &[h], |t| {
            let opts = FlashAttnOptions::default().cu_seqlens_q(t[3].clone());
            flash(t, opts.cu_seqlens_k(t[4].clone()))
        });
    }
    tally.finish();
}

pub fn quantisers(device: &Device) {
    let mut tally = Tally::new("empty quantisers", device);
    for (k, n) in pairs([0, 128], [0, 5]) {
        let weight = vec![k, n];
        let (words, steps) = (vec![k / 8, n], vec![k / 128, n]);
        let mut check = |name, inputs: &[(DType, &[usize])], outputs: &[&[usize]], call| {
            let inputs = inputs.iter().map(|&(dtype, dims)| (dtype, dims.to_vec())).collect();
            let outputs = outputs.iter().map(|dims| dims.to_vec()).collect();
            run(&mut tally, device, name, Row { inputs, outputs, call, tracked: 0 });
        };
        for dtype in [F16, DType::BF16, F32] {
            check("quantize_int8", &[(dtype, &weight)], &[&weight], |t| {
                Ok(vec![quant::quantize_int8(&t[0])?.0])
            });
        }
        check("dequantize_int8", &[(U8, &weight)], &[&weight], |t| {
            Ok(vec![quant::dequantize_int8(&t[0], 1.0)?])
        });
        if k * n == 0 {
            // Of zeros the steps are not zero.
            for dtype in [F16, DType::BF16, F32] {
                check("quantize_int4", &[(dtype, &weight)], &[&words, &steps], |t| {
                    let (packed, scales) = quant::quantize_int4(&t[0])?;
                    Ok(vec![packed, scales])
                });
            }
        }
        check("pack_int4", &[(U8, &weight)], &[&words], |t| Ok(vec![quant::pack_int4(&t[0])?]));
        check("unpack_int4", &[(U32, &words)], &[&weight], |t| {
            Ok(vec![quant::unpack_int4(&t[0])?])
        });
        check("dequantize_int4", &[(U32, &words), (F16, &steps)], &[&weight], |t| {
            Ok(vec![quant::dequantize_int4(&t[0], &t[1])?])
        });
    }
    tally.finish();
}
