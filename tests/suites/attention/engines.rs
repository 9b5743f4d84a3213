//! Results and gradients by each engine.

use candle_core::{DType, Device, Result, Var, bail};
use kaio_candle::prelude::*;

use super::options::Lengths::{Packed, Padded};
use super::options::{Bias, Options, Slopes};
use super::{SMALL, Sizes, each};
use crate::suites::Tally;

/// What each engine takes, it computes as all others, and differentiates if it has a backward pass; what it
/// cannot take, it refuses.
pub fn engines(device: &Device) {
    let padded = Padded([None, Some(vec![140, 31])]);
    let packed = Packed([vec![0, 70, 70, 150], vec![0, 64, 90, 161]]);
    let options = [
        Options::default(),
        Options::causal(),
        Options { scale: Some(0.3), bshd: true, wide: true, ..Options::default() },
        Options { left: Some(40), softcap: Some(1.5), ..Options::causal() },
        Options { slopes: Some(Slopes::ByHead), ..Options::causal() },
        Options { bias: Some(Bias { hides: true, ..Bias::default() }), ..Options::default() },
    ];
    let sizes: [Sizes; 4] = [
        SMALL,
        (&[2, 4], 2, [150, 140, 64, 64]),
        (&[1, 2], 2, [70, 200, 128, 128]),
        (&[1, 4], 1, [1, 300, 64, 64]),
    ];
    let lengths = Options { lengths: padded, ..Options::causal() };
    let sequences = Options { lengths: packed, bshd: true, ..Options::causal() };
    // The CPU path is one for all engines.
    let sizes = if device.is_cpu() { &sizes[..1] } else { &sizes[..] };
    let problems = [
        each(sizes, &options),
        each(&[(&[2, 4], 2, [50, 140, 16, 16])], &[lengths]),
        each(&[(&[4], 2, [150, 161, 16, 16])], &[sequences]),
    ];
    for engine in [Engine::Auto, Engine::Native, Engine::KaioOps] {
        let mut tally = Tally::new("flash_attn engines", device);
        let forward_alone = device.is_cuda() && engine == Engine::KaioOps;
        for problem in problems.iter().flatten() {
            let problem = match forward_alone {
                true => problem.clone().untracked(),
                false => problem.clone(),
            };
            tally.case(format!("{engine:?}: {problem:?}"), || problem.check_by(engine, device));
        }
        if forward_alone {
            tally.case(format!("{engine:?}: a tracked input"), || refuses(engine, device));
        }
        tally.finish();
    }
}

/// A tracked input is refused by the call, not by the backward pass, and never frozen.
fn refuses(engine: Engine, device: &Device) -> Result<()> {
    let q = Var::zeros((4, 8), DType::F32, device)?;
    let opts = FlashAttnOptions::default().engine(engine);
    match q.kaio_flash_attn_with(&q, &q, &opts) {
        Ok(_) => bail!("{engine:?} took a tracked input"),
        Err(error) => {
            let want = format!(
                "kaio_flash_attn_with: Engine::{engine:?} has no backward pass of attention, and an input \
                 tracks a gradient; leave the engine to `Engine::Auto`, which has one, or `.detach()` the \
                 inputs"
            );
            assert_eq!(error.to_string(), want);
            Ok(())
        }
    }
}
