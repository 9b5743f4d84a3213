//! Products with quantised weights.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::engines::CudaWeight;
use super::super::fit::{self, Fitted, Want, fit};
use super::bytes::{CodeScales, Vector};
use super::limit::{SPLIT, countable};
use super::ones::{Ones, failed, is_captured, ones};
use super::operand::{element, per_chunk};
use super::plan::Plans;
use super::w4::{self, Results};
use super::{along_k, encode};
use crate::error::Error;
use crate::kernel::dequant::{Arguments, Codes, Plan, Problem};
use crate::kernel::w4::{Plan as ProductPlan, Scheme};
use crate::op::{Epilogue, MatmulProblem, View};
use crate::quant::QuantScheme;
use crate::quant::planes::{Facts, Form, Planes};
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// Bytes at whose multiples lines of codes begin, if a thread is to load as many at once.
const LINE: usize = 16;

/// The form in which the kernels read a weight that is in the plain one, if it is another: codes of four bits are packed,
/// and those of eight lie along K, with scales in f32.
pub(crate) fn repack(op: &'static str, planes: &Planes) -> Result<Option<Form>> {
    let device = planes.device().as_cuda_device()?;
    let [k, n] = planes.dims;
    if k * n == 0 {
        return Ok(None);
    }
    if is_captured(op, device)? {
        // Its memory would be the graph's, and nothing in it before a launch.
        let (what, fix) = ("this crate".into(), "call `QuantWeight::prepare` before".into());
        let limit = "cannot prepare a weight while a CUDA graph is captured".into();
        return Err(Error::Unsupported { op, what, limit, fix }.into());
    }
    let form = match planes.scheme.is_4bit() {
        true => pack(op, planes, false)?,
        false => along_k::repack(op, planes)?,
    };
    for (_, tensor) in planes.tensors() {
        let stream = tensor.device().as_cuda_device()?.cuda_stream();
        if stream.cu_stream() as usize == PER_THREAD {
            // The weight is everyone's, but this stream another one in each thread.
            stream.synchronize().map_err(|e| failed(op, e))?;
        }
    }
    Ok(Some(form))
}

/// The default stream of whatever thread (`CU_STREAM_PER_THREAD`), which candle takes unless it is told otherwise.
const PER_THREAD: usize = 2;

/// A weight in the layout of `quantize_int4`, as the kernels read it.
pub(crate) fn pack_signed(op: &'static str, planes: &Planes) -> Result<Form> {
    pack(op, planes, true)
}

fn pack(op: &'static str, planes: &Planes, signed: bool) -> Result<Form> {
    let (storage, layout) = planes.codes.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("it is on a GPU") };
    let scheme = w4_scheme(planes.scheme, planes.scales.dtype());
    let codes = w4::pack(op, (storage, &Stack::new(layout)), planes.dims, &scheme, signed)?;
    let [k, n] = planes.dims;
    let codes = tensor(codes, w4::packed_words(k, n));
    let scales = in_lines(op, &planes.scales)?;
    let zeros = planes.zeros.as_ref().map(pack_zeros).transpose()?;
    Ok(Form::Packed(Planes { codes, scales, zeros, ..planes.clone() }))
}

/// Scales whose rows begin where the kernels want them, so that no product has to make such ones.
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

/// Columns whose zero points lie in an order of their own.
const ZEROS: usize = w4::INTERLEAVED as usize;

/// Zero points in the order of [the packed form](crate::kernel::w4), rows of whole such columns.
pub(super) fn pack_zeros(zeros: &Tensor) -> Result<Tensor> {
    let (rows, cols) = zeros.dims2()?;
    let padded = cols.next_multiple_of(ZEROS);
    zeros
        .pad_with_zeros(1, 0, padded - cols)?
        .reshape((rows, padded / ZEROS, 2, ZEROS / 2))?
        .transpose(2, 3)?
        .contiguous()?
        .reshape((rows, padded))
}

