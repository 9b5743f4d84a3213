//! The GPU's memory: host memory, of which is known where something was allocated.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};

/// As `cudaMalloc` aligns.
const ALIGN: usize = 512;

/// Beginnings and lengths.
type Regions = BTreeMap<u64, usize>;

/// Copied when it changes, so that a grid reads it without a lock.
static REGIONS: RwLock<Option<Arc<Regions>>> = RwLock::new(None);

/// Bytes in use, and at most so far.
static USED: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes.max(1), ALIGN).expect("a size that fits")
}

fn change(change: impl FnOnce(&mut Regions)) {
    let mut regions = REGIONS.write().expect("nothing panics with it");
    change(Arc::make_mut(regions.get_or_insert_default()));
}

/// Memory full of NaN.
pub fn allocate(bytes: usize) -> u64 {
    // SAFETY: the size is not 0.
    let at = unsafe { alloc(layout(bytes)) };
    assert!(!at.is_null(), "out of memory");
    // SAFETY: just allocated.
    unsafe { at.write_bytes(0xff, bytes) };
    change(|regions| _ = regions.insert(at as u64, bytes));
    let used = USED.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST.fetch_max(used, Ordering::Relaxed);
    at as u64
}

/// Bytes in use now, and at most since the last [`forget_most`].
pub fn used() -> [usize; 2] {
    [&USED, &MOST].map(|bytes| bytes.load(Ordering::Relaxed))
}

pub fn forget_most() {
    MOST.store(USED.load(Ordering::Relaxed), Ordering::Relaxed);
}

pub fn free(at: u64) {
    change(|regions| {
        let bytes = regions.remove(&at).expect("it was allocated");
        USED.fetch_sub(bytes, Ordering::Relaxed);
        // SAFETY: allocated with this layout, and now forgotten.
        unsafe { dealloc(at as *mut u8, layout(bytes)) };
    });
}

/// What was allocated when a grid began.
#[derive(Clone)]
pub struct Memory(Arc<Regions>);

impl Memory {
    pub fn now() -> Self {
        Self(REGIONS.read().expect("nothing panics with it").clone().unwrap_or_default())
    }

    /// Panics unless all of it lies in one allocation.
    pub fn check(&self, at: u64, bytes: usize) {
        let before = self.0.range(..=at).next_back();
        let inside = before.is_some_and(|(begin, len)| at + bytes as u64 <= begin + *len as u64);
        assert!(
            inside,
            "{bytes} bytes at {at:#x} are not allocated; what begins before them are {} bytes {} before",
            before.map_or(0, |(_, len)| *len),
            before.map_or(0, |(begin, _)| at - begin),
        );
    }

    pub fn slice(&self, at: u64, bytes: usize) -> &[u8] {
        self.check(at, bytes);
        // SAFETY: inside an allocation, which nobody frees while a grid runs. A block that reads what
        // another writes meanwhile is a defect of the kernel's.
        unsafe { std::slice::from_raw_parts(at as *const u8, bytes) }
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.check(at, bytes.len());
        // SAFETY: as above.
        unsafe { (at as *mut u8).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    /// Up to 8 bytes as a number.
    pub fn get(&self, at: u64, bytes: usize) -> u64 {
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(self.slice(at, bytes));
        u64::from_le_bytes(value)
    }

    /// Adds to a float, as other blocks may do meanwhile.
    pub fn add(&self, at: u64, more: f32) {
        let add = |bits| Some((f32::from_bits(bits) + more).to_bits());
        _ = self.count(at).fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Four bytes that several blocks write.
    pub fn count(&self, at: u64) -> &AtomicU32 {
        self.check(at, 4);
        assert!(at.is_multiple_of(4));
        // SAFETY: aligned, inside an allocation, which nobody frees while a grid runs.
        unsafe { AtomicU32::from_ptr(at as *mut u32) }
    }

    pub fn set(&self, at: u64, bytes: usize, value: u64) {
        self.put(at, &value.to_le_bytes()[..bytes]);
    }
}
