//! Activations rounded to eight bits, int8 or e4m3, by a scale for each line: a row, or a group of a row's
//! elements. A team of threads holds a line in registers, or reads it twice.

use super::multiprocessor::WARP;
use super::name::given;
use super::params::{self, Argument, names};
use super::plan::{Step, count};
use super::rows::across_lanes;
use super::{Device, Element};
use crate::ptx::{Factor, Kernel, Reg, Source, Target};

/// Threads of a block, unless a team has more.
const THREADS: u32 = 256;
/// The most threads of a block.
const MOST_THREADS: u32 = 1024;
/// The most chunks that each of a block's threads can hold: what registers allow, where a chunk is loaded at once and where its
/// elements are.
const MOST_CHUNKS: [u64; 2] = [8, 4];
/// Bytes that a thread loads at once.
const CHUNK: u32 = 16;
/// Codes at whose multiples rows begin.
const LINE: u32 = 16;

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows, at least 1, whose elements are contiguous.
    pub rows: u64,
    /// Elements of a row, at least 1.
    pub cols: u64,
    /// Elements of a group: a multiple of 16, or those of a row.
    pub width: u64,
    /// Their type.
    pub element: Element,
    /// The codes': int8 or e4m3.
    pub code: Factor,
    /// Whether all rows begin at multiples of 16 bytes.
    pub aligned: bool,
}

impl Problem {
    fn lines(&self) -> u64 {
        self.rows.saturating_mul(self.groups())
    }

    fn groups(&self) -> u64 {
        self.cols.div_ceil(self.width)
    }

    /// Codes from row to row: a multiple of 16. Those past a row are zeros, or NaN if its scale is.
    pub fn out_row(&self) -> u64 {
        self.cols.next_multiple_of(LINE.into())
    }

    /// Codes of a group.
    fn out_width(&self) -> u64 {
        if self.groups() == 1 { self.out_row() } else { self.width }
    }

    /// What is beyond what threads count, and the most that they do.
    pub fn limit(&self) -> Option<(String, u32)> {
        const MOST: u32 = i32::MAX as u32;
        let over = self.lines() > MOST.into() || self.out_row() > MOST.into();
        let Self { rows, cols, width, .. } = self;
        over.then(|| (format!("{rows} x {cols} activations in groups of {width}"), MOST))
    }
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The elements' type.
    pub element: Element,
    /// The codes': int8 or e4m3.
    pub code: Factor,
    /// Threads that share a line: a power of two.
    pub team: u32,
    /// Chunks that each of them holds at a time.
    pub chunks: u32,
    /// Whether lines are longer than what a team holds: they are read twice.
    pub long: bool,
    /// Whether lines are of whole chunks, at multiples of 16 bytes: else each element is loaded by itself.
    pub whole: bool,
    /// Whether the GPU has an instruction that rounds to the codes.
    pub rounds: bool,
}

impl Config {
    /// `quantize team128 x4, bf16→s8`
    pub fn name(&self) -> String {
        let Self { element, code, team, chunks, long, whole, rounds } = *self;
        let (long, odd) = (given(long, " long"), given(!whole, " odd"));
        let (element, code) = (element.name(), code.name());
        let bits = given(!rounds, " by bits");
        format!("quantize team{team} x{chunks}{long}, {element}→{code}{odd}{bits}")
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.team.max(THREADS)
    }

    fn target(&self) -> Target {
        match self.code {
            Factor::E4m3 if self.rounds => Target::Sm89,
            _ => Target::Sm80,
        }
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    config: Config,
    blocks: u32,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        // Four chunks of a thread are on their way together, unless that leaves lanes without work.
        const CHUNKS: u64 = 4;
        const FEWEST: u64 = 16;
        let Problem { element, code, cols, aligned, .. } = *problem;
        let units = problem.out_width().div_ceil(element.per_chunk().into());
        let team = units.div_ceil(CHUNKS).next_power_of_two().clamp(FEWEST, MOST_THREADS.into());
        let chunks = units.div_ceil(team);
        let whole = aligned && cols.is_multiple_of(element.per_chunk().into());
        let most = MOST_CHUNKS[usize::from(!whole)];
        let long = chunks > most;
        let config = Config {
            element,
            code,
            team: count(team),
            chunks: count(if long { most / 2 } else { chunks }),
            long,
            whole,
            rounds: code == Factor::S8 || device.target != Target::Sm80,
        };
        let lines = u64::from(config.threads() / config.team);
        Self { config, blocks: count(problem.lines().div_ceil(lines)) }
    }

