//! TMA, `cp.async`, and the barriers that count their bytes.

use std::collections::VecDeque;

use crate::grid::{Block, Shared};
use crate::memory::Memory;

/// A descriptor: what the driver writes in place of the 128 bytes that a GPU reads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Map {
    pub mark: u64,
    pub base: u64,
    /// In elements, innermost first.
    pub dims: [u64; 5],
    /// In bytes, from the second dimension on.
    pub strides: [u64; 4],
    pub boxed: [u32; 5],
    pub rank: u8,
    /// Bytes of an element.
    pub size: u8,
    /// Bytes of a line of a box, over which it is swizzled.
    pub line: u16,
}

impl Map {
    pub const MARK: u64 = 0x7e11_5a30_11ad_d1e5;

    /// The descriptor at an address of a kernel's parameters.
    pub fn at(address: u64) -> Self {
        assert!(address != 0 && address.is_multiple_of(64), "no descriptor is at {address:#x}");
        // SAFETY: kernels of the writer take addresses of descriptors from their parameters only, which
        // live as long as the launch; anything is a valid value, and the mark says whether it is one.
        let map = unsafe { (address as *const Self).read() };
        assert_eq!(map.mark, Self::MARK, "no descriptor is at {address:#x}");
        map
    }

    fn line(&self) -> u32 {
        self.line.into()
    }

    fn boxed(&self) -> &[u32] {
        &self.boxed[..self.rank.into()]
    }

    /// Bytes of a box.
    fn bytes(&self) -> u32 {
        assert_eq!(self.boxed[0] * u32::from(self.size), self.line(), "a line of a box");
        self.boxed()[1..].iter().product::<u32>() * self.line()
    }

    /// The lines of the box at these elements that begin inside of the tensor: where they lie in the box
    /// before the swizzle, the bytes of a line that lie in the tensor, and where the first of them is.
    fn lines(&self, at: &[i64]) -> Vec<(u32, std::ops::Range<u32>, u64)> {
        assert_eq!(at.len(), self.boxed().len(), "coordinates");
        let size = i64::from(self.size);
        let columns = 0..self.dims[0] as i64;
        let inside = at[0].max(columns.start)..(at[0] + i64::from(self.boxed[0])).min(columns.end);
        let bytes = inside.start - at[0]..inside.end - at[0];
        let bytes = (bytes.start * size) as u32..(bytes.end * size).max(0) as u32;
        let line = |line: u32| {
            let (mut rest, mut address) = (line, self.base as i64 + inside.start * size);
            for (i, &at) in at.iter().enumerate().skip(1) {
                let place = at + i64::from(rest % self.boxed[i]);
                rest /= self.boxed[i];
                address += place * self.strides[i - 1] as i64;
                if !(0..self.dims[i] as i64).contains(&place) {
                    return None;
                }
            }
            Some((line * self.line(), bytes.clone(), address as u64))
        };
        (0..self.bytes() / self.line()).filter_map(line).collect()
    }
}

/// Where a byte of a box of lines of 128 bytes lies: bits 4 to 6 of an address are XORed with bits 7 to 9.
pub fn swizzled(at: u32) -> u32 {
    swizzled_over(128, at)
}

/// Of lines of so many bytes: of 64, bits 4 and 5 with bits 7 and 8.
fn swizzled_over(line: u32, at: u32) -> u32 {
    at ^ (at >> 3 & (line - 16))
}

/// A box on its way.
#[derive(Clone)]
pub struct Transfer {
    pub map: Map,
    pub shared: u32,
    pub at: Vec<i64>,
}

