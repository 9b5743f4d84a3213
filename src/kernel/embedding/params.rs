//! Parameters of the kernels.

use super::plan::{Plan, Problem};
use super::sort::DIGIT;
use crate::kernel::params::{self, Argument, names};
use crate::kernel::plan::count;

names! {
    /// The parameters. Strides are in elements.
    pub enum Name {
        /// The address of the table.
        Table "table",
        /// From row to row.
        TableRow "table_row",
        /// The address of the ids.
        Ids "ids",
        /// The address of the rows of the table that are asked for, or of its gradient, without gaps.
        Out "out",
        /// Ids.
        Rows "rows",
        /// Elements of a row.
        Cols "cols",
        /// Rows of the table.
        Classes "classes",
        /// Units of a row.
        Units "units",
        /// Blocks of a row.
        Across "across",
        /// The address of the keys that are read: ids, or what a pass of the sort left.
        Keys "keys",
        /// The address of the places that keys had among the ids.
        Places "places",
        /// The address of the keys of the next pass.
        KeysTo "keys_to",
        /// The address of their places.
        PlacesTo "places_to",
        /// The address of the counts of digits, and then of where these begin.
        Counts "counts",
        /// The digit's first bit.
        Shift "shift",
        /// Blocks of the sort.
        SortBlocks "sort_blocks",
        /// The address of the rows' gradients.
        Grads "grads",
        /// From row to row.
        GradsRow "grads_row",
        /// The address of the sums of keys whose rows are in several parts.
        Partial "partial",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// By which kernels.
    pub plan: &'a Plan,
    /// The address of the ids.
    pub ids: u64,
    /// The address of the table, or of the rows' gradients, and elements from row to row.
    pub operand: (u64, u64),
    /// The address of the result.
    pub out: u64,
    /// The addresses of two sets of keys, of two of places, of counts and of partial sums.
    pub buffers: Option<[u64; 6]>,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, step: usize, name: Name) -> Option<Argument> {
        let Self { problem, plan, ids, operand, out, buffers } = *self;
        // A pass of the sort is three steps, and its keys are those of the pass before.
        let pass = (step / 3).min(plan.passes());
        let buffer = |i: usize| buffers.map(|all| Argument::Pointer(all[i]));
        Some(match name {
            Name::Table | Name::Grads => Argument::Pointer(operand.0),
            Name::TableRow | Name::GradsRow => Argument::U64(operand.1),
            Name::Ids => Argument::Pointer(ids),
            Name::Out => Argument::Pointer(out),
            Name::Rows => Argument::U32(count(problem.rows)),
            Name::Cols => Argument::U32(count(problem.cols)),
            Name::Classes => Argument::U32(count(problem.classes)),
            Name::Units => Argument::U32(plan.units()),
            Name::Across => Argument::U32(plan.across()),
            Name::Keys if pass == 0 => Argument::Pointer(ids),
            Name::Keys => buffer((pass - 1) % 2)?,
            Name::Places => buffer(2 + (pass.max(1) - 1) % 2)?,
            Name::KeysTo => buffer(pass % 2)?,
            Name::PlacesTo => buffer(2 + pass % 2)?,
            Name::Counts => buffer(4)?,
            Name::Partial => buffer(5)?,
            Name::Shift => Argument::U32(pass as u32 * DIGIT),
            Name::SortBlocks => Argument::U32(plan.sort_blocks()),
        })
    }
}
