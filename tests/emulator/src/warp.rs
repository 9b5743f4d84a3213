//! One instruction of a warp.

use std::sync::atomic::Ordering;

use crate::copies::{Begun, Copy, CountedBarrier, Groups, Load, Map, Store, Sum, Transfer};
use crate::grid::{Block, Cluster, Shared};
use crate::program::{Instruction, Op, Operand, Program, Shuffle, Space, Special};
use crate::tensor_cores::{Product, list};

pub const LANES: usize = 32;

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Went,
    /// To another place: all that a loop does which waits.
    Jumped,
    /// For another warp.
    Waits,
    Ended,
}

/// 32 lanes, each with a place in the program. Those that are furthest behind go first, so that they come
/// together again where their ways meet.
pub struct Warp {
    /// In its cluster.
    block: usize,
    /// In its block.
    pub number: u32,
    places: [usize; LANES],
    /// Whether these are known to be one.
    together: bool,
    ended: Lanes,
    registers: Vec<[u64; LANES]>,
    /// The barrier that it has come to and not left, and when that was.
    at_barrier: Option<u64>,
    at_cluster: Option<u64>,
    at_meeting: Option<u64>,
    pub products: Groups<Product>,
    begun: Vec<Begun>,
}

impl Warp {
    pub fn new(block: usize, number: u32, program: &Program) -> Self {
        Self {
            block,
            number,
            places: [0; LANES],
            together: true,
            ended: Lanes(0),
            registers: program.registers.iter().map(|&first| [first; LANES]).collect(),
            at_barrier: None,
            at_cluster: None,
            at_meeting: None,
            products: Groups::default(),
            begun: vec![Begun::default(); LANES],
        }
    }

    pub fn ended(&self) -> bool {
        self.ended == Lanes::ALL
    }

