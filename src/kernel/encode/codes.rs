//! Scales and codes by the largest numbers of each group.

use super::{BYTES, Code, Name, ROWS, THREADS, Weight};
use crate::kernel::Element;
use crate::kernel::quantize::rounded;
use crate::kernel::w4::NF4;
use crate::ptx::{Factor, Reg, Source};

/// What the codes of a group are made with.
struct Scale<'k> {
    scale: Reg<'k, f32>,
    zero: Option<Reg<'k, i32>>,
}

impl<'k> Scale<'k> {
    /// Of a group's number.
    fn of(weight: &Weight<'k>, code: Code, group: Reg<'k, u32>, exists: Reg<'k, bool>) -> Self {
        let k = weight.k;
        let [below, above] = weight.range(group, exists);
        let peak = above.max(below);
        let exact = match code {
            Code::Int4 { zeros: true } => above / 15.0 + below / 15.0,
            Code::Int4 { zeros: false } => peak / 7.0,
            Code::Nf4 => peak,
            Code::Int8 => peak / 127.0,
            Code::E4m3 => peak / 448.0,
        };
        let up = match weight.element {
            Element::Half(half) if code.has_4bits() => {
                // The least number of the type from it on.
                let near = k.cvt_rn(half, exact);
                let more = k.select(k.widen(half, near).lt(exact), k.var(1u32), 0);
                let [up, _] = k.unpack(half, k.pack(near, k.var(0u16)) + more);
                up
            }
            _ => exact.max(f32::MIN_POSITIVE),
        };
        let scale = k.select(peak.eq(0.0), k.var(1f32), up);
        let zeros = code == Code::Int4 { zeros: true };
        let zero = zeros.then(|| (below / scale).nearest().min(15));
        Self { scale, zero }
    }

    /// The code of an element, of four bits.
    fn code(&self, code: Code, x: Reg<'k, f32>) -> Reg<'k, u32> {
        let (k, x) = (x.kernel(), x / self.scale);
        match code {
            Code::Nf4 => NF4
                .windows(2)
                .map(|pair| k.select(x.gt(0.5 * (pair[0] + pair[1])), k.var(1u32), 0))
                .reduce(|sum, one| sum + one)
                .expect("there are sixteen values"),
            _ => {
                let code = match self.zero {
                    Some(zero) => x.nearest() + zero,
                    None => x.nearest() + 8,
                };
                code.max(0).min(15).cast()
            }
        }
    }
}

/// A thread has a word: eight rows of a column.
pub(super) fn words(weight: &Weight, code: Code) -> Source {
    let k = weight.k;
    let (codes, scales) = (k.pointer(Name::Codes), k.pointer(Name::Scales));
    let zeros = (code == Code::Int4 { zeros: true }).then(|| k.pointer(Name::Zeros));
    let (word, col) = (k.block_x(), k.block_y() * THREADS + k.thread());
    let (first, exists) = (word * ROWS, col.lt(weight.cols));
    let below = first / weight.group_rows;
    let group = below * weight.groups + col;
    let scale = Scale::of(weight, code, group, exists);
    let packed = (0..ROWS)
        .map(|i| {
            let row = first + i;
            let there = row.lt(weight.rows);
            let x = weight.load(weight.address(row, col), exists & there);
            k.select(there, scale.code(code, x), code.zero()) << (4 * i)
        })
        .reduce(|all, one| all | one)
        .expect("there are eight");
    let place = word * weight.cols + col;
    k.when(exists, || k.st_global(codes.element(place, 4), [packed]));
    let leads = exists & (below * weight.group_rows).eq(first);
    let to = scales.element(group, weight.element.size());
    match weight.element {
        Element::F32 => k.when(leads, || k.st_global(to, [scale.scale])),
        Element::Half(half) => {
            let exact = k.cvt_rn(half, scale.scale);
            k.when(leads, || k.st_global(to, [exact]));
        }
    }
    if let Some((zeros, zero)) = zeros.zip(scale.zero) {
        k.when(leads, || k.st_global_u8(zeros.element(group, 1), zero.cast()));
    }
    k.finish()
}

/// A thread has four codes that follow each other.
pub(super) fn bytes(weight: &Weight, code: Code, rounds: bool) -> Source {
    let k = weight.k;
    let (codes, scales) = (k.pointer(Name::Codes), k.pointer(Name::Scales));
    let group_cols = k.param::<u32>(Name::GroupCols);
    let all = weight.rows * weight.cols;
    let first = (k.block_x() * THREADS + k.thread()) * BYTES;
    k.if_(first.lt(all), || {
        let always = first.lt(all);
        let quotients = [0, 1, 2, 3].map(|i| {
            // Past the end the last one again.
            let place = (first + i).min(all - 1);
            let row = place / weight.cols;
            let col = place - row * weight.cols;
            let (below, right) = (row / weight.group_rows, col / group_cols);
            let group = below * weight.groups + right;
            let Scale { scale, .. } = Scale::of(weight, code, group, always);
            let leads = (below * weight.group_rows).eq(row) & (right * group_cols).eq(col);
            k.when(leads, || k.st_global(scales.element(group, 4), [scale]));
            weight.load(weight.address(row, col), always) / scale
        });
        let code = if code == Code::Int8 { Factor::S8 } else { Factor::E4m3 };
        k.st_global(codes.element(first, 1), [rounded(code, rounds, &quotients)]);
    });
    k.finish()
}
