//! What the benches of one op on a GPU share: [`args`] is their command line, a [`table`] has a line for
//! each row, in a row [`contest`]ants take [`turns`] on a [`gpu`], and [`race`] runs all rows.

pub mod args;
pub mod contest;
pub mod gpu;
pub mod race;
pub mod table;
pub mod turns;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
