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
pub struct Launches {
    all: Vec<Launch>,
    short: bool,
}

/// One of them.
pub struct Launch {
    pub function: Arc<Function>,
    pub grid: [u32; 3],
    pub args: Args,
}

impl Launches {
    /// One more, after the others.
    pub fn add(&mut self, function: Arc<Function>, grid: [u32; 3], args: Args) {
        self.all.push(Launch { function, grid, args });
    }

    /// They take the GPU less time than the host.
    pub fn are_short(&mut self) {
        self.short = true;
    }

    /// Submits all to the device's stream, and returns at once: as one graph where that is worth it.
    ///
    /// # Safety
    ///
    /// That of [`Function::launch`], for each.
    pub unsafe fn submit(&self, op: &'static str, device: &CudaDevice) -> Result<()> {
        // SAFETY: the caller's promise.
        if unsafe { chain::submit(op, device, &self.all, self.short)? } {
            return Ok(());
        }
        for Launch { function, grid, args } in &self.all {
            // SAFETY: the caller's promise.
            unsafe { function.submit(op, device, *grid, args)? };
        }
        Ok(())
    }
}
