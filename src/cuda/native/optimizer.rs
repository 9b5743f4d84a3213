//! Passes over all tensors of a model: tables of their addresses, and the launches.

use candle_core::{
    CudaDevice, CudaStorage, DType, Result, Shape, Storage, StorageRef, Tensor, bail,
};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::limit::countable;
use super::ones::is_captured;
use super::operand::{ALIGN, element};
use super::plan::Plans;
use super::quantised::tensor;
use crate::error::Error;
use crate::kernel::Element;
use crate::kernel::optimizer::{
    Arguments, Betas, Moments, Plan, Problem, Row, State, Task, chunks, dynamic, kind,
};
use crate::train::{AdamWCall, AdamWTables, StorageMut, Sum, Update, write};

static PLANS: Plans<Plan> = Plans::new();

/// A step of AdamW, of tensors on one GPU, none of which is empty.
pub(crate) fn adamw(
    op: &'static str,
    updates: &[Update],
    call: &AdamWCall,
    tables: &mut AdamWTables,
) -> Result<()> {
    let moments = match updates[0].kept.moments[0].scales {
        None => Moments::F32,
        Some(_) => Moments::Bits8,
    };
    let device = updates[0].var.device();
    let mut written = Written::new(device.as_cuda_device()?);
    let mut states = Vec::new();
    for Update { var, kept, .. } in updates {
        let of_var = written.push(var)?;
        let mut state = State { weights: of_var, ..State::default() };
        if let Some(master) = &kept.master {
            state = State {
                weights: written.push(master)?,
                copy: of_var,
                copy_kind: kind(Some(element(var.dtype()))),
                ..state
            };
        }
        for (i, moment) in kept.moments.iter().enumerate() {
            state.moments[i] = written.push(&moment.values)?;
            if let Some(scales) = &moment.scales {
                state.scales[i] = written.push(scales)?;
            }
        }
        states.extend(state.words());
    }
    let mut rows = Rows::default();
    for update in updates {
        let &Update { rate, keep, unbias, .. } = update;
        rows.push(&update.grad, Row { rate, keep, unbias, ..Row::default() })?;
    }
    // These addresses change when a variable or a state does: hardly ever.
    let states = match tables.states.take() {
        Some((words, table)) if words == states => (words, table),
        _ => {
            let table = upload(op, &states, device)?;
            (states, table)
        }
    };
    let states = tables.states.insert(states).1.clone();
    if moments == Moments::Bits8 && tables.books.is_none() {
        let books = dynamic::tables();
        tables.books = Some(Tensor::from_vec(books, dynamic::BYTES as usize, device)?);
    }
    let problem = rows.problem(Task::AdamW(moments), call.clip.is_some());
    let read = [Some(&states), tables.books.as_ref(), call.clip.as_ref()];
    let launch = Launch { read, betas: call.betas, scale: call.scale, ..Launch::default() };
    launch.run(op, &problem, rows, written)
}

/// The norm of all gradients and the factor that clips it.
pub(crate) fn grad_norm(
    op: &'static str,
    grads: &[&Tensor],
    scale: f32,
    max_norm: f32,
) -> Result<Tensor> {
    let mut rows = Rows::default();
    for grad in grads {
        rows.push(grad, Row::default())?;
    }
    let device = grads[0].device();
    let cuda = device.as_cuda_device()?;
    let problem = rows.problem(Task::Norm, false);
    let vector = |len: usize| {
        Ok::<_, candle_core::Error>(tensor(uninit(cuda, &Shape::from(len), DType::F32)?, len))
    };
    let (clip, partials) = (vector(2)?, vector(problem.chunks as usize)?);
    let mut written = Written::new(cuda);
    let (clip_at, partials_at) = (written.push(&clip)?, written.push(&partials)?);
    let launch = Launch { scale, max_norm, clip_at, partials_at, ..Launch::default() };
    launch.run(op, &problem, rows, written)?;
    Ok(clip)
}

