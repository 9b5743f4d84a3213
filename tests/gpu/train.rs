//! The optimizer among streams and in memory.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Var};
use kaio_candle::train::{AdamW, AdamWConfig};

use super::suites::{Layout, Source, results_alone, train};
use super::{gpu, streams::bits};

#[test]
fn train_on_an_own_stream() -> Result<()> {
    if gpu().is_none() {
        return Ok(());
    }
    let own = Device::new_cuda_with_stream(0)?;
    train::layouts(&own);
    train::sixteen_bits(&own);
    train::clipped_steps(&own);
    train::accumulation(&own);
    Ok(())
}

/// Gradients that another stream of the GPU still writes, of variables that a third one reads at once: each step is
/// that of a single stream.
#[test]
fn train_across_streams() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let run = |of_vars: &Device, of_grads: &Device| -> Result<Vec<u32>> {
        let len = if results_alone() { 1 << 15 } else { 1 << 20 };
        let source = &mut Source::new("streams", &Device::Cpu);
        let values = source.tensor(DType::F32, &[len], Layout::Plain)?;
        let var = Var::from_tensor(&values.to_device(of_vars)?)?;
        let grad = values.to_device(of_grads)?;
        let mut adamw = AdamW::new(vec![var.clone()], AdamWConfig::default().clip_norm(1.0))?;
        let mut seen = Vec::new();
        for step in 0..8 {
            let mut grads = GradStore::default();
            // Another one in each step.
            let late = (0..=step).try_fold(grad.clone(), |late, _| &late + &grad)?;
            grads.insert(&var, late);
            adamw.step(&grads)?;
            seen.push((var.as_tensor() + var.as_tensor())?);
        }
        Ok(seen.iter().flat_map(bits).collect())
    };
    let want = run(&gpu, &gpu)?;
    for _ in 0..4 {
        let (one, other) = (Device::new_cuda_with_stream(0)?, Device::new_cuda_with_stream(0)?);
        assert!(run(&one, &other)? == want, "streams of their own");
        assert!(run(&gpu, &other)? == want, "gradients of a stream of their own");
        assert!(run(&one, &gpu)? == want, "variables of a stream of their own");
    }
    Ok(())
}
