//! What a call of attention must look like.

use candle_core::{DType, Result, Tensor};

use super::super::matmul::RESULT;
use super::problem::Extras;
use crate::check::{self, Arg};
use crate::error::Error;
use crate::stack::{batch_dims, broadcast_batch};
use crate::{AttnLayout, FlashAttnOptions};

/// Sizes of a tensor, 1 for what it does not have.
struct Sizes {
    batch: usize,
    heads: usize,
    rows: usize,
    cols: usize,
}

impl Sizes {
    fn new(layout: AttnLayout, t: &Tensor) -> Self {
        let mut dims = [1; 4];
        dims[4 - t.rank()..].copy_from_slice(t.dims());
        if layout == AttnLayout::Bshd && t.rank() > 2 {
            dims.swap(1, 2);
        }
        let [batch, heads, rows, cols] = dims;
        Self { batch, heads, rows, cols }
    }
}

/// Checks a call of flash attention; gives the optional operands.
pub(super) fn flash(
    op: &'static str,
    args @ [q, k, _]: [Arg; 3],
    opts: &FlashAttnOptions,
) -> Result<Extras<Tensor>> {
    let options = [
        ("bias", &opts.bias),
        ("alibi_slopes", &opts.alibi_slopes),
        ("cu_seqlens_q", &opts.cu_seqlens_q),
        ("cu_seqlens_k", &opts.cu_seqlens_k),
        ("seqlens_q", &opts.seqlens_q),
        ("seqlens_k", &opts.seqlens_k),
    ];
    let given = options.map(|(name, t)| t.as_ref().map(|t| (name, t)));
    let all: Vec<_> = args.into_iter().chain(given.into_iter().flatten()).collect();
    check::tensors(op, &all)?;
    tensors(op, args, opts.layout)?;
    let [q_sizes, k_sizes] = [q, k].map(|(_, t)| Sizes::new(opts.layout, t));
    memory(op, args, args.map(|(_, t)| t.dims().to_vec()))?;
    numbers(op, q.1.dtype(), opts)?;

    let [bias, slopes, cu_q, cu_k, len_q, len_k] = given;
    if let (Some((with, _)), Some((name, _))) = (cu_q.or(cu_k), len_q.or(len_k)) {
        let fix = "one is for padded batches, the other for packed ones";
        return Err(Error::Conflict { op, name, with, fix }.into());
    }
    let lengths = match (cu_q, cu_k) {
        (Some(cu_q), Some(cu_k)) => {
            packed(op, args, opts.layout, [cu_q, cu_k])?;
            if bias.is_some() {
                let (name, with) = ("bias", cu_q.0);
                let fix = "pad the sequences and give `seqlens_q` and `seqlens_k`";
                return Err(Error::Conflict { op, name, with, fix }.into());
            }
            [Some((cu_q, q_sizes.rows)), Some((cu_k, k_sizes.rows))]
        }
        (Some((with, _)), None) => return Err(alone(op, "cu_seqlens_k", with).into()),
        (None, Some((with, _))) => return Err(alone(op, "cu_seqlens_q", with).into()),
        (None, None) => {
            for arg in [len_q, len_k].into_iter().flatten() {
                padded(op, (q, opts.layout), arg)?;
            }
            [len_q.map(|arg| (arg, q_sizes.rows)), len_k.map(|arg| (arg, k_sizes.rows))]
        }
    };
    if let Some(arg) = slopes {
        let batch = match cu_q {
            Some((_, ends)) => (ends.dims()[0] - 1, "the sequences of `cu_seqlens_q`"),
            None => (q_sizes.batch, "the batch of `q`"),
        };
        check_slopes(op, arg, batch, q_sizes.heads)?;
    }
    if let Some(arg) = bias {
        let Sizes { batch, heads, rows, .. } = q_sizes;
        check_bias(op, q, arg, [batch, heads, rows, k_sizes.rows])?;
        if arg.1.track_op() && arg.1.device().is_cpu() {
            check::memory(op, "the gradient of `bias`", arg.1.dims(), DType::F32)?;
        }
    }
    let constant: Vec<_> = given[1..].iter().flatten().copied().collect();
    check::untracked(op, &constant)?;
    let [lengths_q, lengths_k] =
        lengths.map(|arg| arg.map(|(arg, rows)| values(op, arg, rows, cu_q.is_some())).transpose());
    Ok(Extras {
        bias: opts.bias.clone(),
        slopes: opts.alibi_slopes.clone(),
        lengths: [lengths_q?, lengths_k?],
    })
}

