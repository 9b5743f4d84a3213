//! Activations rounded to eight bits, int8 or e4m3, by a scale for each line: a row, or a group of a row's
//! elements. One pass: a team of threads holds a line in registers.

use super::multiprocessor::WARP;
use super::params::{self, Argument, names};
use super::plan::{Step, count};
use super::{Device, Element};
use crate::ptx::{Factor, Kernel, Reg, Source, Target};

/// Threads of a block, unless a team has more.
const THREADS: u32 = 256;
/// The most threads of a block.
const MOST_THREADS: u32 = 1024;
/// The most chunks that each of a block's threads can hold: what registers allow.
const MOST_CHUNKS: u32 = 8;
/// Bytes that a thread loads at once.
const CHUNK: u32 = 16;

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows, at least 1, which begin at multiples of 16 bytes.
    pub rows: u64,
    /// Elements of a row, at least 1.
    pub cols: u64,
    /// Elements of a group, at most those of a row.
    pub width: u64,
    /// Their type.
    pub element: Element,
    /// The codes': int8 or e4m3.
    pub code: Factor,
}

impl Problem {
    fn lines(&self) -> u64 {
        self.rows.saturating_mul(self.groups())
    }

    fn groups(&self) -> u64 {
        self.cols.div_ceil(self.width)
    }

    /// Whether there is a kernel for it: for rows and groups of whole chunks, which are not too long for
    /// registers; and e4m3 on GPUs that know it.
    pub fn is_supported(&self, device: &Device) -> bool {
        let unit = u64::from(self.element.per_chunk());
        let most = u64::from(MOST_THREADS * MOST_CHUNKS) * unit;
        self.cols.is_multiple_of(unit)
            && self.width.is_multiple_of(unit)
            && self.width <= most
            && self.lines() <= i32::MAX as u64
            && self.cols <= i32::MAX as u64
            && (self.code == Factor::S8 || device.target == Target::Sm90a)
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
    /// Chunks that each of them holds.
    pub chunks: u32,
}

impl Config {
    /// `quantize team128 x4, bf16→s8`
    pub fn name(&self) -> String {
        let Self { element, code, team, chunks } = self;
        format!("quantize team{team} x{chunks}, {}→{}", element.name(), code.name())
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.team.max(THREADS)
    }

    fn target(&self) -> Target {
        match self.code {
            Factor::E4m3 => Target::Sm90a,
            Factor::S8 | Factor::Half(_) => Target::Sm80,
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

    fn new(problem: &Problem, _: &Device) -> Self {
        // Four chunks of a thread are on their way together, unless that leaves lanes without work.
        const CHUNKS: u64 = 4;
        const FEWEST: u64 = 16;
        let Problem { element, code, width, .. } = *problem;
        let units = width.div_ceil(element.per_chunk().into());
        let team = units.div_ceil(CHUNKS).next_power_of_two().clamp(FEWEST, MOST_THREADS.into());
        let config =
            Config { element, code, team: count(team), chunks: count(units.div_ceil(team)) };
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
        /// The address of the codes, without gaps.
        Codes "codes",
        /// The address of the f32 scales of all lines.
        Scales "scales",
        /// Lines of all rows.
        Lines "lines",
        /// Those of a row.
        Groups "groups",
        /// Elements of a row.
        Cols "cols",
        /// Elements of a line, of which a row's last one may have fewer.
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
            Name::Scales => Argument::Pointer(self.results[1]),
            Name::Lines => Argument::U32(count(problem.lines())),
            Name::Groups => Argument::U32(count(problem.groups())),
            Name::Cols => Argument::U32(count(problem.cols)),
            Name::Width => Argument::U32(count(problem.width)),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
///
/// The scale takes a line's largest magnitude to 127 or 448; a line of zeros has scale 1, and one with a number that
/// is infinite or NaN has scale NaN.
pub fn emit(config: &Config) -> Source {
    let &Config { element, code, team, chunks } = config;
    let k = &Kernel::new("quantize", config.target(), config.threads());
    let (input, input_row) = (k.pointer(Name::Input), k.param::<u64>(Name::InputRow));
    let (codes, scales) = (k.pointer(Name::Codes), k.pointer(Name::Scales));
    let [lines, groups, cols, width] =
        [Name::Lines, Name::Groups, Name::Cols, Name::Width].map(|name| k.param::<u32>(name));
    let shared = (team > WARP).then(|| k.shared(config.threads() / WARP * 4));

    let (thread, unit) = (k.thread(), element.per_chunk());
    let line = k.block_x() * (config.threads() / team) + thread / team;
    let lane = thread % team;
    let exists = line.lt(lines);
    let row = line / groups;
    let first = (line - row * groups) * width;
    let units = (cols - first.min(cols)).min(width) / unit;
    let from = input + (row.wide() * input_row + first.wide()) * u64::from(element.size());
    let held: Vec<_> = (0..chunks)
        .map(|i| {
            let at = lane + i * team;
            let valid = exists & at.lt(units);
            let from = from.element(at, CHUNK);
            let words = k.when(valid, || k.ld_global_nc::<u32, 4>(from));
            (at, valid, words.map(|word| k.select(valid, word, 0)))
        })
        .collect();

    // Of magnitudes the bits are in the same order, and those of NaN the largest.
    let magnitudes = held.iter().flat_map(|(_, _, words)| floats(element, words));
    let peak = magnitudes
        .map(|x| x.abs().cast::<u32>())
        .reduce(|peak, x| peak.max(x))
        .expect("there are chunks");
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
    k.when(exists & lane.eq(0), || k.st_global(scales.element(line, 4), [scale]));

    let inverse = scale.recip();
    let to = codes + (row.wide() * cols.wide() + first.wide());
    for (at, valid, words) in held {
        // The quotient is rounded as a division would: it decides between two codes.
        let quotients: Vec<_> = floats(element, &words)
            .into_iter()
            .map(|x| {
                let near = x * inverse;
                (-near).fma(scale, x).fma(inverse, near)
            })
            .collect();
        let bytes: Vec<_> = quotients.chunks(4).map(|four| rounded(code, four)).collect();
        let to = to.element(at, unit);
        match bytes[..] {
            [word] => k.when(valid, || k.st_global(to, [word])),
            [low, high] => k.when(valid, || k.st_global(to, [low, high])),
            _ => unreachable!("16 bytes are 4 or 8 elements"),
        }
    }
    k.finish()
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
fn largest<'k>(mut value: Reg<'k, u32>, lanes: u32) -> Reg<'k, u32> {
    let mut apart = lanes / 2;
    while apart > 0 {
        value = value.max(value.kernel().shfl_bfly(value, apart));
        apart /= 2;
    }
    value
}

/// Four codes in a register, the first the lowest.
fn rounded<'k>(code: Factor, x: &[Reg<'k, f32>]) -> Reg<'k, u32> {
    let k = x[0].kernel();
    match code {
        Factor::E4m3 => {
            let [low, high] = [0, 2].map(|i| k.cvt_e4m3x2(x[i], x[i + 1]));
            k.pack(low, high)
        }
        Factor::S8 | Factor::Half(_) => {
            let high = k.cvt_pack_s8(x[2].nearest(), x[3].nearest(), 0);
            k.cvt_pack_s8(x[0].nearest(), x[1].nearest(), high)
        }
    }
}
