//! Launches that follow each other.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::CudaDevice;

use super::args::Args;
use super::chain;
use super::function::Function;
use crate::error::Result;

/// Launches in their order, which are submitted together.
#[derive(Default)]
#[must_use]
pub struct Launches(Vec<Launch>);

/// One of them.
pub struct Launch {
    pub function: Arc<Function>,
    pub grid: [u32; 3],
    pub args: Args,
}

impl Launches {
    /// One more, after the others.
    pub fn add(&mut self, function: Arc<Function>, grid: [u32; 3], args: Args) {
        self.0.push(Launch { function, grid, args });
    }

    /// Submits all to the device's stream, and returns at once: as one graph where that is quicker for the host.
    ///
    /// # Safety
    ///
    /// That of [`Function::launch`], for each.
    pub unsafe fn submit(&self, op: &'static str, device: &CudaDevice) -> Result<()> {
        // SAFETY: the caller's promise.
        if unsafe { chain::submit(op, device, &self.0)? } {
            return Ok(());
        }
        for Launch { function, grid, args } in &self.0 {
            // SAFETY: the caller's promise.
            unsafe { function.submit(op, device, *grid, args)? };
        }
        Ok(())
    }
}
