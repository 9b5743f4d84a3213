//! Problems beyond what the kernels count.

use std::fmt::Display;

use candle_core::Result;

use crate::error::Error;

/// What helps against most of them.
pub(super) const SPLIT: &str = "split it and join the results with `Tensor::cat`";

/// The error for a problem with a `limit`: what it has too much of, and the most that there may be. `cannot` says who is
/// at its end, and what it cannot do.
pub(super) fn countable(
    op: &'static str,
    cannot: [&str; 2],
    limit: Option<(String, impl Display)>,
    fix: &str,
) -> Result<()> {
    let Some((got, most)) = limit else { return Ok(()) };
    let [what, take] = cannot;
    let limit = format!("cannot {take} {got} (at most {most})");
    Err(Error::Unsupported { op, what: what.into(), limit, fix: fix.into() }.into())
}
