//! Gated linear units.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{self, Fitted};
use super::operand::element;
use super::plan::Plans;
use crate::check;
use crate::error::Error;
use crate::kernel::glu::{Arguments, Gate, Plan, Problem};
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// Bytes at whose multiples rows begin, if a thread is to load as many at once.
const LINE: usize = 16;

/// `act(gate) · up`, packed. The operands are not empty.
pub(crate) fn glu(op: &'static str, kind: Gate, operands: [Operand; 2]) -> Result<CudaStorage> {
    let [gate, up] = operands;
    let [out, _] = run(op, kind, [Some(gate), Some(up), None])?;
    out.ok_or_else(|| missing(op))
}

/// The gradients of gate and up, given those and the result's gradient.
pub(crate) fn glu_backward(
    op: &'static str,
    kind: Gate,
    operands: [Operand; 3],
) -> Result<[CudaStorage; 2]> {
    let [of_gate, of_up] = run(op, kind, operands.map(Some))?;
    of_gate.zip(of_up).map(|(of_gate, of_up)| [of_gate, of_up]).ok_or_else(|| missing(op))
}

/// Not reached: as many results are made as are asked for.
fn missing(op: &'static str) -> candle_core::Error {
    Error::Driver { op, message: "a result was not made".into() }.into()
}

fn run(
    op: &'static str,
    kind: Gate,
    operands: [Option<Operand>; 3],
) -> Result<[Option<CudaStorage>; 2]> {
    let (gate, stack) = operands[0].ok_or_else(|| missing(op))?;
    let (device, dtype) = (gate.device().clone(), gate.dtype());
    let gpu = Gpu::of(op, &device)?;
    let storages = operands.iter().flatten().map(|&(storage, _)| storage);
    let order = Order::new(op, device.cuda_stream(), storages);
    let mut fitted = [None, None, None];
    for (fitted, operand) in fitted.iter_mut().zip(operands) {
        *fitted = operand.map(|operand| rows(op, operand)).transpose()?;
    }
    let backward = operands[2].is_some();
    let facts = Problem {
        rows: (stack.count() * stack.rows) as u64,
        cols: stack.cols as u64,
        element: element(dtype),
        gate: kind,
        backward,
        aligned: fitted.iter().flatten().all(|fitted| fit::is_aligned(&fitted.stack, dtype, LINE)),
    };
    if let Some((got, most)) = facts.limit(&gpu.device) {
        let (what, limit) =
            ("this crate".into(), format!("cannot take {got} (at most {most} of each)"));
        let fix = "split it and join the results with `Tensor::cat`".into();
        return Err(Error::Unsupported { op, what, limit, fix }.into());
    }
    let compiled = PLANS.get(op, &gpu, &facts)?;
    let alloc = |dtype: DType| uninit(&device, &Shape::from(stack.elements()), dtype);
    let mut results = [Some(alloc(dtype)?), backward.then(|| alloc(dtype)).transpose()?];
    {
        let inputs = fitted.each_ref().map(|fitted| {
            let fitted = fitted.as_ref()?;
            Some((Memory::of(fitted.storage(), &device), fitted))
        });
        let outputs =
            results.each_mut().map(|result| Some(Memory::of_mut(result.as_mut()?, &device)));
        let arguments = Arguments {
            problem: &facts,
            plan: &compiled.plan,
            operands: inputs.each_ref().map(|input| {
                let (memory, fitted) = input.as_ref()?;
                Some((memory.at(fitted.offset(0)), fitted.stack.row_stride as u64))
            }),
            results: outputs.each_ref().map(|output| Some(output.as_ref()?.address())),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(results)
}

/// All rows of an operand as those of one matrix, whose elements are contiguous.
fn rows<'a>(op: &'static str, (storage, stack): Operand<'a>) -> Result<Fitted<'a>> {
    let folded = stack.fold_rows().filter(|folded| folded.cols <= 1 || folded.col_stride == 1);
    match folded {
        Some(folded) => Ok(Fitted::view(storage, folded)),
        None => {
            check::copyable(op, stack.elements())?;
            let copy = fit::pack(storage, &stack.layout())?;
            let rows = stack.count() * stack.rows;
            Ok(Fitted::copy(copy, Stack::row_major(rows, stack.cols)))
        }
    }
}