/// Gradients times the factor that clips them, in their dtypes or in one of 16 bits.
pub(crate) fn scale_grads(
    op: &'static str,
    grads: &[&Tensor],
    clip: &Tensor,
    to: Option<DType>,
) -> Result<Vec<Tensor>> {
    let cuda = grads[0].device().as_cuda_device()?;
    let like = |grad: &&Tensor| {
        let storage = uninit(cuda, grad.shape(), to.unwrap_or(grad.dtype()))?;
        Ok(tensor(storage, grad.shape()))
    };
    let scaled: Vec<_> = grads.iter().map(like).collect::<Result<_>>()?;
    let (mut rows, mut written) = (Rows::default(), Written::new(cuda));
    for (grad, out) in grads.iter().zip(&scaled) {
        rows.push(grad, Row { out: written.push(out)?, ..Row::default() })?;
    }
    let launch = Launch { read: [None, None, Some(clip)], ..Launch::default() };
    let to = match to.map(element) {
        None => None,
        Some(Element::Half(half)) => Some(half),
        Some(Element::F32) => bail!("a dtype of 16 bits was wanted"),
    };
    let problem = rows.problem(Task::Scale(to), false);
    launch.run(op, &problem, rows, written)?;
    Ok(scaled)
}

/// Gradients added to f32 sums.
pub(crate) fn accumulate(op: &'static str, sums: &[Sum]) -> Result<()> {
    let cuda = sums[0].sum.device().as_cuda_device()?;
    let (mut rows, mut written) = (Rows::default(), Written::new(cuda));
    for &Sum { grad, sum, begins } in sums {
        rows.push(grad, Row { out: written.push(sum)?, begins, ..Row::default() })?;
    }
    let problem = rows.problem(Task::Accumulate, false);
    Launch::default().run(op, &problem, rows, written)
}

/// A table of words on the GPU. The copy is asynchronous up to 64 kB, which the driver takes over at once: more than a
/// thousand tensors. A graph would copy it again, from where it is no more.
fn upload(op: &'static str, words: &[u64], device: &candle_core::Device) -> Result<Tensor> {
    if is_captured(op, device.as_cuda_device()?)? {
        let (what, limit) =
            ("a CUDA graph", "cannot have its table of tensors, which the host writes");
        let fix = "capture the forward pass, or the products alone";
        let (what, limit, fix) = (what.into(), limit.into(), fix.into());
        return Err(Error::Unsupported { op, what, limit, fix }.into());
    }
    let words: Vec<i64> = words.iter().map(|word| word.cast_signed()).collect();
    let len = words.len();
    Tensor::from_vec(words, len, device)
}

/// The gradients of a launch, locked against changes.
#[derive(Default)]
struct Rows<'a> {
    rows: Vec<Row>,
    grads: Vec<StorageRef<'a>>,
    offsets: Vec<usize>,
    chunks: u64,
}

impl<'a> Rows<'a> {
    /// A gradient without gaps, which is not empty.
    fn push(&mut self, grad: &'a Tensor, row: Row) -> Result<()> {
        let (storage, layout) = grad.storage_and_layout();
        let Some((offset, _)) = layout.contiguous_offsets() else { bail!("a gradient with gaps") };
        let len = grad.elem_count() as u64;
        // A grid's limit is checked before the launch; until then a number may be cut.
        let first_chunk = self.chunks as u32;
        let kind = kind(Some(element(grad.dtype())));
        let aligned = (offset * grad.dtype().size_in_bytes()).is_multiple_of(ALIGN);
        self.rows.push(Row { len, first_chunk, kind, aligned, ..row });
        self.grads.push(storage);
        self.offsets.push(offset);
        self.chunks += chunks(len);
        Ok(())
    }

    fn problem(&self, task: Task, clipped: bool) -> Problem {
        Problem { task, chunks: self.chunks, tensors: self.rows.len() as u64, clipped }
    }
}

/// Tensors that a launch writes, which nobody else does meanwhile: they are the caller's, but for variables.
struct Written<'a> {
    device: &'a CudaDevice,
    tensors: Vec<&'a Tensor>,
}

