//! What a kernel is given of a weight, or of each of several.

use super::nibbles::Zero;
use super::params::{WEIGHTS, WeightNames};
use super::{INTERLEAVED, Scheme};
use crate::kernel::Element;
use crate::kernel::gemm::Name;
use crate::ptx::{Kernel, Reg};

/// A weight in memory, and where its product goes.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Weight<'k> {
    scheme: Scheme,
    pub codes: Reg<'k, u64>,
    /// Of bytes that are found by their address: from column to column.
    pub codes_line: Option<Reg<'k, u64>>,
    pub scales: Rows<'k>,
    /// Of bytes whose columns have one each, or all the same: from one to the next.
    scale_step: Option<Reg<'k, u32>>,
    pub zeros: Option<Rows<'k>>,
    /// Columns.
    pub n: Reg<'k, u32>,
    /// The address of the product, or its descriptor.
    pub out: Reg<'k, u64>,
}

/// Scales or zero points: a row for each group.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Rows<'k> {
    pub address: Reg<'k, u64>,
    /// Elements from row to row.
    pub line: Reg<'k, u64>,
    /// Bytes of an element.
    pub size: u32,
}

/// When a load is to be done.
#[derive(Clone, Copy)]
pub(in crate::kernel) enum Load {
    /// Where the assembler likes: nothing writes what is loaded.
    Anywhere,
    /// Before the next barrier. ptxas moves others behind it.
    BeforeBarrier,
}

impl<'k> Rows<'k> {
    fn params(k: &'k Kernel, [address, line]: [Name; 2], size: u32) -> Self {
        Self { address: k.pointer(address), line: k.param(line), size }
    }

    /// These if it holds, else others.
    fn or(self, other: Self, holds: Reg<'k, bool>) -> Self {
        let k = holds.kernel();
        Self {
            address: k.select(holds, self.address, other.address),
            line: k.select(holds, self.line, other.line),
            ..self
        }
    }

    /// The zero point of the only group of a column.
    pub fn column_zero(&self, column: Reg<'k, u32>) -> Zero<'k> {
        let at = self.address + zero_place(column).wide();
        Zero { bytes: column.kernel().ld_global_u8(at), byte: 0 }
    }

    /// Where column `column` of a group is: of zero points, one at which 16 begin.
    pub fn at(&self, group: Reg<'k, u32>, column: Reg<'k, u32>) -> Reg<'k, u64> {
        self.address + (group.wide() * self.line + column.wide()) * u64::from(self.size)
    }
}

impl<'k> Weight<'k> {
    /// Declares the parameters of `count` weights. `codes` and `out` declare those of codes and of results.
    pub fn params(
        k: &'k Kernel,
        scheme: Scheme,
        count: u32,
        codes: impl Fn(&WeightNames) -> (Reg<'k, u64>, Option<Reg<'k, u64>>),
        out: impl Fn(Name) -> Reg<'k, u64>,
    ) -> Vec<Self> {
        let whole = scheme.codes.are_bytes() && scheme.group.is_none();
        let params = |names: &WeightNames| {
            let (codes, codes_line) = codes(names);
            Self {
                scheme,
                codes,
                codes_line,
                scales: Rows::params(k, names.scales, scheme.scale.size()),
                scale_step: whole.then(|| k.param(names.scale_step)),
                zeros: scheme.zeros.then(|| Rows::params(k, names.zeros, 1)),
                n: k.param(names.n),
                out: out(names.out),
            }
        };
        WEIGHTS[..count as usize].iter().map(params).collect()
    }

    /// The one of `all` that has line `line`, if each has a line for every `cols` of its columns, and which of its own
    /// that is.
    pub fn of_line(all: &[Self], line: Reg<'k, u32>, cols: u32) -> (Self, Reg<'k, u32>) {
        let (mut of, mut own) = (all[0], line);
        let mut before = None;
        for both in all.windows(2) {
            let lines = both[0].n.div_ceil(cols);
            let first = before.map_or(lines, |before| before + lines);
            let further = line.ge(first);
            of = both[1].or(of, further);
            own = line.kernel().select(further, line - first, own);
            before = Some(first);
        }
        (of, own)
    }

    /// This one if it holds, else another.
    pub fn or(self, other: Self, holds: Reg<'k, bool>) -> Self {
        let k = holds.kernel();
        let both = |a: Option<Reg<'k, u64>>, b| Some(k.select(holds, a?, b?));
        Self {
            scheme: self.scheme,
            codes: k.select(holds, self.codes, other.codes),
            codes_line: both(self.codes_line, other.codes_line),
            scales: self.scales.or(other.scales, holds),
            scale_step: self.scale_step.zip(other.scale_step).map(|(a, b)| k.select(holds, a, b)),
            zeros: self.zeros.zip(other.zeros).map(|(a, b)| a.or(b, holds)),
            n: k.select(holds, self.n, other.n),
            out: k.select(holds, self.out, other.out),
        }
    }

    /// The scale of the only group of a column.
    pub fn column_scale(&self, column: Reg<'k, u32>) -> Reg<'k, f32> {
        let number = self.scale_step.map_or(column, |step| column * step);
        let at = self.scales.address.element(number, self.scales.size);
        self.scale(at, Load::BeforeBarrier)
    }

    /// A scale from memory.
    pub fn scale(&self, at: Reg<'k, u64>, load: Load) -> Reg<'k, f32> {
        let k = at.kernel();
        match (self.scheme.scale, load) {
            (Element::F32, Load::Anywhere) => k.ld_global_nc::<f32, 1>(at)[0],
            (Element::F32, Load::BeforeBarrier) => k.ld_global::<f32, 1>(at)[0],
            (Element::Half(half), Load::Anywhere) => k.widen(half, k.ld_global_nc::<u16, 1>(at)[0]),
            (Element::Half(half), Load::BeforeBarrier) => {
                k.widen(half, k.ld_global::<u16, 1>(at)[0])
            }
        }
    }
}

/// Where a row of zero points has that of a column: see [the packed form](super).
pub fn zero_place<'k>(column: Reg<'k, u32>) -> Reg<'k, u32> {
    let half = INTERLEAVED / 2;
    column / INTERLEAVED * INTERLEAVED + column % half * 2 + column % INTERLEAVED / half
}
