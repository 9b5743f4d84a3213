//! The engines beside one another, on the same problems.

use kaio_candle::prelude::*;

use super::gpu;
use super::suites::Tally;
use super::suites::matmul::Case;

/// Both engines keep to the same bound around the same sums.
#[test]
fn engines_agree() {
    let Some(gpu) = gpu() else { return };
    let mut tally = Tally::new("native and kaio-ops", &gpu);
    for i in 0..200 {
        let case = Case::random("engines", i, 300, 300);
        let engines = [Engine::Native, Engine::KaioOps, Engine::Auto];
        tally.case(format!("{case:?}"), || case.check(&gpu, &engines));
    }
    tally.finish();
}
