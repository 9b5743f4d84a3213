//! Sums of columns: of the blocks' parts of a weight's gradient.

use super::Name;
use crate::kernel::Element;
use crate::kernel::multiprocessor::WARP;
use crate::kernel::name::given;
use crate::kernel::rows::Unit;
use crate::ptx::{Kernel, Source, Target};

/// Warps of a block, which share its columns' parts.
const WARPS: u32 = 16;
/// Parts that a thread loads at once.
const TOGETHER: u32 = 8;

/// The choices of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Columns {
    /// The sums' type.
    pub element: Element,
    /// Whether there are two matrices of parts, one after the other, each with its sums.
    pub both: bool,
}

impl Columns {
    /// `norm columns, bf16 both`
    pub fn name(&self) -> String {
        format!("norm columns, {}{}", self.element.name(), given(self.both, " both"))
    }

    /// The grid for so many columns.
    pub fn grid(&self, cols: u64) -> [u64; 2] {
        [cols.div_ceil(WARP.into()), 1 + u64::from(self.both)]
    }
}

/// The kernel. A lane has a column.
pub fn emit(config: &Columns) -> Source {
    let &Columns { element, both } = config;
    let k = &Kernel::new("norm_columns", Target::Sm80, WARPS * WARP);
    let (parts, first) = (k.pointer(Name::Parts), k.pointer(Name::FirstSums));
    let second = both.then(|| k.pointer(Name::SecondSums));
    let (count, cols) = (k.param::<u32>(Name::Count), k.param::<u64>(Name::Cols));
    let shared = k.shared(WARPS * WARP * 4);

    let (thread, lane, cols) = (k.thread(), k.lane(), cols.low());
    let (warp, col) = (thread / WARP, k.block_x() * WARP + lane);
    let (parts, out) = match second {
        None => (parts, first),
        Some(second) => {
            let which = k.block_y();
            let before = (which * count).mul_wide(cols) * 4u64;
            (parts + before, k.select(which.eq(0), first, second))
        }
    };
    let (from, exists, row) = (parts.element(col, 4), col.lt(cols), cols.wide() * 4u64);
    let sum = k.var(0f32);
    k.for_(warp, count, WARPS * TOGETHER, |part| {
        let loaded: Vec<_> = (0..TOGETHER)
            .map(|i| {
                let part = part + i * WARPS;
                let (valid, at) = (exists & part.lt(count), from + part.wide() * row);
                let [x] = k.when(valid, || k.ld_global_nc::<f32, 1>(at));
                k.select(valid, x, 0.0)
            })
            .collect();
        loaded.into_iter().for_each(|x| sum.set(sum + x));
    });
    k.st_shared(shared + thread * 4, [sum]);
    k.sync_block();
    k.if_(thread.lt(WARP), || {
        let of_warps = (0..WARPS).map(|warp| {
            let [x] = k.ld_shared::<f32, 1>((shared + lane * 4).at((warp * WARP * 4).into()));
            x
        });
        let sum = of_warps.reduce(|a, b| a + b).expect("there are warps");
        let rounded = Unit { element, count: 1 }.round(k, &[sum]);
        let to = out.element(col, element.size());
        k.when(exists, || rounded.store(k, to));
    });
    k.finish()
}
