//! The same bits whenever work is done again.

use candle_core::bail;

use super::streams::bits;
use super::suites::{Tally, poison};
use super::{gpu, work};

/// The same bits on every run, wherever the allocator puts inputs and result.
#[test]
fn runs_are_identical() {
    let Some(gpu) = gpu() else { return };
    let mut tally = Tally::new("native run to run", &gpu);
    let attentions = work::attentions().chain(work::gradients());
    for work in work::products("repeated", 200, 500, 500).chain(attentions) {
        tally.case(&work.name, || {
            let first = bits(&work.call(&gpu)?()?);
            for run in 1..5 {
                poison(&gpu, first.len() + run * 1000);
                let again = bits(&work.call(&gpu)?()?);
                if let Some(i) = first.iter().zip(&again).position(|(a, b)| a != b) {
                    bail!("element {i} differs in run {run}");
                }
            }
            Ok(())
        });
    }
    tally.finish();
}
