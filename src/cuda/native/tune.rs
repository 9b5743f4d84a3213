//! For the benches: products by configurations that nobody chose.

use candle_core::op::BackpropOp;
use candle_core::{DType, Result, Storage, Tensor, bail};

use super::matmul::{Call, Plan};
use super::sm80::Plan as Sm80;
use super::sm90::Plan as Sm90;
use crate::kernel::Config;
use crate::kernel::gemm::Problem;
use crate::op::{Epilogue, MatmulProblem};

/// The product by `config`, or by the chooser's, of two matrices on one GPU; and the problem that the
/// chooser sees.
pub fn matmul(
    a: &Tensor,
    b: &Tensor,
    out: DType,
    config: Option<Config>,
) -> Result<(Tensor, Problem)> {
    let ((sa, la), (sb, lb)) = (a.storage_and_layout(), b.storage_and_layout());
    let (Storage::Cuda(sa), Storage::Cuda(sb)) = (&*sa, &*sb) else { bail!("not on a GPU") };
    let problem = MatmulProblem::new(la, lb);
    let call = Call::new("tune", &problem, Epilogue::round(out), sa, sb, None)?;
    let plan = match config {
        Some(Config::MatmulSm90(config)) => Plan::Sm90(Sm90::new(&call, config)?),
        Some(Config::MatmulSm80(config)) => Plan::Sm80(Sm80::new(&call, config)?),
        Some(_) => bail!("not a product"),
        None => Plan::chosen(&call)?,
    };
    let storage = Storage::Cuda(call.run(&plan)?);
    let tensor = Tensor::from_storage(storage, problem.out.clone(), BackpropOp::none(), false);
    Ok((tensor, call.facts))
}
