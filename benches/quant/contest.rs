//! Who competes in a row: before anyone is timed, our result is compared with candle's product, in f32, of what the
//! codes stand for.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use kaio_candle::prelude::*;

use super::codes;
use super::common::contest::{CANDLE, Contest, OURS, agree, agree_after};
use super::common::gpu::Gpu;
use super::rows::{Op, Row};
use super::upstream::Upstream;

/// Our own products of 16-bit operands.
pub const DENSE: &str = "16 bits";
/// Our own product with each weight, one after the other.
pub const APART: &str = "apart";

/// A weight's scheme, what it was quantised from, and which one of a row's it is.
type Key = (QuantScheme, DType, [usize; 2], usize);

/// Weights that rows have in common.
#[derive(Default)]
pub struct Weights(RefCell<HashMap<Key, QuantWeight>>);

impl Weights {
    pub fn prepare(&self, gpu: &Gpu, row: &Row) -> Result<Contest> {
        match row.op {
            Op::Product(how) => product(gpu, row, how, &self.get(gpu, row)?[0]),
            Op::Codes => codes::prepare(gpu, row),
            Op::Qkv => qkv(gpu, row, &self.get(gpu, row)?),
            Op::Swiglu => swiglu(gpu, row, &self.get(gpu, row)?),
            Op::Gradient => gradient(gpu, row, &self.get(gpu, row)?[0]),
            Op::Quantize => quantize(gpu, row),
            Op::Dequantize => dequantize(row, &self.get(gpu, row)?[0]),
        }
    }

    /// Those of a row.
    fn get(&self, gpu: &Gpu, row: &Row) -> Result<Vec<QuantWeight>> {
        let mut all = self.0.borrow_mut();
        let one = |(i, n)| -> Result<QuantWeight> {
            let key = (row.scheme, row.dtype, [n, row.k], i);
            if let Some(weight) = all.get(&key) {
                return Ok(weight.clone());
            }
            let weight = QuantWeight::quantize(&elements(gpu, row, n)?, &row.scheme)?;
            all.insert(key, weight.clone());
            Ok(weight)
        };
        row.widths().into_iter().enumerate().map(one).collect()
    }
}

/// A random weight, with which results are about as large as activations.
fn elements(gpu: &Gpu, row: &Row, n: usize) -> Result<Tensor> {
    let deviation = 1.0 / (row.k as f32).sqrt();
    Tensor::randn(0f32, deviation, (row.k, n), &gpu.device)?.to_dtype(row.dtype)
}

fn activations(gpu: &Gpu, row: &Row) -> Result<Tensor> {
    Tensor::randn(0f32, 1., (row.m, row.k), &gpu.device)?.to_dtype(row.dtype)
}

/// `x·W` in f32, rounded to the row's dtype.
fn exact(row: &Row, x: &Tensor, weight: &QuantWeight) -> Result<Tensor> {
    x.to_dtype(DType::F32)?.matmul(&weight.dequantize(DType::F32)?)?.to_dtype(row.dtype)
}

fn product(gpu: &Gpu, row: &Row, how: Activations, weight: &QuantWeight) -> Result<Contest> {
    let x = activations(gpu, row)?;
    let opts = MatmulOptions::default().activations(how);
    let ours = x.kaio_matmul_quant_with(weight, &opts)?;
    agree("product", &ours, &exact(row, &rounded(row, how, &x)?, weight)?, row.k)?;
    drop(ours);

    let mut contest = Contest::default();
    let (a, w) = (x.clone(), weight.clone());
    contest.add(OURS, move || a.kaio_matmul_quant_with(&w, &opts).map(drop));
    contest.add_dense(row, &x, std::slice::from_ref(weight))?;
    Ok(contest)
}

/// What codes of the activations stand for.
fn rounded(row: &Row, how: Activations, x: &Tensor) -> Result<Tensor> {
    /// Floats of 24 bits from here on are integers.
    const INTEGERS: f64 = 12_582_912.0;
    let (most, width) = match how {
        Activations::Int8 => (127f32, row.k),
        Activations::Fp8 => (448f32, if row.blocks() { 128 } else { row.k }),
        _ => return Ok(x.clone()),
    };
    let groups = x.to_dtype(DType::F32)?.reshape((row.m, row.k / width, width))?;
    let most = Tensor::new(most, x.device())?;
    let scales = groups.abs()?.max_keepdim(D::Minus1)?.broadcast_div(&most)?;
    let codes = groups.broadcast_div(&scales)?;
    let codes = match how {
        // Activations in 16 bits are often halfway between two codes: to the even one, as floats of 24 bits are.
        Activations::Int8 => ((codes + INTEGERS)? - INTEGERS)?,
        _ => codes::e4m3(&codes)?.1,
    };
    codes.broadcast_mul(&scales)?.reshape((row.m, row.k))
}

fn qkv(gpu: &Gpu, row: &Row, weights: &[QuantWeight]) -> Result<Contest> {
    let x = activations(gpu, row)?;
    let run = {
        let (x, weights) = (x.clone(), weights.to_vec());
        move || x.kaio_qkv_project([&weights[0], &weights[1], &weights[2]])
    };
    let (q, k, v) = run()?;
    for ((name, ours), weight) in [("q", q), ("k", k), ("v", v)].into_iter().zip(weights) {
        agree(name, &ours, &exact(row, &x, weight)?, row.k)?;
    }

    let mut contest = Contest::default();
    contest.add(OURS, move || run().map(drop));
    let (a, all) = (x.clone(), weights.to_vec());
    contest.add(APART, move || all.iter().try_for_each(|w| a.kaio_matmul_quant(w).map(drop)));
    contest.add_dense(row, &x, weights)?;
    Ok(contest)
}

