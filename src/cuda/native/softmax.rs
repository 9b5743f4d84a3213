//! Softmax of rows.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::limit::{SPLIT, countable};
use super::operand::{Rows, element};
use super::plan::Plans;
use crate::kernel::softmax::{Arguments, Plan, Problem};
use crate::op::View;

static PLANS: Plans<Plan> = Plans::new();

/// Softmax of the rows of a view that is not empty; given a gradient, the gradient of the rows of which it is the softmax.
pub(crate) fn softmax(
    op: &'static str,
    x: View<CudaStorage>,
    grad: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    let (storage, layout) = x;
    let device = storage.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let all = [Some(storage), grad.map(|(grad, _)| grad)].into_iter().flatten();
    let order = Order::new(op, device.cuda_stream(), all);
    let x = Rows::of(op, x)?;
    let grad = grad.map(|grad| Rows::of(op, grad)).transpose()?;
    let cols = layout.dims()[layout.dims().len() - 1];
    let problem = Problem {
        rows: (layout.shape().elem_count() / cols) as u64,
        cols: cols as u64,
        element: element(storage.dtype()),
        backward: grad.is_some(),
        aligned: [Some(&x), grad.as_ref()].into_iter().flatten().all(Rows::aligned),
    };
    let limit = problem.limit().map(|(got, most)| (got, format!("{most} of each")));
    countable(op, ["this crate", "take"], limit, SPLIT)?;
    let compiled = PLANS.get(op, &gpu, &problem)?;
    let mut out = uninit(&device, layout.shape(), storage.dtype())?;
    {
        let memory = x.memory(&device);
        let of_grad = grad.as_ref().map(|grad| (grad.memory(&device), grad));
        let result = Memory::of_mut(&mut out, &device);
        let arguments = Arguments {
            problem: &problem,
            plan: &compiled.plan,
            x: x.place(&memory),
            grad: of_grad.as_ref().map(|(memory, grad)| grad.place(memory)),
            out: result.address(),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(out)
}
