//! The rows of the table: each op at sizes that fill the device, beside candle's own way and, on a
//! GPU, a direct call of kaio-ops.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use kaio_candle::prelude::*;
use kaio_candle::quant;

use super::timing::Contestant;

pub struct Case {
    pub op: &'static str,
    pub shape: String,
    pub flops: f64,
    pub rounds: usize,
    /// The bridge, then a direct call of kaio-ops, then candle.
    pub contestants: Vec<Contestant>,
}

/// A case that is built when its turn comes, so that one at a time holds memory.
pub struct Builder {
    pub op: &'static str,
    pub build: Box<dyn FnOnce(&Device) -> Result<Case>>,
}

fn builder(op: &'static str, build: impl FnOnce(&Device) -> Result<Case> + 'static) -> Builder {
    Builder { op, build: Box::new(build) }
}

fn contestant(name: &'static str, run: impl FnMut() -> Result<()> + 'static) -> Contestant {
    Contestant { name, run: Box::new(run) }
}

pub fn all(device: &Device) -> Vec<Builder> {
    let cpu = device.is_cpu();
    let mut all = Vec::new();
    let sizes: &[usize] = if cpu { &[1024] } else { &[64, 1024, 4096] };
    for &n in sizes {
        for (op, dtype, pipelined) in [
            ("matmul_tc f16", DType::F16, false),
            ("matmul_tc bf16", DType::BF16, false),
            ("matmul_tc_async f16", DType::F16, true),
            ("matmul_tc_async bf16", DType::BF16, true),
        ] {
            all.push(builder(op, move |d| matmul(d, op, dtype, pipelined, n)));
        }
    }
    let (n, rows) = if cpu { (1024, [16, 256]) } else { (4096, [16, 2048]) };
    for m in rows {
        all.push(builder("matmul_int8", move |d| int8(d, m, n)));
        all.push(builder("matmul_int4", move |d| int4(d, m, n)));
        all.push(builder("qkv_project_int8", move |d| qkv_int8(d, m, n)));
        all.push(builder("qkv_project_int4", move |d| qkv_int4(d, m, n)));
    }
    for causal in [false, true] {
        let op = if causal { "attention_tc causal" } else { "attention_tc" };
        all.push(builder(op, move |d| attention_tc(d, op, causal)));
        let sizes: &[_] = if cpu { &[[8, 1024, 64]] } else { &[[8, 1024, 64], [1, 4096, 128]] };
        for &size in sizes {
            let op = if causal { "flash_attn causal" } else { "flash_attn" };
            all.push(builder(op, move |d| flash(d, op, causal, size)));
            let op = if causal { "flash_attn backward causal" } else { "flash_attn backward" };
            all.push(builder(op, move |d| flash_backward(d, op, causal, size)));
        }
    }
    all
}

fn random(device: &Device, dims: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::randn(0f32, 1., dims, device)?.to_dtype(dtype)
}

/// The dtype in which candle multiplies 16-bit operands: itself on a GPU; on the CPU it has no fast
/// 16-bit product, and f32 is what its users take.
fn peer_dtype(device: &Device, dtype: DType) -> (DType, &'static str) {
    match (device.is_cpu(), dtype) {
        (true, _) => (DType::F32, "candle matmul f32"),
        (false, DType::BF16) => (dtype, "candle matmul bf16 to bf16"),
        (false, _) => (DType::F16, "candle matmul f16 to f16"),
    }
}

fn matmul(
    device: &Device,
    op: &'static str,
    dtype: DType,
    pipelined: bool,
    n: usize,
) -> Result<Case> {
    let (a, b) = (random(device, &[n, n], dtype)?, random(device, &[n, n], dtype)?);
    let (peer, peer_name) = peer_dtype(device, dtype);
    let (pa, pb) = (a.to_dtype(peer)?, b.to_dtype(peer)?);
    #[cfg(feature = "cuda")]
    let direct = direct::matmul(&a, &b, pipelined, n)?;
    let ours = contestant("kaio-candle", move || {
        if pipelined { a.kaio_matmul_tc_async(&b) } else { a.kaio_matmul_tc(&b) }.map(drop)
    });
    Ok(Case {
        op,
        shape: format!("{n}³"),
        flops: 2.0 * (n as f64).powi(3),
        // The smallest shows the host's part, which needs many rounds.
        rounds: if n == 64 { 200 } else { 20 },
        contestants: vec![
            ours,
            #[cfg(feature = "cuda")]
            direct,
            contestant(peer_name, move || pa.matmul(&pb).map(drop)),
        ],
    })
}