/// q, k and v belong together.
fn tensors(op: &'static str, args: [Arg; 3], layout: AttnLayout) -> Result<()> {
    let [q, k, v] = args.map(|(_, t)| t);
    check::dtype(op, args[0], &check::FLOATS)?;
    let shapes = match layout {
        AttnLayout::Bhsd => "[S, D], [H, S, D] or [B, H, S, D]",
        AttnLayout::Bshd => "[S, D], [S, H, D] or [B, S, H, D]",
    };
    for arg in args {
        check::same_dtype(op, arg, args[0])?;
        let fix = "reshape it, or use `.unsqueeze(..)?`";
        check::rank(op, arg, 2..=4, shapes, fix)?;
    }
    for (arg, t) in &args[1..] {
        let fix = "add the missing dimensions with `.unsqueeze(..)?`";
        check::dim(op, arg, ("rank", t.rank()), (q.rank(), "the rank of `q`"), fix)?;
    }
    let [q, k, v] = [q, k, v].map(|t| Sizes::new(layout, t));
    matrices(op, [&q, &k, &v])?;
    for (arg, sizes) in [("k", &k), ("v", &v)] {
        let fix = "expand a batch of 1 with `.broadcast_as(..)?`";
        check::dim(op, arg, ("B", sizes.batch), (q.batch, "the batch of `q`"), fix)?;
    }
    let fix = "give `v` as many heads as `k`";
    check::dim(op, "v", ("heads", v.heads), (k.heads, "the heads of `k`"), fix)?;
    if q.heads != 0 && (k.heads == 0 || q.heads % k.heads != 0) {
        return Err(Error::Dimension {
            op,
            arg: "k",
            dim: "heads",
            got: k.heads,
            want: format!("a divisor of {}, the heads of `q`", q.heads),
            fix: "equally many query heads share a key head: repeat or drop key heads".into(),
        }
        .into());
    }
    Ok(())
}

/// Checks a call of attention over any batch dimensions.
pub(super) fn broadcast(op: &'static str, args: [Arg; 3]) -> Result<()> {
    check::tensors(op, &args)?;
    for arg in args {
        check::dtype(op, arg, &[DType::F16])?;
        let fix = "add a dimension with `.unsqueeze(0)?`";
        check::rank(op, arg, 2..=usize::MAX, "[.., S, D]", fix)?;
    }
    let sizes = args.map(|(_, t)| {
        let dims = t.dims();
        Sizes { batch: 1, heads: 1, rows: dims[dims.len() - 2], cols: dims[dims.len() - 1] }
    });
    matrices(op, sizes.each_ref())?;
    check::batch(op, args[1], args[0])?;
    check::batch(op, args[2], args[1])?;
    check::batch(op, args[2], args[0])?;
    let batch = args[1..].iter().fold(batch_dims(args[0].1.dims()).to_vec(), |batch, (_, t)| {
        broadcast_batch(&batch, batch_dims(t.dims())).expect("checked above")
    });
    let repeated = |t: Sizes| [batch.as_slice(), &[t.rows, t.cols]].concat();
    memory(op, args, sizes.map(repeated))
}

/// The result of operands of these shapes can exist; on the CPU there is memory for it, and for what that
/// path keeps: the operands in f32 and some numbers for each row.
fn memory(op: &'static str, args: [Arg; 3], operands: [Vec<usize>; 3]) -> Result<()> {
    const ROW: usize = 16;
    let [q, _, v] = &operands;
    let of_rows = |width: usize| [&q[..q.len() - 1], &[width]].concat();
    let out = of_rows(v[v.len() - 1]);
    check::size(op, RESULT, &out, DType::F32)?;
    if !args[0].1.device().is_cpu() {
        return Ok(());
    }
    check::memory(op, RESULT, &out, DType::F32)?;
    check::memory(op, "what is kept of the rows of `q`,", &of_rows(ROW), DType::F32)?;
    for ((arg, _), dims) in args.iter().zip(&operands) {
        check::memory(op, format_args!("`{arg}`, as the CPU path takes it,"), dims, DType::F32)?;
    }
    Ok(())
}