/// The `cols` columns of packed ones.
fn unpack_zeros(zeros: &Tensor, cols: usize) -> Result<Tensor> {
    let (rows, padded) = zeros.dims2()?;
    let halves = zeros.reshape((rows, padded / ZEROS, ZEROS / 2, 2))?.transpose(2, 3)?;
    halves.reshape((rows, padded))?.narrow(1, 0, cols)?.force_contiguous()
}

/// Packed codes in the plain form.
pub(crate) fn unpack(op: &'static str, planes: &Planes) -> Result<Planes> {
    let (storage, _) = planes.codes.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("packed codes are on a GPU") };
    let [k, n] = planes.dims;
    let scheme = w4_scheme(planes.scheme, planes.scales.dtype());
    let codes = w4::unpack(op, storage, planes.dims, scheme.codes)?;
    let codes = tensor(codes, (k.div_ceil(8), n));
    // Without what is between the lines.
    let scales = planes.scales.contiguous()?;
    let zeros = planes.zeros.as_ref().map(|zeros| unpack_zeros(zeros, n)).transpose()?;
    Ok(Planes { codes, scales, zeros, ..planes.clone() })
}

pub(super) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// How a weight is quantised, as the kernels for its codes know it.
fn w4_scheme(scheme: QuantScheme, scales: DType) -> Scheme {
    let codes = match scheme {
        QuantScheme::Nf4 { .. } => w4::Codes::Nf4,
        QuantScheme::Int4 { .. } => w4::Codes::Int4,
        QuantScheme::Int8 { .. } => w4::Codes::Int8,
        QuantScheme::Fp8 { .. } => w4::Codes::E4m3,
    };
    let group = (!scheme.spans()[0]).then(|| scheme.group([1, 1])[0] as u32);
    Scheme { codes, zeros: scheme.has_zero_points(), scale: element(scales), group }
}

/// Whether codes are packed ones of four bits.
fn is_w4(facts: &Facts) -> bool {
    facts.packed && facts.scheme.is_4bit()
}

/// A packed weight, or one of bytes that lie in `lines`.
fn packed<'a>(weight: &CudaWeight<'a>, lines: w4::CodeLines) -> w4::Weight<'a> {
    let Facts { scheme, dims: [k, n], .. } = weight.facts;
    let groups = |(storage, layout): View<'a, CudaStorage>| (storage, Stack::new(layout));
    w4::Weight {
        scheme: w4_scheme(scheme, weight.scales.0.dtype()),
        k,
        n,
        codes: weight.codes.0,
        lines,
        scales: groups(weight.scales),
        zeros: weight.zeros.map(groups),
    }
}

/// The weight as kernels that multiply with codes read it, if it lies so.
fn as_codes<'a>(weight: &CudaWeight<'a>) -> Option<w4::Weight<'a>> {
    match is_w4(&weight.facts) {
        true => Some(packed(weight, w4::CodeLines::default())),
        false => along_k::code_lines(weight).map(|lines| packed(weight, lines)),
    }
}

/// The same, if there are such kernels for so many rows.
fn multiplied<'a>(
    op: &'static str,
    weight: &CudaWeight<'a>,
    rows: &Stack,
    device: &CudaDevice,
) -> Result<Option<w4::Weight<'a>>> {
    let m = (rows.count() * rows.rows) as u64;
    let target = Gpu::of(op, device)?.device.target;
    Ok(as_codes(weight).filter(|weight| ProductPlan::takes(weight.scheme.codes, m, target)))
}