impl Transfer {
    /// What lies in the tensor, in pieces that the swizzle leaves whole: where each is in shared memory and
    /// in the GPU's, and its bytes.
    fn pieces(&self) -> Vec<(u32, u64, usize)> {
        const UNIT: u32 = 16;
        let mut pieces = vec![];
        for (line, bytes, mut address) in self.map.lines(&self.at) {
            let mut byte = bytes.start;
            while byte < bytes.end {
                let next = (byte / UNIT * UNIT + UNIT).min(bytes.end);
                let place = swizzled_over(self.map.line(), self.shared + line + byte);
                pieces.push((place, address, (next - byte) as usize));
                address += u64::from(next - byte);
                byte = next;
            }
        }
        pieces
    }

    fn poison(&self, shared: &mut Shared) {
        (0..self.map.bytes())
            .step_by(8)
            .for_each(|byte| shared.set(self.shared + byte, 8, u64::MAX));
    }

    /// What is outside of the tensor is 0.
    fn load(&self, shared: &mut Shared, memory: &Memory) {
        (0..self.map.bytes()).step_by(8).for_each(|byte| shared.set(self.shared + byte, 8, 0));
        for (to, from, bytes) in self.pieces() {
            shared.slice_mut(to, bytes).copy_from_slice(memory.slice(from, bytes));
        }
    }

    fn store(&self, shared: &Shared, memory: &Memory) {
        for (from, to, bytes) in self.pieces() {
            memory.put(to, shared.slice(from, bytes));
        }
    }
}

/// The box is of f32.
fn add_box(transfer: &Transfer, shared: &Shared, memory: &Memory) {
    assert_eq!(transfer.map.size, 4, "sums of f32");
    for (from, to, bytes) in transfer.pieces() {
        for at in (0..bytes as u32).step_by(4) {
            let more = f32::from_bits(shared.get(from + at, 4) as u32);
            memory.add(to + u64::from(at), more);
        }
    }
}

/// What goes to shared memory, and counts at a barrier.
#[derive(Clone)]
pub enum Load {
    /// A box.
    Box(Transfer),
    /// Bytes that follow each other.
    Bytes { to: u32, from: u64, bytes: u32 },
    /// A register of a thread of the cluster.
    Value { to: u32, value: u64, bytes: u32 },
}

impl Load {
    fn bytes(&self) -> u32 {
        match self {
            Self::Box(transfer) => transfer.map.bytes(),
            Self::Bytes { bytes, .. } | Self::Value { bytes, .. } => *bytes,
        }
    }

    /// What it leaves until it is waited for.
    pub fn poison(&self, shared: &mut Shared) {
        match self {
            Self::Box(transfer) => transfer.poison(shared),
            &Self::Bytes { to, bytes, .. } | &Self::Value { to, bytes, .. } => {
                shared.slice_mut(to, bytes as usize).fill(u8::MAX);
            }
        }
    }

    fn run(&self, shared: &mut Shared, memory: &Memory) {
        match self {
            Self::Box(transfer) => transfer.load(shared, memory),
            &Self::Bytes { to, from, bytes } => {
                let bytes = bytes as usize;
                shared.slice_mut(to, bytes).copy_from_slice(memory.slice(from, bytes));
            }
            &Self::Value { to, value, bytes } => shared.set(to, bytes as usize, value),
        }
    }
}

/// What goes from shared memory to the GPU's.
#[derive(Clone)]
pub enum Store {
    /// A box.
    Box(Transfer),
    /// A box of floats that are added to others.
    BoxSum(Transfer),
    /// Floats that are added to others.
    Sum(Sum),
}

/// `bytes` bytes of floats.
#[derive(Clone, Copy)]
pub struct Sum {
    pub to: u64,
    pub from: u32,
    pub bytes: u32,
}

impl Sum {
    fn add(self, shared: &Shared, memory: &Memory) {
        let Self { to, from, bytes } = self;
        assert!(to.is_multiple_of(16) && from.is_multiple_of(16) && bytes.is_multiple_of(16));
        for at in (0..bytes).step_by(4) {
            let more = f32::from_bits(shared.get(from + at, 4) as u32);
            memory.add(to + u64::from(at), more);
        }
    }
}