fn int8(device: &Device, m: usize, n: usize) -> Result<Case> {
    let (a, _) = quant::quantize_int8(&random(device, &[m, n], DType::F32)?)?;
    let (w, scale) = quant::quantize_int8(&random(device, &[n, n], DType::F32)?)?;
    let (peer, peer_name) = peer_dtype(device, DType::F16);
    let (pa, pw) = (random(device, &[m, n], peer)?, random(device, &[n, n], peer)?);
    #[cfg(feature = "cuda")]
    let direct = direct::int8(&a, &w, [m, n])?;
    Ok(Case {
        op: "matmul_int8",
        shape: format!("{m}×{n}×{n}"),
        flops: 2.0 * (m * n * n) as f64,
        rounds: 20,
        contestants: vec![
            contestant("kaio-candle", move || a.kaio_matmul_int8(&w, scale).map(drop)),
            #[cfg(feature = "cuda")]
            direct,
            contestant(peer_name, move || pa.matmul(&pw).map(drop)),
        ],
    })
}

fn int4(device: &Device, m: usize, n: usize) -> Result<Case> {
    let a = random(device, &[m, n], DType::F16)?;
    let (w, s) = quant::quantize_int4(&random(device, &[n, n], DType::F32)?)?;
    let (peer, peer_name) = peer_dtype(device, DType::F16);
    let (pa, pw) = (a.to_dtype(peer)?, random(device, &[n, n], peer)?);
    #[cfg(feature = "cuda")]
    let direct = direct::int4(&a, &w, &s, [m, n])?;
    Ok(Case {
        op: "matmul_int4",
        shape: format!("{m}×{n}×{n}"),
        flops: 2.0 * (m * n * n) as f64,
        rounds: 20,
        contestants: vec![
            contestant("kaio-candle", move || a.kaio_matmul_int4(&w, &s).map(drop)),
            #[cfg(feature = "cuda")]
            direct,
            contestant(peer_name, move || pa.matmul(&pw).map(drop)),
        ],
    })
}

/// Three products of candle beside one projection.
fn three(device: &Device, x: &Tensor, n: usize) -> Result<Contestant> {
    let (dtype, _) = peer_dtype(device, DType::F16);
    let x = x.to_dtype(dtype)?;
    let w = (0..3).map(|_| random(device, &[n, n], dtype)).collect::<Result<Vec<_>>>()?;
    let name = if device.is_cpu() { "candle 3 matmuls f32" } else { "candle 3 matmuls f16" };
    Ok(contestant(name, move || w.iter().try_for_each(|w| x.matmul(w).map(drop))))
}

fn qkv_int8(device: &Device, m: usize, n: usize) -> Result<Case> {
    let x = random(device, &[m, n], DType::F16)?;
    let (w, scale) = quant::quantize_int8(&random(device, &[n, n], DType::F32)?)?;
    let candle = three(device, &x, n)?;
    #[cfg(feature = "cuda")]
    let direct = direct::qkv_int8(&x, &w, scale, [m, n])?;
    Ok(Case {
        op: "qkv_project_int8",
        shape: format!("3·{m}×{n}×{n}"),
        flops: 6.0 * (m * n * n) as f64,
        rounds: 20,
        contestants: vec![
            contestant("kaio-candle", move || {
                x.kaio_qkv_project_int8([&w, &w, &w], [scale; 3]).map(drop)
            }),
            #[cfg(feature = "cuda")]
            direct,
            candle,
        ],
    })
}

fn qkv_int4(device: &Device, m: usize, n: usize) -> Result<Case> {
    let x = random(device, &[m, n], DType::F16)?;
    let (w, s) = quant::quantize_int4(&random(device, &[n, n], DType::F32)?)?;
    let candle = three(device, &x, n)?;
    #[cfg(feature = "cuda")]
    let direct = direct::qkv_int4(&x, &w, &s, [m, n])?;
    Ok(Case {
        op: "qkv_project_int4",
        shape: format!("3·{m}×{n}×{n}"),
        flops: 6.0 * (m * n * n) as f64,
        rounds: 20,
        contestants: vec![
            contestant("kaio-candle", move || {
                x.kaio_qkv_project_int4([&w, &w, &w], [&s, &s, &s]).map(drop)
            }),
            #[cfg(feature = "cuda")]
            direct,
            candle,
        ],
    })
}

