//! Rotary position embedding (Su et al., "RoFormer", 2021): pairs of a row's elements turned by the angles of its position.
//! The gradient is the rotation back.

use super::name::given;
use super::params::{self, Argument, names};
use super::plan::{Step, count};
use super::rows::{Loaded, Unit};
use super::{Device, Element};
pub use crate::options::RopeLayout;
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block.
const THREADS: u32 = 256;
/// Heads of which a thread has one place each: they have their angles in common.
const HEADS: u32 = 4;

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Batches, heads of each, and positions: at least 1.
    pub dims: [u64; 3],
    /// Elements of a row, which are contiguous: at least 1.
    pub cols: u64,
    /// Those that are turned, from the first one on: an even number.
    pub turned: u64,
    /// The type of rows and results.
    pub element: Element,
    /// That of the cosines and sines.
    pub angle: Element,
    /// Which elements are pairs.
    pub layout: RopeLayout,
    /// Whether all rows of all operands begin at multiples of 16 bytes.
    pub aligned: bool,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The type of rows and results.
    pub element: Element,
    /// That of the cosines and sines.
    pub angle: Element,
    /// Which elements are pairs.
    pub layout: RopeLayout,
    /// Elements that a thread takes at once: one, or as many as 16 bytes hold.
    pub unit: u32,
    /// Heads of a thread.
    pub heads: u32,
}

impl Config {
    /// `rope halves x8 heads4, bf16 by f32`
    pub fn name(&self) -> String {
        let Self { element, angle, layout, unit, heads } = *self;
        let layout = match layout {
            RopeLayout::Halves => "halves",
            RopeLayout::Interleaved => "interleaved",
        };
        let heads = given(heads > 1, " heads");
        format!("rope {layout} x{unit}{heads}, {} by {}", element.name(), angle.name())
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    config: Config,
    /// Places of a row where a thread turns units.
    turns: u32,
    /// Places of a row.
    places: u32,
    grid: [u32; 3],
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let Problem { dims, cols, turned, element, angle, layout, aligned } = *problem;
        let chunk = u64::from(element.per_chunk());
        let whole = aligned && cols.is_multiple_of(chunk) && (turned / 2).is_multiple_of(chunk);
        let unit = Unit::of(element, whole).count;
        let [batches, all_heads, positions] = dims;
        let heads = if all_heads > 1 { HEADS } else { 1 };
        let turns = turned / 2 / u64::from(unit);
        let places = turns + (cols - turned) / u64::from(unit);
        let threads = places.saturating_mul(positions).saturating_mul(batches);
        let grid =
            [count(threads.div_ceil(THREADS.into())), count(all_heads.div_ceil(heads.into())), 1];
        let config = Config { element, angle, layout, unit, heads };
        Self { config, turns: count(turns), places: count(places), grid }
    }

    fn steps(&self) -> Vec<Step> {
        vec![Step { kernel: self.config.into(), grid: self.grid }]
    }
}

impl Problem {
    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self) -> Option<(String, u32)> {
        const MOST: u32 = i32::MAX as u32;
        let [batches, heads, positions] = self.dims;
        let elements = batches.saturating_mul(positions).saturating_mul(self.cols);
        if heads > u64::from(u16::MAX) {
            return Some((format!("{heads} heads"), u16::MAX.into()));
        }
        let what = || format!("{batches} x {positions} positions of {} elements", self.cols);
        (elements > MOST.into()).then(|| (what(), MOST))
    }
}

