//! Cross-entropy of rows of logits: their losses by one pass that keeps the maximum and the sum of exponentials together
//! (Milakov and Gimelshein, 2018), their gradients by another.

use super::multiprocessor::WARP;
use super::name::given;
use super::params::{self, Argument, names};
use super::plan::{Step, count};
use super::{Device, Element};

mod emit;

pub use emit::{emit, emit_sum};

/// Threads of a block, unless a team has more.
const THREADS: u32 = 128;
/// The most threads of a row.
const MOST_TEAM: u64 = 512;
/// Threads of the block that adds all rows' losses.
const SUM_THREADS: u32 = 1024;

/// What is computed of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Its loss, and what normalises it.
    Losses,
    /// The gradient, from what was kept.
    Gradient,
    /// Its loss, and the gradient of that in place of the logits.
    Both,
}

/// How many bytes threads load and store at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// 16: rows are of whole lines.
    Lines,
    /// 16, but for what is before the first line and after the last one.
    Peeled,
    /// An element.
    Elements,
}

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows, at least 1, whose elements are contiguous.
    pub rows: u64,
    /// Classes.
    pub cols: u64,
    /// The logits' type, and their gradient's.
    pub element: Element,
    /// Whether targets have 64 bits.
    pub wide: bool,
    /// What is computed of each row, unless the losses are there.
    pub pass: Option<Pass>,
    /// Whether the losses become one: their mean over those that are counted, or their sum.
    pub reduced: Option<Reduced>,
    /// Whether logits are capped.
    pub softcap: bool,
    /// Whether some of the target's probability is spread.
    pub smoothing: bool,
    /// Whether all rows begin at multiples of 16 bytes.
    pub aligned: bool,
    /// Whether each row begins as many bytes after such a multiple as that of the gradient does.
    pub congruent: bool,
}

/// What losses become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduced {
    /// Their mean over those that are counted.
    Mean,
    /// Their sum.
    Sum,
}

impl Problem {
    /// What is beyond what threads count, and the most that they do.
    pub fn limit(&self) -> Option<(String, u32)> {
        // What a team steps over at once is added to columns.
        const MOST: u32 = i32::MAX as u32 - (1 << 16);
        let over = self.rows > MOST.into() || self.cols > MOST.into();
        over.then(|| (format!("{} rows of {} logits", self.rows, self.cols), MOST))
    }
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The logits' type.
    pub element: Element,
    /// Whether targets have 64 bits.
    pub wide: bool,
    /// What is computed.
    pub pass: Pass,
    /// Whether logits are capped.
    pub softcap: bool,
    /// Whether some of the target's probability is spread.
    pub smoothing: bool,
    /// How rows are read.
    pub access: Access,
    /// Threads that share a row: a power of two.
    pub team: u32,
}

impl Config {
    /// `cross_entropy losses lines team512, bf16 u32 softcap`
    pub fn name(&self) -> String {
        let Self { element, wide, pass, softcap, smoothing, access, team } = *self;
        let pass = match pass {
            Pass::Losses => "losses",
            Pass::Gradient => "gradient",
            Pass::Both => "both",
        };
        let access = match access {
            Access::Lines => "lines",
            Access::Peeled => "peeled",
            Access::Elements => "elements",
        };
        let (element, target) = (element.name(), target_name(wide));
        let (softcap, smoothing) = (given(softcap, " softcap"), given(smoothing, " smoothing"));
        format!("cross_entropy {pass} {access} team{team}, {element} {target}{softcap}{smoothing}")
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.team.max(THREADS)
    }
}

fn target_name(wide: bool) -> &'static str {
    if wide { "i64" } else { "u32" }
}

/// All choices of the kernel that adds losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sum {
    /// What they become.
    pub reduced: Reduced,
    /// Whether targets have 64 bits.
    pub wide: bool,
}

impl Sum {
    /// `cross_entropy mean, i64`
    pub fn name(&self) -> String {
        let reduced = match self.reduced {
            Reduced::Mean => "mean",
            Reduced::Sum => "sum",
        };
        format!("cross_entropy {reduced}, {}", target_name(self.wide))
    }
}

