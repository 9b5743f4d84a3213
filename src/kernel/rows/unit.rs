//! Elements that a thread loads or stores at once, and computes with in f32.

use crate::kernel::Element;
use crate::ptx::{Half, Reg};

/// Bytes of the widest load or store.
pub(in crate::kernel) const LINE: u32 = 16;

/// Elements side by side, at a multiple of their bytes or of 16: a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::kernel) struct Unit {
    pub element: Element,
    pub count: u32,
}

/// A unit as it lay in memory, which takes fewer registers than its floats.
#[derive(Clone, Debug)]
pub(in crate::kernel) enum Loaded<'k> {
    Floats(Vec<Reg<'k, f32>>),
    Pairs(Half, Vec<Reg<'k, u32>>),
    One(Half, Reg<'k, u16>),
}

impl Unit {
    /// As many elements as 16 bytes hold where rows are of such, else one.
    pub fn of(element: Element, whole: bool) -> Self {
        Self { element, count: if whole { element.per_chunk() } else { 1 } }
    }

    /// Loads, and nothing else: within [`Kernel::when`](crate::ptx::Kernel::when), too.
    pub fn load<'k>(self, from: Reg<'k, u64>) -> Loaded<'k> {
        let k = from.kernel();
        // Words of 4 bytes, up to four at once.
        let words = self.count * self.element.size() / 4;
        let places = (0..words.div_ceil(4)).map(|i| from.at(i64::from(i * LINE)));
        match self.element {
            Element::Half(half) if self.count == 1 => {
                let [x] = k.ld_global_nc::<u16, 1>(from);
                Loaded::One(half, x)
            }
            Element::F32 => Loaded::Floats(match words {
                1 => k.ld_global_nc::<f32, 1>(from).into(),
                2 => k.ld_global_nc::<f32, 2>(from).into(),
                _ => places.flat_map(|from| k.ld_global_nc::<f32, 4>(from)).collect(),
            }),
            Element::Half(half) => {
                let pairs = match words {
                    1 => k.ld_global_nc::<u32, 1>(from).into(),
                    2 => k.ld_global_nc::<u32, 2>(from).into(),
                    _ => places.flat_map(|from| k.ld_global_nc::<u32, 4>(from)).collect(),
                };
                Loaded::Pairs(half, pairs)
            }
        }
    }

    /// Stores as many floats, rounded.
    pub fn store<'k>(self, to: Reg<'k, u64>, values: &[Reg<'k, f32>]) {
        debug_assert_eq!(values.len(), self.count as usize);
        let k = to.kernel();
        match self.element {
            Element::Half(half) if self.count == 1 => k.st_global(to, [k.cvt_rn(half, values[0])]),
            Element::F32 => words(to, values),
            Element::Half(half) => {
                let pairs = values.chunks_exact(2).map(|pair| k.cvt_rn_x2(half, pair[0], pair[1]));
                words(to, &pairs.collect::<Vec<_>>());
            }
        }
    }
}

/// Stores words side by side, up to four at once.
fn words<'k, T: crate::ptx::Scalar>(to: Reg<'k, u64>, values: &[Reg<'k, T>]) {
    let k = to.kernel();
    match *values {
        [a] => k.st_global(to, [a]),
        [a, b] => k.st_global(to, [a, b]),
        _ => {
            let (fours, rest) = values.as_chunks::<4>();
            assert!(rest.is_empty(), "a unit is a power of two");
            for (i, &four) in (0..).zip(fours) {
                k.st_global(to.at(i * i64::from(LINE)), four);
            }
        }
    }
}

impl<'k> Loaded<'k> {
    /// In f32.
    pub fn floats(&self) -> Vec<Reg<'k, f32>> {
        match self {
            Self::Floats(floats) => floats.clone(),
            Self::Pairs(half, pairs) => {
                pairs.iter().flat_map(|&pair| pair.kernel().unpack(*half, pair)).collect()
            }
            Self::One(half, x) => vec![x.kernel().widen(*half, *x)],
        }
    }
}

/// A thread's first element.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Place<'k> {
    pub row: Reg<'k, u64>,
    pub col: Reg<'k, u64>,
    pub element: Element,
}

impl<'k> Place<'k> {
    /// Its address in rows that begin at `address` and lie `stride` elements apart.
    pub fn in_rows(&self, address: Reg<'k, u64>, stride: Reg<'k, u64>) -> Reg<'k, u64> {
        address + (self.row * stride + self.col) * u64::from(self.element.size())
    }
}
