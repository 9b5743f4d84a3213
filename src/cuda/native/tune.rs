//! For the benches: products and attention by configurations that nobody chose.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Result, Shape, Storage, Tensor, bail};

use super::along_k::activations;
use super::bytes::{CodeScales, Vector, codes_call};
use super::matmul::Call;
use super::plan::Compiled;
use super::quantised::{pack_zeros, tensor};
use super::{attention, quantize, w4};
use crate::kernel::attention as flash;
use crate::kernel::gemm::{self, Problem};
use crate::kernel::w4::Scheme;
use crate::kernel::{self, Config, Plan};
use crate::op::{
    AttentionInputs, AttentionProblem, AttentionWants, Epilogue, MatmulProblem, Rounding,
};
use crate::options::MatmulOptions;
use crate::ptx::Factor;
use crate::stack::Stack;

/// The product by `config`, or by the chooser's, of two matrices on one GPU; and the problem that the
/// chooser sees.
pub fn matmul(
    a: &Tensor,
    b: &Tensor,
    out: DType,
    config: Option<Config>,
) -> Result<(Tensor, Problem)> {
    let ((sa, la), (sb, lb)) = (a.storage_and_layout(), b.storage_and_layout());
    let (Storage::Cuda(sa), Storage::Cuda(sb)) = (&*sa, &*sb) else { bail!("not on a GPU") };
    let problem = MatmulProblem::new("tune", la, lb)?;
    let call = Call::new("tune", &problem, Epilogue::round(out), sa, sb, None)?;
    product(&call, config, problem.out.clone())
}

/// The product of a call by `config`, or by the chooser's, and its problem.
fn product(
    call: &Call,
    config: Option<Config>,
    shape: impl Into<Shape>,
) -> Result<(Tensor, Problem)> {
    let device = &call.gpu.device;
    let plan = match config {
        Some(config) => gemm::Plan::of(&config, &call.facts, device),
        None => Some(gemm::Plan::new(&call.facts, device)),
    };
    let Some(plan) = plan else { bail!("not a product") };
    let storage = call.run(&Compiled::new("tune", &call.gpu, plan)?)?;
    Ok((tensor(storage, shape), call.facts))
}

/// bf16 `rows · cols · a·bᵀ` of bytes `[M, K]` and `[N, K]`, int8 or else e4m3, with f32 scales `[M]` and `[N]`, or of
/// blocks `[M, ⌈K/128⌉]` and `[⌈K/128⌉, ⌈N/128⌉]`, by `config` or by the chooser's; and the problem that the chooser
/// sees.
pub fn matmul_bytes(
    [a, b]: [&Tensor; 2],
    [rows, cols]: [&Tensor; 2],
    int8: bool,
    config: Option<Config>,
) -> Result<(Tensor, Problem)> {
    let all = [a, b, rows, cols].map(|t| t.storage_and_layout());
    let [
        (Storage::Cuda(sa), la),
        (Storage::Cuda(sb), lb),
        (Storage::Cuda(sr), lr),
        (Storage::Cuda(sc), lc),
    ] = all.each_ref().map(|(storage, layout)| (&**storage, *layout))
    else {
        bail!("not on a GPU")
    };
    let (x, w) = (Stack::new(la), Stack::new(lb).t());
    let (rows, cols) = (Vector::Of(sr, lr), Vector::Of(sc, lc));
    let scales = match lr.dims().len() {
        1 => CodeScales::Lines { one: 1.0, rows, cols, zero: None },
        _ => CodeScales::Blocks { rows, cols },
    };
    let factor = if int8 { Factor::S8 } else { Factor::E4m3 };
    let out = Epilogue::round(DType::BF16);
    let x_lines = activations("tune", (sa, &x))?;
    let call = codes_call("tune", sa.device(), factor, (x_lines, (sb, &w)), scales, None, out)?;
    product(&call, config, (x.rows, w.cols))
}

/// A matrix rounded to int8 or e4m3, and the scales of each row's groups of `width` elements.
pub fn quantize_rows(x: &Tensor, dtype: DType, width: usize) -> Result<[Tensor; 2]> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("not on a GPU") };
    let stack = Stack::new(layout);
    let rounding = Rounding { dtype, width };
    let rounded = quantize::quantize_rows("tune", (storage, &stack), rounding)?;
    let codes = tensor(rounded.codes, (stack.rows, rounded.row)).narrow(1, 0, stack.cols)?;
    Ok([codes, tensor(rounded.scales, (stack.rows, stack.cols.div_ceil(width)))])
}

/// Attention by `config`, or by the chooser's, of `[B, H, S, D]` with as many heads of keys, on one GPU;
/// and the problem that the chooser sees.
pub fn flash_attn(
    [q, k, v]: [&Tensor; 3],
    causal: bool,
    config: Option<Config>,
) -> Result<(Tensor, flash::Problem)> {
    let all = [q, k, v].map(|t| t.storage_and_layout());
    let [(Storage::Cuda(sq), lq), (Storage::Cuda(sk), lk), (Storage::Cuda(sv), lv)] =
        all.each_ref().map(|(storage, layout)| (&**storage, *layout))
    else {
        bail!("not on a GPU")
    };
    let out_dtype = q.dtype();
    let problem = AttentionProblem { out_dtype, ..AttentionProblem::broadcast(lq, lk, lv, causal) };
    let inputs = AttentionInputs { q: sq, k: sk, v: sv, extras: Default::default() };
    let wants = AttentionWants { lse: false, stats: false };
    let call = attention::Call::new("tune", &problem, wants, &inputs)?;
    let device = &call.gpu.device;
    let plan = match config {
        Some(config) => flash::Plan::of(&config, &call.facts, device),
        None => Some(flash::Plan::new(&call.facts, device)),
    };
    let Some(plan) = plan else { bail!("not attention") };
    let compiled = Compiled::new("tune", &call.gpu, plan)?;
    let out = call.run(&problem, &compiled)?.out;
    Ok((tensor(out, problem.shape.clone()), call.facts))
}