/// Attention of candle's ops, which keeps all scores.
fn unfused(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
}

fn mask(device: &Device, s: usize, causal: bool) -> Result<Option<Tensor>> {
    let hidden = |i, j| if j > i { f32::NEG_INFINITY } else { 0.0 };
    let mask = (0..s).flat_map(|i| (0..s).map(move |j| hidden(i, j)));
    causal.then(|| Tensor::from_iter(mask, device)?.reshape((s, s))).transpose()
}

fn attention_flops(heads: usize, s: usize, d: usize, causal: bool) -> f64 {
    4.0 * (heads * s * s * d) as f64 * if causal { 0.5 } else { 1.0 }
}

fn attention_tc(device: &Device, op: &'static str, causal: bool) -> Result<Case> {
    let (heads, s, d) = (1, 384, 64);
    let [q, k, v] = [0; 3].map(|_| random(device, &[heads, s, d], DType::F16));
    let (q, k, v) = (q?, k?, v?);
    let [pq, pk, pv] = [&q, &k, &v].map(|t| t.to_dtype(DType::F32));
    let (pq, pk, pv, mask) = (pq?, pk?, pv?, mask(device, s, causal)?);
    #[cfg(feature = "cuda")]
    let direct = direct::attention_tc(&q, &k, &v, causal)?;
    Ok(Case {
        op,
        shape: format!("H{heads} S{s} D{d}"),
        flops: attention_flops(heads, s, d, causal),
        rounds: 40,
        contestants: vec![
            contestant("kaio-candle", move || q.kaio_attention_tc(&k, &v, causal).map(drop)),
            #[cfg(feature = "cuda")]
            direct,
            contestant("candle unfused f32", move || {
                unfused(&pq, &pk, &pv, mask.as_ref()).map(drop)
            }),
        ],
    })
}

fn flash(
    device: &Device,
    op: &'static str,
    causal: bool,
    [heads, s, d]: [usize; 3],
) -> Result<Case> {
    let [q, k, v] = [0; 3].map(|_| random(device, &[1, heads, s, d], DType::F32));
    let (q, k, v, mask) = (q?, k?, v?, mask(device, s, causal)?);
    let (pq, pk, pv) = (q.clone(), k.clone(), v.clone());
    #[cfg(feature = "cuda")]
    let direct = direct::flash(&q, &k, &v, causal)?;
    Ok(Case {
        op,
        shape: format!("f32 H{heads} S{s} D{d}"),
        flops: attention_flops(heads, s, d, causal),
        rounds: 20,
        contestants: vec![
            contestant("kaio-candle", move || q.kaio_flash_attn(&k, &v, causal).map(drop)),
            #[cfg(feature = "cuda")]
            direct,
            contestant("candle unfused f32", move || {
                unfused(&pq, &pk, &pv, mask.as_ref()).map(drop)
            }),
        ],
    })
}

/// The backward pass alone: the forward pass ran before.
fn flash_backward(
    device: &Device,
    op: &'static str,
    causal: bool,
    [heads, s, d]: [usize; 3],
) -> Result<Case> {
    let vars = (0..3).map(|_| Var::randn(0f32, 1., (1, heads, s, d), device));
    let vars = vars.collect::<Result<Vec<_>>>()?;
    let weights = random(device, &[1, heads, s, d], DType::F32)?;
    let mask = mask(device, s, causal)?;
    let ours = (vars[0].kaio_flash_attn(&vars[1], &vars[2], causal)? * &weights)?.sum_all()?;
    let peer = (unfused(&vars[0], &vars[1], &vars[2], mask.as_ref())? * &weights)?.sum_all()?;
    #[cfg(feature = "cuda")]
    let direct = direct::flash_backward(&vars, &weights, causal)?;
    Ok(Case {
        op,
        shape: format!("f32 H{heads} S{s} D{d}"),
        flops: 2.5 * attention_flops(heads, s, d, causal),
        rounds: 10,
        contestants: vec![
            contestant("kaio-candle", move || ours.backward().map(drop)),
            #[cfg(feature = "cuda")]
            direct,
            contestant("candle unfused f32", move || peer.backward().map(drop)),
        ],
    })
}

