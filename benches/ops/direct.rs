//! kaio-ops called as its own users call it, into outputs that exist.

use candle_core::{DType, Error, Result, Tensor, Var, WithDType};
use half::{bf16, f16};
use kaio::prelude::{GpuBuffer, KaioDevice};
use kaio_candle::registry;

use super::turns::{Contestant, contestant};

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

pub fn matmul(a: &Tensor, b: &Tensor, n: usize) -> Result<Contestant> {
    let kaio = registry::device(0)?;
    let (mut c, n) = (zeros(&kaio, n * n)?, n as u32);
    if a.dtype() == DType::F16 {
        let (a, b) = (buffer::<f16>(&kaio, a)?, buffer::<f16>(&kaio, b)?);
        return Ok(kaio_ops(move || kaio_ops::matmul_tc_async(&kaio, &a, &b, &mut c, n, n, n)));
    }
    let (a, b) = (buffer::<bf16>(&kaio, a)?, buffer::<bf16>(&kaio, b)?);
    Ok(kaio_ops(move || kaio_ops::matmul_tc_bf16_async(&kaio, &a, &b, &mut c, n, n, n)))
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
    let (mut q, mut k, mut v) = (halves(&kaio, m, n)?, halves(&kaio, m, n)?, halves(&kaio, m, n)?);
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
    let (mut q, mut k, mut v) = (halves(&kaio, m, n)?, halves(&kaio, m, n)?, halves(&kaio, m, n)?);
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
    let forward = match causal {
        false => kaio_ops::attention_flash_with_stats,
        true => kaio_ops::attention_flash_causal_with_stats,
    };
    let backward = match causal {
        false => kaio_ops::attention_flash_bwd,
        true => kaio_ops::attention_flash_bwd_causal,
    };
    let mut outs = Vec::new();
    for h in 0..q.len() {
        let (mut out, mut lse) = (zeros(&kaio, s * d)?, zeros(&kaio, s)?);
        forward(&kaio, &q[h], &k[h], &v[h], &mut out, &mut lse, s32, d32).map_err(Error::wrap)?;
        outs.push((out, lse));
    }
    let (mut dq, mut dk, mut dv) =
        (zeros(&kaio, s * d)?, zeros(&kaio, s * d)?, zeros(&kaio, s * d)?);
    Ok(kaio_ops(move || {
        (0..q.len()).try_for_each(|h| {
            let (out, lse) = &outs[h];
            backward(
                &kaio, &g[h], &q[h], &k[h], &v[h], out, lse, &mut dq, &mut dk, &mut dv, s32, d32,
            )
        })
    }))
}
