//! Activations rounded to eight bits.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Layout, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{Want, fit, pack};
use super::bytes::activations;
use super::operand::{ALIGN, element, per_chunk};
use super::plan::Plans;
use crate::kernel::quantize::{Arguments, Plan, Problem};
use crate::ptx::Factor;

static PLANS: Plans<Plan> = Plans::new();

/// Rows rounded to int8 bytes in u8 or to e4m3, packed, and the f32 scale of each group of `width` elements of a row;
/// `None` if there is no kernel for it. The operand is not empty.
pub(crate) fn quantize_rows(
    op: &'static str,
    (storage, stack): Operand,
    dtype: DType,
    width: usize,
) -> Result<Option<(CudaStorage, CudaStorage)>> {
    let device = storage.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let (rows, cols) = (stack.count() * stack.rows, stack.cols);
    // Zeros at the end of a row change no scale.
    let padded = cols.next_multiple_of(per_chunk(storage.dtype()));
    let problem = Problem {
        rows: rows as u64,
        cols: padded as u64,
        width: if width < cols { width } else { padded } as u64,
        element: element(storage.dtype()),
        code: if dtype == DType::U8 { Factor::S8 } else { Factor::E4m3 },
    };
    if !problem.is_supported(&gpu.device) {
        return Ok(None);
    }
    let (fitted, stride) = match padded == cols {
        true => {
            let (fitted, lines) = activations(op, (storage, stack))?;
            (fitted, lines.stride)
        }
        false => {
            let want = Want { cols: padded, align: ALIGN, folded: true, ..Want::default() };
            (fit(op, (storage, stack), want)?, padded)
        }
    };
    let order = Order::new(op, device.cuda_stream(), [storage]);
    let compiled = PLANS.get(op, &gpu, &problem)?;
    let groups = cols.div_ceil(width.min(cols));
    let mut codes = uninit(&device, &Shape::from(rows * padded), dtype)?;
    let mut scales = uninit(&device, &Shape::from(rows * groups), DType::F32)?;
    {
        let input = Memory::of(fitted.storage(), &device);
        let results = [Memory::of_mut(&mut codes, &device), Memory::of_mut(&mut scales, &device)];
        let arguments = Arguments {
            problem: &problem,
            input: (input.at(fitted.offset(0)), stride as u64),
            results: results.each_ref().map(Memory::address),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    if padded != cols {
        let kept = Layout::new((rows, cols).into(), vec![padded, 1], 0);
        codes = pack(&codes, &kept)?;
    }
    Ok(Some((codes, scales)))
}
