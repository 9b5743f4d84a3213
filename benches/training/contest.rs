//! Who competes in a row. Before anyone is timed, results and gradients are compared with the plain formula's, in f32.

use candle_core::{D, DType, Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::common::contest::{CANDLE, Contest, OURS, agree, agree_after};
use super::common::gpu::Gpu;
use super::rows::{HEADS, Op, Pass, Row};
use super::{loss, table};

/// A function of some tensors, the constants last, which has one result.
type Function = fn(&Row, &[Tensor]) -> Result<Tensor>;

/// The shapes of an op's operands, our function of them and the plain one.
fn functions(row: &Row) -> (Vec<Vec<usize>>, Function, Function) {
    let matrix = || vec![row.rows, row.cols];
    match row.op {
        Op::RmsNorm => (
            vec![matrix(), vec![row.cols]],
            |_, t| t[0].kaio_rms_norm(&t[1], EPS),
            |_, t| normed(&t[0])?.broadcast_mul(&t[1]),
        ),
        Op::LayerNorm => (
            vec![matrix(), vec![row.cols], vec![row.cols]],
            |_, t| t[0].kaio_layer_norm(&t[1], Some(&t[2]), EPS),
            |_, t| {
                let centred = t[0].broadcast_sub(&t[0].mean_keepdim(D::Minus1)?)?;
                normed(&centred)?.broadcast_mul(&t[1])?.broadcast_add(&t[2])
            },
        ),
        Op::Rope(RopeLayout::Halves) => (
            vec![vec![1, HEADS, row.rows / HEADS, row.cols]],
            |_, t| t[0].kaio_rope(&t[1], &t[2], RopeLayout::Halves),
            |_, t| candle_nn::rotary_emb::rope_slow(&t[0], &t[1], &t[2]),
        ),
        Op::Rope(RopeLayout::Interleaved) => (
            vec![vec![1, HEADS, row.rows / HEADS, row.cols]],
            |_, t| t[0].kaio_rope(&t[1], &t[2], RopeLayout::Interleaved),
            |_, t| candle_nn::rotary_emb::rope_i_slow(&t[0], &t[1], &t[2]),
        ),
        Op::Softmax => (
            vec![matrix()],
            |_, t| t[0].kaio_softmax(),
            |_, t| candle_nn::ops::softmax(&t[0], D::Minus1),
        ),
        Op::Swiglu => {
            (vec![matrix(), matrix()], |_, t| t[0].kaio_swiglu(&t[1]), |_, t| t[0].silu()? * &t[1])
        }
        Op::CrossEntropy | Op::LinearCrossEntropy { .. } => unreachable!("a loss"),
        Op::Embedding { .. } => unreachable!("a table"),
    }
}

const EPS: f32 = 1e-5;

/// `x / √(mean(x²) + eps)`.
fn normed(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(EPS))?.sqrt()?)
}

/// What has no gradient.
fn constants(row: &Row, device: &Device) -> Result<Vec<Tensor>> {
    let Op::Rope(_) = row.op else { return Ok(vec![]) };
    let positions = Tensor::arange(0f32, (row.rows / HEADS) as f32, device)?.unsqueeze(1)?;
    let pairs = row.cols / 2;
    let speeds = Tensor::arange(0f32, pairs as f32, device)?.affine(-9.2 / pairs as f64, 0.0)?;
    let angles = positions.broadcast_mul(&speeds.exp()?.unsqueeze(0)?)?;
    [angles.cos()?, angles.sin()?].iter().map(|t| t.to_dtype(row.dtype)).collect()
}

pub fn prepare(gpu: &Gpu, row: &Row) -> Result<Contest> {
    if let Op::Embedding { classes, ids } = row.op {
        return table::prepare(gpu, row, classes, ids);
    }
    if let Some(contest) = loss::prepare(gpu, row)? {
        return Ok(contest);
    }
    let random = |dims: &[usize]| Tensor::randn(0f32, 1., dims, &gpu.device)?.to_dtype(row.dtype);
    let (shapes, ours, plain) = functions(row);
    let operands = shapes.iter().map(|dims| random(dims)).collect::<Result<Vec<_>>>()?;
    let constants = constants(row, &gpu.device)?;
    check(row, &operands, ours, plain)?;

    let mut contest = Contest::default();
    match row.pass {
        Pass::Forward => {
            let operands = [operands, constants].concat();
            let (row, these) = (*row, operands.clone());
            contest.add(OURS, move || ours(&row, &these).map(drop));
            contest.add_if_able(CANDLE, move || plain(&row, &operands).map(drop));
        }
        Pass::Backward | Pass::Both => {
            let vars = operands.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
            let tracked = vars.iter().map(|var| var.as_tensor().clone());
            let tracked: Vec<_> = tracked.chain(constants).collect();
            let mut out = None;
            let backward = Backward::of(|| {
                out = Some(ours(row, &tracked)?);
                Ok(())
            })?;
            let Some(out) = out else { bail!("nothing was computed") };
            let upstream = random(out.dims())?;
            contest.add(OURS, move || backward.run(&[Some(upstream.clone())]).map(drop));
        }
    }
    contest.add_copy(super::common::table::Row::bytes(row), &gpu.device)?;
    Ok(contest)
}

/// On a few rows our results and gradients are those of the plain formula.
fn check(row: &Row, operands: &[Tensor], ours: Function, plain: Function) -> Result<()> {
    const ROWS: usize = 512;
    let few = Row { rows: row.rows.min(ROWS), ..*row };
    let narrowed = operands.iter().zip(functions(&few).0);
    let narrowed = narrowed.map(|(t, dims)| {
        let narrow = |t: Tensor, (axis, len): (usize, usize)| t.narrow(axis, 0, len);
        dims.into_iter().enumerate().try_fold(t.clone(), narrow)?.contiguous()
    });
    let narrowed = narrowed.collect::<Result<Vec<_>>>()?;
    let run = |f: Function, dtype| {
        let cast = narrowed.iter().map(|t| Var::from_tensor(&t.to_dtype(dtype)?));
        let vars = cast.collect::<Result<Vec<_>>>()?;
        let constants = constants(&few, narrowed[0].device())?;
        let constants = constants.iter().map(|t| t.to_dtype(dtype));
        let tracked = vars.iter().map(|var| Ok(var.as_tensor().clone()));
        let tracked = tracked.chain(constants).collect::<Result<Vec<_>>>()?;
        let out = f(&few, &tracked)?;
        let grads = out.to_dtype(DType::F32)?.sqr()?.sum_all()?.backward()?;
        let of = |var: &Var| match grads.get(var) {
            Some(grad) => grad.to_dtype(row.dtype),
            None => bail!("no gradient"),
        };
        let grads = vars.iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok::<_, candle_core::Error>((out.to_dtype(row.dtype)?, grads))
    };
    let ((out, grads), (plain, plain_grads)) = (run(ours, row.dtype)?, run(plain, DType::F32)?);
    agree("the result", &out, &plain, row.cols)?;
    for (grad, plain) in grads.iter().zip(&plain_grads) {
        // The upstream gradient is rounded before, and what it is made of.
        agree_after("a gradient", grad, plain, row.cols, 4)?;
    }
    Ok(())
}
