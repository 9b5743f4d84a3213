//! Activations rounded to eight bits.

use candle_core::{CpuStorage, CudaStorage, DType, Result, Shape, Tensor};

use crate::op::{Computed, Op, View, eval};
use crate::stack::Stack;
use crate::{check, cpu, cuda};

/// Codes of the shape of `x`, and scales `[rows, groups]` of groups of `width` elements of each row; outside of the graph.
pub(super) fn quantize(
    op: &'static str,
    x: &Tensor,
    dtype: DType,
    width: usize,
) -> Result<(Tensor, Tensor)> {
    let [codes, scales] = eval(&Quantize { name: op, dtype, width: width.max(1) }, &[x])?;
    let last = x.rank() - 1;
    Ok((codes.narrow(last, 0, x.dims()[last])?, scales))
}

/// Inputs: x. Results: codes, whose rows may be longer on a GPU, and scales.
struct Quantize {
    name: &'static str,
    /// u8 for int8, or e4m3.
    dtype: DType,
    width: usize,
}

impl Op for Quantize {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let (x, layout) = inputs[0];
        check::memory(self.name, "rounded activations", layout.dims(), DType::F32)?;
        let (codes, scales) = cpu::quantize_rows((x, &Stack::new(layout)), self.dtype, self.width)?;
        Ok(vec![
            (codes, layout.shape().clone()),
            (CpuStorage::F32(scales), self.groups(layout.dims())),
        ])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let (x, layout) = inputs[0];
        let (codes, row, scales) =
            cuda::quantize_rows(self.name, (x, layout), self.dtype, self.width)?;
        let mut dims = layout.dims().to_vec();
        *dims.last_mut().expect("rank checked") = row;
        Ok(vec![(codes, Shape::from(dims)), (scales, self.groups(layout.dims()))])
    }
}

impl Quantize {
    fn groups(&self, dims: &[usize]) -> Shape {
        let (rows, k) = (dims[..dims.len() - 1].iter().product::<usize>(), dims[dims.len() - 1]);
        Shape::from((rows, k.div_ceil(self.width)))
    }
}
