//! Rotary position embeddings.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result, Shape};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{Fitted, copyable, pack};
use super::limit::{SPLIT, countable};
use super::operand::{element, rows_aligned};
use super::plan::Plans;
use crate::kernel::rope::{Arguments, Plan, Problem};
use crate::op::RopeProblem;
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// The rows turned, packed. `storages` are those of rows, of which there are some, cosines and sines.
pub(crate) fn rope(
    op: &'static str,
    problem: &RopeProblem,
    storages: [&CudaStorage; 3],
) -> Result<CudaStorage> {
    let [storage, cos, sin] = storages;
    let device = storage.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let order = Order::new(op, device.cuda_stream(), storages);
    let x = rows(op, storage, &problem.x)?;
    let [of_cos, of_sin] = &problem.angles;
    let angles = [rows(op, cos, of_cos)?, rows(op, sin, of_sin)?];
    let dims = problem.dims();
    let facts = Problem {
        dims: dims.map(|len| len as u64),
        cols: problem.x.cols as u64,
        turned: problem.turned as u64,
        element: element(storage.dtype()),
        angle: element(cos.dtype()),
        layout: problem.layout,
        aligned: rows_aligned(&x.stack, storage.dtype())
            && angles.iter().all(|angles| rows_aligned(&angles.stack, cos.dtype())),
    };
    countable(op, ["this crate", "turn"], facts.limit(), SPLIT)?;
    let compiled = PLANS.get(op, &gpu, &facts)?;
    let mut out = uninit(&device, &Shape::from(problem.x.elements()), storage.dtype())?;
    {
        let memory = Memory::of(x.storage(), &device);
        let [cos, sin] = angles.each_ref().map(|angles| Memory::of(angles.storage(), &device));
        let result = Memory::of_mut(&mut out, &device);
        let batch = |fitted: &Fitted| match fitted.stack.batch() {
            // One matrix serves all batches.
            [(1, _)] | [] => 0,
            [.., (_, stride)] => *stride as u64,
        };
        let angle = |memory: &Memory, fitted: &Fitted| {
            (memory.at(fitted.offset(0)), [batch(fitted), fitted.stack.row_stride as u64])
        };
        let strides = x.stack.batch().iter().map(|&(_, stride)| stride as u64);
        let mut strides = strides.chain([x.stack.row_stride as u64]);
        let arguments = Arguments {
            problem: &facts,
            plan: &compiled.plan,
            x: (
                memory.at(x.offset(0)),
                std::array::from_fn(|_| strides.next().expect("batches, heads, positions")),
            ),
            angles: [angle(&cos, &angles[0]), angle(&sin, &angles[1])],
            out: result.address(),
            back: problem.back,
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(out)
}

/// Matrices of contiguous rows over two batch dimensions, the inner one as it is.
fn rows<'a>(op: &'static str, storage: &'a CudaStorage, stack: &Stack) -> Result<Fitted<'a>> {
    let dense = stack.cols <= 1 || stack.col_stride == 1;
    let in_two = |stack: &Stack| stack.clone().with_batch_dims(2).in_two_dims(1);
    if let Some(stack) = in_two(stack).filter(|_| dense) {
        return Ok(Fitted::view(storage, stack));
    }
    copyable(op, stack.elements())?;
    let packed = in_two(&stack.packed()).expect("without gaps all dimensions can be merged");
    Ok(Fitted::copy(pack(storage, &stack.layout())?, packed))
}