/// A weight as [`w4_matmul`] takes it: on one GPU, packed codes, u32, from [`w4_pack`], or bytes `[N, K]` whose rows begin
/// at multiples of 16 bytes; and for each group a row of scales and one of zero points, from [`w4_pack_zeros`].
#[derive(Clone, Debug)]
pub struct W4 {
    /// How it is quantised.
    pub scheme: Scheme,
    /// Rows and columns.
    pub size: [usize; 2],
    /// The codes.
    pub codes: Tensor,
    /// f16, bf16 or f32, as the scheme says.
    pub scales: Tensor,
    /// u8.
    pub zeros: Option<Tensor>,
}

/// Packed codes of plain ones, u32 `[⌈k/8⌉, n]`.
pub fn w4_pack(plain: &Tensor, size: [usize; 2], scheme: &Scheme) -> Result<Tensor> {
    let (storage, layout) = plain.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("not on a GPU") };
    let codes = w4::pack("tune", (storage, &Stack::new(layout)), size, scheme, false)?;
    Ok(tensor(codes, w4::packed_words(size[0], size[1])))
}

/// Packed zero points of plain ones, `[groups, n]`.
pub fn w4_pack_zeros(plain: &Tensor) -> Result<Tensor> {
    pack_zeros(plain)
}

/// Plain codes of packed ones.
pub fn w4_unpack(packed: &Tensor, size @ [k, n]: [usize; 2], scheme: &Scheme) -> Result<Tensor> {
    let (storage, _) = packed.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("not on a GPU") };
    Ok(tensor(w4::unpack("tune", storage, size, scheme.codes)?, (k.div_ceil(8), n)))
}

/// Calls `with` for the storages of a weight.
fn with_w4<T>(weight: &W4, with: impl FnOnce(&w4::Weight) -> Result<T>) -> Result<T> {
    let W4 { scheme, size: [k, n], ref codes, ref scales, ref zeros } = *weight;
    let (codes, at) = codes.storage_and_layout();
    let Storage::Cuda(codes) = &*codes else { bail!("not on a GPU") };
    let all = [Some(scales), zeros.as_ref()].map(|t| t.map(Tensor::storage_and_layout));
    let groups = |i: usize| match &all[i] {
        Some((storage, layout)) => match &**storage {
            Storage::Cuda(storage) => Ok(Some((storage, Stack::new(layout)))),
            _ => bail!("not on a GPU"),
        },
        None => Ok(None),
    };
    let (Some(scales), zeros) = (groups(0)?, groups(1)?) else { unreachable!("scales are there") };
    let lines = match scheme.codes.are_bytes() {
        true => w4::CodeLines { first: at.start_offset(), line: at.stride()[0] },
        false => w4::CodeLines::default(),
    };
    with(&w4::Weight { scheme, k, n, codes, lines, scales, zeros })
}

/// The elements of a weight, `[k, n]`, or `[n, k]` where they are transposed.
pub fn w4_dequantize(weight: &W4, dtype: DType, transposed: bool) -> Result<Tensor> {
    let elements = with_w4(weight, |weight| w4::dequantize("tune", weight, dtype, transposed))?;
    let [k, n] = weight.size;
    Ok(tensor(elements, if transposed { (n, k) } else { (k, n) }))
}

/// `act(x·W + bias)` of a matrix by `config`, or by the chooser's.
pub fn w4_matmul(
    x: &Tensor,
    weight: &W4,
    options: &MatmulOptions,
    config: Option<Config>,
) -> Result<Tensor> {
    let (storage, layout) = x.storage_and_layout();
    let bias = options.bias.as_ref().map(Tensor::storage_and_layout);
    let bias = match &bias {
        None => None,
        Some((storage, layout)) => match &**storage {
            Storage::Cuda(storage) => Some((storage, *layout)),
            _ => bail!("not on a GPU"),
        },
    };
    let Storage::Cuda(storage) = &*storage else { bail!("not on a GPU") };
    let stack = Stack::new(layout);
    let epilogue = Epilogue {
        out_dtype: options.out_dtype.unwrap_or(x.dtype()),
        activation: options.activation,
    };
    let out = with_w4(weight, |weight| {
        let (x, weights) = ((storage, &stack), std::slice::from_ref(weight));
        let call = w4::Call::new("tune", x, weights, w4::Results::Each, epilogue, bias, None)?;
        let Some(config) = config else { return call.run_chosen() };
        let Some(plan) = kernel::w4::Plan::of(&config, &call.facts, &call.gpu.device) else {
            bail!("not a product with such a weight")
        };
        call.run(&Compiled::new("tune", &call.gpu, plan)?)
    })?;
    let out = out.into_iter().next().expect("one for the weight");
    Ok(tensor(out, (stack.count() * stack.rows, weight.size[1])))
}
