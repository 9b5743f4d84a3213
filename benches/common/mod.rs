//! What the benches of one op on a GPU share: [`args`] is their command line, a [`table`] has a line for
//! each row, in a row [`contest`]ants take [`turns`] on a [`gpu`], and [`race`] runs all rows.

pub mod args;
pub mod contest;
pub mod gpu;
pub mod race;
pub mod table;
pub mod turns;

use std::time::{SystemTime, UNIX_EPOCH};

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The date in UTC: a figure without one is worth little.
pub fn today() -> String {
    let mut days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs() / 86_400);
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", days + 1)
}
