//! Rotary position embedding (Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021), with its
//! gradient, which is the rotation back.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Tensor};

use super::{Computed, Differentiable, Op, View, apply, eval};
use crate::options::RopeLayout;
use crate::stack::Stack;
use crate::{check, cpu, cuda};

const NAME: &str = "kaio_rope";

/// Pairs of the last dimension turned by the angles of their positions, the last dimension but one.
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    let args @ [a, c, s] = [("x", x), ("cos", cos), ("sin", sin)];
    check::tensors(NAME, &args)?;
    check::untracked(NAME, &[c, s])?;
    let shapes = "[.., heads, positions, D]";
    check::rank(NAME, a, 2..=usize::MAX, shapes, "add a dimension with `.unsqueeze(0)?`")?;
    check::dtype(NAME, a, &check::FLOATS)?;
    match x.dtype() {
        DType::F32 => check::dtype(NAME, c, &[DType::F32])?,
        half => check::dtype(NAME, c, &[DType::F32, half])?,
    }
    check::same_dtype(NAME, s, c)?;
    check::same_shape(NAME, s, c)?;
    let shapes = "[positions, R/2] or [batch, positions, R/2]";
    check::rank(NAME, c, 2..=3, shapes, "narrow it to the positions of `x`")?;
    let (of_x, of_cos) = (x.dims(), cos.dims());
    let (d, positions) = (of_x[of_x.len() - 1], of_x[of_x.len() - 2]);
    let (half, known) = (of_cos[of_cos.len() - 1], of_cos[of_cos.len() - 2]);
    if known < positions {
        let why = format_args!("or more, the positions of `x` {of_x:?}");
        let fix = "compute the angles of all positions";
        check::dim(NAME, "cos", ("positions", known), (positions, why), fix)?;
    }
    if half > d / 2 {
        let why = format_args!("or fewer, half of the last dimension of `x` {of_x:?}");
        let fix = "give each pair of elements one angle";
        check::dim(NAME, "cos", ("R/2", half), (d / 2, why), fix)?;
    }
    if let &[batch, ..] = &of_cos[..of_cos.len() - 2] {
        let batches = of_x[..of_x.len().saturating_sub(3)].iter().product::<usize>();
        let why = format_args!("the batches of `x` {of_x:?}");
        let fix = "give each batch its angles, or leave that dimension out";
        check::dim(NAME, "cos", ("batch", batch), (batches, why), fix)?;
    }
    if x.device().is_cpu() {
        check::memory(NAME, "the result", of_x, DType::F32)?;
    }
    // What of the tables is not read is not copied either.
    let [cos, sin] = [cos, sin].map(|angles| angles.narrow(angles.rank() - 2, 0, positions));
    let [out] = apply(Rope { layout, back: false }, &[x, &cos?, &sin?])?;
    Ok(out)
}

/// Rows and angles, as the ops' loops and kernels read them.
pub(crate) struct RopeProblem {
    /// Batch dimensions, heads as the last one; positions, and elements of a row.
    pub x: Stack,
    /// A matrix for all batches, or one each.
    pub angles: [Stack; 2],
    /// Elements that are turned.
    pub turned: usize,
    pub layout: RopeLayout,
    /// Whether they are turned back.
    pub back: bool,
}

impl RopeProblem {
    /// Batches, heads of each and positions.
    pub fn dims(&self) -> [usize; 3] {
        let [batches @ .., heads] = self.x.batch() else { unreachable!("heads are a dimension") };
        [batches.iter().map(|&(len, _)| len).product(), heads.0, self.x.rows]
    }
}

#[derive(Clone, Copy)]
struct Rope {
    layout: RopeLayout,
    back: bool,
}

impl Rope {
    fn problem(&self, [x, cos, sin]: [&Layout; 3]) -> RopeProblem {
        let Self { layout, back } = *self;
        RopeProblem {
            x: Stack::new(x).with_batch_dims(1),
            angles: [cos, sin].map(|angles| Stack::new(angles).with_batch_dims(1)),
            turned: 2 * cos.dims()[cos.dims().len() - 1],
            layout,
            back,
        }
    }
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let &[x, cos, sin] = inputs else { unreachable!("rows, cosines and sines") };
        let problem = self.problem([x.1, cos.1, sin.1]);
        Ok(vec![(cpu::rope(&problem, [x.0, cos.0, sin.0])?, x.1.shape().clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let &[x, cos, sin] = inputs else { unreachable!("rows, cosines and sines") };
        let problem = self.problem([x.1, cos.1, sin.1]);
        Ok(vec![(cuda::rope(NAME, &problem, [x.0, cos.0, sin.0])?, x.1.shape().clone())])
    }
}

impl Differentiable for Rope {
    fn differentiates(&self, input: usize) -> bool {
        input == 0
    }

    fn reads(&self, input: usize, _: &[&Tensor]) -> bool {
        input > 0
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None]) };
        let back = Self { back: !self.back, ..*self };
        let [of_x] = eval(&back, &[grad, inputs[1], inputs[2]])?;
        Ok(vec![Some(of_x), None, None])
    }
}
