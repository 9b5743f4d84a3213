//! Rows of a table by their ids, and the gradient of the table: ids are sorted, and the rows of each added in their order, so
//! that sums are the same each time.

mod gather;
mod params;
mod plan;
mod sort;
mod sums;

pub use params::{Arguments, Name};
pub use plan::{Buffers, Plan, Problem};

use super::Element;
use super::rows::Unit;
use crate::ptx::{Kernel, Reg, Source};

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Config {
    /// Rows of the table.
    Gather {
        /// Their type.
        element: Element,
        /// Whether ids have 64 bits.
        wide: bool,
        /// Elements that a thread copies at once.
        unit: u32,
        /// Threads of a row: a power of two.
        across: u32,
    },
    /// How often each digit occurs in a block's keys, or where these go.
    Sort {
        /// Whether keys go there.
        scatter: bool,
        /// Where keys come from.
        keys: Keys,
    },
    /// Where the keys with each digit begin, of all blocks.
    Scan,
    /// The sums of rows with one id in a part of the sorted ones.
    Sum {
        /// The rows' type.
        element: Element,
        /// Elements of a thread.
        unit: u32,
    },
    /// The sums of ids whose rows are in several parts.
    Join {
        /// The rows' type.
        element: Element,
        /// Elements of a thread.
        unit: u32,
    },
}

/// Where keys come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Keys {
    /// From ids, of 64 bits or 32.
    Ids {
        /// Whether they have 64 bits.
        wide: bool,
    },
    /// From the pass before.
    Sorted,
}

impl Config {
    /// `embedding gather x8 across128, bf16 i64`
    pub fn name(&self) -> String {
        let id = |wide| if wide { "i64" } else { "u32" };
        match *self {
            Self::Gather { element, wide, unit, across } => {
                let (element, id) = (element.name(), id(wide));
                format!("embedding gather x{unit} across{across}, {element} {id}")
            }
            Self::Sort { scatter, keys } => {
                let what = if scatter { "scatter" } else { "count" };
                let keys = match keys {
                    Keys::Ids { wide } => id(wide),
                    Keys::Sorted => "keys",
                };
                format!("embedding {what}, {keys}")
            }
            Self::Scan => "embedding scan, counts".into(),
            Self::Sum { element, unit } => format!("embedding sum x{unit}, {}", element.name()),
            Self::Join { element, unit } => format!("embedding join x{unit}, {}", element.name()),
        }
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    match *config {
        Config::Gather { element, wide, unit, across } => {
            gather::emit(Unit { element, count: unit }, wide, across)
        }
        Config::Sort { scatter, keys } => sort::emit(scatter, keys),
        Config::Scan => sort::emit_scan(),
        Config::Sum { element, unit } => sums::emit(Unit { element, count: unit }),
        Config::Join { element, unit } => sums::emit_join(Unit { element, count: unit }),
    }
}

/// The id at a place, or the number of rows of the table for one that has no row.
fn id<'k>(
    k: &'k Kernel,
    wide: bool,
    ids: Reg<'k, u64>,
    at: Reg<'k, u32>,
    classes: Reg<'k, u32>,
) -> Reg<'k, u32> {
    match wide {
        false => k.ld_global_nc::<u32, 1>(ids.element(at, 4))[0].min(classes),
        true => {
            let [id] = k.ld_global_nc::<u64, 1>(ids.element(at, 8));
            let low = id.low();
            let short = !low.wide().ne(id);
            k.select(short, low.min(classes), classes)
        }
    }
}
