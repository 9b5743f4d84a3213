//! Sums of rows whose ids are sorted. A block has a part of them, and some columns: what begins and ends there is stored, what
//! goes on in another part is left in f32.

use super::Name;
use crate::kernel::rows::Unit;
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block.
pub const THREADS: u32 = 128;
/// Sorted rows of a part.
pub const PART: u32 = 64;
/// Rows, or sums, on their way together.
const TOGETHER: u32 = 8;

/// What both kernels know.
struct Part<'k> {
    k: &'k Kernel,
    unit: Unit,
    keys: Reg<'k, u64>,
    partial: Reg<'k, u64>,
    out: Reg<'k, u64>,
    rows: Reg<'k, u32>,
    cols: Reg<'k, u32>,
    classes: Reg<'k, u32>,
    number: Reg<'k, u32>,
    col: Reg<'k, u32>,
    exists: Reg<'k, bool>,
}

impl<'k> Part<'k> {
    fn declare(k: &'k Kernel, unit: Unit) -> Self {
        let (keys, partial) = (k.pointer(Name::Keys), k.pointer(Name::Partial));
        let out = k.pointer(Name::Out);
        let [rows, cols, classes, units, across] =
            [Name::Rows, Name::Cols, Name::Classes, Name::Units, Name::Across]
                .map(|name| k.param::<u32>(name));
        let block = k.block_x();
        let at = block % across * THREADS + k.thread();
        let (number, col) = (block / across, at * unit.count);
        Self { k, unit, keys, partial, out, rows, cols, classes, number, col, exists: at.lt(units) }
    }

    fn key(&self, at: Reg<'k, u32>) -> Reg<'k, u32> {
        self.k.ld_global_nc::<u32, 1>(self.keys.element(at, 4))[0]
    }

    /// Whether the row at a place has this key, and is one.
    fn goes_on(&self, at: Reg<'k, u32>, key: Reg<'k, u32>) -> Reg<'k, bool> {
        let inside = at.lt(self.rows);
        inside & self.key(at.min(self.rows - 1)).eq(key)
    }

    /// The sums of a part's first key, which began before it, or of its last one, which goes on after it.
    fn partial(&self, part: Reg<'k, u32>, last: u32) -> Reg<'k, u64> {
        let row = (part * 2 + last).wide() * self.cols.wide();
        self.partial + (row + self.col.wide()) * 4u64
    }

    fn store(&self, key: Reg<'k, u32>, sums: &[Reg<'k, f32>]) {
        self.k.if_(key.lt(self.classes), || {
            let row = key.wide() * self.cols.wide() + self.col.wide();
            self.unit.store(self.out + row * u64::from(self.unit.element.size()), sums);
        });
    }
}

/// Its partial sums.
fn floats(unit: Unit) -> Unit {
    Unit { element: crate::kernel::Element::F32, ..unit }
}

/// The sums of a part's keys.
pub fn emit(unit: Unit) -> Source {
    let k = &Kernel::new("embedding_sum", Target::Sm80, THREADS);
    let part = Part::declare(k, unit);
    let (grads, grads_row) = (k.pointer(Name::Grads), k.param::<u64>(Name::GradsRow));
    let places = k.pointer(Name::Places);
    k.if_(part.exists, || {
        let first = part.number * PART;
        let end = (first + PART).min(part.rows);
        let key = k.var(part.key(first));
        // Whether the key's rows began in another part.
        let before = (first.max(1) - 1).min(part.rows - 1);
        let began = first.gt(0) & part.key(before).eq(key);
        let began = k.var(k.select(began, k.var(1u32), 0));
        let sums: Vec<_> = (0..unit.count).map(|_| k.var(0f32)).collect();
        let load = |at| {
            let [place] = k.ld_global_nc::<u32, 1>(places.element(at, 4));
            let row = place.wide() * grads_row + part.col.wide();
            (part.key(at), unit.load(k, grads + row * u64::from(unit.element.size())))
        };
        let add = |next: Reg<'_, u32>, row: Vec<Reg<'_, f32>>| {
            k.if_(next.ne(key), || {
                k.if_else(
                    began.ne(0),
                    || floats(unit).store(part.partial(part.number, 0), &sums),
                    || part.store(key, &sums),
                );
                sums.iter().for_each(|sum| sum.set(0f32));
                key.set(next);
                began.set(0u32);
            });
            sums.iter().zip(row).for_each(|(sum, x)| sum.increase(x));
        };
        let at = k.var(first);
        k.loop_(|exit| {
            exit.when((at + TOGETHER).gt(end));
            let loaded: Vec<_> = (0..TOGETHER).map(|i| load(at + i)).collect();
            loaded.into_iter().for_each(|(key, row)| add(key, row.floats()));
            at.increase(TOGETHER);
        });
        k.for_(at, end, 1u32, |at| {
            let (key, row) = load(at);
            add(key, row.floats());
        });
        let goes_on = part.goes_on(end, key);
        let began = began.ne(0);
        k.if_(began, || floats(unit).store(part.partial(part.number, 0), &sums));
        k.if_(!began & goes_on, || floats(unit).store(part.partial(part.number, 1), &sums));
        k.if_(!began & !goes_on, || part.store(key, &sums));
    });
    k.finish()
}

/// The sums of keys whose rows begin in a part, and go on after it.
pub fn emit_join(unit: Unit) -> Source {
    let k = &Kernel::new("embedding_join", Target::Sm80, THREADS);
    let part = Part::declare(k, unit);
    k.if_(part.exists, || {
        let first = part.number * PART;
        let end = (first + PART).min(part.rows);
        let key = part.key(end - 1);
        let before = (first.max(1) - 1).min(part.rows - 1);
        let began = first.gt(0) & part.key(before).eq(key);
        k.if_(part.goes_on(end, key) & !began, || {
            let sums = floats(unit).load(k, part.partial(part.number, 1)).floats();
            let next = k.var(part.number + 1);
            k.loop_(|exit| {
                let mut last = None;
                let loaded: Vec<_> = (0..TOGETHER)
                    .map(|i| {
                        let number = next + i;
                        let more = part.goes_on(number * PART, key);
                        last = Some(more);
                        let from = part.partial(number, 0);
                        (more, k.when(more, || floats(unit).load(k, from)))
                    })
                    .collect();
                for (more, row) in loaded {
                    for (&sum, x) in sums.iter().zip(row.floats()) {
                        sum.increase(k.select(more, x, 0.0));
                    }
                }
                next.increase(TOGETHER);
                exit.when(!last.expect("some are together"));
            });
            part.store(key, &sums);
        });
    });
    k.finish()
}
