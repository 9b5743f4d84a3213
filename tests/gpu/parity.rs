//! Bit for bit what a direct call of kaio-ops gives, with outputs poisoned first.
//!
//! This proves nothing about the kernels (the tables do that), but that the bridge hands them the
//! right memory, and all of it.

use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};
use kaio::prelude::{GpuBuffer, KaioDevice};
use kaio_candle::prelude::*;
use kaio_candle::quant;

use super::gpu;
use super::suites::{Layout, Source, poison};

fn buffer<T: candle_core::WithDType + cudarc::driver::DeviceRepr>(
    kaio: &KaioDevice,
    t: &Tensor,
) -> GpuBuffer<T> {
    kaio.alloc_from(&t.flatten_all().unwrap().to_vec1::<T>().unwrap()).unwrap()
}

/// The bits of a result of the bridge against those of a direct call.
fn same(what: &str, got: &Tensor, kaio: &KaioDevice, want: &GpuBuffer<f32>) {
    let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let want = want.to_host(kaio).unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
    if let Some(i) = got.iter().zip(&want).position(differs) {
        panic!("{what}: element {i} is {} through the bridge, {} directly", got[i], want[i]);
    }
}

fn same_f16(what: &str, got: &Tensor, kaio: &KaioDevice, want: &GpuBuffer<f16>) {
    let got = got.flatten_all().unwrap().to_vec1::<f16>().unwrap();
    assert_eq!(got, want.to_host(kaio).unwrap(), "{what}");
}

const M: usize = 65;
const N: usize = 68;
const K: usize = 256;
/// What the quantised kernels of kaio-ops compute right: the projections write whole tiles of 64 rows
/// by 16 columns, also past the end, and the int4 product has the scales of 64 columns.
const TILE: usize = 64;

/// A kernel of kaio-ops: `c [m, n] = a [m, k] · b [k, n]`.
type Product<T> = fn(
    &KaioDevice,
    &GpuBuffer<T>,
    &GpuBuffer<T>,
    &mut GpuBuffer<f32>,
    u32,
    u32,
    u32,
) -> kaio::prelude::Result<()>;

/// The engine is asked for: by itself the bridge multiplies with this crate's own kernels.
fn matmul<T: candle_core::WithDType + cudarc::driver::DeviceRepr>(
    kernel: Product<T>,
) -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let kaio = registry::device(0)?;
    let what = format!("matmul {}", T::DTYPE.as_str());
    let mut source = Source::new(&format!("parity {what}"), &gpu);
    let a = source.tensor(T::DTYPE, &[M, K], Layout::Plain)?;
    let b = source.tensor(T::DTYPE, &[K, N], Layout::Plain)?;
    let (ka, kb) = (buffer::<T>(&kaio, &a), buffer::<T>(&kaio, &b));
    let mut c = kaio.alloc_zeros::<f32>(M * N).unwrap();
    kernel(&kaio, &ka, &kb, &mut c, M as u32, N as u32, K as u32).unwrap();
    poison(&gpu, M * N);
    let options = MatmulOptions::default().engine(Engine::KaioOps);
    same(&what, &a.kaio_matmul_with(&b, &options)?, &kaio, &c);
    Ok(())
}

#[test]
fn matmul_f16() -> Result<()> {
    matmul::<f16>(kaio_ops::matmul_tc_async)
}

#[test]
fn matmul_bf16() -> Result<()> {
    matmul::<bf16>(kaio_ops::matmul_tc_bf16_async)
}

