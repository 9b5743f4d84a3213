//! Rows of a table by their ids, and the table's gradient.

use candle_core::{DType, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::common::contest::{CANDLE, Contest, OURS, agree};
use super::common::gpu::Gpu;
use super::common::table::Row as _;
use super::rows::{Ids, Pass, Row};

/// `torch_peers.py` makes the same ids.
fn ids(rows: usize, classes: usize, ids: Ids) -> Vec<u32> {
    let scattered = |i: usize, below: usize| i * 2_654_435_761 % below;
    match ids {
        Ids::Uniform => (0..rows).map(|i| scattered(i, classes) as u32).collect(),
        Ids::Zipf => {
            // How many words in the first so many are expected: quantiles of these, in a scattered order.
            let mut sum = 0.0;
            let sums: Vec<f64> = (1..=classes)
                .map(|rank| {
                    sum += 1.0 / rank as f64;
                    sum
                })
                .collect();
            let quantile = |i| (scattered(i, rows) as f64 + 0.5) / rows as f64 * sum;
            (0..rows).map(|i| sums.partition_point(|&up_to| up_to < quantile(i)) as u32).collect()
        }
    }
}

/// The contest of a row: candle's gradient is the addition that its backward pass makes, to zeros that are there.
pub fn prepare(gpu: &Gpu, row: &Row, classes: usize, of: Ids) -> Result<Contest> {
    let device = &gpu.device;
    let random =
        |rows: usize| Tensor::randn(0f32, 1., (rows, row.cols), device)?.to_dtype(row.dtype);
    let ids = Tensor::from_vec(ids(row.rows, classes, of), row.rows, device)?;
    let (table, upstream) = (Var::from_tensor(&random(classes)?)?, random(row.rows)?);
    let zeros = Tensor::zeros((classes, row.cols), row.dtype, device)?;
    let mut out = None;
    let backward = Backward::of(|| {
        out = Some(table.kaio_embedding(&ids)?);
        Ok(())
    })?;
    let Some(rows) = out else { bail!("nothing was computed") };
    agree("the rows", &rows, &table.detach().index_select(&ids, 0)?, 1)?;
    check(row, &ids, &table, &upstream, &backward)?;
    drop(rows);

    let mut contest = Contest::default();
    match row.pass {
        Pass::Forward => {
            let (table, same) = (table.detach(), (table.detach(), ids.clone()));
            contest.add(OURS, move || table.kaio_embedding(&ids).map(drop));
            contest.add_if_able(CANDLE, move || same.0.index_select(&same.1, 0).map(drop));
        }
        Pass::Backward | Pass::Both => {
            let same = upstream.clone();
            contest.add(OURS, move || backward.run(&[Some(upstream.clone())]).map(drop));
            contest.add_if_able(CANDLE, move || zeros.index_add(&ids, &same, 0).map(drop));
        }
    }
    contest.add_copy(row.bytes(), device)?;
    Ok(contest)
}

/// Our gradient is what candle adds up, in f32, of the first columns.
fn check(
    row: &Row,
    ids: &Tensor,
    table: &Var,
    upstream: &Tensor,
    backward: &Backward,
) -> Result<()> {
    const COLS: usize = 64;
    let grads = backward.run(&[Some(upstream.clone())])?;
    let Some(Some(grad)) = grads.first() else { bail!("no gradient") };
    let few = upstream.narrow(1, 0, COLS)?.contiguous()?.to_dtype(DType::F32)?;
    let zeros = few.zeros_like()?.narrow(0, 0, 1)?.broadcast_as((table.dims()[0], COLS))?;
    let sums = zeros.contiguous()?.index_add(ids, &few, 0)?.to_dtype(row.dtype)?;
    let grad = grad.narrow(1, 0, COLS)?.contiguous()?;
    let of_ids = |t: &Tensor| t.index_select(ids, 0);
    agree("the gradient", &of_ids(&grad)?, &of_ids(&sums)?, row.rows)?;
    // Rows of the table without an id have zeros: all in a line, so that there is something to compare with.
    let line = |t: &Tensor| t.flatten_all()?.unsqueeze(0);
    agree("the gradient", &line(&grad)?, &line(&sums)?, row.rows)
}
