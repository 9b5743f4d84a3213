//! The order of an engine's work with that of the candle devices whose tensors it reads.

use std::sync::Arc;

use candle_core::{CudaStorage, Result};
use cudarc::driver::{CudaStream, DriverError};

use crate::error::Error;

/// The stream that an engine works on, and those of its inputs that have to be ordered with it.
///
/// Inputs of one ordinal may belong to several candle devices, each with a stream of its own. Their
/// order is made on the device; the host never waits.
pub struct Order {
    op: &'static str,
    stream: Arc<CudaStream>,
    others: Vec<Arc<CudaStream>>,
}

impl Order {
    /// Of an engine that works on `stream`.
    pub fn new<'a>(
        op: &'static str,
        stream: Arc<CudaStream>,
        inputs: impl IntoIterator<Item = &'a CudaStorage>,
    ) -> Self {
        let mut others: Vec<Arc<CudaStream>> = Vec::new();
        for input in inputs {
            let other = input.device.cuda_stream();
            let known = others.iter().any(|known| known.cu_stream() == other.cu_stream());
            if !known && !ordered_by_driver(&stream, &other) {
                others.push(other);
            }
        }
        Self { op, stream, others }
    }

    /// Submits work after what was submitted to all streams, and before what will be.
    pub fn run(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let driver = |e: DriverError| Error::Driver { op: self.op, message: e.to_string() };
        for other in &self.others {
            self.stream.join(other).map_err(driver)?;
        }
        let result = work();
        // Also after a failure: some of the work may run.
        let mut joined = Ok(());
        for other in &self.others {
            joined = joined.and(other.join(&self.stream));
        }
        if joined.is_err() {
            // Nothing may be freed under a kernel. The error below is the one to report.
            let _ = self.stream.synchronize();
        }
        result?;
        Ok(joined.map_err(driver)?)
    }
}

/// Whether each of two streams of a GPU waits for the other by definition: they are one, or one is the
/// legacy default stream and the other not "non-blocking", as all are that `cuStreamCreate` makes for
/// candle. (The per-thread default stream is candle's choice, the legacy one kaio's.)
fn ordered_by_driver(a: &CudaStream, b: &CudaStream) -> bool {
    const PER_THREAD: usize = 2;
    let [a, b] = [a, b].map(|stream| stream.cu_stream() as usize);
    let (least, most) = (a.min(b), a.max(b));
    // The legacy default stream is 0 or 1.
    a == b || (least < PER_THREAD && most <= PER_THREAD)
}