/// q `[.., Sq, D]`, k `[.., Sk, D]` and v `[.., Sk, Dv]` belong together.
fn matrices(op: &'static str, [q, k, v]: [&Sizes; 3]) -> Result<()> {
    let fix = "give heads a dimension of their own with `.reshape(..)?` and `.transpose(..)?`";
    check::dim(op, "k", ("D", k.cols), (q.cols, "the head dimension of `q`"), fix)?;
    let fix = "give `v` one row for each key";
    check::dim(op, "v", ("Sk", v.rows), (k.rows, "the keys of `k`"), fix)?;
    if q.cols == 0 {
        return Err(Error::Dimension {
            op,
            arg: "q",
            dim: "D",
            got: 0,
            want: "at least 1".into(),
            fix: "give `q` and `k` at least one column".into(),
        }
        .into());
    }
    Ok(())
}

/// Options that are no tensors.
fn numbers(op: &'static str, dtype: DType, opts: &FlashAttnOptions) -> Result<()> {
    if let Some(scale) = opts.softmax_scale {
        check::finite(op, "softmax_scale", scale)?;
    }
    if let Some(cap) = opts.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
        let (got, want) = (cap.to_string(), "a finite number above 0".into());
        let fix = "leave it out for none";
        return Err(Error::Value { op, name: "softcap", got, want, fix }.into());
    }
    if opts.causal && opts.window_size_right.is_some_and(|right| right != 0) {
        let (name, with) = ("causal", "window_size_right");
        let fix = "`causal` is a `window_size_right` of 0";
        return Err(Error::Conflict { op, name, with, fix }.into());
    }
    if let Some(out) = opts.out_dtype.filter(|&out| out != dtype && out != DType::F32) {
        let want = match dtype {
            DType::F32 => "f32, the dtype of `q`".into(),
            _ => format!("{}, the dtype of `q`, or f32", dtype.as_str()),
        };
        let (got, fix) = (out.as_str().into(), "leave it out for the dtype of `q`");
        return Err(Error::Value { op, name: "out_dtype", got, want, fix }.into());
    }
    Ok(())
}

/// One half of what says how a packed batch lies.
fn alone(op: &'static str, name: &'static str, with: &'static str) -> Error {
    let (got, want) = ("missing".into(), format!("a tensor beside `{with}`"));
    Error::Value { op, name, got, want, fix: "a packed batch needs both" }
}

/// A packed batch, and where its sequences begin.
fn packed(op: &'static str, args: [Arg; 3], layout: AttnLayout, ends: [Arg; 2]) -> Result<()> {
    let shapes = match layout {
        AttnLayout::Bhsd => "[H, T, D] with `cu_seqlens_q`",
        AttnLayout::Bshd => "[T, H, D] with `cu_seqlens_q`",
    };
    check::rank(op, args[0], 3..=3, shapes, "put all sequences one after another")?;
    for (arg, t) in ends {
        counts(op, (arg, t), "[B + 1]")?;
        if t.dims()[0] == 0 {
            return Err(Error::Dimension {
                op,
                arg,
                dim: "entries",
                got: 0,
                want: "at least 1".into(),
                fix: "begin with 0, then give the end of each sequence".into(),
            }
            .into());
        }
    }
    let [(with, q), (arg, k)] = ends;
    let why = format_args!("the entries of `{with}`");
    let fix = "give `q` and `k` equally many sequences; they may be empty";
    Ok(check::dim(op, arg, ("entries", k.dims()[0]), (q.dims()[0], why), fix)?)
}

/// Lengths of the batches of a padded one.
fn padded(op: &'static str, (q, layout): (Arg, AttnLayout), (arg, t): Arg) -> Result<()> {
    let shapes = match (layout, arg) {
        (AttnLayout::Bhsd, "seqlens_q") => "[B, H, S, D] with `seqlens_q`",
        (AttnLayout::Bhsd, _) => "[B, H, S, D] with `seqlens_k`",
        (AttnLayout::Bshd, "seqlens_q") => "[B, S, H, D] with `seqlens_q`",
        (AttnLayout::Bshd, _) => "[B, S, H, D] with `seqlens_k`",
    };
    check::rank(op, q, 4..=4, shapes, "add the missing dimensions with `.unsqueeze(..)?`")?;
    counts(op, (arg, t), "[B]")?;
    let want = (q.1.dims()[0], "the batch of `q`");
    Ok(check::dim(op, arg, ("B", t.dims()[0]), want, "give it one length for each batch")?)
}

