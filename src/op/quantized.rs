//! Products with int8 and int4 weights. No gradient: see [`check::untracked`].

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::matmul::{Matmul, RESULT};
use super::{Computed, Op, View, apply_constant};
use crate::{check, cpu, cuda, error::Error, quant, stack::Stack};

/// The largest K whose sum of int8 products cannot leave i32: `K · 128 · 128 < 2³¹`.
const INT8_MAX_K: usize = (i32::MAX / (128 * 128)) as usize;

/// f32 `[.., M, N]` = `scale · Σ a·b`.
pub(crate) fn matmul_int8(lhs: &Tensor, rhs: &Tensor, scale: f32) -> Result<Tensor> {
    const OP: &str = "kaio_matmul_int8";
    let (a, b) = (("lhs", lhs), ("rhs", rhs));
    check::tensors(OP, &[a, b])?;
    check::dtype(OP, a, &[DType::U8])?;
    check::dtype(OP, b, &[DType::U8])?;
    let k = check::activations(OP, a)?;
    check::int8_weight(OP, (a.0, lhs, k), b)?;
    if k > INT8_MAX_K {
        return Err(Error::Dimension {
            op: OP,
            arg: "lhs",
            dim: "K",
            got: k,
            want: format!("at most {INT8_MAX_K}, so that the i32 sum cannot overflow"),
            fix: "split K and add the products".into(),
        }
        .into());
    }
    check::finite(OP, "scale", scale)?;
    check::untracked(OP, &[a, b])?;
    let [out] = apply_constant(&MatmulInt8 { scale }, &[lhs, rhs])?;
    Ok(out)
}

/// f32 `[.., M, N]` = `a · dequantised weight`.
pub(crate) fn matmul_int4(lhs: &Tensor, packed: &Tensor, scales: &Tensor) -> Result<Tensor> {
    const OP: &str = "kaio_matmul_int4";
    let (a, b, s) = (("lhs", lhs), ("packed", packed), ("scales", scales));
    check::tensors(OP, &[a, b, s])?;
    check::dtype(OP, a, &[DType::F16])?;
    check::int4_words(OP, b)?;
    check::dtype(OP, s, &[DType::F16])?;
    let k = check::activations(OP, a)?;
    check::int4_weight(OP, ("lhs", k), b, s)?;
    check::untracked(OP, &[a, b, s])?;
    let n = packed.dims()[1];
    rows(OP, lhs.layout(), n)?;
    let empty = lhs.elem_count() == 0 || packed.elem_count() == 0;
    if lhs.device().is_cuda() && !empty && !cuda::takes_int4(n) {
        check::copyable(OP, k * n)?;
        // To f16, on the GPU: what the int4 kernel does with each nibble.
        let weight = quant::dequantize(packed, scales, DType::F16)?;
        let [out] = apply_constant(&Matmul::new(OP), &[lhs, &weight])?;
        return Ok(out);
    }
    let [out] = apply_constant(&MatmulInt4, &[lhs, packed, scales])?;
    Ok(out)
}

/// The activations as one matrix or, if strides forbid that, as a stack, and the shape of their product
/// with a weight of `n` columns, unless no memory can hold it.
pub(super) fn rows(op: &'static str, lhs: &Layout, n: usize) -> Result<(Stack, Shape)> {
    let mut dims = lhs.dims().to_vec();
    *dims.last_mut().expect("rank checked") = n;
    check::size(op, RESULT, &dims, DType::F32)?;
    let stack = Stack::new(lhs);
    Ok((stack.fold_rows().unwrap_or(stack), Shape::from(dims)))
}

struct MatmulInt8 {
    scale: f32,
}

impl Op for MatmulInt8 {
    fn name(&self) -> &'static str {
        "kaio_matmul_int8"
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [(a, la), (b, lb)] = *inputs else { unreachable!("two operands") };
        let (lhs, shape) = rows(self.name(), la, lb.dims()[1])?;
        check::memory(self.name(), RESULT, shape.dims(), DType::F32)?;
        let out = cpu::matmul_weight((a, &lhs), (b, lb), self.scale)?;
        Ok(vec![(CpuStorage::F32(out), shape)])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(a, la), (b, lb)] = *inputs else { unreachable!("two operands") };
        let (lhs, shape) = rows(self.name(), la, lb.dims()[1])?;
        let rhs = Stack::new(lb);
        let out = cuda::matmul_int8(self.name(), (a, &lhs), (b, &rhs), self.scale)?;
        Ok(vec![(out, shape)])
    }
}

struct MatmulInt4;

impl Op for MatmulInt4 {
    fn name(&self) -> &'static str {
        "kaio_matmul_int4"
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [(a, la), packed, scales] = *inputs else { unreachable!("three operands") };
        let n = packed.1.dims()[1];
        let (lhs, shape) = rows(self.name(), la, n)?;
        check::memory(self.name(), RESULT, shape.dims(), DType::F32)?;
        let out = cpu::matmul_int4((a, &lhs), packed, scales)?;
        Ok(vec![(CpuStorage::F32(out), shape)])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(a, la), (b, lb), (s, ls)] = *inputs else { unreachable!("three operands") };
        let (lhs, shape) = rows(self.name(), la, lb.dims()[1])?;
        let (words, steps) = (Stack::new(lb), Stack::new(ls));
        let out = cuda::matmul_int4(self.name(), (a, &lhs), (b, &words), (s, &steps))?;
        Ok(vec![(out, shape)])
    }
}
