//! Elements that a thread loads or stores at once, and computes with in f32.

use crate::kernel::Element;
use crate::ptx::{Address, Half, Kernel, Reg, Scalar};

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

    /// Loads, and nothing else: within [`Kernel::when`], too. Nothing writes there while the kernel runs.
    pub fn load<'k>(self, k: &'k Kernel, from: impl Into<Address<'k, u64>>) -> Loaded<'k> {
        self.load_by(k, from.into(), true)
    }

    /// The same of what this thread writes later.
    pub fn load_mutable<'k>(self, k: &'k Kernel, from: impl Into<Address<'k, u64>>) -> Loaded<'k> {
        self.load_by(k, from.into(), false)
    }

    fn load_by<'k>(self, k: &'k Kernel, from: Address<'k, u64>, constant: bool) -> Loaded<'k> {
        match self.element {
            Element::Half(half) if self.count == 1 => {
                let [x] = words_at::<u16, 1>(k, from, constant);
                Loaded::One(half, x)
            }
            Element::F32 => Loaded::Floats(self.words(k, from, constant)),
            Element::Half(half) => Loaded::Pairs(half, self.words(k, from, constant)),
        }
    }

    /// Words of 4 bytes, up to four at once.
    fn words<'k, T: Scalar>(
        self,
        k: &'k Kernel,
        from: Address<'k, u64>,
        constant: bool,
    ) -> Vec<Reg<'k, T>> {
        let words = self.count * self.element.size() / 4;
        let places = (0..words.div_ceil(4)).map(|i| from.at(i64::from(i * LINE)));
        match words {
            1 => words_at::<T, 1>(k, from, constant).into(),
            2 => words_at::<T, 2>(k, from, constant).into(),
            _ => places.flat_map(|from| words_at::<T, 4>(k, from, constant)).collect(),
        }
    }

    /// As many floats, rounded.
    pub fn round<'k>(self, k: &'k Kernel, values: &[Reg<'k, f32>]) -> Loaded<'k> {
        debug_assert_eq!(values.len(), self.count as usize);
        match self.element {
            Element::F32 => Loaded::Floats(values.to_vec()),
            Element::Half(half) if self.count == 1 => Loaded::One(half, k.cvt_rn(half, values[0])),
            Element::Half(half) => {
                let pairs = values.chunks_exact(2).map(|pair| k.cvt_rn_x2(half, pair[0], pair[1]));
                Loaded::Pairs(half, pairs.collect())
            }
        }
    }

    /// Stores as many floats, rounded.
    pub fn store<'k>(self, to: Reg<'k, u64>, values: &[Reg<'k, f32>]) {
        let k = to.kernel();
        self.round(k, values).store(k, to);
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

    /// Stores, and nothing else: within [`Kernel::when`], too.
    pub fn store(&self, k: &'k Kernel, to: impl Into<Address<'k, u64>>) {
        match self {
            Self::Floats(floats) => words(k, to.into(), floats),
            Self::Pairs(_, pairs) => words(k, to.into(), pairs),
            Self::One(_, x) => k.st_global(to, [*x]),
        }
    }

    /// The same where a predicate holds, else zeros.
    pub fn or_zero(self, holds: Reg<'k, bool>) -> Self {
        let k = holds.kernel();
        match self {
            Self::Floats(x) => {
                Self::Floats(x.into_iter().map(|x| k.select(holds, x, 0.0)).collect())
            }
            Self::Pairs(half, x) => {
                Self::Pairs(half, x.into_iter().map(|x| k.select(holds, x, 0)).collect())
            }
            Self::One(half, x) => Self::One(half, k.select(holds, x, 0)),
        }
    }
}

fn words_at<'k, T: Scalar, const N: usize>(
    k: &'k Kernel,
    from: Address<'k, u64>,
    constant: bool,
) -> [Reg<'k, T>; N] {
    if constant { k.ld_global_nc(from) } else { k.ld_global(from) }
}

/// Stores words side by side, up to four at once.
fn words<'k, T: Scalar>(k: &'k Kernel, to: Address<'k, u64>, values: &[Reg<'k, T>]) {
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
