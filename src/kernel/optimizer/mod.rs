//! Passes over all tensors of a model at once: AdamW's step, the norm of all gradients, their sums over
//! micro-batches, and their scaling.
//!
//! A launch takes any number of tensors of any sizes. A tensor is cut into chunks of [`CHUNK`] elements, one for each
//! block; a table in global memory has a row for each tensor, and a block finds its own by the number of the tensor's
//! first chunk. Nothing of a model is in a kernel's text.

mod adamw;
mod add;
pub mod dynamic;
mod norm;
mod rows;

pub use norm::BESIDE_NORM;
pub use rows::{CHUNK, Row, State, chunks, kind};

use super::Device;
use super::params::{self, Argument, names};
use super::plan::Step;
use crate::ptx::{Half, Source};

/// Threads of a block.
const THREADS: u32 = 256;

/// What is done to each tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// A step of AdamW.
    AdamW(Moments),
    /// The norm of all gradients together, and the factor that clips it.
    Norm,
    /// Gradients are added to f32 sums, or begin them.
    Accumulate,
    /// Gradients times a factor, in their own types or rounded to one.
    Scale(Option<Half>),
}

/// How the moments are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moments {
    /// In f32.
    F32,
    /// In codes of eight bits, with an f32 scale for each block of [`dynamic::BLOCK`].
    Bits8,
}

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// What is done.
    pub task: Task,
    /// Chunks of all tensors together, at least 1.
    pub chunks: u64,
    /// Tensors, at least 1.
    pub tensors: u64,
    /// Whether AdamW takes gradients times a factor that is in memory.
    pub clipped: bool,
}

impl Problem {
    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self) -> Option<(String, u32)> {
        let most = i32::MAX as u32;
        let over = self.chunks > most.into() || self.tensors > most.into();
        over.then(|| {
            (
                format!("{} chunks of {CHUNK} elements in {} tensors", self.chunks, self.tensors),
                most,
            )
        })
    }
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Config {
    /// A step of AdamW.
    AdamW {
        /// How the moments are kept.
        moments: Moments,
        /// Whether gradients are taken times a factor that is in memory.
        clipped: bool,
    },
    /// The sum of the squares of each chunk.
    Squares,
    /// The norm of all chunks, and the factor.
    Norm,
    /// Gradients added to sums.
    Accumulate,
    /// Gradients times a factor, in their own types or rounded to one.
    Scale(Option<Half>),
}

impl Config {
    /// `adamw f32, clipped`
    pub fn name(&self) -> String {
        match self {
            Self::AdamW { moments, clipped } => {
                let moments = match moments {
                    Moments::F32 => "f32",
                    Moments::Bits8 => "bits8",
                };
                format!("adamw {moments}, {}", if *clipped { "clipped" } else { "plain" })
            }
            Self::Squares => "gradients squares, f32".into(),
            Self::Norm => "gradients norm, f32".into(),
            Self::Accumulate => "gradients accumulate, f32".into(),
            Self::Scale(None) => "gradients scale, same".into(),
            Self::Scale(Some(half)) => format!("gradients scale, {}", half.name()),
        }
    }
}

/// The kernels and their grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    task: Task,
    clipped: bool,
    chunks: u32,
    tensors: u32,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let Problem { task, clipped, .. } = *problem;
        let [chunks, tensors] = [problem.chunks, problem.tensors].map(super::plan::count);
        Self { task, clipped, chunks, tensors }
    }

    fn steps(&self) -> Vec<Step> {
        let step = |kernel: Config, blocks| Step { kernel: kernel.into(), grid: [blocks, 1, 1] };
        match self.task {
            Task::AdamW(moments) => {
                vec![step(Config::AdamW { moments, clipped: self.clipped }, self.chunks)]
            }
            Task::Norm => vec![step(Config::Squares, self.chunks), step(Config::Norm, 1)],
            Task::Accumulate => vec![step(Config::Accumulate, self.chunks)],
            Task::Scale(to) => vec![step(Config::Scale(to), self.chunks)],
        }
    }
}

names! {
    /// The parameters.
    pub enum Name {
        /// The address of the tensors' [`Row`]s.
        Rows "rows",
        /// Tensors.
        Tensors "tensors",
        /// AdamW: the address of the tensors' [`State`]s.
        States "states",
        /// AdamW with moments of eight bits: the address of the [code books](dynamic::tables).
        Books "books",
        /// The address of the norm and, after it, the factor of all gradients.
        Clip "clip",
        /// What gradients are multiplied with.
        Scale "scale",
        /// The norm that is not clipped.
        MaxNorm "max_norm",
        /// The address of the chunks' sums of squares.
        Partials "partials",
        /// Chunks.
        Chunks "chunks",
        /// The decay of the first moment.
        Beta1 "beta1",
        /// The gradient's part of it, 1 − β₁.
        Rest1 "rest1",
        /// The decay of the second moment.
        Beta2 "beta2",
        /// The squared gradient's part of it, 1 − β₂.
        Rest2 "rest2",
        /// What is added to the root of the second moment.
        Epsilon "epsilon",
    }
}

/// The numbers of AdamW that all tensors share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Betas {
    /// β₁ and 1 − β₁.
    pub first: [f32; 2],
    /// β₂ and 1 − β₂.
    pub second: [f32; 2],
    /// ε.
    pub epsilon: f32,
}

/// One launch. What its task does not take may be anything.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// The kernels.
    pub plan: &'a Plan,
    /// The address of the rows.
    pub rows: u64,
    /// The address of the states.
    pub states: u64,
    /// The address of the code books.
    pub books: u64,
    /// The address of the norm and the factor.
    pub clip: u64,
    /// The address of the chunks' sums of squares.
    pub partials: u64,
    /// What gradients are multiplied with.
    pub scale: f32,
    /// The norm that is not clipped.
    pub max_norm: f32,
    /// AdamW's numbers.
    pub betas: Betas,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let Betas { first, second, epsilon } = self.betas;
        Some(match name {
            Name::Rows => Argument::Pointer(self.rows),
            Name::Tensors => Argument::U32(self.plan.tensors),
            Name::States => Argument::Pointer(self.states),
            Name::Books => Argument::Pointer(self.books),
            Name::Clip => Argument::Pointer(self.clip),
            Name::Scale => Argument::F32(self.scale),
            Name::MaxNorm => Argument::F32(self.max_norm),
            Name::Partials => Argument::Pointer(self.partials),
            Name::Chunks => Argument::U32(self.plan.chunks),
            Name::Beta1 => Argument::F32(first[0]),
            Name::Rest1 => Argument::F32(first[1]),
            Name::Beta2 => Argument::F32(second[0]),
            Name::Rest2 => Argument::F32(second[1]),
            Name::Epsilon => Argument::F32(epsilon),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    match *config {
        Config::AdamW { moments, clipped } => adamw::emit(moments, clipped),
        Config::Squares => norm::emit_squares(),
        Config::Norm => norm::emit_norm(),
        Config::Accumulate => add::emit_accumulate(),
        Config::Scale(to) => add::emit_scale(to),
    }
}
