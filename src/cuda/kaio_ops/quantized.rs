//! int4 products and the three projections of an attention layer.

use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaStorage, Result};
use cudarc::driver::DeviceRepr;
use half::f16;
use kaio::prelude::{GpuBuffer, KaioDevice};

use super::fit::{Want, fit};
use super::session::{KaioResult, Pointer, Session};
use super::{Fitted, Operand, crop, product_indexable, slabs};
use crate::check::INT4_GROUP;

/// The depth of one f16 `mma.sync`.
const F16_K_TILE: usize = 16;
/// Columns of f16 scales that the int4 kernel reads with one access.
const PAIR: usize = 2;
/// The projection kernels write whole tiles: what hangs over the edge of a result would be written
/// past its end.
const QKV_TILE: (usize, usize) = (64, 16);

/// Words hold eight rows of a weight.
fn words(k: usize) -> usize {
    k / 8
}

/// The kernels read activations row-major, as one matrix, with loads of 4 bytes.
fn activations<'a>(op: &'static str, x: Operand<'a>, m: usize, k: usize) -> Result<Fitted<'a>> {
    fit(op, x, Want { rows: m, cols: k, align: 4, folded: true, ..Want::default() })
}

/// The kernels read the words of a column side by side: `[N, K/8]` row-major.
fn packed<'a>(op: &'static str, (storage, stack): Operand<'a>, n: usize) -> Result<Fitted<'a>> {
    fit(op, (storage, &stack.t()), Want { rows: n, ..Want::default() })
}

/// The kernels read f16 scales `[K/128, N]` row-major, two at a time.
fn scales<'a>(op: &'static str, steps: Operand<'a>, n: usize) -> Result<Fitted<'a>> {
    fit(op, steps, Want { cols: n, align: 4, ..Want::default() })
}

pub(crate) fn matmul_int4(
    op: &'static str,
    x: Operand,
    w: Operand,
    s: Operand,
) -> Result<CudaStorage> {
    let (m, n, k) = (x.1.count() * x.1.rows, w.1.cols, x.1.cols);
    let width = n.next_multiple_of(PAIR);
    product_indexable(op, ("lhs", m), k, ("packed", width))?;
    let x = activations(op, x, m, k)?;
    let (w, s) = (packed(op, w, width)?, scales(op, s, width)?);
    let [out] = products(op, (m, width), k, &x, &[&w, &s], |device, x, inputs, [c], rows| {
        let w_view = inputs[0].view::<u32>(w.offset(0), words(k) * width);
        let s_view = inputs[1].view::<f16>(s.offset(0), k / INT4_GROUP * width);
        let (n, k, group) = (width as u32, k as u32, INT4_GROUP as u32);
        kaio_ops::matmul_int4(device, x, &w_view, &s_view, c, rows, n, k, group)
    })?;
    crop(op, out, 1, (m, width), 0, (m, n))
}

pub(crate) fn qkv_int8(
    op: &'static str,
    x: Operand,
    weights: &[Operand],
    s: [f32; 3],
) -> Result<[CudaStorage; 3]> {
    let (m, n) = (x.1.count() * x.1.rows, weights[0].1.cols);
    let k = x.1.cols.next_multiple_of(F16_K_TILE);
    let (height, width) = (m.next_multiple_of(QKV_TILE.0), n.next_multiple_of(QKV_TILE.1));
    product_indexable(op, ("x", height), k, ("weights[0]", width))?;
    let x = activations(op, x, height, k)?;
    let want = Want { rows: k, cols: width, align: 4, ..Want::default() };
    let w = weights.iter().map(|&w| fit(op, w, want)).collect::<Result<Vec<_>>>()?;
    let w: Vec<_> = w.iter().collect();
    let out = products(op, (height, width), k, &x, &w, |device, x, inputs, [q, key, v], rows| {
        let view = |i: usize| inputs[i].view::<i8>(w[i].offset(0), k * width);
        let (n, k) = (width as u32, k as u32);
        let (w0, w1, w2) = (view(0), view(1), view(2));
        kaio_ops::qkv_project_int8(
            device, x, &w0, &w1, &w2, s[0], s[1], s[2], q, key, v, rows, n, k,
        )
    })?;
    let [q, k, v] = out.map(|out| crop(op, out, 1, (height, width), 0, (m, n)));
    Ok([q?, k?, v?])
}