names! {
    /// The parameters. Strides are in elements.
    pub enum Name {
        /// The address of the rows.
        X "x",
        /// From batch to batch.
        XBatch "x_batch",
        /// From head to head.
        XHead "x_head",
        /// From position to position.
        XRow "x_row",
        /// The address of the cosines.
        Cos "cos",
        /// From batch to batch.
        CosBatch "cos_batch",
        /// From position to position.
        CosRow "cos_row",
        /// The address of the sines.
        Sin "sin",
        /// From batch to batch.
        SinBatch "sin_batch",
        /// From position to position.
        SinRow "sin_row",
        /// The address of the result, without gaps.
        Out "out",
        /// 1, or −1 for the rotation back.
        Sign "sign",
        /// Batches times positions.
        Rows "rows",
        /// Positions.
        Positions "positions",
        /// Heads of a batch.
        Heads "heads",
        /// Elements of a row.
        Cols "cols",
        /// Elements that are turned.
        Turned "turned",
        /// Places of a row where units are turned.
        Turns "turns",
        /// Places of a row.
        Places "places",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// By which kernel.
    pub plan: &'a Plan,
    /// Address of the rows, and elements from batch to batch, head to head, position to position.
    pub x: (u64, [u64; 3]),
    /// Addresses of cosines and sines, and elements from batch to batch and position to position.
    pub angles: [(u64, [u64; 2]); 2],
    /// Address of the result.
    pub out: u64,
    /// Whether rows are turned back.
    pub back: bool,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let Self { problem, plan, x, angles: [cos, sin], .. } = self;
        let [batches, heads, positions] = problem.dims;
        let number = |n: u64| Argument::U32(count(n));
        Some(match name {
            Name::X => Argument::Pointer(x.0),
            Name::XBatch => Argument::U64(x.1[0]),
            Name::XHead => Argument::U64(x.1[1]),
            Name::XRow => Argument::U64(x.1[2]),
            Name::Cos => Argument::Pointer(cos.0),
            Name::CosBatch => Argument::U64(cos.1[0]),
            Name::CosRow => Argument::U64(cos.1[1]),
            Name::Sin => Argument::Pointer(sin.0),
            Name::SinBatch => Argument::U64(sin.1[0]),
            Name::SinRow => Argument::U64(sin.1[1]),
            Name::Out => Argument::Pointer(self.out),
            Name::Sign => Argument::F32(if self.back { -1.0 } else { 1.0 }),
            Name::Rows => number(batches * positions),
            Name::Positions => number(positions),
            Name::Heads => number(heads),
            Name::Cols => number(problem.cols),
            Name::Turned => number(problem.turned),
            Name::Turns => Argument::U32(plan.turns),
            Name::Places => Argument::U32(plan.places),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let &Config { element, angle, layout, unit, heads } = config;
    let k = &Kernel::new("rope", Target::Sm80, THREADS);
    // The assembler would rather have three, and spill.
    if matches!(layout, RopeLayout::Interleaved) {
        k.blocks_per_sm(2);
    }
    let [x, cos, sin, out] = [Name::X, Name::Cos, Name::Sin, Name::Out].map(|name| k.pointer(name));
    let [x_batch, x_head, x_row] =
        [Name::XBatch, Name::XHead, Name::XRow].map(|n| k.param::<u64>(n));
    let [cos_batch, cos_row, sin_batch, sin_row] =
        [Name::CosBatch, Name::CosRow, Name::SinBatch, Name::SinRow].map(|n| k.param::<u64>(n));
    let sign = k.param::<f32>(Name::Sign);
    let [rows, positions, all_heads, cols, turned, turns, places] = [
        Name::Rows,
        Name::Positions,
        Name::Heads,
        Name::Cols,
        Name::Turned,
        Name::Turns,
        Name::Places,
    ]
    .map(|name| k.param::<u32>(name));

    let number = k.block_x() * THREADS + k.thread();
    let row = number / places;
    let place = number - row * places;
    let first_head = k.block_y() * heads;
    let (size, units) = (element.size(), Unit { element, count: unit });
    k.if_(row.lt(rows), || {
        let batch = row / positions;
        let position = row - batch * positions;
        let from = x + (batch.wide() * x_batch + position.wide() * x_row) * u64::from(size);
        let to_row = (batch * all_heads).mul_wide(positions) + position.wide();
        let to = out + to_row * cols.wide() * u64::from(size);
        let (head_from, head_to) =
            (x_head * u64::from(size), positions.mul_wide(cols) * u64::from(size));
        // Where each head's row begins, and whether there is one.
        let heads = || {
            (0..heads).map(move |i| {
                let head = first_head + i;
                let number = head.wide();
                (head.lt(all_heads), from + number * head_from, to + number * head_to)
            })
        };
        let turn = || {
            let [cos, sin] = [(cos, cos_batch, cos_row), (sin, sin_batch, sin_row)].map(
                |(at, of_batch, of_row)| {
                    let row = batch.wide() * of_batch + position.wide() * of_row;
                    let at =
                        (at + row * u64::from(angle.size())).element(place, unit * angle.size());
                    Unit { element: angle, count: unit }.load(k, at).floats()
                },
            );
            let sin: Vec<_> = sin.into_iter().map(|sin| sin * sign).collect();
            let [a, b] = match layout {
                RopeLayout::Halves => [place * unit, place * unit + turned / 2],
                RopeLayout::Interleaved => [place * (2 * unit), place * (2 * unit) + unit],
            };
            let loaded: Vec<_> = heads()
                .map(|(exists, from, to)| {
                    let places = [a, b].map(|at| from.element(at, size));
                    (exists, to, places.map(|from| k.when(exists, || units.load(k, from))))
                })
                .collect();
            for (exists, to, halves) in loaded {
                let results = rotate(layout, halves, &cos, &sin);
                for (at, values) in [a, b].into_iter().zip(results) {
                    let (rounded, to) = (units.round(k, &values), to.element(at, size));
                    k.when(exists, || rounded.store(k, to));
                }
            }
        };
        let pass = || {
            let at = turned + (place - turns) * unit;
            for (exists, from, to) in heads() {
                let (from, to) = (from.element(at, size), to.element(at, size));
                k.when(exists, || units.load(k, from).store(k, to));
            }
        };
        k.if_else(place.lt(turns), turn, pass);
    });
    k.finish()
}

/// `(a, b)` to `(a·cos − b·sin, b·cos + a·sin)`, of all pairs of two units.
fn rotate<'k>(
    layout: RopeLayout,
    units: [Loaded<'k>; 2],
    cos: &[Reg<'k, f32>],
    sin: &[Reg<'k, f32>],
) -> [Vec<Reg<'k, f32>>; 2] {
    let [first, second] = units.map(|unit| unit.floats());
    let pairs: Vec<_> = match layout {
        RopeLayout::Halves => first.into_iter().zip(second).collect(),
        RopeLayout::Interleaved => {
            let all = [first, second].concat();
            all.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
        }
    };
    let turned = pairs
        .into_iter()
        .zip(cos.iter().zip(sin))
        .map(|((a, b), (&cos, &sin))| ((-b).fma(sin, a * cos), a.fma(sin, b * cos)));
    match layout {
        RopeLayout::Halves => {
            let (first, second): (Vec<_>, Vec<_>) = turned.unzip();
            [first, second]
        }
        RopeLayout::Interleaved => {
            let all: Vec<_> = turned.flat_map(|(a, b)| [a, b]).collect();
            let (first, second) = all.split_at(all.len() / 2);
            [first.to_vec(), second.to_vec()]
        }
    }
}