/// kaio-ops called as its own users call it, into outputs that exist.
#[cfg(feature = "cuda")]
mod direct {
    use candle_core::{DType, Error, Result, Tensor, Var, WithDType};
    use half::{bf16, f16};
    use kaio::prelude::{GpuBuffer, KaioDevice};
    use kaio_candle::registry;

    use super::{Contestant, contestant};

    fn buffer<T: WithDType + cudarc::driver::DeviceRepr>(
        kaio: &KaioDevice,
        t: &Tensor,
    ) -> Result<GpuBuffer<T>> {
        kaio.alloc_from(&t.flatten_all()?.to_vec1::<T>()?).map_err(Error::wrap)
    }

    fn signed(kaio: &KaioDevice, t: &Tensor) -> Result<GpuBuffer<i8>> {
        let bytes = t.flatten_all()?.to_vec1::<u8>()?.into_iter().map(|x| x as i8);
        kaio.alloc_from(&bytes.collect::<Vec<_>>()).map_err(Error::wrap)
    }

    fn zeros(kaio: &KaioDevice, len: usize) -> Result<GpuBuffer<f32>> {
        kaio.alloc_zeros(len).map_err(Error::wrap)
    }

    fn kaio_ops(mut run: impl FnMut() -> kaio::prelude::Result<()> + 'static) -> Contestant {
        contestant("kaio-ops", move || run().map_err(Error::wrap))
    }