pub(crate) fn qkv_int4(
    op: &'static str,
    x: Operand,
    weights: &[Operand],
    steps: &[Operand],
) -> Result<[CudaStorage; 3]> {
    let (m, n, k) = (x.1.count() * x.1.rows, weights[0].1.cols, x.1.cols);
    let (height, width) = (m.next_multiple_of(QKV_TILE.0), n.next_multiple_of(QKV_TILE.1));
    product_indexable(op, ("x", height), k, ("weights[0]", width))?;
    let x = activations(op, x, height, k)?;
    let w = weights.iter().map(|&w| packed(op, w, width));
    let s = steps.iter().map(|&s| scales(op, s, width));
    let inputs = w.chain(s).collect::<Result<Vec<_>>>()?;
    let inputs: Vec<_> = inputs.iter().collect();
    let out =
        products(op, (height, width), k, &x, &inputs, |device, x, pointers, [q, key, v], rows| {
            let w = |i: usize| pointers[i].view::<u32>(inputs[i].offset(0), words(k) * width);
            let s = |i: usize| {
                pointers[3 + i].view::<f16>(inputs[3 + i].offset(0), k / INT4_GROUP * width)
            };
            let (n, k, group) = (width as u32, k as u32, INT4_GROUP as u32);
            let (w0, w1, w2, s0, s1, s2) = (w(0), w(1), w(2), s(0), s(1), s(2));
            kaio_ops::qkv_project_int4(
                device, x, &w0, &w1, &w2, &s0, &s1, &s2, q, key, v, rows, n, k, group,
            )
        })?;
    let [q, k, v] = out.map(|out| crop(op, out, 1, (height, width), 0, (m, n)));
    Ok([q?, k?, v?])
}

/// `N` results `[m, n]` of activations `[m, k]` and some weights, in slabs of rows.
fn products<const N: usize, X, Y: CudaDType + DeviceRepr>(
    op: &'static str,
    (m, n): (usize, usize),
    k: usize,
    x: &Fitted,
    weights: &[&Fitted],
    kernel: impl Fn(&KaioDevice, &GpuBuffer<X>, &[Pointer], [&mut GpuBuffer<Y>; N], u32) -> KaioResult,
) -> Result<[CudaStorage; N]> {
    let inputs: Vec<_> = std::iter::once(x).chain(weights.iter().copied()).collect();
    let storages: Vec<_> = inputs.iter().map(|input| input.storage()).collect();
    let session = Session::new(op, &storages)?;
    let mut out = (0..N).map(|_| session.alloc::<Y>(m * n)).collect::<Result<Vec<_>>>()?;
    {
        let px = session.input(x.storage())?;
        let pw = weights.iter().map(|w| session.input(w.storage()));
        let pw = pw.collect::<Result<Vec<_>>>()?;
        let py = out.iter_mut().map(|out| session.output(out)).collect::<Result<Vec<_>>>()?;
        session.run(|device| {
            for (start, rows) in slabs(m, k.max(n)) {
                let x = px.view(x.offset(0) + start * k, rows * k);
                let mut y: [_; N] = std::array::from_fn(|i| py[i].view(start * n, rows * n));
                kernel(device, &x, &pw, y.each_mut().map(|y| &mut **y), rows as u32)?;
            }
            Ok(())
        })?;
    }
    let mut out = out.into_iter().map(|out| Y::wrap_cuda_slice(out, session.device.clone()));
    Ok(std::array::from_fn(|_| out.next().expect("N of them")))
}