    fn steps(&self) -> Vec<Step> {
        vec![Step { kernel: self.config.into(), grid: [self.blocks, 1, 1] }]
    }
}

names! {
    /// The parameters.
    pub enum Name {
        /// The address of the first row.
        Input "input",
        /// Elements from row to row.
        InputRow "input_row",
        /// The address of the codes.
        Codes "codes",
        /// Codes from row to row.
        OutRow "out_row",
        /// The address of the f32 scales of all lines.
        Scales "scales",
        /// Lines of all rows.
        Lines "lines",
        /// Those of a row.
        Groups "groups",
        /// Elements of a row.
        Cols "cols",
        /// Codes of a line, of which a row's last one may have fewer.
        Width "width",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The address of the first row, and elements from row to row.
    pub input: (u64, u64),
    /// The addresses of the codes and of the scales.
    pub results: [u64; 2],
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let problem = self.problem;
        Some(match name {
            Name::Input => Argument::Pointer(self.input.0),
            Name::InputRow => Argument::U64(self.input.1),
            Name::Codes => Argument::Pointer(self.results[0]),
            Name::OutRow => Argument::U32(count(problem.out_row())),
            Name::Scales => Argument::Pointer(self.results[1]),
            Name::Lines => Argument::U32(count(problem.lines())),
            Name::Groups => Argument::U32(count(problem.groups())),
            Name::Cols => Argument::U32(count(problem.cols)),
            Name::Width => Argument::U32(count(problem.out_width())),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
///
/// The scale takes a line's largest magnitude to 127 or 448; a line of zeros has scale 1, and one with a number that
/// is infinite or NaN has scale NaN.
pub fn emit(config: &Config) -> Source {
    let &Config { element, code, team, chunks, long, .. } = config;
    let k = &Kernel::new("quantize", config.target(), config.threads());
    let (input, input_row) = (k.pointer(Name::Input), k.param::<u64>(Name::InputRow));
    let (codes, scales) = (k.pointer(Name::Codes), k.pointer(Name::Scales));
    let [lines, groups, cols, width, out_row] =
        [Name::Lines, Name::Groups, Name::Cols, Name::Width, Name::OutRow]
            .map(|name| k.param::<u32>(name));
    let shared = (team > WARP).then(|| k.shared(config.threads() / WARP * 4));

    let (thread, unit) = (k.thread(), element.per_chunk());
    let number = k.block_x() * (config.threads() / team) + thread / team;
    let lane = thread % team;
    let exists = number.lt(lines);
    let row = number / groups;
    let first = (number - row * groups) * width;
    let line = Line {
        config,
        from: input + (row.wide() * input_row + first.wide()) * u64::from(element.size()),
        len: (cols - first).min(width),
        exists,
    };
    let out_units = (out_row - first).min(width) / unit;
    let span = team * chunks;

    let (held, peak) = match long {
        false => {
            let held = line.hold(lane);
            let peak = magnitude(element, &held);
            (Some(held), peak)
        }
        true => {
            let peak = k.var(0u32);
            k.for_(0u32, out_units, span, |before| {
                peak.set(peak.max(magnitude(element, &line.hold(before + lane))));
            });
            (None, peak)
        }
    };
    let peak = largest(peak, team.min(WARP));
    let peak = match shared {
        None => peak,
        Some(shared) => {
            let warps = team / WARP;
            let of_lane = thread % WARP;
            k.when(of_lane.eq(0), || k.st_shared(shared + thread / WARP * 4, [peak]));
            k.sync_block();
            let place = thread / team * warps + of_lane % warps;
            let [peak] = k.ld_shared::<u32, 1>(shared + place * 4);
            largest(peak, warps)
        }
    };
    let most = if code == Factor::S8 { 127.0 } else { 448.0 };
    let scale = (peak.cast::<f32>() / most).max(f32::MIN_POSITIVE);
    let scale = k.select(peak.eq(0), k.var(1f32), scale);
    let scale = k.select(peak.lt(f32::INFINITY.to_bits()), scale, f32::NAN);
    k.when(exists & lane.eq(0), || k.st_global(scales.element(number, 4), [scale]));

    let codes = Codes {
        config,
        to: codes + (row.wide() * out_row.wide() + first.wide()),
        units: out_units,
        exists,
        scale,
        inverse: scale.recip(),
    };
    match held {
        Some(held) => codes.store(&held),
        None => k.for_(0u32, out_units, span, |before| codes.store(&line.hold(before + lane))),
    }
    k.finish()
}

/// A chunk's number in its line, and its elements.
type Chunk<'k> = (Reg<'k, u32>, [Reg<'k, u32>; 4]);

/// The codes of a line.
struct Codes<'a, 'k> {
    config: &'a Config,
    /// The address of the first one.
    to: Reg<'k, u64>,
    /// Those of chunks, with the zeros that fill a row up.
    units: Reg<'k, u32>,
    exists: Reg<'k, bool>,
    scale: Reg<'k, f32>,
    inverse: Reg<'k, f32>,
}

impl<'k> Codes<'_, 'k> {
    fn store(&self, held: &[Chunk<'k>]) {
        let &Config { element, code, rounds, .. } = self.config;
        let k = self.to.kernel();
        for (at, words) in held {
            // The quotient is rounded as a division would: it decides between two codes.
            let quotient = |x: Reg<'k, f32>| {
                let near = x * self.inverse;
                (-near).fma(self.scale, x).fma(self.inverse, near)
            };
            let quotients: Vec<_> = floats(element, words).into_iter().map(quotient).collect();
            let bytes: Vec<_> =
                quotients.chunks(4).map(|four| rounded(code, rounds, four)).collect();
            let valid = self.exists & at.lt(self.units);
            let to = self.to.element(*at, element.per_chunk());
            match bytes[..] {
                [word] => k.when(valid, || k.st_global(to, [word])),
                [low, high] => k.when(valid, || k.st_global(to, [low, high])),
                _ => unreachable!("16 bytes are 4 or 8 elements"),
            }
        }
    }
}

/// A row, or a group of a row's elements.
struct Line<'a, 'k> {
    config: &'a Config,
    /// The address of the first element.
    from: Reg<'k, u64>,
    /// Elements.
    len: Reg<'k, u32>,
    exists: Reg<'k, bool>,
}

impl<'k> Line<'_, 'k> {
    /// What a thread holds at a time, from a chunk on.
    fn hold(&self, first: Reg<'k, u32>) -> Vec<Chunk<'k>> {
        let chunk = |i| {
            let at = first + i * self.config.team;
            (at, self.chunk(at))
        };
        (0..self.config.chunks).map(chunk).collect()
    }

    /// The elements of a chunk, with zeros past the line.
    fn chunk(&self, at: Reg<'k, u32>) -> [Reg<'k, u32>; 4] {
        let (k, unit) = (self.from.kernel(), self.config.element.per_chunk());
        if self.config.whole {
            let valid = self.exists & at.lt(self.len / unit);
            let from = self.from.element(at, CHUNK);
            let words = k.when(valid, || k.ld_global_nc::<u32, 4>(from));
            return words.map(|word| k.select(valid, word, 0));
        }
        let first = at * unit;
        let size = self.config.element.size();
        let from = self.from.element(first, size);
        let place = |i: u32| (self.exists & (first + i).lt(self.len), from.at((i * size).into()));
        match self.config.element {
            Element::F32 => [0, 1, 2, 3].map(|i| {
                let (valid, from) = place(i);
                let [x] = k.when(valid, || k.ld_global_nc::<u32, 1>(from));
                k.select(valid, x, 0)
            }),
            Element::Half(_) => [0, 2, 4, 6].map(|i| {
                let [low, high] = [i, i + 1].map(|i| {
                    let (valid, from) = place(i);
                    let [x] = k.when(valid, || k.ld_global_nc::<u16, 1>(from));
                    k.select(valid, x, 0u16)
                });
                k.pack(low, high)
            }),
        }
    }
}

/// The largest magnitude, by its bits: of magnitudes they are in the same order, and those of NaN the largest.
fn magnitude<'k>(element: Element, held: &[Chunk<'k>]) -> Reg<'k, u32> {
    let magnitudes = held.iter().flat_map(|(_, words)| floats(element, words));
    magnitudes
        .map(|x| x.abs().cast::<u32>())
        .reduce(|peak, x| peak.max(x))
        .expect("there are chunks")
}

/// The elements of a chunk.
fn floats<'k>(element: Element, words: &[Reg<'k, u32>; 4]) -> Vec<Reg<'k, f32>> {
    match element {
        Element::F32 => words.map(|word| word.cast()).to_vec(),
        Element::Half(half) => {
            words.iter().flat_map(|&pair| pair.kernel().unpack(half, pair)).collect()
        }
    }
}

