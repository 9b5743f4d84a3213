//! Products with quantised weights.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::engines::CudaWeight;
use super::super::fit::{self, Fitted, Want, fit};
use super::bytes;
use super::operand::element;
use super::plan::Plans;
use super::w4;
use crate::error::Error;
use crate::kernel::dequant::{Arguments, Codes, Plan, Problem};
use crate::kernel::w4::Scheme;
use crate::op::{Epilogue, MatmulProblem, View};
use crate::quant::QuantScheme;
use crate::quant::planes::{Facts, Form, Planes};
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// Bytes at whose multiples lines of codes begin, if a thread is to load as many at once.
const LINE: usize = 16;

/// The form in which the kernels read a weight, if it is another one: codes of four bits are packed, and those
/// of eight lie along K.
pub(crate) fn repack(op: &'static str, form: &Form) -> Result<Option<Form>> {
    let Form::Plain(planes) = form else { return Ok(None) };
    let [k, n] = planes.dims;
    if k * n == 0 {
        return Ok(None);
    }
    if !planes.scheme.is_4bit() {
        return Ok(bytes::along_k(op, planes)?.map(Form::Plain));
    }
    let (storage, layout) = planes.codes.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { return Ok(None) };
    let scheme = w4_scheme(planes.scheme, planes.scales.dtype());
    let codes = w4::pack(op, (storage, &Stack::new(layout)), planes.dims, &scheme)?;
    let codes = tensor(codes, w4::packed_words(k, n));
    let scales = in_lines(op, &planes.scales)?;
    let zeros = planes.zeros.as_ref().map(|zeros| in_lines(op, zeros)).transpose()?;
    Ok(Some(Form::Packed(Planes { codes, scales, zeros, ..planes.clone() })))
}

/// Scales or zero points whose rows begin where the kernels want them, so that no product has to make such ones.
fn in_lines(op: &'static str, groups: &Tensor) -> Result<Tensor> {
    let (rows, cols) = groups.dims2()?;
    let (storage, layout) = groups.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("they are with the codes") };
    let lines = w4::lines(op, (storage, &Stack::new(layout)))?;
    let pitch = lines.stack.cols;
    match lines.into_copy() {
        None => Ok(groups.clone()),
        Some(copy) => tensor(copy, (rows, pitch)).narrow(1, 0, cols),
    }
}

/// Packed codes in the plain form.
pub(crate) fn unpack(op: &'static str, planes: &Planes) -> Result<Planes> {
    let (storage, _) = planes.codes.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("packed codes are on a GPU") };
    let [k, n] = planes.dims;
    let codes = tensor(w4::unpack(op, storage, planes.dims)?, (k.div_ceil(8), n));
    Ok(Planes { codes, ..planes.map(Tensor::contiguous)? })
}

pub(super) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// How a weight of four bits is quantised, as its kernels know it.
fn w4_scheme(scheme: QuantScheme, scales: DType) -> Scheme {
    let codes = match scheme {
        QuantScheme::Nf4 { .. } => w4::Codes::Nf4,
        _ => w4::Codes::Int4,
    };
    let group = (!scheme.spans()[0]).then(|| scheme.group([1, 1])[0] as u32);
    Scheme { codes, zeros: scheme.has_zero_points(), scale: element(scales), group }
}

/// A packed weight.
fn packed<'a>(weight: &CudaWeight<'a>) -> w4::Weight<'a> {
    let Facts { scheme, dims: [k, n], .. } = weight.facts;
    let groups = |(storage, layout): View<'a, CudaStorage>| (storage, Stack::new(layout));
    w4::Weight {
        scheme: w4_scheme(scheme, weight.scales.0.dtype()),
        k,
        n,
        codes: weight.codes.0,
        scales: groups(weight.scales),
        zeros: weight.zeros.map(groups),
    }
}

/// `act(x·W + bias)`, or `x·Wᵀ`. Packed codes have kernels of their own for the former. Else the weight is made floats of
/// x's dtype in a panel that lives as long as the call, and multiplied by the kernels for those. Neither the result nor
/// the depth is empty.
pub(crate) fn matmul_quant(
    op: &'static str,
    x: View<CudaStorage>,
    weight: &CudaWeight,
    transposed: bool,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    if weight.facts.packed && !transposed {
        let rows = Stack::new(x.1);
        return w4::matmul(op, (x.0, &rows), &packed(weight), epilogue, bias);
    }
    let panel = Panel::new(op, weight, x.0.dtype())?;
    let layout = if transposed { panel.layout.transpose(0, 1)? } else { panel.layout };
    let problem = MatmulProblem::new(op, x.1, &layout)?;
    super::matmul(op, &problem, epilogue, x.0, &panel.storage, bias)
}

/// The weight in a float dtype, row-major.
pub(crate) fn dequantize(
    op: &'static str,
    weight: &CudaWeight,
    dtype: DType,
) -> Result<CudaStorage> {
    let Panel { storage, layout } = Panel::new(op, weight, dtype)?;
    if layout.is_contiguous() {
        return Ok(storage);
    }
    fit::copyable(op, layout.shape().elem_count())?;
    fit::pack(&storage, &layout)
}

/// A weight in floats, by rows or by columns as its codes lie.
pub(in crate::cuda) struct Panel {
    pub storage: CudaStorage,
    pub layout: Layout,
}