#[test]
fn quantised() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let kaio = registry::device(0)?;
    let mut source = Source::new("parity quantised", &gpu);
    let (m, n, k) = (M as u32, N as u32, K as u32);

    let a = source.tensor(DType::U8, &[M, K], Layout::Plain)?;
    let b = source.tensor(DType::U8, &[K, N], Layout::Plain)?;
    let signed = |t: &Tensor| -> GpuBuffer<i8> {
        let bytes = t.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        kaio.alloc_from(&bytes.into_iter().map(|x| x as i8).collect::<Vec<_>>()).unwrap()
    };
    let mut c = kaio.alloc_zeros::<f32>(M * N).unwrap();
    kaio_ops::matmul_int8(&kaio, &signed(&a), &signed(&b), &mut c, 0.37, m, n, k).unwrap();
    poison(&gpu, M * N);
    same("matmul_int8", &a.kaio_matmul_int8(&b, 0.37)?, &kaio, &c);

    let (m, n) = (TILE as u32, TILE as u32);
    let x = source.tensor(DType::F16, &[TILE, K], Layout::Plain)?;
    let kx = buffer::<f16>(&kaio, &x);
    let quantised = [0, 1, 2].map(|_| {
        let w = source.tensor(DType::F32, &[K, TILE], Layout::Plain).unwrap();
        quant::quantize_int4(&w).unwrap()
    });
    let words = [0, 1, 2].map(|i| buffer::<u32>(&kaio, &quantised[i].0.t().unwrap()));
    let steps = [0, 1, 2].map(|i| buffer::<f16>(&kaio, &quantised[i].1));
    let mut c = kaio.alloc_zeros::<f32>(TILE * TILE).unwrap();
    kaio_ops::matmul_int4(&kaio, &kx, &words[0], &steps[0], &mut c, m, n, k, 128).unwrap();
    poison(&gpu, TILE * TILE);
    same("matmul_int4", &x.kaio_matmul_int4(&quantised[0].0, &quantised[0].1)?, &kaio, &c);

    let mut out = [0, 1, 2].map(|_| kaio.alloc_zeros::<f16>(TILE * TILE).unwrap());
    let weights = [0, 1, 2].map(|_| source.tensor(DType::U8, &[K, TILE], Layout::Plain).unwrap());
    let [w0, w1, w2] = [0, 1, 2].map(|i| signed(&weights[i]));
    let [q, key, v] = &mut out;
    let s = [0.01, 0.02, 0.03];
    kaio_ops::qkv_project_int8(&kaio, &kx, &w0, &w1, &w2, s[0], s[1], s[2], q, key, v, m, n, k)
        .unwrap();
    poison(&gpu, 3 * TILE * TILE / 2);
    let got = x.kaio_qkv_project_int8([&weights[0], &weights[1], &weights[2]], s)?;
    for (got, want) in [got.0, got.1, got.2].iter().zip(&out) {
        same_f16("qkv_project_int8", got, &kaio, want);
    }
    let [q, key, v] = &mut out;
    let ([w0, w1, w2], [s0, s1, s2]) = (&words, &steps);
    kaio_ops::qkv_project_int4(&kaio, &kx, w0, w1, w2, s0, s1, s2, q, key, v, m, n, k, 128)
        .unwrap();
    poison(&gpu, 3 * TILE * TILE / 2);
    let [(w0, s0), (w1, s1), (w2, s2)] = &quantised;
    let got = x.kaio_qkv_project_int4([w0, w1, w2], [s0, s1, s2])?;
    for (got, want) in [got.0, got.1, got.2].iter().zip(&out) {
        same_f16("qkv_project_int4", got, &kaio, want);
    }
    Ok(())
}

#[test]
fn flash_attention() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let kaio = registry::device(0)?;
    let mut source = Source::new("parity flash", &gpu);
    let (s, d) = (300, 64);
    let [q, k, v] = [0; 3].map(|_| source.tensor(DType::F32, &[s, d], Layout::Plain).unwrap());
    let [kq, kk, kv] = [&q, &k, &v].map(|t| buffer::<f32>(&kaio, t));
    let new = || kaio.alloc_zeros::<f32>(s * d).unwrap();
    let (su, du) = (s as u32, d as u32);
    for causal in [false, true] {
        let mut out = new();
        let forward = match causal {
            false => kaio_ops::attention_flash,
            true => kaio_ops::attention_flash_causal,
        };
        forward(&kaio, &kq, &kk, &kv, &mut out, su, du).unwrap();
        poison(&gpu, s * d);
        let what = format!("attention_flash causal={causal}");
        let opts = FlashAttnOptions::default().causal(causal).engine(Engine::KaioOps);
        same(&what, &q.kaio_flash_attn_with(&k, &v, &opts)?, &kaio, &out);
    }
    Ok(())
}