    pub fn matmul(a: &Tensor, b: &Tensor, pipelined: bool, n: usize) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (mut c, n32) = (zeros(&kaio, n * n)?, n as u32);
        if a.dtype() == DType::F16 {
            let kernel = match pipelined {
                false => kaio_ops::matmul_tc,
                true => kaio_ops::matmul_tc_async,
            };
            let (a, b) = (buffer::<f16>(&kaio, a)?, buffer::<f16>(&kaio, b)?);
            return Ok(self::kaio_ops(move || kernel(&kaio, &a, &b, &mut c, n32, n32, n32)));
        }
        let kernel = match pipelined {
            false => kaio_ops::matmul_tc_bf16,
            true => kaio_ops::matmul_tc_bf16_async,
        };
        let (a, b) = (buffer::<bf16>(&kaio, a)?, buffer::<bf16>(&kaio, b)?);
        Ok(self::kaio_ops(move || kernel(&kaio, &a, &b, &mut c, n32, n32, n32)))
    }

    pub fn int8(a: &Tensor, w: &Tensor, [m, n]: [usize; 2]) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (a, w, mut c) = (signed(&kaio, a)?, signed(&kaio, w)?, zeros(&kaio, m * n)?);
        let (m, n) = (m as u32, n as u32);
        Ok(kaio_ops(move || kaio_ops::matmul_int8(&kaio, &a, &w, &mut c, 1.0, m, n, n)))
    }

    pub fn int4(a: &Tensor, w: &Tensor, s: &Tensor, [m, n]: [usize; 2]) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (a, w) = (buffer::<f16>(&kaio, a)?, buffer::<u32>(&kaio, &w.t()?)?);
        let (s, mut c) = (buffer::<f16>(&kaio, s)?, zeros(&kaio, m * n)?);
        let (m, n) = (m as u32, n as u32);
        Ok(kaio_ops(move || kaio_ops::matmul_int4(&kaio, &a, &w, &s, &mut c, m, n, n, 128)))
    }

    /// Rows of f16 output, in whole tiles: the kernels write past the end of a result that is not.
    fn halves(kaio: &KaioDevice, m: usize, n: usize) -> Result<GpuBuffer<f16>> {
        kaio.alloc_zeros(m.next_multiple_of(64) * n).map_err(Error::wrap)
    }

    pub fn qkv_int8(x: &Tensor, w: &Tensor, scale: f32, [m, n]: [usize; 2]) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (x, w) = (buffer::<f16>(&kaio, x)?, signed(&kaio, w)?);
        let (mut q, mut k, mut v) =
            (halves(&kaio, m, n)?, halves(&kaio, m, n)?, halves(&kaio, m, n)?);
        let (m, n) = (m as u32, n as u32);
        Ok(kaio_ops(move || {
            kaio_ops::qkv_project_int8(
                &kaio, &x, &w, &w, &w, scale, scale, scale, &mut q, &mut k, &mut v, m, n, n,
            )
        }))
    }

    pub fn qkv_int4(x: &Tensor, w: &Tensor, s: &Tensor, [m, n]: [usize; 2]) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (x, w) = (buffer::<f16>(&kaio, x)?, buffer::<u32>(&kaio, &w.t()?)?);
        let s = buffer::<f16>(&kaio, s)?;
        let (mut q, mut k, mut v) =
            (halves(&kaio, m, n)?, halves(&kaio, m, n)?, halves(&kaio, m, n)?);
        let (m, n) = (m as u32, n as u32);
        Ok(kaio_ops(move || {
            kaio_ops::qkv_project_int4(
                &kaio, &x, &w, &w, &w, &s, &s, &s, &mut q, &mut k, &mut v, m, n, n, 128,
            )
        }))
    }

    pub fn attention_tc(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (_, s, d) = q.dims3()?;
        let mut out = zeros(&kaio, s * d)?;
        let (q, k, v) = (buffer(&kaio, q)?, buffer(&kaio, k)?, buffer(&kaio, v)?);
        let (s, d) = (s as u32, d as u32);
        let kernel = match causal {
            false => kaio_ops::attention_tc,
            true => kaio_ops::attention_tc_causal,
        };
        Ok(kaio_ops(move || kernel(&kaio, &q, &k, &v, &mut out, s, s, d, d)))
    }

    /// Buffers of each head.
    fn heads(kaio: &KaioDevice, t: &Tensor) -> Result<Vec<GpuBuffer<f32>>> {
        (0..t.dim(1)?).map(|h| buffer(kaio, &t.get_on_dim(1, h)?)).collect()
    }

    pub fn flash(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (_, _, s, d) = q.dims4()?;
        let mut out = zeros(&kaio, s * d)?;
        let (q, k, v) = (heads(&kaio, q)?, heads(&kaio, k)?, heads(&kaio, v)?);
        let (s, d) = (s as u32, d as u32);
        let kernel = match causal {
            false => kaio_ops::attention_flash,
            true => kaio_ops::attention_flash_causal,
        };
        Ok(kaio_ops(move || {
            (0..q.len()).try_for_each(|h| kernel(&kaio, &q[h], &k[h], &v[h], &mut out, s, d))
        }))
    }

    pub fn flash_backward(vars: &[Var], grad: &Tensor, causal: bool) -> Result<Contestant> {
        let kaio = registry::device(0)?;
        let (_, _, s, d) = grad.dims4()?;
        let (q, k, v) = (heads(&kaio, &vars[0])?, heads(&kaio, &vars[1])?, heads(&kaio, &vars[2])?);
        let g = heads(&kaio, grad)?;
        let (s32, d32) = (s as u32, d as u32);
        let (forward, backward) = match causal {
            false => (
                kaio_ops::attention_flash_with_stats
                    as fn(&_, &_, &_, &_, &mut _, &mut _, _, _) -> _,
                kaio_ops::attention_flash_bwd
                    as fn(&_, &_, &_, &_, &_, &_, &_, &mut _, &mut _, &mut _, _, _) -> _,
            ),
            true => (
                kaio_ops::attention_flash_causal_with_stats
                    as fn(&_, &_, &_, &_, &mut _, &mut _, _, _) -> _,
                kaio_ops::attention_flash_bwd_causal
                    as fn(&_, &_, &_, &_, &_, &_, &_, &mut _, &mut _, &mut _, _, _) -> _,
            ),
        };
        let mut outs = Vec::new();
        for h in 0..q.len() {
            let (mut out, mut lse) = (zeros(&kaio, s * d)?, zeros(&kaio, s)?);
            forward(&kaio, &q[h], &k[h], &v[h], &mut out, &mut lse, s32, d32)
                .map_err(Error::wrap)?;
            outs.push((out, lse));
        }
        let (mut dq, mut dk, mut dv) =
            (zeros(&kaio, s * d)?, zeros(&kaio, s * d)?, zeros(&kaio, s * d)?);
        Ok(kaio_ops(move || {
            (0..q.len()).try_for_each(|h| {
                let (out, lse) = &outs[h];
                backward(
                    &kaio, &g[h], &q[h], &k[h], &v[h], out, lse, &mut dq, &mut dk, &mut dv, s32,
                    d32,
                )
            })
        }))
    }
}
