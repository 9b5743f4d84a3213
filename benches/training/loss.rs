//! Losses: contestants that read targets, too.

use candle_core::{D, DType, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::common::contest::{CANDLE, Contest, OURS, agree_after};
use super::common::gpu::Gpu;
use super::rows::{Op, Pass, Row};

/// The mean loss of some operands and targets.
type Loss = fn(&[Tensor], &Tensor) -> Result<Tensor>;

/// The shapes of the operands, our loss and the plain one.
fn functions(row: &Row) -> Option<(Vec<Vec<usize>>, Loss, Loss)> {
    match row.op {
        Op::CrossEntropy => Some((
            vec![vec![row.rows, row.cols]],
            |t, targets| t[0].kaio_cross_entropy(targets, &CrossEntropyOptions::default()),
            |t, targets| plain(&t[0], targets),
        )),
        Op::LinearCrossEntropy { depth } => Some((
            vec![vec![row.rows, depth], vec![row.cols, depth]],
            |t, targets| {
                t[0].kaio_linear_cross_entropy(&t[1], targets, &CrossEntropyOptions::default())
            },
            |t, targets| plain(&t[0].matmul(&t[1].t()?)?, targets),
        )),
        _ => None,
    }
}

/// As candle-nn's cross_entropy.
fn plain(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let z = logits.to_dtype(DType::F32)?;
    let max = z.max_keepdim(D::Minus1)?;
    let z = z.broadcast_sub(&max)?;
    let log = z.exp()?.sum_keepdim(D::Minus1)?.log()?;
    z.broadcast_sub(&log)?.gather(&targets.unsqueeze(1)?, 1)?.mean_all()?.neg()
}

/// The contest of a loss; `None` for other ops.
pub fn prepare(gpu: &Gpu, row: &Row) -> Result<Option<Contest>> {
    let Some((shapes, ours, theirs)) = functions(row) else { return Ok(None) };
    let operands = shapes
        .iter()
        // Logits of a product are about as large as those given.
        .map(|dims| {
            let scale = if shapes.len() == 1 { 1.0 } else { (dims[1] as f64).powf(-0.25) };
            (Tensor::randn(0f32, 1., dims.as_slice(), &gpu.device)? * scale)?.to_dtype(row.dtype)
        })
        .collect::<Result<Vec<_>>>()?;
    let targets = (0..row.rows as u64).map(|i| (i * 2_654_435_761 % row.cols as u64) as u32);
    let targets = Tensor::from_vec(targets.collect(), row.rows, &gpu.device)?;
    check(row, &operands, &targets, ours, theirs)?;

    let vars = operands.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let tracked: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let mut contest = Contest::default();
    match row.pass {
        Pass::Forward => {
            let (these, same) = (operands.clone(), targets.clone());
            contest.add(OURS, move || ours(&these, &targets).map(drop));
            contest.add_if_able(CANDLE, move || theirs(&operands, &same).map(drop));
        }
        Pass::Backward => {
            let mut out = None;
            let backward = Backward::of(|| {
                out = Some(ours(&tracked, &targets)?);
                Ok(())
            })?;
            let Some(out) = out else { bail!("nothing was computed") };
            let upstream = out.ones_like()?;
            contest.add(OURS, move || backward.run(&[Some(upstream.clone())]).map(drop));
        }
        Pass::Both => {
            contest.add(OURS, move || {
                let mut out = None;
                let backward = Backward::of(|| {
                    out = Some(ours(&tracked, &targets)?);
                    Ok(())
                })?;
                let Some(out) = out else { bail!("nothing was computed") };
                backward.run(&[Some(out.ones_like()?)]).map(drop)
            });
        }
    }
    Ok(Some(contest))
}

/// On a few rows our loss and gradients are those of the plain formula.
fn check(row: &Row, operands: &[Tensor], targets: &Tensor, ours: Loss, plain: Loss) -> Result<()> {
    const ROWS: usize = 256;
    let few = row.rows.min(ROWS);
    let targets = targets.narrow(0, 0, few)?.contiguous()?;
    let run = |loss: Loss, dtype| {
        let vars = operands.iter().enumerate().map(|(i, t)| {
            let t = if i == 0 { t.narrow(0, 0, few)?.contiguous()? } else { t.clone() };
            Var::from_tensor(&t.to_dtype(dtype)?)
        });
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let tracked: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let loss = loss(&tracked, &targets)?;
        let grads = loss.backward()?;
        let of = |var: &Var| match grads.get(var) {
            Some(grad) => grad.to_dtype(row.dtype),
            None => bail!("no gradient"),
        };
        let grads = vars.iter().map(of).collect::<Result<Vec<_>>>()?;
        Ok::<_, candle_core::Error>((loss.reshape((1, 1))?, grads))
    };
    let ((loss, grads), (plain, plain_grads)) = (run(ours, row.dtype)?, run(plain, DType::F32)?);
    // Logits of a product are rounded, which the mean over rows hides.
    agree_after("the loss", &loss.to_dtype(row.dtype)?, &plain.to_dtype(row.dtype)?, few, 1)?;
    for (grad, plain) in grads.iter().zip(&plain_grads) {
        agree_after("a gradient", grad, plain, row.cols, 4)?;
    }
    Ok(())
}