/// `act(x·W + bias)`, or `x·Wᵀ`. There are kernels for the codes of the former. Else the weight is made floats of
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
    let Facts { dims: [k, n], scheme, .. } = weight.facts;
    let columns = if transposed { k } else { n };
    let divided = match divides(x, weight) || transposed && may_divide(x, weight) {
        true => Some(Divided::new(op, weight.scales, scheme, columns)?),
        false => None,
    };
    let weight = match &divided {
        Some(divided) => CudaWeight { scales: (&divided.scales, &divided.layout), ..*weight },
        None => *weight,
    };
    let scales = divided.as_ref().map(Divided::of_sums);
    if !transposed {
        let rows = Stack::new(x.1);
        if let Some(weight) = multiplied(op, &weight, &rows, x.0.device())? {
            return w4::matmul(op, (x.0, &rows), &weight, epilogue, bias, scales);
        }
    }
    let panel = Panel::new(op, &weight, x.0.dtype())?;
    let layout = if transposed { panel.layout.transpose(0, 1)? } else { panel.layout };
    let problem = MatmulProblem::new(op, x.1, &layout)?;
    match scales {
        None => super::matmul(op, &problem, epilogue, x.0, &panel.storage, bias),
        Some(scales) => {
            let operands = [x.0, &panel.storage];
            super::matmul::matmul_scaled(op, &problem, epilogue, operands, bias, scales)
        }
    }
}

/// Whether elements of a weight may be beyond the type of x.
fn may_divide(x: View<CudaStorage>, weight: &CudaWeight) -> bool {
    x.0.dtype() == DType::F16 && weight.facts.far
}

/// Whether the product with a weight divides its scales, and multiplies its sums, by a power of two: scales become elements of
/// f16 that may be beyond it.
pub(crate) fn divides(x: View<CudaStorage>, weight: &CudaWeight) -> bool {
    let rows = Stack::new(x.1);
    let m = (rows.count() * rows.rows) as u64;
    let by_codes = as_codes(weight).is_some_and(|w| ProductPlan::scales_sums(w.scheme.codes, m));
    may_divide(x, weight) && !by_codes
}

/// Scales of a weight over the power of two of the largest, or over 1.
struct Divided {
    scales: CudaStorage,
    layout: Layout,
    power: CudaStorage,
    one: Layout,
    ones: Arc<Ones>,
    columns: usize,
}

impl Divided {
    /// For a product of so many columns.
    fn new(
        op: &'static str,
        scales: View<CudaStorage>,
        scheme: QuantScheme,
        columns: usize,
    ) -> Result<Self> {
        let ones = ones(op, scales.0.device(), DType::F32, columns)?;
        let (layout, one) = (Layout::contiguous(scales.1.shape()), Layout::contiguous(1));
        let [scales, power] = encode::divided(op, scales, scheme.farthest() as u32)?;
        Ok(Self { scales, layout, power, one, ones, columns })
    }

    /// What sums are multiplied with.
    fn of_sums(&self) -> CodeScales<'_> {
        let cols = Vector::At(self.ones.address(), self.columns);
        CodeScales::Lines { one: 1.0, rows: Vector::Of(&self.power, &self.one), cols, zero: None }
    }
}

/// The products with weights of one scheme, or what becomes of them, if one kernel does it all; nothing is empty.
pub(crate) fn matmul_quant_all(
    op: &'static str,
    x: View<CudaStorage>,
    weights: &[CudaWeight],
    results: Results,
    epilogue: Epilogue,
) -> Result<Option<Vec<CudaStorage>>> {
    let weights: Option<Vec<_>> = weights.iter().map(as_codes).collect();
    match weights.as_deref() {
        Some(all @ [first, others @ ..]) if others.iter().all(|w| w.scheme == first.scheme) => {
            w4::matmul_all(op, (x.0, &Stack::new(x.1)), all, results, epilogue)
        }
        _ => Ok(None),
    }
}

/// The weight in a float dtype, row-major.
pub(crate) fn dequantize(
    op: &'static str,
    weight: &CudaWeight,
    dtype: DType,
) -> Result<CudaStorage> {
    if is_w4(&weight.facts) {
        return w4::dequantize(op, &packed(weight, Default::default()), dtype, false);
    }
    if weight.facts.dims[1] == 1 {
        // A column is by rows as well.
        return Ok(Panel::new(op, weight, dtype)?.storage);
    }
    // Bytes are turned faster than floats.
    let (codes, layout) = along_k::across(op, weight)?;
    Ok(Panel::new(op, &CudaWeight { codes: (&codes, &layout), ..*weight }, dtype)?.storage)
}