/// The kernels and their grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    rows: Option<(Config, u32)>,
    sum: Option<Sum>,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        // Lines of a thread: enough that what a team does together does not count.
        const LINES: u64 = 4;
        let Problem { element, wide, pass, softcap, smoothing, .. } = *problem;
        let line = u64::from(element.per_chunk());
        let access = match (problem.aligned, problem.congruent) {
            (true, _) if problem.cols.is_multiple_of(line) => Access::Lines,
            (_, true) => Access::Peeled,
            (_, false) => Access::Elements,
        };
        let team = problem.cols.div_ceil(line * LINES).next_power_of_two();
        let team = count(team.clamp(WARP.into(), MOST_TEAM));
        let rows = pass.map(|pass| {
            let config = Config { element, wide, pass, softcap, smoothing, access, team };
            (config, count(problem.rows.div_ceil((config.threads() / team).into())))
        });
        Self { rows, sum: problem.reduced.map(|reduced| Sum { reduced, wide }) }
    }

    fn steps(&self) -> Vec<Step> {
        let step = |kernel, blocks| Step { kernel, grid: [blocks, 1, 1] };
        let rows = self.rows.map(|(config, blocks)| step(config.into(), blocks));
        let sum = self.sum.map(|sum| step(sum.into(), 1));
        [rows, sum].into_iter().flatten().collect()
    }
}

names! {
    /// The parameters.
    pub enum Name {
        /// The address of the first row of logits.
        Logits "logits",
        /// Elements from row to row.
        LogitsRow "logits_row",
        /// The address of the targets.
        Targets "targets",
        /// The target of rows that do not count, in 64 bits.
        Ignored "ignored",
        /// Rows.
        Rows "rows",
        /// Classes.
        Cols "cols",
        /// The cap of logits.
        Cap "cap",
        /// What the target keeps of its probability.
        Kept "kept",
        /// The share of it that is spread.
        Spread "spread",
        /// What each class gets of that.
        Even "even",
        /// A factor of the squared log-sum-exp.
        ZLoss "z_loss",
        /// The address of the rows' losses.
        Losses "losses",
        /// The address of what normalises each row: two numbers.
        Stats "stats",
        /// The address of the gradients of losses.
        Upstream "upstream",
        /// Elements from row to row of these: 1, or 0 if they share one.
        UpstreamRow "upstream_row",
        /// The address of what all counted rows are multiplied with besides.
        Share "share",
        /// The address of the gradient, without gaps.
        Out "out",
        /// The address of what all losses become.
        Total "total",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The address of the first row of logits, and elements from row to row.
    pub logits: (u64, u64),
    /// The address of the targets.
    pub targets: u64,
    /// The target of rows that do not count.
    pub ignored: i64,
    /// The cap of logits, or any number.
    pub cap: f32,
    /// How much of the target's probability is spread.
    pub smoothing: f32,
    /// A factor of the squared log-sum-exp.
    pub z_loss: f32,
    /// The address of the rows' losses.
    pub losses: Option<u64>,
    /// The address of what normalises each row.
    pub stats: Option<u64>,
    /// The address of the gradients of losses, and elements from row to row.
    pub upstream: Option<(u64, u32)>,
    /// The address of what all counted rows are multiplied with besides.
    pub share: Option<u64>,
    /// The address of the gradient.
    pub out: Option<u64>,
    /// The address of what all losses become.
    pub total: Option<u64>,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let problem = self.problem;
        Some(match name {
            Name::Logits => Argument::Pointer(self.logits.0),
            Name::LogitsRow => Argument::U64(self.logits.1),
            Name::Targets => Argument::Pointer(self.targets),
            Name::Ignored => Argument::U64(self.ignored.cast_unsigned()),
            Name::Rows => Argument::U32(count(problem.rows)),
            Name::Cols => Argument::U32(count(problem.cols)),
            Name::Cap => Argument::F32(self.cap),
            Name::Kept => Argument::F32(1.0 - self.smoothing),
            Name::Spread => Argument::F32(self.smoothing),
            Name::Even => Argument::F32(self.smoothing / problem.cols as f32),
            Name::ZLoss => Argument::F32(self.z_loss),
            Name::Losses => Argument::Pointer(self.losses?),
            Name::Stats => Argument::Pointer(self.stats?),
            Name::Upstream => Argument::Pointer(self.upstream?.0),
            Name::UpstreamRow => Argument::U32(self.upstream?.1),
            Name::Share => Argument::Pointer(self.share?),
            Name::Out => Argument::Pointer(self.out?),
            Name::Total => Argument::Pointer(self.total?),
        })
    }
}
