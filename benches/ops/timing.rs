//! Times of contestants that take turns.

use std::time::Instant;

use candle_core::{Device, Result};

use super::turns::{Contestant, median, take_turns};

pub struct Timing {
    /// From start to end of the work: device events on a GPU, the clock on the CPU.
    pub total_us: f64,
    /// Until the call returned: the fastest round, because interruptions only ever add.
    pub host_us: f64,
}

/// Times over `rounds` rounds.
pub fn contest(
    device: &Device,
    contestants: &mut [Contestant],
    rounds: usize,
) -> Result<Vec<Timing>> {
    let samples = take_turns(contestants, rounds, |run| once(device, run))?;
    let timing = |samples: Vec<(f64, f64)>| {
        let (total, host): (Vec<f64>, Vec<f64>) = samples.into_iter().unzip();
        Timing { total_us: median(total), host_us: host.into_iter().fold(f64::INFINITY, f64::min) }
    };
    Ok(samples.into_iter().map(timing).collect())
}

fn once(device: &Device, run: &mut dyn FnMut() -> Result<()>) -> Result<(f64, f64)> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
            let stream = cuda.cuda_stream();
            let event =
                || stream.record_event(Some(CU_EVENT_DEFAULT)).map_err(candle_core::Error::wrap);
            device.synchronize()?;
            let (start, clock) = (event()?, Instant::now());
            run()?;
            let (host, end) = (clock.elapsed(), event()?);
            device.synchronize()?;
            let total = start.elapsed_ms(&end).map_err(candle_core::Error::wrap)?;
            Ok((f64::from(total) * 1e3, host.as_secs_f64() * 1e6))
        }
        _ => {
            let clock = Instant::now();
            run()?;
            let us = clock.elapsed().as_secs_f64() * 1e6;
            Ok((us, us))
        }
    }
}
