//! From the plain form of codes to the packed one, back, and to elements.
//!
//! A block of 128 threads has a block of codes.

mod elements;
mod params;
mod words;

pub use params::{Arguments, Name};

use super::{BLOCK, Codes, Scheme};
use crate::kernel::name::given;
use crate::kernel::plan::{self, count};
use crate::kernel::{Device, Element, Step};
use crate::ptx::Source;

/// Threads of a block.
const THREADS: u32 = 128;
/// The most blocks in y.
const MOST_COLUMNS: u64 = 65_535;

/// What is made of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Config {
    /// Packed codes of plain ones; past the end is this code.
    Pack {
        /// What they are codes of.
        codes: Codes,
        /// The code of zero.
        zero: u32,
        /// Whether plain codes are two's complement: packed ones are 8 more.
        signed: bool,
    },
    /// Plain codes of packed ones, row-major.
    Unpack {
        /// What they are codes of.
        codes: Codes,
    },
    /// Elements of packed codes.
    Elements {
        /// How the weight is quantised.
        scheme: Scheme,
        /// The elements' type.
        out: Element,
        /// Whether the result is `Wᵀ`, `[N, K]`, and not `W`.
        transposed: bool,
    },
}

impl Config {
    /// `w4layout elements int4 zeros g128, f16→bf16 nk`
    pub fn name(&self) -> String {
        match self {
            Self::Pack { codes, zero, signed } => {
                format!("w4layout pack {}{}, zero{zero}", codes.name(), given(*signed, " signed"))
            }
            Self::Unpack { codes } => format!("w4layout unpack {}, plain", codes.name()),
            Self::Elements { scheme, out, transposed } => {
                let order = if *transposed { "nk" } else { "kn" };
                let (scale, out, scheme) = (scheme.scale.name(), out.name(), scheme.name());
                format!("w4layout elements {scheme}, {scale}→{out} {order}")
            }
        }
    }
}

/// The kernel. Its parameters are those of [`Name`]; the grid has a block for each of the codes', along K in x.
pub fn emit(config: &Config) -> Source {
    match *config {
        Config::Pack { codes, zero, signed } => words::pack(codes, zero, signed),
        Config::Unpack { codes } => words::unpack(codes),
        Config::Elements { scheme, out, transposed } => elements::emit(&scheme, out, transposed),
    }
}

/// A weight, none of whose dimensions is 0, and what is made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows.
    pub k: u64,
    /// Columns.
    pub n: u64,
    /// What is made of what.
    pub config: Config,
}

impl Problem {
    /// What is beyond what kernels can count, and the most that they can.
    pub fn limit(&self) -> Option<(String, u64)> {
        let most = MOST_COLUMNS * u64::from(BLOCK);
        let sizes = [("K", self.k, 1 << 30), ("N", self.n, most)];
        let over = sizes.into_iter().find(|&(_, size, most)| size > most);
        over.map(|(name, size, most)| (format!("{name} of {size}"), most))
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    config: Config,
    blocks: [u32; 2],
}

impl plan::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let blocks = [problem.k, problem.n].map(|len| count(len.div_ceil(BLOCK.into())));
        Self { config: problem.config, blocks }
    }

    fn steps(&self) -> Vec<Step> {
        let [x, y] = self.blocks;
        vec![Step { kernel: self.config.into(), grid: [x, y, 1] }]
    }
}
