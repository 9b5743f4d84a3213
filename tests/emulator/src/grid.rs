//! Blocks, clusters, and whose turn it is.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::copies::CountedBarrier;
use crate::memory::Memory;
use crate::program::Program;
use crate::warp::{Turn, Warp};

/// A parameter's bytes, where a descriptor may lie.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Param(pub [u8; 128]);

/// A grid to be run.
pub struct Launch<'a> {
    pub program: &'a Program,
    pub params: Vec<Param>,
    pub memory: Memory,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

impl Launch<'_> {
    /// All blocks, on all cores. What went wrong first, if anything did.
    pub fn run(&self) -> Result<(), String> {
        let blocks: u32 = self.grid.iter().product();
        let next = AtomicU32::new(0);
        let failure = Mutex::new(None);
        let work = || {
            loop {
                let first = next.fetch_add(self.program.cluster, Ordering::Relaxed);
                if first >= blocks {
                    break;
                }
                let cluster = || Cluster::new(self, first).run();
                if let Err(what) = catch_unwind(AssertUnwindSafe(cluster)) {
                    let what = match what.downcast_ref::<&str>() {
                        Some(what) => what.to_string(),
                        None => what.downcast_ref().cloned().unwrap_or("a panic".into()),
                    };
                    failure.lock().expect("held for this line").get_or_insert(what);
                    next.store(blocks, Ordering::Relaxed);
                }
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = match self.program.waits_for_blocks() {
            true => blocks as usize,
            false => cores.min(blocks as usize),
        };
        std::thread::scope(|scope| (0..threads).for_each(|_| _ = scope.spawn(work)));
        failure.into_inner().expect("no thread is left").map_or(Ok(()), Err)
    }
}

/// A barrier that counts arrivals, and how often it has been passed.
#[derive(Clone, Default)]
pub struct Barrier {
    arrived: u32,
    passed: u64,
}

impl Barrier {
    /// Counts arrivals at a barrier of `all`; gives what [`opened`](Self::opened) wants to know.
    pub fn arrive(&mut self, arrivals: u32, all: u32) -> u64 {
        let before = self.passed;
        self.arrived += arrivals;
        assert!(self.arrived <= all, "{} arrivals at a barrier of {all}", self.arrived);
        if self.arrived == all {
            *self = Self { arrived: 0, passed: before + 1 };
        }
        before
    }

    pub fn opened(&self, since: u64) -> bool {
        self.passed > since
    }
}

/// A block's own.
pub struct Block {
    /// In x, y and z.
    pub at: [u32; 3],
    /// In its cluster.
    pub rank: u32,
    pub shared: Shared,
    /// Those of `bar`.
    pub barriers: [Barrier; 16],
    /// Where the four warps of a warpgroup meet for `wgmma`.
    pub meetings: Vec<Barrier>,
    /// Those of `mbarrier`, by their addresses.
    pub counted: HashMap<u32, CountedBarrier>,
}

/// Shared memory. Nothing lies at address 0.
pub struct Shared(Vec<u8>);

impl Shared {
    pub const BEGIN: u32 = 1024;

    fn place(&self, at: u32, bytes: usize) -> std::ops::Range<usize> {
        let begin = at.checked_sub(Self::BEGIN).unwrap_or(u32::MAX) as usize;
        let inside = begin + bytes <= self.0.len();
        assert!(inside, "{bytes} bytes at {at:#x} are not of the shared memory");
        begin..begin + bytes
    }

    pub fn slice(&self, at: u32, bytes: usize) -> &[u8] {
        &self.0[self.place(at, bytes)]
    }

    pub fn slice_mut(&mut self, at: u32, bytes: usize) -> &mut [u8] {
        let place = self.place(at, bytes);
        &mut self.0[place]
    }

    pub fn get(&self, at: u32, bytes: usize) -> u64 {
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(self.slice(at, bytes));
        u64::from_le_bytes(value)
    }

    pub fn set(&mut self, at: u32, bytes: usize, value: u64) {
        self.slice_mut(at, bytes).copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
}

/// Blocks that run together: one, where there are no clusters.
pub struct Cluster<'a> {
    pub launch: &'a Launch<'a>,
    pub blocks: Vec<Block>,
    /// `barrier.cluster`.
    pub barrier: Barrier,
}

/// `EMULATOR_SEED`: another number is another order of warps.
fn seed() -> u64 {
    let asked = std::env::var("EMULATOR_SEED").ok();
    asked.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Whose turn it is, and for how long.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

impl<'a> Cluster<'a> {
    fn new(launch: &'a Launch, first: u32) -> Self {
        let [x, y, _] = launch.grid;
        let block = |rank: u32| {
            let at = first + rank;
            Block {
                at: [at % x, at / x % y, at / (x * y)],
                rank,
                shared: Shared(vec![0xff; launch.shared as usize]),
                barriers: Default::default(),
                meetings: vec![Barrier::default(); launch.threads.div_ceil(128) as usize],
                counted: HashMap::new(),
            }
        };
        let blocks = (0..launch.program.cluster).map(block).collect();
        Self { launch, blocks, barrier: Barrier::default() }
    }

    /// The warps of all blocks.
    pub fn warps(&self) -> u32 {
        self.launch.program.cluster * self.launch.threads / 32
    }

    fn run(&mut self) {
        // A turn is of one to 512 instructions: where two must not be torn apart, a short one does it. After
        // one in 16 a warp is left out of up to 128 rounds, in which the others run ahead.
        const TURNS: usize = 10;
        const ABSENT: usize = 16;
        const ABSENCES: usize = 8;
        const PATIENCE: u32 = 300;
        let of_block = self.launch.threads / 32;
        let mut warps: Vec<_> = (0..self.warps())
            .map(|i| Warp::new((i / of_block) as usize, i % of_block, self.launch.program))
            .collect();
        let mut random = Random(u64::from(self.blocks[0].at[0]) + seed());
        let (mut running, mut idle): (Vec<usize>, _) = ((0..warps.len()).collect(), 0);
        let mut absent = vec![0u32; warps.len()];
        while !running.is_empty() {
            let mut steps = 0;
            for i in (1..running.len()).rev() {
                running.swap(i, random.below(i + 1));
            }
            for &warp in &running {
                if absent[warp] > 0 {
                    absent[warp] -= 1;
                    continue;
                }
                if random.below(ABSENT) == 0 {
                    absent[warp] = 1 << random.below(ABSENCES);
                }
                for _ in 0..1 << random.below(TURNS) {
                    match warps[warp].step(self) {
                        Turn::Went => steps += 1,
                        Turn::Jumped => {}
                        Turn::Waits | Turn::Ended => break,
                    }
                }
            }
            running.retain(|&warp| !warps[warp].ended());
            idle = if steps == 0 { idle + 1 } else { 0 };
            if idle > PATIENCE {
                let at: Vec<_> = running.iter().map(|&warp| warps[warp].place(self)).collect();
                panic!("nobody can go on:\n{}", at.join("\n"));
            }
        }
        for warp in &mut warps {
            warp.finish(self);
        }
        for block in &self.blocks {
            let tidy = block.barriers.iter().all(|barrier| barrier.arrived == 0);
            assert!(tidy, "at the end somebody waits at a barrier");
        }
    }
}