/// A vector of u32.
fn counts(op: &'static str, (arg, t): Arg, shape: &'static str) -> Result<()> {
    if t.dtype() != DType::U32 {
        let (got, want) = (t.dtype(), "u32".into());
        let fix = "cast it with `.to_dtype(DType::U32)?`".into();
        return Err(Error::DType { op, arg, got, want, fix }.into());
    }
    Ok(check::rank(op, (arg, t), 1..=1, shape, "flatten it with `.flatten_all()?`")?)
}

/// `[Hq]` or `[B, Hq]`.
fn check_slopes(op: &'static str, (arg, t): Arg, batch: (usize, &str), heads: usize) -> Result<()> {
    check::dtype(op, (arg, t), &[DType::F32])?;
    let fix = "give each head a slope, or each batch and head";
    check::rank(op, (arg, t), 1..=2, "[Hq] or [B, Hq]", fix)?;
    let got = t.dims()[t.rank() - 1];
    check::dim(op, arg, ("heads", got), (heads, "the heads of `q`"), fix)?;
    if t.rank() == 2 {
        check::dim(op, arg, ("B", t.dims()[0]), batch, fix)?;
    }
    Ok(())
}

/// Broadcast from the right to `want` = `[B, Hq, Sq, Sk]`.
fn check_bias(op: &'static str, q: Arg, (arg, t): Arg, want: [usize; 4]) -> Result<()> {
    let dtypes = [DType::F32, q.1.dtype()];
    if t.dtype().is_int() {
        let want = if dtypes[0] == dtypes[1] {
            "f32".into()
        } else {
            format!("f32 or {}", dtypes[1].as_str())
        };
        let fix = "a mask becomes a bias of 0 where a key is visible and -inf where not: \
                   `mask.where_cond(&zeros, &minus_infinities)?`; cast, it would add 1 to their scores"
            .into();
        return Err(Error::DType { op, arg, got: t.dtype(), want, fix }.into());
    }
    check::dtype(op, (arg, t), if dtypes[0] == dtypes[1] { &dtypes[..1] } else { &dtypes })?;
    let fix = "give it the shape of the scores, with 1 for what is shared";
    check::rank(op, (arg, t), 1..=4, "[B or 1, Hq or 1, Sq or 1, Sk]", fix)?;
    let sizes = want.into_iter().zip(["B", "heads", "Sq", "Sk"]);
    for (&got, (want, dim)) in t.dims().iter().zip(sizes.skip(4 - t.rank())) {
        if got != want && (got != 1 || dim == "Sk") {
            let or = if dim == "Sk" { "" } else { " or 1" };
            let (want, fix) = (format!("{want}{or}"), fix.into());
            return Err(Error::Dimension { op, arg, dim, got, want, fix }.into());
        }
    }
    Ok(())
}

/// The lengths side by side. On the CPU each must fit: on a GPU the host would have to wait for them.
fn values(op: &'static str, (name, t): Arg, rows: usize, packed: bool) -> Result<Tensor> {
    check::copies(op, &[(name, t)])?;
    let t = t.contiguous()?;
    if !t.device().is_cpu() {
        return Ok(t);
    }
    let refuse = |i: usize, got: u32, want: String| {
        let (got, fix) = (format!("{got} at entry {i}"), "check how it was computed");
        Err(Error::Value { op, name, got, want, fix })
    };
    // candle looks for an empty view's elements where its offset says.
    let values = if t.elem_count() == 0 { vec![] } else { t.to_vec1::<u32>()? };
    for (i, &value) in values.iter().enumerate() {
        if packed && i == 0 && value != 0 {
            refuse(i, value, "0, where the first sequence begins".into())?;
        }
        if packed && i > 0 && value < values[i - 1] {
            refuse(i, value, format!("at least {}, the entry before", values[i - 1]))?;
        }
        if value as usize > rows {
            refuse(i, value, format!("at most {rows}, the rows that there are"))?;
        }
    }
    Ok(t)
}
