//! How often the driver was asked for what takes the host's time: tests count what a call of an op costs.

use std::sync::atomic::{AtomicU64, Ordering};

/// What is counted.
#[derive(Clone, Copy)]
pub enum Call {
    Allocation,
    Launch,
    /// Copies and fills.
    Copy,
    /// A byte that is copied to the host.
    ByteToHost,
}

const KINDS: usize = 4;

static COUNTS: [AtomicU64; KINDS] = [const { AtomicU64::new(0) }; KINDS];

pub fn count(call: Call) {
    add(call, 1);
}

pub fn add(call: Call, many: usize) {
    COUNTS[call as usize].fetch_add(many as u64, Ordering::Relaxed);
}

/// The counts so far, in the order of [`Call`]. No driver has this function, so that a test knows where it is.
///
/// # Safety
/// The caller's pointer can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emulator_calls(counts: *mut [u64; KINDS]) {
    // SAFETY: the caller's promise.
    unsafe { counts.write(COUNTS.each_ref().map(|count| count.load(Ordering::Relaxed))) };
}