fn swiglu(gpu: &Gpu, row: &Row, weights: &[QuantWeight]) -> Result<Contest> {
    let x = activations(gpu, row)?;
    let [gate, up] = [weights[0].clone(), weights[1].clone()];
    let ours = x.kaio_swiglu_project(&gate, &up)?;
    let [g, u] = [&gate, &up].map(|w| exact(row, &x, w)?.to_dtype(DType::F32));
    let want = (g?.silu()? * u?)?.to_dtype(row.dtype)?;
    // Gate and up are rounded before.
    agree_after("swiglu", &ours, &want, row.k, 3)?;
    drop((ours, want));

    let mut contest = Contest::default();
    let (a, [g, u]) = (x.clone(), [gate.clone(), up.clone()]);
    contest.add(OURS, move || a.kaio_swiglu_project(&g, &u).map(drop));
    let (a, [g, u]) = (x.clone(), [gate.clone(), up.clone()]);
    contest.add(APART, move || {
        a.kaio_matmul_quant(&g)?.kaio_swiglu(&a.kaio_matmul_quant(&u)?).map(drop)
    });
    let [g, u] = [gate.dequantize(row.dtype)?, up.dequantize(row.dtype)?];
    let opts = MatmulOptions::default().out_dtype(row.dtype);
    let (a, [b, c]) = (x.clone(), [g.clone(), u.clone()]);
    contest.add(DENSE, move || {
        a.kaio_matmul_with(&b, &opts)?.kaio_swiglu(&a.kaio_matmul_with(&c, &opts)?).map(drop)
    });
    contest.add_if_able(CANDLE, move || (x.matmul(&g)?.silu()? * x.matmul(&u)?).map(drop));
    Ok(contest)
}

/// `backward` of a graph that is there, from a given upstream gradient.
fn gradient(gpu: &Gpu, row: &Row, weight: &QuantWeight) -> Result<Contest> {
    let x = Var::from_tensor(&activations(gpu, row)?)?;
    let upstream = Tensor::randn(0f32, 1., (row.m, row.n), &gpu.device)?.to_dtype(row.dtype)?;
    let dense = weight.dequantize(row.dtype)?;
    let opts = MatmulOptions::default().out_dtype(row.dtype);
    let ours = x.kaio_matmul_quant(weight)?.apply_op1(Upstream(upstream.clone()))?;
    let peer = x.kaio_matmul_with(&dense, &opts)?.apply_op1(Upstream(upstream.clone()))?;
    let grads = ours.backward()?;
    let Some(grad) = grads.get(&x) else { candle_core::bail!("the gradient is missing") };
    let transposed = weight.dequantize(DType::F32)?.t()?;
    let want = upstream.to_dtype(DType::F32)?.matmul(&transposed)?.to_dtype(row.dtype)?;
    agree("gradient", grad, &want, row.n)?;

    let mut contest = Contest::default();
    contest.add(OURS, move || ours.backward().map(drop));
    contest.add(DENSE, move || peer.backward().map(drop));
    contest.notes.push("with candle's graph, which adds each gradient to zeros".into());
    Ok(contest)
}

fn quantize(gpu: &Gpu, row: &Row) -> Result<Contest> {
    let weight = elements(gpu, row, row.n)?;
    let ours = QuantWeight::quantize(&weight, &row.scheme)?.dequantize(DType::F32)?;
    let host = QuantWeight::quantize(&weight.to_device(&Device::Cpu)?, &row.scheme)?;
    agree("elements", &ours, &host.dequantize(DType::F32)?.to_device(&gpu.device)?, 1)?;
    drop(ours);

    let (mut contest, scheme) = (Contest::default(), row.scheme);
    contest.add(OURS, move || QuantWeight::quantize(&weight, &scheme).map(drop));
    Ok(contest)
}

fn dequantize(row: &Row, weight: &QuantWeight) -> Result<Contest> {
    // Products read this form.
    weight.prepare()?;
    let host = weight.to_device(&Device::Cpu)?.dequantize(row.dtype)?;
    agree("elements", &weight.dequantize(row.dtype)?, &host.to_device(weight.device())?, 1)?;

    let (mut contest, weight, dtype) = (Contest::default(), weight.clone(), row.dtype);
    contest.add(OURS, move || weight.dequantize(dtype).map(drop));
    Ok(contest)
}

impl Contest {
    /// The products with weights of 16 bits, ours and candle's.
    fn add_dense(&mut self, row: &Row, x: &Tensor, weights: &[QuantWeight]) -> Result<()> {
        let dense = weights.iter().map(|w| w.dequantize(row.dtype)).collect::<Result<Vec<_>>>()?;
        let opts = MatmulOptions::default().out_dtype(row.dtype);
        let (a, all) = (x.clone(), dense.clone());
        self.add(DENSE, move || {
            all.iter().try_for_each(|w| a.kaio_matmul_with(w, &opts).map(drop))
        });
        let a = x.clone();
        self.add_if_able(CANDLE, move || dense.iter().try_for_each(|w| a.matmul(w).map(drop)));
        Ok(())
    }
}