impl<'a> Written<'a> {
    fn new(device: &'a CudaDevice) -> Self {
        Self { device, tensors: Vec::new() }
    }

    /// The address of a tensor that will be written: the device waits for all who use it.
    fn push(&mut self, tensor: &'a Tensor) -> Result<u64> {
        let address = self.touch(tensor)?;
        self.tensors.push(tensor);
        Ok(address)
    }

    fn touch(&self, tensor: &Tensor) -> Result<u64> {
        let mut address = 0;
        write(tensor, |storage| {
            let StorageMut::Cuda(storage) = storage else { bail!("a CUDA tensor was wanted") };
            address = Memory::of_mut(storage, self.device).address();
            Ok(())
        })?;
        Ok(address)
    }

    /// What was written is known to all who use it from now on.
    fn publish(&self) -> Result<()> {
        self.tensors.iter().try_for_each(|tensor| self.touch(tensor).map(drop))
    }
}

/// What a launch takes besides the gradients and what is written.
#[derive(Default)]
struct Launch<'a> {
    /// AdamW's states and code books, and the clipping factor.
    read: [Option<&'a Tensor>; 3],
    betas: Betas,
    scale: f32,
    max_norm: f32,
    clip_at: u64,
    partials_at: u64,
}

impl Launch<'_> {
    fn run(self, op: &'static str, problem: &Problem, rows: Rows, written: Written) -> Result<()> {
        const SPLIT: &str = "take fewer tensors, or parts of them, at a time";
        countable(op, ["this crate", "take"], problem.limit(), SPLIT)?;
        let cuda = written.device;
        let gpu = Gpu::of(op, cuda)?;
        let compiled = PLANS.get(op, &gpu, problem)?;
        // Nobody writes to them before the launch, either.
        let outputs: Vec<_> = written.tensors.iter().map(|tensor| locked(tensor)).collect();
        let inputs: Vec<_> = self.read.iter().map(|tensor| tensor.map(locked)).collect();
        let order = {
            let all = outputs.iter().chain(&rows.grads).chain(inputs.iter().flatten());
            let all = all.map(|storage| on_cuda(storage)).collect::<Result<Vec<_>>>()?;
            Order::new(op, cuda.cuda_stream(), all)
        };
        let mut grads = Vec::new();
        let mut words = Vec::new();
        for ((row, storage), &offset) in rows.rows.iter().zip(&rows.grads).zip(&rows.offsets) {
            let memory = Memory::of(on_cuda(storage)?, cuda);
            words.extend(Row { grad: memory.at(offset), ..*row }.words());
            grads.push(memory);
        }
        let table = upload(op, &words, &candle_core::Device::Cuda(cuda.clone()))?;
        let table_storage = table.storage_and_layout().0;
        let table_memory = Memory::of(on_cuda(&table_storage)?, cuda);
        let mut read = Vec::new();
        for input in &inputs {
            let storage = input.as_ref().map(|storage| on_cuda(storage)).transpose()?;
            read.push(storage.map(|storage| Memory::of(storage, cuda)));
        }
        let address = |i: usize| read[i].as_ref().map_or(0, Memory::address);
        let arguments = Arguments {
            plan: &compiled.plan,
            rows: table_memory.address(),
            states: address(0),
            books: address(1),
            clip: if self.clip_at == 0 { address(2) } else { self.clip_at },
            partials: self.partials_at,
            scale: self.scale,
            max_norm: self.max_norm,
            betas: self.betas,
        };
        order.run(|| Ok(compiled.launch(op, cuda, &arguments)?))?;
        drop((grads, read, table_memory));
        drop((outputs, inputs, rows.grads));
        written.publish()
    }
}

fn locked(tensor: &Tensor) -> StorageRef<'_> {
    tensor.storage_and_layout().0
}

fn on_cuda<'a>(storage: &'a StorageRef) -> Result<&'a CudaStorage> {
    match &**storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("a CUDA tensor was wanted"),
    }
}
