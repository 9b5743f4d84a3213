//! Rows of a table.

use super::{Name, id};
use crate::kernel::rows::{Place, Unit};
use crate::ptx::{Kernel, Source, Target};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// An id that has no row gives NaN.
pub fn emit(unit: Unit, wide: bool, across: u32) -> Source {
    let k = &Kernel::new("embedding_gather", Target::Sm80, THREADS);
    let (table, table_row) = (k.pointer(Name::Table), k.param::<u64>(Name::TableRow));
    let (ids, out) = (k.pointer(Name::Ids), k.pointer(Name::Out));
    let [rows, cols, classes, units, blocks] =
        [Name::Rows, Name::Cols, Name::Classes, Name::Units, Name::Across]
            .map(|name| k.param::<u32>(name));
    let (thread, block) = (k.thread(), k.block_x());
    let row = block / blocks * (THREADS / across) + thread / across;
    let at = block % blocks * across + thread % across;
    k.if_(row.lt(rows), || {
        k.if_(at.lt(units), || {
            let id = id(k, wide, ids, row, classes);
            let (col, element) = ((at * unit.count).wide(), unit.element);
            let to = Place { row: row.wide(), col, element }.in_rows(out, cols.wide());
            let from = Place { row: id.wide(), col, element }.in_rows(table, table_row);
            k.if_else(
                id.lt(classes),
                || unit.store(to, &unit.load(k, from).floats()),
                || unit.store(to, &vec![k.var(f32::NAN); unit.count as usize]),
            );
        });
    });
    k.finish()
}
