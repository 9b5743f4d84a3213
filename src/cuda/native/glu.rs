//! Gated linear units.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit;
use super::limit::{SPLIT, countable};
use super::operand::{ALIGN, element, rows};
use super::plan::Plans;
use crate::kernel::glu::{Arguments, Plan, Problem};
use crate::options::Gate;

static PLANS: Plans<Plan> = Plans::new();

/// `act(gate) · up`, packed. The operands are not empty.
pub(crate) fn glu(op: &'static str, kind: Gate, operands: [Operand; 2]) -> Result<CudaStorage> {
    let [out] = run(op, kind, &operands, false)?;
    Ok(out)
}

/// The gradients of gate and up, given those and the result's gradient.
pub(crate) fn glu_backward(
    op: &'static str,
    kind: Gate,
    operands: [Operand; 3],
) -> Result<[CudaStorage; 2]> {
    run(op, kind, &operands, true)
}

fn run<const N: usize>(
    op: &'static str,
    kind: Gate,
    operands: &[Operand],
    backward: bool,
) -> Result<[CudaStorage; N]> {
    let (gate, stack) = operands[0];
    let (device, dtype) = (gate.device().clone(), gate.dtype());
    let gpu = Gpu::of(op, &device)?;
    let order = Order::new(op, device.cuda_stream(), operands.iter().map(|&(storage, _)| storage));
    let fitted = operands.iter().map(|&operand| rows(op, operand)).collect::<Result<Vec<_>>>()?;
    let facts = Problem {
        rows: (stack.count() * stack.rows) as u64,
        cols: stack.cols as u64,
        element: element(dtype),
        gate: kind,
        backward,
        aligned: fitted.iter().all(|fitted| fit::is_aligned(&fitted.stack, dtype, ALIGN)),
    };
    let limit = facts.limit(&gpu.device).map(|(got, most)| (got, format!("{most} of each")));
    countable(op, ["this crate", "take"], limit, SPLIT)?;
    let compiled = PLANS.get(op, &gpu, &facts)?;
    let mut results = (0..N)
        .map(|_| uninit(&device, &Shape::from(stack.elements()), dtype))
        .collect::<Result<Vec<_>>>()?;
    {
        let inputs: Vec<_> = fitted.iter().map(|f| Memory::of(f.storage(), &device)).collect();
        let outputs: Vec<_> =
            results.iter_mut().map(|result| Memory::of_mut(result, &device)).collect();
        let operands = inputs.iter().zip(&fitted);
        let operands = operands
            .map(|(memory, fitted)| (memory.at(fitted.offset(0)), fitted.stack.row_stride as u64));
        let arguments = Arguments {
            problem: &facts,
            plan: &compiled.plan,
            operands: &operands.collect::<Vec<_>>(),
            results: &outputs.iter().map(Memory::address).collect::<Vec<_>>(),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    let mut results = results.into_iter();
    Ok(std::array::from_fn(|_| results.next().expect("N of them")))
}
