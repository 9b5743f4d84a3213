//! Words of checkpoints, regrouped where they are.

use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::empty;
use super::limit::countable;
use super::plan::Plans;
use super::quantised::tensor;
use crate::kernel::regroup::{Arguments, Config, Plan, Problem};
use crate::op::View;
use crate::quant::load::int4::{CODES, Packing};

static PLANS: Plans<Plan> = Plans::new();

/// Bytes of a word.
const WORD: usize = size_of::<u32>();

/// Plain codes, u32 `[⌈k/8⌉, n]`, of words of any strides or of bytes, and of rows in an order.
pub(crate) fn regroup(
    op: &'static str,
    words: &Tensor,
    packing: Packing,
    [k, n]: [usize; 2],
    order: Option<&Tensor>,
    fill: u8,
) -> Result<Tensor> {
    let view = match packing {
        Packing::Rows | Packing::Columns => words.clone(),
        Packing::Turned => words.t()?,
        Packing::Bytes => in_whole_words(words)?,
    };
    let (storage, layout) = view.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("they are on a GPU") };
    let strides = match packing {
        // Row by row of the transposed weight.
        Packing::Bytes => [1, k / CODES],
        _ => [layout.stride()[0], layout.stride()[1]],
    };
    let order = order.map(Tensor::storage_and_layout);
    let order = match &order {
        None => None,
        Some((order, layout)) => match &**order {
            Storage::Cuda(order) => Some((order, *layout)),
            _ => unreachable!("it is with the words"),
        },
    };
    let config = Config::Words { across: packing == Packing::Columns, ordered: order.is_some() };
    let problem = Problem { rows: k as u64, cols: n as u64, config };
    let shape = (k.div_ceil(CODES), n);
    let mut out = uninit(&storage.device, &Shape::from(shape), DType::U32)?;
    let places = (packing.places(), fill);
    run(op, &problem, (storage, layout.start_offset(), strides), places, order, &mut out)?;
    Ok(tensor(out, shape))
}

/// The sum of all codes of words `[⌈k/8⌉, n]` of eight rows.
pub(crate) fn sum_of_codes(op: &'static str, words: &Tensor, [k, n]: [usize; 2]) -> Result<f64> {
    let (storage, layout) = words.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("they are on a GPU") };
    let strides = [layout.stride()[0], layout.stride()[1]];
    let problem = Problem { rows: k as u64, cols: n as u64, config: Config::Sums };
    let mut sums = empty::zeros(storage, n, DType::F32)?;
    let places = (Packing::Rows.places(), 0);
    run(op, &problem, (storage, layout.start_offset(), strides), places, None, &mut sums)?;
    Ok(tensor(sums, n).to_vec1::<f32>()?.into_iter().map(f64::from).sum())
}

/// Bytes without gaps, from the beginning of a word on.
fn in_whole_words(bytes: &Tensor) -> Result<Tensor> {
    let begins = bytes.layout().start_offset().is_multiple_of(WORD);
    match bytes.is_contiguous() && begins {
        true => Ok(bytes.clone()),
        false => bytes.force_contiguous(),
    }
}

/// Launches the kernel for words from an element of a storage on, with strides in words.
fn run(
    op: &'static str,
    problem: &Problem,
    (storage, first, strides): (&CudaStorage, usize, [usize; 2]),
    (places, fill): ([u8; CODES], u8),
    order: Option<View<CudaStorage>>,
    out: &mut CudaStorage,
) -> Result<()> {
    let device = out.device.clone();
    let gpu = Gpu::of(op, &device)?;
    countable(op, ["this crate", "take"], problem.limit(), "load parts of its columns")?;
    let inputs = [Some(storage), order.map(|(order, _)| order)];
    let stream = Order::new(op, device.cuda_stream(), inputs.into_iter().flatten());
    let compiled = PLANS.get(op, &gpu, problem)?;
    let input = Memory::of(storage, &device);
    let order = order
        .map(|(order, layout): (_, &Layout)| (Memory::of(order, &device), layout.start_offset()));
    let out = Memory::of_mut(out, &device);
    let arguments = Arguments {
        problem,
        input: (input.at(first), strides.map(|stride| stride as u64)),
        places,
        order: order.as_ref().map(|(memory, first)| memory.at(*first)),
        fill: fill.into(),
        out: out.address(),
    };
    stream.run(|| Ok(compiled.launch(op, &device, &arguments)?))
}