impl Store {
    fn run(&self, shared: &Shared, memory: &Memory) {
        match self {
            Self::Box(transfer) => transfer.store(shared, memory),
            Self::BoxSum(transfer) => add_box(transfer, shared, memory),
            Self::Sum(sum) => sum.add(shared, memory),
        }
    }
}

/// An `mbarrier`.
pub struct CountedBarrier {
    expected: u32,
    pending: u32,
    /// Those that are still to come.
    bytes: i64,
    passed: u32,
    /// What will bring them.
    pub loads: Vec<Load>,
}

impl CountedBarrier {
    pub fn new(expected: u32) -> Self {
        Self { expected, pending: expected, bytes: 0, passed: 0, loads: vec![] }
    }

    pub fn arrive(&mut self, bytes: u32) {
        assert!(self.pending > 0, "more than {} arrivals", self.expected);
        self.pending -= 1;
        self.bytes += i64::from(bytes);
        self.turn();
    }

    fn turn(&mut self) {
        if self.pending == 0 && self.bytes == 0 && self.loads.is_empty() {
            self.pending = self.expected;
            self.passed += 1;
        }
    }

    /// Whether the phase of a parity is over. Its bytes come when all are on their way, and not before they
    /// are waited for.
    pub fn passed(&mut self, parity: u32, shared: &mut Shared, memory: &Memory) -> bool {
        let coming: i64 = self.loads.iter().map(|load| i64::from(load.bytes())).sum();
        assert!(self.pending > 0 || coming <= self.bytes, "more bytes than were expected");
        if self.pending == 0 && coming == self.bytes && self.passed % 2 == parity {
            self.loads.drain(..).for_each(|load| load.run(shared, memory));
            self.bytes = 0;
            self.turn();
        }
        self.passed % 2 != parity
    }
}

/// `size` bytes of `cp.async`, 16 or 4, of which some are read and the others 0.
#[derive(Clone, Copy)]
pub struct Copy {
    pub to: u32,
    pub from: u64,
    pub size: u32,
    pub bytes: u32,
}

impl Copy {
    pub fn poison(self, shared: &mut Shared) {
        shared.slice_mut(self.to, self.size as usize).fill(u8::MAX);
    }

    fn run(self, shared: &mut Shared, memory: &Memory) {
        let to = shared.slice_mut(self.to, self.size as usize);
        let (read, rest) = to.split_at_mut(self.bytes as usize);
        if !read.is_empty() {
            read.copy_from_slice(memory.slice(self.from, read.len()));
        }
        rest.fill(0);
    }
}

/// Things begun, in groups.
#[derive(Clone)]
pub struct Groups<T> {
    begun: Vec<T>,
    groups: VecDeque<Vec<T>>,
}

impl<T> Default for Groups<T> {
    fn default() -> Self {
        Self { begun: vec![], groups: VecDeque::new() }
    }
}

impl<T> Groups<T> {
    pub fn begin(&mut self, what: T) {
        self.begun.push(what);
    }

    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.begun));
    }

    /// What has to be done before no more than `pending` groups are under way.
    pub fn wait(&mut self, pending: usize) -> Vec<T> {
        let over = self.groups.len().saturating_sub(pending);
        self.groups.drain(..over).flatten().collect()
    }

    pub fn is_done(&self) -> bool {
        self.begun.is_empty() && self.groups.iter().all(Vec::is_empty)
    }
}

/// What a lane has begun.
#[derive(Clone, Default)]
pub struct Begun {
    pub stores: Groups<Store>,
    pub copies: Groups<Copy>,
}

impl Begun {
    pub fn wait_for_stores(&mut self, pending: usize, block: &Block, memory: &Memory) {
        self.stores.wait(pending).iter().for_each(|store| store.run(&block.shared, memory));
    }

    pub fn wait_for_copies(&mut self, pending: usize, block: &mut Block, memory: &Memory) {
        for copy in self.copies.wait(pending) {
            copy.run(&mut block.shared, memory);
        }
    }
}
