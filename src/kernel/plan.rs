//! Plans: from the facts of a problem to launches, as a pure function of each family of kernels.

use super::params::Names;
use super::{Config, Device};

/// A launch: a kernel, and the blocks of its grid in x, y and z.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The kernel.
    pub kernel: Config,
    /// Blocks.
    pub grid: [u32; 3],
}

/// The kernels that a family takes for a problem, in their order, and the numbers of their launches.
pub trait Plan: Sized {
    /// The facts.
    type Problem;
    /// The names of the parameters of its kernels.
    type Name: Names;

    /// What is chosen for a problem on a device.
    fn new(problem: &Self::Problem, device: &Device) -> Self;

    /// What is launched.
    fn steps(&self) -> Vec<Step>;
}

/// A number of blocks or tiles as kernels count them. What is beyond is refused before a plan is made.
pub(super) fn count(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// What of a weight is beyond what kernels count that take its columns along y, by `threads` in a block, and the most that they
/// do: elements, and columns.
pub(super) fn weight_limit(
    [rows, cols]: [u64; 2],
    threads: u32,
    most: u32,
) -> Option<(String, u32)> {
    // What the second dimension of a grid reaches.
    let widest = 65_535 * threads;
    if cols > widest.into() {
        return Some((format!("{cols} columns"), widest));
    }
    let over = rows.saturating_mul(cols) > most.into();
    over.then(|| (format!("a weight of {rows} x {cols} elements"), most))
}
