//! Adds the partial sums of a split.

use super::Config;
use crate::kernel::gemm::result::TileOfResult;
use crate::kernel::gemm::terms::{Sum, Terms, add};
use crate::kernel::gemm::{Epilogue, Name};
use crate::kernel::name::given;
use crate::ptx::{Factor, Kernel, Source, Target};

/// The choices for the kernel that adds partial sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reduce {
    /// Partial sums of each element.
    pub split: u32,
    /// Elements of a thread: 4 or 1, a divisor of the columns of `C`.
    pub unit: u32,
    /// Whether the sums are i32, not f32.
    pub integers: bool,
    /// What is done to a sum before it is stored.
    pub epilogue: Epilogue,
}

impl Reduce {
    /// Threads of a block.
    pub const THREADS: u32 = 128;

    /// `sm80 reduce split3 unit4 s32, →f32 +bf16 relu`
    pub fn name(&self) -> String {
        let Self { split, unit, integers, epilogue } = self;
        let integers = given(*integers, " s32");
        format!("sm80 reduce split{split} unit{unit}{integers}, {}", epilogue.name())
    }

    /// Columns of a block.
    pub fn cols(&self) -> u32 {
        Self::THREADS * self.unit
    }

    /// The grid for so many rows and columns.
    pub fn grid(&self, [rows, cols]: [u32; 2]) -> [u32; 3] {
        [rows, cols.div_ceil(self.cols()), 1]
    }
}

impl Config {
    /// The kernel that follows a split one.
    pub fn reduce(&self) -> Option<Reduce> {
        let Self { split, unit, epilogue, .. } = *self;
        let integers = self.factor() == Factor::S8;
        (split > 1).then_some(Reduce { split, unit, integers, epilogue })
    }
}

/// The kernel that adds partial sums in the order of the split, so that results are the same each time.
/// The grid has a block for each row of all products in x, and one for each [`Reduce::cols`] in y.
///
/// Its parameters are those of [`Name`].
pub fn emit_reduce(config: &Reduce) -> Source {
    match config.integers {
        false => emit_sums::<f32>(config),
        true => emit_sums::<i32>(config),
    }
}

fn emit_sums<S: Sum>(config: &Reduce) -> Source {
    let k = &Kernel::new("matmul_reduce", Target::Sm80, Reduce::THREADS);
    // Without a number ptxas aims at so few registers that it spills.
    k.blocks_per_sm(4);
    let (partial, out) = (k.pointer(Name::Partial), k.pointer(Name::Out));
    let terms = Terms::params(k, config.epilogue);
    let (rows, cols) = (k.param::<u32>(Name::Rows), k.param::<u32>(Name::Cols));
    let row = k.block_x();
    let col = (k.block_y() * Reduce::THREADS + k.thread()) * config.unit;
    k.if_(col.lt(cols), || {
        let index = row.wide() * cols.wide() + col.wide();
        let part_bytes = rows.wide() * cols.wide() * 4u64;
        let at = k.var(partial + index * 4u64);
        let parts: Vec<Vec<_>> = (0..config.split)
            .map(|part| {
                if part > 0 {
                    at.increase(part_bytes);
                }
                match config.unit {
                    4 => k.ld_global_nc::<S, 4>(at).to_vec(),
                    _ => k.ld_global_nc::<S, 1>(at).to_vec(),
                }
            })
            .collect();
        let sums = add(parts).expect("there is a part");
        let (zero, first) = (k.var(0u32), (k.var(0u32), k.var(0u32)));
        let result = TileOfResult { terms, out, rows, cols, first, batch: zero };
        result.store(&sums, row, col, None);
    });
    k.finish()
}