/// The largest number of `lanes` lanes that follow each other, a power of two.
pub(super) fn largest<'k>(value: Reg<'k, u32>, lanes: u32) -> Reg<'k, u32> {
    across_lanes(value, lanes, |a, b| a.max(b))
}

/// Four codes in a register, the first the lowest; `rounds`: by the instruction, if they are of e4m3.
pub(super) fn rounded<'k>(code: Factor, rounds: bool, x: &[Reg<'k, f32>]) -> Reg<'k, u32> {
    let k = x[0].kernel();
    match code {
        Factor::E4m3 if rounds => {
            let [low, high] = [0, 2].map(|i| k.cvt_e4m3x2(x[i], x[i + 1]));
            k.pack(low, high)
        }
        Factor::E4m3 => {
            let [low, high] = [0, 2].map(|i| k.prmt(e4m3(x[i]), e4m3(x[i + 1]), 0x40));
            k.prmt(low, high, 0x5410)
        }
        Factor::S8 | Factor::Half(_) => {
            let high = k.cvt_pack_s8(x[2].nearest(), x[3].nearest(), 0);
            k.cvt_pack_s8(x[0].nearest(), x[1].nearest(), high)
        }
    }
}

/// What `cvt.rn.satfinite.e4m3x2.f32` makes of a float, for GPUs without it.
fn e4m3(x: Reg<f32>) -> Reg<u32> {
    /// The least number with all digits.
    const LEAST: f32 = 1.0 / 64.0;
    /// A number whose last bit is worth what the last bit of those below is.
    const COARSE: f32 = 16_384.0;
    /// Digits of f32 past the three of e4m3, and eight for each exponent that only f32 has.
    const PAST: u32 = 20;
    const BELOW: u32 = (127 - 7) * 8;
    const MOST: u32 = 0x7e;
    const NAN: u32 = 0x7f;
    let (k, magnitude) = (x.kernel(), x.abs());
    let bits = magnitude.cast::<u32>();
    // Half of the last digit, and of two that are as near the even one.
    let half = bits.bfe(PAST, 1) + ((1 << (PAST - 1)) - 1);
    let normal = (((bits + half) >> PAST) - BELOW).min(MOST);
    let small = (magnitude + COARSE).cast::<u32>() - COARSE.to_bits();
    let code = k.select(magnitude.lt(LEAST), small, normal);
    let code = k.select(bits.le(f32::INFINITY.to_bits()), code, NAN);
    code | ((x.cast::<u32>() >> 24) & 0x80)
}
