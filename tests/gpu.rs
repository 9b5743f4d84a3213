//! The GPU suite: all suites on CUDA, and what only a GPU has.
//!
//! Without a GPU it says so and passes; with `KAIO_REQUIRE_GPU=1` it fails.
#![cfg(feature = "cuda")]

#[path = "gpu/bytes.rs"]
mod bytes;
#[path = "gpu/calls.rs"]
mod calls;
#[path = "../examples/custom_kernel.rs"]
mod custom_kernel;
#[path = "gpu/determinism.rs"]
mod determinism;
#[path = "gpu/engines.rs"]
mod engines;
#[path = "gpu/fragments.rs"]
mod fragments;
#[path = "gpu/graphs.rs"]
mod graphs;
#[path = "gpu/launches.rs"]
mod launches;
#[path = "gpu/limits.rs"]
mod limits;
#[path = "gpu/memory.rs"]
mod memory;
#[path = "gpu/parity.rs"]
mod parity;
#[path = "gpu/processes.rs"]
mod processes;
#[path = "gpu/registry.rs"]
mod registry;
#[path = "gpu/streams.rs"]
mod streams;
mod suites;
#[path = "suites/tables.rs"]
mod tables;
#[path = "gpu/threads.rs"]
mod threads;
#[path = "gpu/train.rs"]
mod train;
#[path = "gpu/w4.rs"]
mod w4;
#[path = "gpu/w8.rs"]
mod w8;
#[path = "gpu/work.rs"]
mod work;

use std::io::Write;
use std::sync::OnceLock;

use candle_core::Device;

/// Prints past the test harness's capture.
fn say(text: &str) {
    writeln!(std::io::stderr(), "{text}").expect("stderr is open");
}

/// The first GPU, or a loud skip.
fn gpu() -> Option<Device> {
    static GPU: OnceLock<Result<Device, String>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| Device::new_cuda(0).map_err(|e| e.to_string()));
    match gpu {
        Ok(device) => Some(device.clone()),
        Err(why) => {
            let required = std::env::var("KAIO_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(!required, "KAIO_REQUIRE_GPU=1, but there is no GPU: {why}");
            say(&format!("SKIPPED, no GPU: {why}"));
            None
        }
    }
}

/// What the suites run on.
fn device() -> Option<Device> {
    gpu()
}

/// Devices whose tensors no call takes beside [`device`]'s.
fn other_devices() -> Vec<Device> {
    [Some(Device::Cpu), second_gpu()].into_iter().flatten().collect()
}

/// The second GPU, where there is one.
fn second_gpu() -> Option<Device> {
    let device = Device::new_cuda(1).ok();
    if device.is_none() {
        say("does not apply: a test of two GPUs, there is no second one");
    }
    device
}
