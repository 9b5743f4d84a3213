//! For the benches: products and attention by configurations that nobody chose.

use candle_core::op::BackpropOp;
use candle_core::{DType, Result, Storage, Tensor, bail};

use super::attention;
use super::matmul::{Call, Plan};
use super::sm80::Plan as Sm80;
use super::sm90::Plan as Sm90;
use crate::kernel::Config;
use crate::kernel::attention as flash;
use crate::kernel::gemm::Problem;
use crate::op::{AttentionInputs, AttentionProblem, Epilogue, MatmulProblem};

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

/// Attention by `config`, or by the chooser's, of `[B, H, S, D]` with as many heads of keys, on one GPU;
/// and the problem that the chooser sees.
pub fn flash_attn(
    [q, k, v]: [&Tensor; 3],
    causal: bool,
    config: Option<Config>,
) -> Result<(Tensor, flash::Problem)> {
    let all = [q, k, v].map(|t| t.storage_and_layout());
    let [(Storage::Cuda(sq), lq), (Storage::Cuda(sk), lk), (Storage::Cuda(sv), lv)] =
        all.each_ref().map(|(storage, layout)| (&**storage, *layout))
    else {
        bail!("not on a GPU")
    };
    let out_dtype = q.dtype();
    let problem = AttentionProblem { out_dtype, ..AttentionProblem::broadcast(lq, lk, lv, causal) };
    let inputs = AttentionInputs { q: sq, k: sk, v: sv, extras: Default::default() };
    let call = attention::Call::new("tune", &problem, false, &inputs)?;
    let config = match config {
        Some(Config::FlashSm90(config)) => attention::Config::Sm90(config),
        Some(Config::FlashSm80(config)) => attention::Config::Sm80(config),
        Some(_) => bail!("not attention"),
        None => attention::Config::chosen(&call.facts, &call.gpu.device),
    };
    let plan = attention::Plan::new("tune", &call.gpu, &call.facts, config)?;
    let storage = Storage::Cuda(call.run(&problem, &plan)?.0);
    let shape = problem.shape.clone();
    Ok((Tensor::from_storage(storage, shape, BackpropOp::none(), false), call.facts))
}