/// A weight in floats, by rows or by columns: as its codes of eight bits lie, or of four as products take them.
pub(in crate::cuda) struct Panel {
    pub storage: CudaStorage,
    pub layout: Layout,
}

impl Panel {
    fn new(op: &'static str, weight: &CudaWeight, dtype: DType) -> Result<Self> {
        let Facts { scheme, dims, .. } = weight.facts;
        if is_w4(&weight.facts) {
            let [k, n] = dims;
            let unit = per_chunk(dtype);
            // By columns, if they alone begin where products want lines to begin.
            let turned = k.is_multiple_of(unit) && !n.is_multiple_of(unit);
            let storage = w4::dequantize(op, &packed(weight, Default::default()), dtype, turned)?;
            let layout = match turned {
                true => Layout::contiguous((n, k)).transpose(0, 1)?,
                false => Layout::contiguous((k, n)),
            };
            return Ok(Self { storage, layout });
        }
        let kind = match scheme {
            QuantScheme::Fp8 { .. } => Codes::E4m3,
            QuantScheme::Int8 { .. } => Codes::Int8,
            _ => unreachable!("codes of four bits are packed"),
        };
        let (codes, scales) = (weight.codes, weight.scales);
        Codewords { kind, dims, group: group(scheme), codes, scales }.panel(op, dtype)
    }
}

/// A matrix of codes of eight bits.
pub(in crate::cuda) struct Codewords<'a> {
    pub kind: Codes,
    pub dims: [usize; 2],
    /// Rows and columns that share a scale, 0 for all.
    pub group: [u32; 2],
    pub codes: View<'a, CudaStorage>,
    pub scales: View<'a, CudaStorage>,
}

impl Codewords<'_> {
    /// In floats.
    pub fn panel(&self, op: &'static str, dtype: DType) -> Result<Panel> {
        let Self { kind, dims, mut group, codes: (codes, codes_at), scales: (scales, scales_at) } =
            *self;
        let device = codes.device().clone();
        let gpu = Gpu::of(op, &device)?;
        let order = Order::new(op, device.cuda_stream(), [codes, scales]);
        let (mut stack, mut steps) = (Stack::new(codes_at), Stack::new(scales_at));
        // Columns are rows of the transposed matrix.
        let transposed = stack.rows > 1 && stack.row_stride == 1 && stack.col_stride != 1;
        if transposed {
            group.reverse();
            (stack, steps) = (stack.t(), steps.t());
        }
        let lines = lines(op, codes, stack)?;
        let [rows, cols] = if transposed { [dims[1], dims[0]] } else { dims };
        let facts = Problem {
            rows: rows as u64,
            cols: cols as u64,
            codes: kind,
            scale: element(scales.dtype()),
            out: element(dtype),
            aligned: fit::is_aligned(&lines.stack, codes.dtype(), LINE)
                && row_aligned(&lines.stack, codes.dtype()),
            group,
        };
        let limit = facts.limit(&gpu.device).map(|(got, most)| (got, format!("{most} a side")));
        countable(op, ["this crate", "take"], limit, SPLIT)?;
        let compiled = PLANS.get(op, &gpu, &facts)?;
        let mut storage = uninit(&device, &Shape::from((dims[0], dims[1])), dtype)?;
        {
            let inputs = [lines.storage(), scales].map(|storage| Memory::of(storage, &device));
            let out = Memory::of_mut(&mut storage, &device);
            let arguments = Arguments {
                problem: &facts,
                plan: &compiled.plan,
                codes: (inputs[0].at(lines.offset(0)), lines.stack.row_stride as u64),
                scales: (
                    inputs[1].at(steps.matrix_offset(0)),
                    [steps.row_stride, steps.col_stride].map(|stride| stride as u64),
                ),
                out: out.address(),
            };
            order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
        }
        let layout = match transposed {
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

/// Rows and columns that share a scale, 0 for all.
fn group(scheme: QuantScheme) -> [u32; 2] {
    let spans = scheme.spans();
    let group = scheme.group([1, 1]);
    [0, 1].map(|side| if spans[side] { 0 } else { group[side] as u32 })
}
