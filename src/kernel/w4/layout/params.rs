//! The parameters, and their values.

use super::Problem;
use crate::kernel::params::{self, Argument, names};
use crate::kernel::plan::count;

names! {
    /// The parameters.
    pub enum Name {
        /// Plain codes: the address of `[⌈K/8⌉, N]`.
        Plain "plain",
        /// Elements from row to row.
        PlainRow "plain_row",
        /// Elements from column to column.
        PlainCol "plain_col",
        /// Packed ones, at a multiple of 16.
        Codes "codes",
        /// Scales: the address of `[groups, N]`.
        Scales "scales",
        /// Elements from row to row.
        ScaleLine "scale_line",
        /// Zero points: the address of `[groups, N]`.
        Zeros "zeros",
        /// Elements from row to row.
        ZeroLine "zero_line",
        /// The address of the result.
        Out "out",
        /// Elements from row to row of a result that is one.
        OutLine "out_line",
        /// Rows of the weight.
        K "k",
        /// Columns of the weight.
        N "n",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments {
    /// What is computed.
    pub problem: Problem,
    /// The address of plain codes, from which or to which, and elements from row to row and from column to column.
    pub plain: Option<(u64, [u64; 2])>,
    /// That of packed ones.
    pub codes: u64,
    /// Address and elements from row to row.
    pub scales: Option<(u64, u64)>,
    /// Likewise, in the order of [the packed form](crate::kernel::w4).
    pub zeros: Option<(u64, u64)>,
    /// The address of elements, and how many there are from row to row.
    pub out: Option<(u64, u64)>,
}

impl params::Arguments for Arguments {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let pointer = Argument::Pointer;
        match name {
            Name::Plain => self.plain.map(|(address, _)| pointer(address)),
            Name::PlainRow => self.plain.map(|(_, [row, _])| Argument::U64(row)),
            Name::PlainCol => self.plain.map(|(_, [_, col])| Argument::U64(col)),
            Name::Codes => Some(pointer(self.codes)),
            Name::Scales => self.scales.map(|(address, _)| pointer(address)),
            Name::ScaleLine => self.scales.map(|(_, line)| Argument::U64(line)),
            Name::Zeros => self.zeros.map(|(address, _)| pointer(address)),
            Name::ZeroLine => self.zeros.map(|(_, line)| Argument::U64(line)),
            Name::Out => self.out.map(|(address, _)| pointer(address)),
            Name::OutLine => self.out.map(|(_, line)| Argument::U64(line)),
            Name::K => Some(Argument::U32(count(self.problem.k))),
            Name::N => Some(Argument::U32(count(self.problem.n))),
        }
    }
}
