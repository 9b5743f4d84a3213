//! Bit for bit what a direct call of kaio-ops gives, with outputs poisoned first.
//!
//! This proves nothing about the kernels (the tables do that), but that the bridge hands them the
//! right memory, and all of it.

use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};
use kaio::prelude::{GpuBuffer, KaioDevice};
use kaio_candle::prelude::*;

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

const M: usize = 65;
const N: usize = 68;
const K: usize = 256;

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
fn matmul_int8() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let kaio = registry::device(0)?;
    let mut source = Source::new("parity int8", &gpu);
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