    fn running(&self) -> impl Iterator<Item = usize> + '_ {
        Lanes(!self.ended.0).iter()
    }

    /// Where it is, for a message.
    pub fn place(&self, cluster: &Cluster) -> String {
        let lane = self.running().min_by_key(|&lane| self.places[lane]).expect("it runs");
        let text = &cluster.launch.program.instructions[self.places[lane]].text;
        format!(
            "block {:?} warp {} lane {lane}: {text}",
            cluster.blocks[self.block].at, self.number
        )
    }

    /// Nothing may be under way at the end but stores, which nobody has to wait for.
    pub fn finish(&mut self, cluster: &Cluster) {
        let block = &cluster.blocks[self.block];
        for begun in &mut self.begun {
            begun.wait_for_stores(0, block, &cluster.launch.memory);
            assert!(begun.stores.is_done(), "at the end stores are not committed");
            assert!(begun.copies.is_done(), "at the end copies are under way");
        }
        assert!(self.products.is_done(), "at the end wgmma is under way");
    }

    /// The value of an operand for a lane.
    pub fn get(&self, block: &Block, operand: &Operand, lane: usize) -> u64 {
        match *operand {
            Operand::Reg(register, _) => self.registers[register][lane],
            Operand::Number(number) => number,
            Operand::Special(Special::Shared) => Shared::BEGIN.into(),
            Operand::Special(Special::Thread) => u64::from(self.number) * 32 + lane as u64,
            Operand::Special(Special::Lane) => lane as u64,
            Operand::Special(Special::Block(axis)) => block.at[axis].into(),
            Operand::Special(Special::Rank) => block.rank.into(),
            _ => panic!("{operand:?} has no value"),
        }
    }

    pub fn set(&mut self, operand: &Operand, lane: usize, value: u64) {
        match *operand {
            Operand::Reg(register, bits) => self.registers[register][lane] = value & bits,
            Operand::Nothing => {}
            _ => panic!("{operand:?} takes no value"),
        }
    }

    /// The same for some lanes.
    fn set_all(&mut self, operand: &Operand, lanes: Lanes, values: &[u64; LANES]) {
        let Operand::Reg(register, bits) = *operand else { panic!("{operand:?} takes no value") };
        let to = &mut self.registers[register];
        match lanes {
            Lanes::ALL => *to = values.map(|value| value & bits),
            _ => lanes.iter().for_each(|lane| to[lane] = values[lane] & bits),
        }
    }

    /// The address that `[base + offset]` means.
    pub fn address(&self, block: &Block, operand: &Operand, lane: usize) -> u64 {
        let Operand::At(base, offset) = operand else { panic!("{operand:?} is no place") };
        self.get(block, base, lane).wrapping_add(*offset as u64)
    }

    /// The next instruction, of the lanes that are furthest behind.
    pub fn step(&mut self, cluster: &mut Cluster) -> Turn {
        let (first, ended) = (self.places[0], self.ended.0);
        // Mostly all are at one place.
        self.together = ended == 0 && (self.together || self.places == [first; LANES]);
        let (place, here) = match self.together {
            true => (first, Lanes::ALL),
            false => {
                let Some(place) = self.running().map(|lane| self.places[lane]).min() else {
                    return Turn::Ended;
                };
                (place, Lanes::of(self.running().filter(|&lane| self.places[lane] == place)))
            }
        };
        let i = &cluster.launch.program.instructions[place];
        let lanes = match i.guard {
            None => here,
            Some((register, wanted)) => {
                let values = &self.registers[register];
                Lanes::of(here.iter().filter(|&lane| (values[lane] != 0) == wanted))
            }
        };
        let turn = self.run(cluster, i, lanes, lanes.0 == !ended);
        if turn != Turn::Waits {
            match here {
                Lanes::ALL => self.places = [place + 1; LANES],
                _ => here.iter().for_each(|lane| self.places[lane] += 1),
            }
        }
        if turn == Turn::Ended {
            self.ended.0 |= lanes.0;
        }
        if let (Turn::Jumped, Some(&Operand::Label(to))) = (turn, i.args.first()) {
            lanes.iter().for_each(|lane| self.places[lane] = to);
            self.together &= lanes == here;
        }
        turn
    }

    /// As [`get`](Self::get), and what only the launch knows.
    fn value(&self, cluster: &Cluster, block: &Block, operand: &Operand, lane: usize) -> u64 {
        let launch = cluster.launch;
        match *operand {
            Operand::Param(param) => &raw const launch.params[param] as u64,
            Operand::Special(Special::Blocks(axis)) => launch.grid[axis].into(),
            Operand::Special(Special::Cluster) => (block.at[0] / launch.program.cluster).into(),
            _ => self.get(block, operand, lane),
        }
    }

    /// Of all lanes.
    fn values(&self, cluster: &Cluster, operand: &Operand) -> [u64; LANES] {
        let block = &cluster.blocks[self.block];
        match *operand {
            Operand::Reg(register, _) => self.registers[register],
            Operand::Number(number) => [number; LANES],
            _ => std::array::from_fn(|lane| self.value(cluster, block, operand, lane)),
        }
    }

    /// Runs an instruction for some lanes, which may be `all` that there are.
    fn run(&mut self, cluster: &mut Cluster, i: &Instruction, lanes: Lanes, all: bool) -> Turn {
        let together = || assert!(all, "not all lanes are at {}", i.text);
        let launch = cluster.launch;
        let (memory, warps) = (&launch.memory, cluster.warps());
        match i.op {
            Op::Lanewise(function) => {
                let mut others: [Option<[u64; LANES]>; 4] = [None; 4];
                for (other, operand) in others.iter_mut().zip(&i.args[1..]) {
                    if !matches!(operand, Operand::Reg(..)) {
                        *other = Some(self.values(cluster, operand));
                    }
                }
                let values = std::array::from_fn(|arg| match (i.args.get(1 + arg), &others[arg]) {
                    (Some(&Operand::Reg(register, _)), _) => &self.registers[register],
                    (_, Some(other)) => other,
                    (_, None) => &[0; LANES],
                });
                let results = match lanes {
                    Lanes::ALL => (function.all)(&values),
                    // Others' values are nobody's: a divisor of theirs may be 0.
                    _ => {
                        let mut results = [0; LANES];
                        for lane in lanes.iter() {
                            results[lane] = (function.one)(values.map(|value| value[lane]));
                        }
                        results
                    }
                };
                self.set_all(&i.args[0], lanes, &results);
            }
            Op::Move(bytes) => self.mov(cluster, i, bytes, lanes),
            Op::Return => return Turn::Ended,
            Op::Branch => return Turn::Jumped,
            Op::Nothing => {}
            Op::Together => together(),
            Op::LoadParam(bytes) => {
                let Operand::At(base, _) = &i.args[1] else { panic!("{}", i.text) };
                let Operand::Param(param) = **base else { panic!("{}", i.text) };
                let mut value = [0; 8];
                value[..bytes].copy_from_slice(&launch.params[param].0[..bytes]);
                lanes.iter().for_each(|lane| self.set(&i.args[0], lane, u64::from_le_bytes(value)));
            }
            Op::LoadCount => {
                std::thread::yield_now();
                for lane in lanes.iter() {
                    let at = self.address(&cluster.blocks[self.block], &i.args[1], lane);
                    self.set(&i.args[0], lane, memory.count(at).load(Ordering::Acquire).into());
                }
            }
            Op::AddCount => {
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let at = self.address(block, &i.args[0], lane);
                    let more = self.get(block, &i.args[1], lane) as u32;
                    memory.count(at).fetch_add(more, Ordering::Release);
                }
            }
            Op::AddFloat => {
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let at = self.address(block, &i.args[0], lane);
                    let more = self.get(block, &i.args[1], lane) as u32;
                    memory.add(at, f32::from_bits(more));
                }
            }
            Op::RaiseCount => {
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let at = self.address(block, &i.args[0], lane);
                    let least = self.get(block, &i.args[1], lane) as u32;
                    memory.count(at).fetch_max(least, Ordering::Relaxed);
                }
            }
            Op::TakeCount => {
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let at = self.address(block, &i.args[1], lane);
                    let more = self.get(block, &i.args[2], lane) as u32;
                    let before = memory.count(at).fetch_add(more, Ordering::Relaxed);
                    self.set(&i.args[0], lane, before.into());
                }
            }
            Op::Load(space, bytes) => self.load(cluster, i, space, bytes, lanes),
            Op::Store(space, bytes) => self.store(cluster, i, space, bytes, lanes),
            Op::StoreCounted(bytes) => self.store_counted(cluster, i, bytes, lanes),
            Op::Shuffle(how) => {
                together();
                let block = &cluster.blocks[self.block];
                let value = |lane: usize| {
                    let by = self.get(block, &i.args[2], lane) as usize;
                    let from = match how {
                        Shuffle::From => by % LANES,
                        Shuffle::Xor => lane ^ by,
                        Shuffle::Up => lane.checked_sub(by).unwrap_or(lane),
                    };
                    self.get(block, &i.args[1], from)
                };
                let values: [u64; LANES] = std::array::from_fn(value);
                lanes.iter().for_each(|lane| self.set(&i.args[0], lane, values[lane]));
            }
            Op::Ballot => {
                together();
                let block = &cluster.blocks[self.block];
                let votes: u64 =
                    (0..LANES).map(|lane| self.get(block, &i.args[1], lane) << lane).sum();
                lanes.iter().for_each(|lane| self.set(&i.args[0], lane, votes));
            }
            Op::Elect => {
                together();
                lanes.iter().for_each(|lane| self.set(&i.args[0], lane, (lane == 0).into()));
            }
            Op::Arrive | Op::Sync => {
                together();
                let block = &mut cluster.blocks[self.block];
                let id = self.get(block, &i.args[0], 0) as usize;
                let of = i.args.get(1).map(|of| self.get(block, of, 0) as u32);
                let barrier = &mut block.barriers[id];
                let arrive = || barrier.arrive(LANES as u32, of.unwrap_or(launch.threads));
                let since = self.at_barrier.unwrap_or_else(arrive);
                if matches!(i.op, Op::Sync) && !barrier.opened(since) {
                    self.at_barrier = Some(since);
                    return Turn::Waits;
                }
                self.at_barrier = None;
            }
            Op::ArriveCluster => {
                together();
                assert!(self.at_cluster.is_none(), "a second time at {}", i.text);
                self.at_cluster = Some(cluster.barrier.arrive(1, warps));
            }
            Op::WaitCluster => {
                let since = self.at_cluster.expect("it has arrived");
                if !cluster.barrier.opened(since) {
                    return Turn::Waits;
                }
                self.at_cluster = None;
            }
            Op::MapShared => {
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let [at, rank] = [1, 2].map(|arg| self.get(block, &i.args[arg], lane));
                    self.set(&i.args[0], lane, at | (rank + 1) << WINDOW);
                }
            }
            Op::Init => {
                for lane in lanes.iter() {
                    let block = &mut cluster.blocks[self.block];
                    let at = self.address(block, &i.args[0], lane) as u32;
                    let expected = self.get(block, &i.args[1], lane) as u32;
                    block.counted.insert(at, CountedBarrier::new(expected));
                }
            }
            Op::ArriveCounted | Op::ExpectBytes => {
                for lane in lanes.iter() {
                    let block = &mut cluster.blocks[self.block];
                    let bytes = match i.op {
                        Op::ExpectBytes => self.get(block, &i.args[2], lane) as u32,
                        _ => 0,
                    };
                    self.counted(block, &i.args[1], lane).arrive(bytes);
                }
            }
            Op::TryWait => {
                let mut passed = true;
                for lane in lanes.iter() {
                    let block = &mut cluster.blocks[self.block];
                    let at = self.address(block, &i.args[1], lane) as u32;
                    let parity = self.get(block, &i.args[2], lane) as u32;
                    let barrier = block.counted.get_mut(&at).expect("an mbarrier");
                    let over = barrier.passed(parity, &mut block.shared, memory);
                    self.set(&i.args[0], lane, over.into());
                    passed &= over;
                }
                if !passed {
                    // Its loop comes back to it.
                    lanes.iter().for_each(|lane| self.places[lane] += 1);
                    self.together = false;
                    return Turn::Waits;
                }
            }
            Op::LoadBox => {
                for lane in lanes.iter() {
                    let block = &mut cluster.blocks[self.block];
                    let load = Load::Box(self.transfer(block, &i.args[1], &i.args[0], lane));
                    load.poison(&mut block.shared);
                    self.counted(block, &i.args[2], lane).loads.push(load);
                }
            }
            Op::LoadBytes => {
                for lane in lanes.iter() {
                    let block = &mut cluster.blocks[self.block];
                    let to = self.address(block, &i.args[0], lane) as u32;
                    let from = self.address(block, &i.args[1], lane);
                    let bytes = self.get(block, &i.args[2], lane) as u32;
                    let aligned = [u64::from(to), from, bytes.into()];
                    let aligned = aligned.iter().all(|at| at.is_multiple_of(16));
                    assert!(aligned, "{to:#x}, {from:#x}, {bytes}: {}", i.text);
                    let load = Load::Bytes { to, from, bytes };
                    load.poison(&mut block.shared);
                    self.counted(block, &i.args[3], lane).loads.push(load);
                }
            }
            Op::StoreBox | Op::AddBox => {
                let kind = match i.op {
                    Op::AddBox => Store::BoxSum,
                    _ => Store::Box,
                };
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let store = self.transfer(block, &i.args[0], &i.args[1], lane);
                    assert!(store.at.iter().all(|&at| at >= 0), "before the tensor: {}", i.text);
                    self.begun[lane].stores.begin(kind(store));
                }
            }
            Op::AddFloats => {
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let to = self.address(block, &i.args[0], lane);
                    let from = self.address(block, &i.args[1], lane) as u32;
                    let bytes = self.get(block, &i.args[2], lane) as u32;
                    self.begun[lane].stores.begin(Store::Sum(Sum { to, from, bytes }));
                }
            }
            Op::CommitStores => lanes.iter().for_each(|lane| self.begun[lane].stores.commit()),
            Op::WaitStores => {
                for lane in lanes.iter() {
                    let block = &cluster.blocks[self.block];
                    let pending = self.get(block, &i.args[0], lane) as usize;
                    self.begun[lane].wait_for_stores(pending, block, memory);
                }
            }
            Op::Copy => {
                for lane in lanes.iter() {
                    let block = &mut cluster.blocks[self.block];
                    let to = self.address(block, &i.args[0], lane) as u32;
                    let from = self.address(block, &i.args[1], lane);
                    let size = self.get(block, &i.args[2], lane) as u32;
                    let bytes = i.args.get(3).map_or(size, |n| self.get(block, n, lane) as u32);
                    let aligned =
                        to.is_multiple_of(size) && (bytes == 0 || from.is_multiple_of(size.into()));
                    assert!(aligned && bytes <= size, "{to:#x}, {from:#x}, {bytes}: {}", i.text);
                    let copy = Copy { to, from, size, bytes };
                    copy.poison(&mut block.shared);
                    self.begun[lane].copies.begin(copy);
                }
            }
            Op::CommitCopies => lanes.iter().for_each(|lane| self.begun[lane].copies.commit()),
            Op::WaitCopies => {
                for lane in lanes.iter() {
                    let block = &mut cluster.blocks[self.block];
                    let pending = self.get(block, &i.args[0], lane) as usize;
                    self.begun[lane].wait_for_copies(pending, block, memory);
                }
            }
            Op::LoadMatrix(transposed) => {
                together();
                self.ldmatrix(&cluster.blocks[self.block], i, transposed);
            }
            Op::StoreMatrix(transposed) => {
                together();
                self.stmatrix(&mut cluster.blocks[self.block], i, transposed);
            }
            Op::Multiply(factor) => {
                together();
                self.mma(&cluster.blocks[self.block], i, factor);
            }
            Op::MultiplyTf32 => {
                together();
                self.mma_tf32(&cluster.blocks[self.block], i);
            }
            Op::MultiplyGroup(..) => {
                together();
                self.begin_wgmma(&cluster.blocks[self.block], i, self.places[0]);
            }
            Op::CommitGroup => self.products.commit(),
            Op::FenceGroup | Op::WaitGroup => {
                together();
                let block = &mut cluster.blocks[self.block];
                if matches!(i.op, Op::WaitGroup) && self.at_meeting.is_none() {
                    let pending = self.get(block, &i.args[0], 0) as usize;
                    for product in self.products.wait(pending) {
                        let i = &launch.program.instructions[product.place];
                        self.wgmma(block, i, &product);
                    }
                }
                let meeting = &mut block.meetings[self.number as usize / 4];
                let since = self.at_meeting.unwrap_or_else(|| meeting.arrive(1, 4));
                if !meeting.opened(since) {
                    self.at_meeting = Some(since);
                    return Turn::Waits;
                }
                self.at_meeting = None;
            }
        }
        Turn::Went
    }

    fn counted<'b>(
        &self,
        block: &'b mut Block,
        place: &Operand,
        lane: usize,
    ) -> &'b mut CountedBarrier {
        let at = self.address(block, place, lane) as u32;
        block.counted.get_mut(&at).expect("an mbarrier")
    }

    fn mov(&mut self, cluster: &Cluster, i: &Instruction, bytes: usize, lanes: Lanes) {
        let block = &cluster.blocks[self.block];
        let half = 4 * bytes;
        if let (Operand::Reg(..), Operand::Reg(..) | Operand::Number(_)) = (&i.args[0], &i.args[1])
        {
            return self.set_all(&i.args[0], lanes, &self.values(cluster, &i.args[1]));
        }
        for lane in lanes.iter() {
            match (&i.args[0], &i.args[1]) {
                (Operand::List(to), from) => {
                    let value = self.get(block, from, lane);
                    self.set(&to[0], lane, value & ((1 << half) - 1));
                    self.set(&to[1], lane, value >> half);
                }
                (to, Operand::List(from)) => {
                    let [low, high] = [0, 1].map(|part| self.get(block, &from[part], lane));
                    self.set(to, lane, low | high << half);
                }
                (to, from) => {
                    let value = self.value(cluster, block, from, lane);
                    self.set(to, lane, value);
                }
            }
        }
    }

    /// Where the registers of an access lie: lane by lane, one after another.
    fn places<'i>(
        &self,
        block: &Block,
        i: &'i Instruction,
        (place, registers): (&Operand, &'i Operand),
        bytes: usize,
        lanes: Lanes,
    ) -> Vec<(usize, &'i Operand, u64)> {
        let registers = list(registers);
        let of_lane = |lane| {
            let begin = self.address(block, place, lane);
            let aligned = begin.is_multiple_of((bytes * registers.len()) as u64);
            assert!(aligned, "{begin:#x} is misaligned for {}", i.text);
            registers.iter().zip((begin..).step_by(bytes)).map(move |(to, at)| (lane, to, at))
        };
        lanes.iter().flat_map(of_lane).collect()
    }

    fn load(&mut self, cluster: &Cluster, i: &Instruction, space: Space, bytes: usize, on: Lanes) {
        let block = &cluster.blocks[self.block];
        for (lane, to, at) in self.places(block, i, (&i.args[1], &i.args[0]), bytes, on) {
            let value = match space {
                Space::Global => cluster.launch.memory.get(at, bytes),
                Space::Shared => {
                    let (block, at) = self.shared(at);
                    cluster.blocks[block].shared.get(at, bytes)
                }
            };
            self.set(to, lane, value);
        }
    }

    fn store(&self, cluster: &mut Cluster, i: &Instruction, space: Space, bytes: usize, on: Lanes) {
        let block = &cluster.blocks[self.block];
        for (lane, from, at) in self.places(block, i, (&i.args[0], &i.args[1]), bytes, on) {
            let value = self.get(&cluster.blocks[self.block], from, lane);
            match space {
                Space::Global => cluster.launch.memory.set(at, bytes, value),
                Space::Shared => {
                    let (block, at) = self.shared(at);
                    cluster.blocks[block].shared.set(at, bytes, value);
                }
            }
        }
    }

    /// `st.async`: what is stored comes when the barrier is waited for.
    fn store_counted(&self, cluster: &mut Cluster, i: &Instruction, bytes: usize, on: Lanes) {
        let block = &cluster.blocks[self.block];
        for (lane, from, at) in self.places(block, i, (&i.args[0], &i.args[1]), bytes, on) {
            let block = &cluster.blocks[self.block];
            let value = self.get(block, from, lane);
            let (whose, barrier) = self.shared(self.address(block, &i.args[2], lane));
            let (block, to) = self.shared(at);
            assert_eq!(block, whose, "{}: a barrier of another block", i.text);
            let load = Load::Value { to, value, bytes: bytes as u32 };
            let block = &mut cluster.blocks[block];
            load.poison(&mut block.shared);
            block.counted.get_mut(&barrier).expect("an mbarrier").loads.push(load);
        }
    }

    /// Whose shared memory an address is of, and where in it.
    fn shared(&self, at: u64) -> (usize, u32) {
        let rank = (at >> WINDOW) as usize;
        (rank.checked_sub(1).unwrap_or(self.block), (at & ((1 << WINDOW) - 1)) as u32)
    }

    /// What an instruction of TMA is about.
    fn transfer(&self, block: &Block, place: &Operand, shared: &Operand, lane: usize) -> Transfer {
        let Operand::Box(map, at) = place else { panic!("{place:?} is no place in a tensor") };
        let map = Map::at(self.get(block, map, lane));
        let at = at.iter().map(|x| i64::from(self.get(block, x, lane) as u32 as i32)).collect();
        Transfer { map, shared: self.address(block, shared, lane) as u32, at }
    }
}

/// Some of a warp's lanes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Lanes(u32);

impl Lanes {
    const ALL: Self = Self(u32::MAX);

    fn of(lanes: impl Iterator<Item = usize>) -> Self {
        Self(lanes.fold(0, |all, lane| all | 1 << lane))
    }

    fn iter(self) -> impl Iterator<Item = usize> {
        (0..LANES).filter(move |&lane| self.0 >> lane & 1 != 0)
    }
}

/// Bits of an address in shared memory. Above them is which block of the cluster it is of, counted from 1;
/// 0: the one that asks.
const WINDOW: u32 = 24;
