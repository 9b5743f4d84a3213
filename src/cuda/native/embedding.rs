//! Rows of a table, and its gradient.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::empty::zeros;
use super::super::fit::is_aligned;
use super::limit::{SPLIT, countable};
use super::operand::{ALIGN, element, rows};
use super::plan::Plans;
use crate::kernel::embedding::{Arguments, Plan, Problem};
use crate::op::View;

static PLANS: Plans<Plan> = Plans::new();

/// The rows of a table at ids without gaps; there are some, and they have elements.
pub(crate) fn embedding(
    op: &'static str,
    table: Operand,
    ids: View<CudaStorage>,
) -> Result<CudaStorage> {
    run(op, table, ids, None)
}

/// The gradient of a table of `classes` rows, given those of its rows at ids.
pub(crate) fn embedding_backward(
    op: &'static str,
    grads: Operand,
    ids: View<CudaStorage>,
    classes: usize,
) -> Result<CudaStorage> {
    run(op, grads, ids, Some(classes))
}

/// `classes` of a gradient.
fn run(
    op: &'static str,
    (storage, stack): Operand,
    ids: View<CudaStorage>,
    classes: Option<usize>,
) -> Result<CudaStorage> {
    let (device, dtype) = (storage.device().clone(), storage.dtype());
    let gpu = Gpu::of(op, &device)?;
    let operand = rows(op, (storage, stack))?;
    let cols = operand.stack.cols;
    let facts = Problem {
        rows: ids.1.shape().elem_count() as u64,
        cols: cols as u64,
        classes: classes.unwrap_or(operand.stack.rows) as u64,
        element: element(dtype),
        wide: ids.0.dtype() == DType::I64,
        backward: classes.is_some(),
        aligned: is_aligned(&operand.stack, dtype, ALIGN),
    };
    countable(op, ["this crate", "take"], facts.limit(), SPLIT)?;
    let order = Order::new(op, device.cuda_stream(), [storage, ids.0]);
    let compiled = PLANS.get(op, &gpu, &facts)?;
    let mut out = match classes {
        // Only rows with an id are written.
        Some(classes) => zeros(storage, classes * cols, dtype)?,
        None => uninit(&device, &Shape::from(facts.rows as usize * cols), dtype)?,
    };
    let mut buffers = match classes {
        None => vec![],
        Some(_) => {
            let sizes = facts.buffers();
            let alloc = |len: u64, dtype| uninit(&device, &Shape::from(len as usize), dtype);
            let keys = [sizes.keys; 4].into_iter().chain([sizes.counts]);
            let keys = keys.map(|len| alloc(len, DType::U32));
            keys.chain([alloc(sizes.partial, DType::F32)]).collect::<Result<Vec<_>>>()?
        }
    };
    {
        let [from, of_ids] = [operand.storage(), ids.0].map(|s| Memory::of(s, &device));
        let to = Memory::of_mut(&mut out, &device);
        let buffers: Vec<_> = buffers.iter_mut().map(|s| Memory::of_mut(s, &device)).collect();
        let addresses: Vec<_> = buffers.iter().map(Memory::address).collect();
        let arguments = Arguments {
            problem: &facts,
            plan: &compiled.plan,
            ids: of_ids.at(ids.1.start_offset()),
            operand: (from.at(operand.offset(0)), operand.stack.row_stride as u64),
            out: to.address(),
            buffers: addresses.try_into().ok(),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(out)
}
