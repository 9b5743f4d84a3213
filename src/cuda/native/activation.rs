//! Activations of products, their gradients, and sums of columns.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{self, Fitted};
use super::limit::{SPLIT, countable};
use super::operand::{ALIGN, element, rows};
use super::plan::Plans;
use crate::Activation;
use crate::kernel::activation::{Arguments, Plan, Problem, Work};
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// `act(x)`, packed. x is not empty.
pub(crate) fn activation(op: &'static str, act: Activation, x: Operand) -> Result<CudaStorage> {
    let dtype = x.0.dtype();
    let call = Call { op, work: Work::Apply(act, element(dtype)), input: x, before: None };
    let (out, _) = call.run(Some(dtype), None)?;
    Ok(out.expect("one for each element"))
}

/// `grad · act′(x)` in a dtype, packed, if there is an activation of an x, and the sums of its columns in another. They are
/// not empty.
pub(crate) fn activation_backward(
    op: &'static str,
    grad: Operand,
    before: Option<(Activation, Operand, DType)>,
    sums: Option<DType>,
) -> Result<(Option<CudaStorage>, Option<CudaStorage>)> {
    let of = element(grad.0.dtype());
    let work = match (before, sums) {
        (Some((act, x, out)), _) => {
            let types = [element(x.0.dtype()), of, element(out)];
            Work::Gradient(act, types, sums.map(element))
        }
        (None, Some(sums)) => Work::Sums(of, element(sums)),
        (None, None) => return Ok((None, None)),
    };
    let call = Call { op, work, input: grad, before: before.map(|(_, x, _)| x) };
    call.run(before.map(|(.., out)| out), sums)
}

struct Call<'a> {
    op: &'static str,
    work: Work,
    input: Operand<'a>,
    before: Option<Operand<'a>>,
}

impl Call<'_> {
    fn run(
        &self,
        out: Option<DType>,
        sums: Option<DType>,
    ) -> Result<(Option<CudaStorage>, Option<CudaStorage>)> {
        let &Self { op, work, input, before } = self;
        let (storage, stack) = input;
        let device = storage.device();
        let gpu = Gpu::of(op, device)?;
        let read = [Some(input), before].into_iter().flatten();
        let order = Order::new(op, device.cuda_stream(), read.map(|(storage, _)| storage));
        let input = rows(op, input)?;
        let before = before.map(|x| packed(op, x)).transpose()?;
        let aligned =
            |fitted: &Fitted, of: &CudaStorage| fit::is_aligned(&fitted.stack, of.dtype(), ALIGN);
        let facts = Problem {
            rows: (stack.count() * stack.rows) as u64,
            cols: stack.cols as u64,
            work,
            aligned: [Some(&input), before.as_ref()]
                .into_iter()
                .flatten()
                .all(|fitted| aligned(fitted, fitted.storage())),
        };
        let limit = facts.limit(&gpu.device).map(|(got, most)| (got, format!("{most} of each")));
        countable(op, ["this crate", "take"], limit, SPLIT)?;
        let compiled = PLANS.get(op, &gpu, &facts)?;
        let made = |len: usize, dtype| make(device, len, dtype);
        let mut out = out.map(|dtype| made(stack.elements(), dtype)).transpose()?;
        let mut sums = sums.map(|dtype| made(stack.cols, dtype)).transpose()?;
        let parts = compiled.plan.parts() * stack.cols;
        let mut parts = (parts > 0).then(|| made(parts, DType::F32)).transpose()?;
        {
            let input_memory = Memory::of(input.storage(), device);
            let before_memory =
                before.as_ref().map(|fitted| (Memory::of(fitted.storage(), device), fitted));
            let outputs = [&mut out, &mut sums, &mut parts];
            let outputs =
                outputs.map(|made| made.as_mut().map(|made| Memory::of_mut(made, device)));
            let [out, sums, parts] =
                outputs.each_ref().map(|memory| memory.as_ref().map(Memory::address));
            let arguments = Arguments {
                problem: &facts,
                plan: &compiled.plan,
                input: (input_memory.at(input.offset(0)), input.stack.row_stride as u64),
                before: before_memory.as_ref().map(|(memory, fitted)| memory.at(fitted.offset(0))),
                out,
                sums,
                parts,
            };
            order.run(|| Ok(compiled.launch(op, device, &arguments)?))?;
        }
        Ok((out, sums))
    }
}

fn make(device: &CudaDevice, len: usize, dtype: DType) -> Result<CudaStorage> {
    uninit(device, &Shape::from(len), dtype)
}

/// All rows of an operand without gaps.
fn packed<'a>(op: &'static str, (storage, stack): Operand<'a>) -> Result<Fitted<'a>> {
    let whole = Stack::row_major(stack.count() * stack.rows, stack.cols);
    let fitted = rows(op, (storage, stack))?;
    match fitted.stack.row_stride == whole.row_stride || whole.rows == 1 {
        true => Ok(fitted),
        false => Ok(Fitted::copy(fit::pack(storage, &stack.layout())?, whole)),
    }
}
