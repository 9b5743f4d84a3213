//! The rows of the table: each op at sizes that fill the device, beside candle's own way and, on a
//! GPU, a direct call of kaio-ops.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use kaio_candle::prelude::*;
use kaio_candle::quant;

#[cfg(feature = "cuda")]
use super::direct;
use super::turns::{Contestant, contestant};
use super::unfused::unfused;

pub struct Case {
    pub op: &'static str,
    pub shape: String,
    pub flops: f64,
    pub rounds: usize,
    /// This crate, then a direct call of kaio-ops into a result that exists, then candle.
    pub contestants: Vec<Contestant>,
}

type Build = Box<dyn FnOnce(&Device) -> Result<Case>>;

/// A case that is built when its turn comes, so that one at a time holds memory.
pub struct Builder {
    pub op: &'static str,
    pub build: Build,
}

fn builder(op: &'static str, build: impl FnOnce(&Device) -> Result<Case> + 'static) -> Builder {
    Builder { op, build: Box::new(build) }
}

pub fn all(device: &Device) -> Vec<Builder> {
    let cpu = device.is_cpu();
    let mut all = Vec::new();
    let sizes: &[usize] = if cpu { &[1024] } else { &[64, 1024, 4096] };
    for &n in sizes {
        for (op, dtype) in [("matmul_tc f16", DType::F16), ("matmul_tc bf16", DType::BF16)] {
            all.push(builder(op, move |d| matmul(d, op, dtype, n)));
        }
    }
    let (n, rows) = if cpu { (1024, [16, 256]) } else { (4096, [16, 2048]) };
    for m in rows {
        all.push(builder("matmul_int8", move |d| int8(d, m, n)));
        all.push(builder("matmul_int4", move |d| int4(d, m, n)));
        all.push(builder("qkv_project_int8", move |d| qkv_int8(d, m, n)));
        all.push(builder("qkv_project_int4", move |d| qkv_int4(d, m, n)));
    }
    if cpu {
        // Decoding: candle's own 16-bit product and its blocks of 4 and 8 bits, which read no more.
        for m in [1, 16] {
            for (op, dtype, by_columns) in [
                ("matmul_tc f16 few rows", DType::F16, false),
                ("matmul_tc f16 few rows, w.t()", DType::F16, true),
                ("matmul_tc bf16 few rows", DType::BF16, false),
                ("matmul_tc bf16 few rows, w.t()", DType::BF16, true),
            ] {
                all.push(builder(op, move |d| few_rows(d, op, dtype, [m, 4096], by_columns)));
            }
            all.push(builder("matmul_int4 few rows", move |d| few_rows_int4(d, [m, 4096])));
            all.push(builder("matmul_int8 few rows", move |d| few_rows_int8(d, [m, 4096])));
            let int4 = |zero_points| QuantScheme::Int4 { group: 128, zero_points };
            for (op, scheme, peer) in [
                ("matmul_quant int4 few rows", int4(false), GgmlDType::Q4_0),
                ("matmul_quant int4 zero points few rows", int4(true), GgmlDType::Q4_0),
                ("matmul_quant nf4 few rows", QuantScheme::Nf4 { block: 64 }, GgmlDType::Q4_0),
                (
                    "matmul_quant int8 few rows",
                    QuantScheme::Int8 { per: Per::Channel },
                    GgmlDType::Q8_0,
                ),
                (
                    "matmul_quant fp8 few rows",
                    QuantScheme::Fp8 { per: Per::Block },
                    GgmlDType::Q8_0,
                ),
            ] {
                all.push(builder(op, move |d| few_rows_quant(d, op, scheme, [m, 4096], peer)));
            }
        }
    }
    let size = if cpu { [256, 4096] } else { [4096, 11_008] };
    all.push(builder("swiglu", move |d| swiglu(d, size)));
    all.push(builder("swiglu backward", move |d| swiglu_backward(d, size)));
    let rows = if cpu { 256 } else { 16_384 };
    for part in [Part::Activation, Part::Bias, Part::Layer] {
        all.push(builder(part.name(), move |d| layer_backward(d, part, [rows, 3072])));
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

/// The dtype in which candle multiplies 16-bit operands: itself on a GPU; on the CPU f32, which is faster
/// there for as many rows as these.
fn peer_dtype(device: &Device, dtype: DType) -> (DType, &'static str) {
    match (device.is_cpu(), dtype) {
        (true, _) => (DType::F32, "candle matmul f32"),
        (false, DType::BF16) => (dtype, "candle matmul bf16 to bf16"),
        (false, _) => (DType::F16, "candle matmul f16 to f16"),
    }
}

fn matmul(device: &Device, op: &'static str, dtype: DType, n: usize) -> Result<Case> {
    let (a, b) = (random(device, &[n, n], dtype)?, random(device, &[n, n], dtype)?);
    let (peer, peer_name) = peer_dtype(device, dtype);
    let (pa, pb) = (a.to_dtype(peer)?, b.to_dtype(peer)?);
    #[cfg(feature = "cuda")]
    let direct = direct::matmul(&a, &b, n)?;
    let ours = contestant("kaio-candle", move || a.kaio_matmul_tc(&b).map(drop));
    Ok(Case {
        op,
        shape: format!("{n}³"),
        flops: 2.0 * (n as f64).powi(3),
        // The smallest shows the host's part, which needs many rounds.
        rounds: if n == 64 { 300 } else { 30 },
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
        rounds: 30,
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
        rounds: 30,
        contestants: vec![
            contestant("kaio-candle", move || a.kaio_matmul_int4(&w, &s).map(drop)),
            #[cfg(feature = "cuda")]
            direct,
            contestant(peer_name, move || pa.matmul(&pw).map(drop)),
        ],
    })
}

/// A product that reads a weight for few rows, beside candle's in the same dtype. On the CPU candle
/// rounds it to that dtype.
fn few_rows(
    device: &Device,
    op: &'static str,
    dtype: DType,
    [m, n]: [usize; 2],
    by_columns: bool,
) -> Result<Case> {
    let (a, w) = (random(device, &[m, n], dtype)?, random(device, &[n, n], dtype)?);
    let w = if by_columns { w.t()? } else { w };
    let (pa, pw) = (a.clone(), w.clone());
    let name = if dtype == DType::F16 { "candle matmul f16" } else { "candle matmul bf16" };
    let ours = contestant("kaio-candle", move || a.kaio_matmul_tc(&w).map(drop));
    let peer = contestant(name, move || pa.matmul(&pw).map(drop));
    Ok(by_square(op, [m, n], [ours, peer]))
}

/// candle's product with a weight `[N, K]` in blocks of GGUF's.
fn gguf(device: &Device, [m, n]: [usize; 2], dtype: GgmlDType) -> Result<Contestant> {
    let weight = random(device, &[n, n], DType::F32)?;
    let weight = QMatMul::from_qtensor(QTensor::quantize(&weight, dtype)?)?;
    let x = random(device, &[m, n], DType::F32)?;
    let name = if dtype == GgmlDType::Q4_0 { "candle QMatMul Q4_0" } else { "candle QMatMul Q8_0" };
    Ok(contestant(name, move || weight.forward(&x).map(drop)))
}

fn few_rows_int4(device: &Device, size @ [m, n]: [usize; 2]) -> Result<Case> {
    let a = random(device, &[m, n], DType::F16)?;
    let (w, s) = quant::quantize_int4(&random(device, &[n, n], DType::F32)?)?;
    let ours = contestant("kaio-candle", move || a.kaio_matmul_int4(&w, &s).map(drop));
    Ok(by_square("matmul_int4 few rows", size, [ours, gguf(device, size, GgmlDType::Q4_0)?]))
}

fn few_rows_int8(device: &Device, size @ [m, n]: [usize; 2]) -> Result<Case> {
    let (a, _) = quant::quantize_int8(&random(device, &[m, n], DType::F32)?)?;
    let (w, scale) = quant::quantize_int8(&random(device, &[n, n], DType::F32)?)?;
    let ours = contestant("kaio-candle", move || a.kaio_matmul_int8(&w, scale).map(drop));
    Ok(by_square("matmul_int8 few rows", size, [ours, gguf(device, size, GgmlDType::Q8_0)?]))
}

fn few_rows_quant(
    device: &Device,
    op: &'static str,
    scheme: QuantScheme,
    size @ [m, n]: [usize; 2],
    peer: GgmlDType,
) -> Result<Case> {
    let a = random(device, &[m, n], DType::BF16)?;
    let w = QuantWeight::quantize(&random(device, &[n, n], DType::BF16)?, &scheme)?;
    let opts = MatmulOptions::default().out_dtype(DType::F32);
    let ours = contestant("kaio-candle", move || a.kaio_matmul_quant_with(&w, &opts).map(drop));
    Ok(by_square(op, size, [ours, gguf(device, size, peer)?]))
}

/// `m` rows by a square weight, to f32.
fn by_square(op: &'static str, [m, n]: [usize; 2], contestants: [Contestant; 2]) -> Case {
    Case {
        op,
        shape: format!("{m}×{n}×{n}"),
        flops: 2.0 * (m * n * n) as f64,
        rounds: 30,
        contestants: contestants.into(),
    }
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
        rounds: 30,
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
        rounds: 30,
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

/// Both halves of one projection, as a model has them. It is bound by memory: three times the result's
/// bytes; its operations are the product of gate and up, and the two of SiLU.
fn swiglu(device: &Device, [m, n]: [usize; 2]) -> Result<Case> {
    let projection = random(device, &[m, 2 * n], DType::BF16)?;
    let (gate, up) = (projection.narrow(1, 0, n)?, projection.narrow(1, n, n)?);
    let (pg, pu) = (gate.clone(), up.clone());
    Ok(Case {
        op: "swiglu",
        shape: format!("bf16 {m}×{n}"),
        flops: 3.0 * (m * n) as f64,
        rounds: 30,
        contestants: vec![
            contestant("kaio-candle", move || gate.kaio_swiglu(&up).map(drop)),
            contestant("candle bf16", move || (pg.silu()? * &pu).map(drop)),
        ],
    })
}

/// The backward pass alone, of two tensors.
fn swiglu_backward(device: &Device, [m, n]: [usize; 2]) -> Result<Case> {
    let var = || Var::from_tensor(&random(device, &[m, n], DType::BF16)?);
    let (gate, up, weights) = (var()?, var()?, random(device, &[m, n], DType::BF16)?);
    let ours = (gate.kaio_swiglu(&up)? * &weights)?.sum_all()?;
    let peer = ((gate.silu()? * up.as_tensor())? * &weights)?.sum_all()?;
    Ok(Case {
        op: "swiglu backward",
        shape: format!("bf16 {m}×{n}"),
        flops: 8.0 * (m * n) as f64,
        rounds: 10,
        contestants: vec![
            contestant("kaio-candle", move || ours.backward().map(drop)),
            contestant("candle bf16", move || peer.backward().map(drop)),
        ],
    })
}

/// What is differentiated of a layer `gelu(x·W + bias)`.
#[derive(Clone, Copy)]
enum Part {
    /// Beside a product of depth 8, which takes little: the gradient of the activation, and the bias's.
    Activation,
    /// Likewise, of a bias alone.
    Bias,
    /// All of it, of depth 768.
    Layer,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Activation => "gelu and bias backward",
            Self::Bias => "bias backward",
            Self::Layer => "layer with gelu, forward and backward",
        }
    }
}

/// The peer adds the bias and activates in candle's ops.
fn layer_backward(device: &Device, part: Part, [m, n]: [usize; 2]) -> Result<Case> {
    let k = if let Part::Layer = part { 768 } else { 8 };
    let x = random(device, &[m, k], DType::BF16)?;
    let w = random(device, &[k, n], DType::BF16)?;
    let (x, w) = match part {
        Part::Layer => (Var::from_tensor(&x)?.into_inner(), Var::from_tensor(&w)?.into_inner()),
        Part::Activation | Part::Bias => (x, w),
    };
    let bias = Var::from_tensor(&random(device, &[n], DType::BF16)?)?.into_inner();
    let round = MatmulOptions::default().out_dtype(DType::BF16);
    let mut opts = round.clone().bias(bias.clone());
    let activated = !matches!(part, Part::Bias);
    opts.activation = activated.then_some(Activation::GeluTanh);
    let (px, pw) = (x.clone(), w.clone());
    let ours = move || x.kaio_matmul_with(&w, &opts);
    let peer = move || {
        let z = px.kaio_matmul_with(&pw, &round)?.broadcast_add(&bias)?;
        if activated { z.gelu() } else { Ok(z) }
    };
    let contestants = match part {
        Part::Layer => vec![
            contestant("kaio-candle", move || ours()?.backward().map(drop)),
            contestant("candle bf16", move || peer()?.backward().map(drop)),
        ],
        Part::Activation | Part::Bias => {
            let (ours, peer) = (ours()?, peer()?);
            vec![
                contestant("kaio-candle", move || ours.backward().map(drop)),
                contestant("candle bf16", move || peer.backward().map(drop)),
            ]
        }
    };
    let products = if let Part::Layer = part { 6.0 * (m * n * k) as f64 } else { 0.0 };
    let (op, shape) = (part.name(), format!("bf16 {m}×{n}, K {k}"));
    Ok(Case { op, shape, flops: products + 8.0 * (m * n) as f64, rounds: 10, contestants })
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
        rounds: 100,
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
        rounds: 30,
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
