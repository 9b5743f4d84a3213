//! Rows of a table by their ids, with the table's gradient.

use candle_core::{CpuStorage, CudaStorage, DType, Result, Shape, Tensor};

use super::cross_entropy::packed;
use super::{Computed, Differentiable, Op, View, apply, eval};
use crate::stack::Stack;
use crate::{check, cpu, cuda};

/// The rows of `table [V, H]` at `ids`.
pub(crate) fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let op = "kaio_embedding";
    let args @ [t, i] = [("table", table), ("ids", ids)];
    check::tensors(op, &args)?;
    check::untracked(op, &[i])?;
    check::dtype(op, t, &check::FLOATS)?;
    check::dtype(op, i, &[DType::U32, DType::I64])?;
    check::rank(op, t, 2..=2, "[V, H]", "a table has a row for each id")?;
    let [_, cols] = *table.dims() else { unreachable!("checked above") };
    let dims = [ids.dims(), &[cols]].concat();
    check::size(op, "the result", &dims, table.dtype())?;
    if table.device().is_cpu() {
        check::memory(op, "the result", &dims, DType::F32)?;
    }
    let [out] = apply(Embedding { op, out: dims.into() }, &[table, &packed(op, i)?])?;
    Ok(out)
}

/// Inputs: the table, and ids without gaps.
struct Embedding {
    op: &'static str,
    out: Shape,
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [table, ids] = *inputs else { unreachable!("a table and ids") };
        Ok(vec![(cpu::embedding(self.op, table, ids)?, self.out.clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(table, at), ids] = *inputs else { unreachable!("a table and ids") };
        let out = cuda::embedding(self.op, (table, &Stack::new(at)), ids)?;
        Ok(vec![(out, self.out.clone())])
    }
}

impl Differentiable for Embedding {
    fn differentiates(&self, input: usize) -> bool {
        input == 0
    }

    fn reads(&self, input: usize, _: &[&Tensor]) -> bool {
        input > 0
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// The sum of the gradients of all rows of each id.
    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None; 2]) };
        let (table, ids) = (inputs[0], inputs[1]);
        if grad.elem_count() == 0 || table.elem_count() == 0 {
            return Ok(vec![Some(table.zeros_like()?), None]);
        }
        let rows = grad.reshape((ids.elem_count(), table.dims()[1]))?;
        let gradient = Gradient { op: self.op, out: table.shape().clone() };
        let [of_table] = eval(&gradient, &[&rows, ids])?;
        Ok(vec![Some(of_table), None])
    }
}

/// Inputs: gradients of rows, and their ids. Result: the table's gradient.
struct Gradient {
    op: &'static str,
    out: Shape,
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [rows, ids] = *inputs else { unreachable!("rows and ids") };
        let out = cpu::embedding_backward(self.op, rows, ids, self.out.dims()[0])?;
        Ok(vec![(out, self.out.clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(rows, at), ids] = *inputs else { unreachable!("rows and ids") };
        let rows = (rows, &Stack::new(at));
        let out = cuda::embedding_backward(self.op, rows, ids, self.out.dims()[0])?;
        Ok(vec![(out, self.out.clone())])
    }
}
