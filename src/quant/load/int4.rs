//! What the formats of four-bit integers have in common.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::groups::Groups;
use crate::quant::{QuantScheme, QuantWeight, order::Order, planes::Planes};

/// Codes of a word.
pub const CODES: usize = 8;

/// A weight `[k, n]` as all of these formats have it once its words are along K: `scale · (code − zero)`, codes and
/// zero points from 0 to 15.
pub struct Int4<'a> {
    pub op: &'static str,
    pub dims: [usize; 2],
    /// `[⌈k/8⌉, n]`, the first row of eight in the lowest four bits. What is past the last row may be anything.
    pub words: Vec<u32>,
    /// `[.., n]`, a row for each of the format's groups.
    pub scales: &'a Tensor,
    /// The same, or none where all are 8.
    pub zeros: Option<Vec<u8>>,
    pub groups: Groups,
}

impl Int4<'_> {
    pub fn weight(self) -> Result<QuantWeight> {
        let Self { op, dims: dims @ [k, n], words, scales, zeros, groups } = self;
        let device = scales.device();
        let zeros = zeros.filter(|zeros| zeros.iter().any(|&zero| zero != 8));
        let scheme = QuantScheme::Int4 { group: groups.group, zero_points: zeros.is_some() };
        let mut words = match &groups.order {
            Some(order) => gathered(&words, n, order),
            None => words,
        };
        fill(&mut words, dims, scheme.zero_code());

        let scales = groups.scales(&scales.to_device(&Device::Cpu)?)?;
        let zeros = zeros.map(|zeros| groups.zeros(zeros, n));
        let planes = Planes {
            scheme,
            dims,
            codes: Tensor::from_vec(words, (k.div_ceil(CODES), n), &Device::Cpu)?,
            scales,
            zeros: zeros
                .map(|zeros| Tensor::from_vec(zeros, (groups.count, n), &Device::Cpu))
                .transpose()?,
            order: groups
                .order
                .map(|order| Order::new(op, &Tensor::from_vec(order, k, &Device::Cpu)?))
                .transpose()?,
            exponent: 0,
        };
        QuantWeight::from_planes(op, planes)?.to_device(device)
    }
}

/// The words whose row `i` is row `order[i]` of others.
fn gathered(words: &[u32], n: usize, order: &[u32]) -> Vec<u32> {
    let mut to = vec![0; words.len()];
    if n == 0 {
        return to;
    }
    to.par_chunks_mut(n).zip(order.par_chunks(CODES)).for_each(|(to, rows)| {
        for (place, &row) in rows.iter().enumerate() {
            let (from, shift) =
                (&words[row as usize / CODES * n..][..n], 4 * (row as usize % CODES));
            for (to, from) in to.iter_mut().zip(from) {
                *to |= ((from >> shift) & 15) << (4 * place);
            }
        }
    });
    to
}

/// Makes the rows past the last one the code of 0.
fn fill(words: &mut [u32], [k, n]: [usize; 2], code: u8) {
    let used = k % CODES;
    if used == 0 || n == 0 {
        return;
    }
    let kept = (1 << (4 * used)) - 1;
    let rest = (0x1111_1111 * u32::from(code)) & !kept;
    let last = words.len() - n;
    words[last..].iter_mut().for_each(|word| *word = (*word & kept) | rest);
}

/// Zero points `[rows, n]` of words `[rows, ⌈n/8⌉]`, `places[i]` being the place of column `i` of eight.
pub fn zeros(words: &[u32], n: usize, places: [u8; CODES]) -> Vec<u8> {
    if n == 0 {
        return vec![];
    }
    let row = |words: &[u32]| -> Vec<u8> {
        let code = |col: usize| (words[col / CODES] >> (4 * places[col % CODES])) & 15;
        (0..n).map(|col| code(col) as u8).collect()
    };
    words.chunks(n.div_ceil(CODES)).flat_map(row).collect()
}

/// The places of columns in their order.
pub const IN_ORDER: [u8; CODES] = [0, 1, 2, 3, 4, 5, 6, 7];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_gathered() {
        // Two columns of eleven rows: row k has the code k in the first column, 15 − k in the second.
        let words = [0x7654_3210, 0x89AB_CDEF, 0xFFFF_FA98, 0x0000_0567];
        let order = [10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5];
        let mut to = gathered(&words, 2, &order);
        assert_eq!(to, [0x3728_190A, 0xC8D7_E6F5, 0x546, 0xAB9]);
        fill(&mut to, [11, 2], 8);
        assert_eq!(to, [0x3728_190A, 0xC8D7_E6F5, 0x8888_8546, 0x8888_8AB9]);
        fill(&mut to, [11, 2], 0);
        assert_eq!(to, [0x3728_190A, 0xC8D7_E6F5, 0x546, 0xAB9]);
        fill(&mut to, [16, 2], 8);
        assert_eq!(to, [0x3728_190A, 0xC8D7_E6F5, 0x546, 0xAB9]);
    }

    #[test]
    fn zeros_are_unpacked() {
        let words = [0x7654_3210, 0xFA, 0xFEDC_BA98, 0x12];
        let all = zeros(&words, 10, IN_ORDER);
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7, 10, 15, 8, 9, 10, 11, 12, 13, 14, 15, 2, 1]);
        assert_eq!(zeros(&words[..1], 8, [0, 4, 1, 5, 2, 6, 3, 7]), [0, 4, 1, 5, 2, 6, 3, 7]);
    }
}