impl Panel {
    fn new(op: &'static str, weight: &CudaWeight, dtype: DType) -> Result<Self> {
        let Facts { scheme, dims, signed, .. } = weight.facts;
        if weight.facts.packed {
            let storage = w4::dequantize(op, &packed(weight), dtype, false)?;
            return Ok(Self { storage, layout: Layout::contiguous((dims[0], dims[1])) });
        }
        let kind = kind(scheme, signed);
        Codewords {
            kind,
            dims,
            group: group(scheme),
            codes: weight.codes,
            scales: weight.scales,
            zeros: weight.zeros,
        }
        .panel(op, dtype)
    }
}

/// A matrix of codes.
pub(in crate::cuda) struct Codewords<'a> {
    pub kind: Codes,
    pub dims: [usize; 2],
    /// Rows and columns that share a scale, 0 for all.
    pub group: [u32; 2],
    pub codes: View<'a, CudaStorage>,
    pub scales: View<'a, CudaStorage>,
    pub zeros: Option<View<'a, CudaStorage>>,
}

impl Codewords<'_> {
    /// In floats.
    pub fn panel(&self, op: &'static str, dtype: DType) -> Result<Panel> {
        let Self { kind, dims, mut group, .. } = *self;
        let (codes, scales, zeros) = (self.codes.0, self.scales.0, self.zeros);
        let (device, nibbles) = (codes.device().clone(), kind.are_nibbles());
        let gpu = Gpu::of(op, &device)?;
        let inputs = [Some(codes), Some(scales), zeros.map(|(zeros, _)| zeros)];
        let order = Order::new(op, device.cuda_stream(), inputs.into_iter().flatten());
        let mut steps = Stack::new(self.scales.1);
        let stack = Stack::new(self.codes.1);
        let turned = stack.rows > 1 && stack.row_stride == 1 && stack.col_stride != 1;
        // Columns of bytes are rows of the transposed weight, but a column of words is not eight rows of words.
        let down = turned && nibbles && dims[0].is_multiple_of(8);
        let transposed = turned && !nibbles;
        if transposed {
            group.reverse();
            steps = steps.t();
        }
        let lines = lines(op, codes, if turned && (down || !nibbles) { stack.t() } else { stack })?;
        let [rows, cols] = if transposed { [dims[1], dims[0]] } else { dims };
        let facts = Problem {
            rows: rows as u64,
            cols: cols as u64,
            codes: kind,
            scale: element(scales.dtype()),
            out: element(dtype),
            down,
            aligned: fit::is_aligned(&lines.stack, codes.dtype(), LINE)
                && row_aligned(&lines.stack, codes.dtype()),
            group,
        };
        countable(op, &facts, &gpu)?;
        let compiled = PLANS.get(op, &gpu, &facts)?;
        let mut storage = uninit(&device, &Shape::from((dims[0], dims[1])), dtype)?;
        {
            let inputs = [lines.storage(), scales].map(|storage| Memory::of(storage, &device));
            let zeros =
                zeros.map(|(zeros, layout)| (Memory::of(zeros, &device), Stack::new(layout)));
            let out = Memory::of_mut(&mut storage, &device);
            let arguments = Arguments {
                problem: &facts,
                plan: &compiled.plan,
                codes: (inputs[0].at(lines.offset(0)), lines.stack.row_stride as u64),
                scales: (
                    inputs[1].at(steps.matrix_offset(0)),
                    [steps.row_stride, steps.col_stride].map(|stride| stride as u64),
                ),
                zeros: zeros.as_ref().map(|(memory, stack)| {
                    (memory.at(stack.matrix_offset(0)), stack.row_stride as u64)
                }),
                out: out.address(),
            };
            order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
        }
        let layout = match down || transposed {
            true => Layout::contiguous((dims[1], dims[0])).transpose(0, 1)?,
            false => Layout::contiguous((dims[0], dims[1])),
        };
        Ok(Panel { storage, layout })
    }
}

/// Codes whose lines lie in one piece.
fn lines<'a>(op: &'static str, codes: &'a CudaStorage, stack: Stack) -> Result<Fitted<'a>> {
    if stack.cols <= 1 || stack.col_stride == 1 {
        return Ok(Fitted::view(codes, stack));
    }
    fit(op, (codes, &stack), Want::default())
}

/// Whether rows begin at multiples of as many bytes as the first one.
fn row_aligned(stack: &Stack, dtype: DType) -> bool {
    stack.rows <= 1 || (stack.row_stride * dtype.size_in_bytes()).is_multiple_of(LINE)
}

fn kind(scheme: QuantScheme, signed: bool) -> Codes {
    match scheme {
        QuantScheme::Int4 { zero_points: true, .. } => Codes::Uint4,
        QuantScheme::Int4 { .. } => Codes::Int4 { signed },
        QuantScheme::Nf4 { .. } => Codes::Table(scheme.table().map(f32::to_bits)),
        QuantScheme::Int8 { .. } => Codes::Int8,
        QuantScheme::Fp8 { .. } => Codes::E4m3,
    }
}

/// Rows and columns that share a scale, 0 for all.
fn group(scheme: QuantScheme) -> [u32; 2] {
    let spans = scheme.spans();
    let group = scheme.group([1, 1]);
    [0, 1].map(|side| if spans[side] { 0 } else { group[side] as u32 })
}

fn countable(op: &'static str, facts: &Problem, gpu: &Gpu) -> Result<()> {
    let Some((got, most)) = facts.limit(&gpu.device) else { return Ok(()) };
    let (what, limit) = ("this crate".into(), format!("cannot take {got} (at most {most} a side)"));
    let fix = "split it and join the results with `Tensor::cat`".into();
    Err(Error::Unsupported { op, what, limit, fix }.into())
}
