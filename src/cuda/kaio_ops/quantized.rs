//! int8 products.

use candle_core::{CudaStorage, Result};

use super::fit::{Want, fit};
use super::session::Session;
use super::{Operand, product_indexable, slabs};

/// The depth of one int8 `mma.sync`.
const K_TILE: usize = 32;

/// `scale · Σ x·w`, exact sums in f32.
pub(crate) fn matmul_int8(
    op: &'static str,
    x: Operand,
    w: Operand,
    scale: f32,
) -> Result<CudaStorage> {
    let (m, n, k) = (x.1.count() * x.1.rows, w.1.cols, x.1.cols.next_multiple_of(K_TILE));
    product_indexable(op, ("lhs", m), k, ("rhs", n))?;
    // The kernel reads activations row-major, as one matrix, with loads of 4 bytes.
    let x = fit(op, x, Want { rows: m, cols: k, align: 4, folded: true, ..Want::default() })?;
    let w = fit(op, w, Want { rows: k, ..Want::default() })?;
    let session = Session::new(op, &[x.storage(), w.storage()])?;
    let mut out = session.alloc::<f32>(m * n)?;
    {
        let (px, pw) = (session.input(x.storage())?, session.input(w.storage())?);
        let py = session.output(&mut out)?;
        session.run(|device| {
            let w = pw.view::<i8>(w.offset(0), k * n);
            for (start, rows) in slabs(m, k.max(n)) {
                let x = px.view::<i8>(x.offset(0) + start * k, rows * k);
                let mut y = py.view::<f32>(start * n, rows * n);
                let (rows, n, k) = (rows as u32, n as u32, k as u32);
                kaio_ops::matmul_int8(device, &x, &w, &mut y, scale, rows, n, k)?;
            }
            Ok(())
        })?;
    }
    Ok(CudaStorage::wrap_cuda_slice(out, session.device.clone()))
}
