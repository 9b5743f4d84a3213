//! What is kept: through a file and back, and how much it is.

use candle_core::DType::{BF16, F16, F32};
use candle_core::{Device, Result, Tensor, Var, bail, safetensors};
use kaio_candle::train::{AdamW, AdamWConfig, Moments, Schedule};

use super::inputs::{gradients, store, vars};
use crate::suites::{Nd, Source, Tally, identical};

/// A run from a file of its state ends in the bits of one that went on.
pub fn resume(device: &Device) {
    let mut tally = Tally::new("adamw resume", device);
    for dtype in [F32, BF16, F16] {
        for moments in [Moments::F32, Moments::Bits8] {
            let case = format!("{dtype:?} {moments:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let ours = vars(source, dtype)?;
                let config = AdamWConfig::default().moments(moments).clip_norm(1.0);
                let config = config.schedule(Schedule::linear(9).warm_up(2));
                let mut adamw = AdamW::named(ours.clone(), config.clone())?;
                let grads = (0..7).map(|_| gradients(source, dtype)).collect::<Result<Vec<_>>>()?;
                for grads in &grads[..4] {
                    adamw.step(&store(&ours, grads))?;
                }
                let mut all = adamw.state()?;
                for (name, var) in &ours {
                    all.insert(name.clone(), var.as_detached_tensor());
                }
                let name = format!("kaio-adamw-{}-{dtype:?}-{moments:?}", std::process::id());
                let path = std::env::temp_dir().join(name);
                safetensors::save(&all, &path)?;
                let loaded = safetensors::load(&path, device);
                std::fs::remove_file(&path)?;
                let loaded = loaded?;

                let fresh = |(name, _): &(String, Var)| {
                    Ok((name.clone(), Var::from_tensor(&loaded[name])?))
                };
                let resumed = ours.iter().map(fresh).collect::<Result<Vec<_>>>()?;
                let mut other = AdamW::named(resumed.clone(), config)?;
                other.set_state(&loaded)?;
                for grads in &grads[4..] {
                    adamw.step(&store(&ours, grads))?;
                    other.step(&store(&resumed, grads))?;
                }
                if other.steps() != 7 || other.learning_rate() != adamw.learning_rate() {
                    bail!("{other:?} beside {adamw:?}");
                }
                for ((name, var), (_, resumed)) in ours.iter().zip(&resumed) {
                    identical(name, resumed, &Nd::of(var)?)?;
                }
                let (state, of_other) = (adamw.state()?, other.state()?);
                if state.len() != of_other.len() {
                    bail!("{} tensors, {} after a resumed run", state.len(), of_other.len());
                }
                for (name, want) in &state {
                    identical(name, &of_other[name], &Nd::of(want)?)?;
                }
                Ok(())
            });
        }
    }
    tally.finish();
}

/// What the documentation says that an element takes.
pub fn kept_bytes(device: &Device) {
    let mut tally = Tally::new("adamw bytes", device);
    let len = 1 << 14;
    for (dtype, moments, want) in [
        (F32, Moments::F32, 8 * len),
        (BF16, Moments::F32, 12 * len),
        // Codes, and two scales for each 256.
        (F32, Moments::Bits8, 2 * len + 2 * 4 * len / 256),
        (BF16, Moments::Bits8, 6 * len + 2 * 4 * len / 256),
    ] {
        tally.case(format!("{dtype:?} {moments:?}"), || {
            let var = Var::zeros(len, dtype, device)?;
            let config = AdamWConfig::default().moments(moments);
            let mut adamw = AdamW::new(vec![var.clone()], config)?;
            let grads = || -> Result<_> {
                let mut grads = candle_core::backprop::GradStore::default();
                grads.insert(&var, Tensor::zeros(len, dtype, device)?);
                Ok(grads)
            };
            adamw.step(&grads()?)?;
            let without = adamw.bytes();
            adamw.accumulate(&grads()?)?;
            match (without, adamw.bytes()) == (want, want + 4 * len) {
                true => Ok(()),
                false => bail!("{without}, {} with sums; wanted {want}", adamw.bytes()),
            }
        });
    }
    tally.finish();
}
