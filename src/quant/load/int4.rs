//! What the formats of four-bit integers have in common.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::groups::Groups;
use super::{awq, nf4};
use crate::cuda;
use crate::quant::{QuantScheme, QuantWeight, order::Order, planes::Planes};

/// Codes of a word.
pub const CODES: usize = 8;

/// How a format packs the codes of a weight `[k, n]`, eight in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// Words `[⌈k/8⌉, n]` of eight rows, the first one lowest.
    Rows,
    /// The same as `[n, ⌈k/8⌉]`.
    Turned,
    /// Words `[k, n/8]` of eight columns, in AWQ's order.
    Columns,
    /// Bytes, of `[n, k/8]` words of eight rows, the first of two in the higher four bits of a byte.
    Bytes,
}

impl Packing {
    /// Where a word has each of its eight codes.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // Read by a kernel alone.
    pub fn places(self) -> [u8; CODES] {
        match self {
            Self::Rows | Self::Turned => IN_ORDER,
            Self::Columns => awq::PLACES,
            Self::Bytes => [1, 0, 3, 2, 5, 4, 7, 6],
        }
    }
}

/// Words of a file: i32, u32 or bytes, anywhere.
pub struct Words<'a> {
    pub tensor: &'a Tensor,
    pub packing: Packing,
}

impl Words<'_> {
    /// Words of eight rows `[⌈k/8⌉, n]`, on the CPU. What is past the last row may be anything.
    fn host(&self, [k, n]: [usize; 2]) -> Result<Vec<u32>> {
        let words = || super::bits(self.tensor);
        Ok(match self.packing {
            Packing::Rows => words()?,
            Packing::Turned => super::transpose(&words()?, [n, k.div_ceil(CODES)]),
            Packing::Columns => awq::along_k(&words()?, [k, n]),
            Packing::Bytes => {
                let bytes = super::host(self.tensor)?.to_vec1::<u8>()?;
                super::transpose(&nf4::words(&bytes), [n, k / CODES])
            }
        })
    }

    /// Those that a weight has, on a device: rows in an order, and past the last one a code.
    fn codes(
        &self,
        op: &'static str,
        dims @ [k, n]: [usize; 2],
        order: Option<&Order>,
        fill: u8,
        device: &Device,
    ) -> Result<Tensor> {
        if device.is_cuda() {
            let order = order.map(|order| &order.rows);
            return cuda::regroup(op, self.tensor, self.packing, dims, order, fill);
        }
        let mut words = self.host(dims)?;
        if let Some(order) = order {
            words = gathered(&words, n, &order.rows.to_vec1()?);
        }
        past(&mut words, dims, fill);
        Tensor::from_vec(words, (k.div_ceil(CODES), n), device)
    }
}

/// A weight `[k, n]` as all of these formats have it: `scale · (code − zero)`, codes and zero points from 0 to 15.
pub struct Int4<'a> {
    pub op: &'static str,
    pub dims: [usize; 2],
    pub words: Words<'a>,
    /// `[.., n]`, a row for each of the format's groups.
    pub scales: &'a Tensor,
    /// The same, or none where all are 8.
    pub zeros: Option<Vec<u8>>,
    pub groups: Groups,
}

impl Int4<'_> {
    pub fn weight(self) -> Result<QuantWeight> {
        let Self { op, dims, words, scales, zeros, groups } = self;
        let zeros = zeros.filter(|zeros| zeros.iter().any(|&zero| zero != 8));
        let scheme = QuantScheme::Int4 { group: groups.group, zero_points: zeros.is_some() };
        weight(op, scheme, dims, &words, scales, zeros, &groups)
    }
}

/// A weight made where its tensors are.
pub fn weight(
    op: &'static str,
    scheme: QuantScheme,
    dims @ [k, n]: [usize; 2],
    words: &Words,
    scales: &Tensor,
    zeros: Option<Vec<u8>>,
    groups: &Groups,
) -> Result<QuantWeight> {
    let device = words.tensor.device();
    // No kernel is launched for what is empty.
    let at = if k * n == 0 { &Device::Cpu } else { device };
    let order = groups.order.as_ref().map(|order| {
        let rows = Tensor::from_slice(order, k, &Device::Cpu)?;
        Order::new(op, &rows)?.to_device(at)
    });
    let order = order.transpose()?;
    let zeros = zeros.map(|zeros| groups.zeros(zeros, n));
    let planes = Planes {
        scheme,
        dims,
        codes: words.codes(op, dims, order.as_ref(), scheme.zero_code(), at)?,
        scales: groups.scales(&scales.to_device(at)?)?,
        zeros: zeros.map(|zeros| Tensor::from_vec(zeros, (groups.count, n), at)).transpose()?,
        order,
        far: false,
    };
    QuantWeight::from_planes(op, planes)?.to_device(device)
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
fn past(words: &mut [u32], [k, n]: [usize; 2], code: u8) {
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
        past(&mut to, [11, 2], 8);
        assert_eq!(to, [0x3728_190A, 0xC8D7_E6F5, 0x8888_8546, 0x8888_8AB9]);
        past(&mut to, [11, 2], 0);
        assert_eq!(to, [0x3728_190A, 0xC8D7_E6F5, 0x546, 0xAB9]);
        past(&mut to, [16, 2], 8);
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
