//! From sums to gradients in memory.

use super::Gradients;
use super::config::{KeySums, Pass};
use super::pass::{Lane, Thread, plus};
use crate::kernel::Element;
use crate::kernel::ampere::product::M16;
use crate::kernel::ampere::store::{store_row, store_tf32x3_row};
use crate::kernel::attention::Name;
use crate::kernel::attention::backward::work::WorkTile;
use crate::ptx::{Kernel, Reg, Value};

/// A gradient, in elements.
#[derive(Clone, Copy)]
pub(super) struct Destination<'k> {
    address: Reg<'k, u64>,
    row: Reg<'k, u64>,
    head: Reg<'k, u64>,
    batch: Reg<'k, u64>,
    /// What sums are multiplied with.
    scale: Option<Reg<'k, f32>>,
}

impl<'k> Destination<'k> {
    /// Declares the parameters of what a pass sums.
    pub fn params(k: &'k Kernel, pass: Pass) -> [Option<Self>; 2] {
        let dq = [Name::DqAt, Name::DqRow, Name::DqHead, Name::DqBatch];
        let dk = [Name::DkAt, Name::DkRow, Name::DkHead, Name::DkBatch];
        let dv = [Name::DvAt, Name::DvRow, Name::DvHead, Name::DvBatch];
        let [scaled, plain] = match pass {
            Pass::Queries => [Some(dq), None],
            Pass::Keys(KeySums::All | KeySums::Both) => [Some(dk), Some(dv)],
            Pass::Keys(KeySums::Keys) => [Some(dk), None],
            Pass::Keys(KeySums::Values) => [None, Some(dv)],
            Pass::Bias { .. } => [None, None],
        };
        let destination = |[at, row, head, batch]: [Name; 4]| Self {
            address: k.pointer(at),
            row: k.param(row),
            head: k.param(head),
            batch: k.param(batch),
            scale: None,
        };
        let scale = scaled.map(|_| k.param(Name::GradScale));
        let scaled = scaled.map(|names| Self { scale, ..destination(names) });
        [scaled, plain.map(destination)]
    }
}

impl<'k> Gradients<'k, '_> {
    /// Stores a tile's gradients. Those of what only pads a tensor are 0.
    pub(super) fn store(&self, t: &Thread<'k>, work: &WorkTile<'k>) {
        let (c, side) = (self.c, self.c.pass.side());
        let (lane, span) = (Lane::new(self.k), work.span(side));
        for (m16, block) in t.m16_tiles.iter().zip(0..) {
            for h in 0..2 {
                let row = work.first + (lane.row(c) + (M16 * block + 8 * h)).cast();
                let (inside, some) = self.tiles.stored(side, row, span.count);
                for (i, out) in self.out.iter().enumerate() {
                    let Some(out) = out else { continue };
                    let value = |&sum: &Reg<'k, f32>| {
                        let value = out.scale.map_or(sum, |scale| sum * scale);
                        some.map_or(value, |some| self.k.select(some, value, 0.0))
                    };
                    let of_row = m16.sums[i].chunks(4).map(|quad| &quad[2 * h as usize..][..2]);
                    let pairs: Vec<_> =
                        of_row.map(|pair| [value(&pair[0]), value(&pair[1])]).collect();
                    // The second of paired warps has the second half of the columns.
                    let columns = c.sum_columns()[i];
                    let before = lane.second(c, columns);
                    let at = |col: Reg<'k, u32>| {
                        let col = plus(col, before);
                        let at = work.batch.wide() * out.batch + work.head.wide() * out.head;
                        let at = at + span.at(row).wide() * out.row + col.wide();
                        out.address + at * u64::from(c.element.size())
                    };
                    match c.element {
                        Element::Half(_) => store_row(c.element, &pairs, lane.lane, inside, at),
                        Element::F32 => {
                            let dim = c.dims()[i].next_multiple_of(8);
                            let dim = match before {
                                None => Value::Literal(dim),
                                Some(before) => Value::Reg(self.k.var(dim) - before),
                            };
                            store_tf32x3_row(dim, &pairs, lane.lane, inside, at);
                        }
                    }
                }
            }
        }
    }
}
