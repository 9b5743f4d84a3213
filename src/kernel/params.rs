//! Parameters by name: emitters declare them and launches fill them by the same names, so that neither
//! knows an order.
//!
//! Each family has a table of `names!`, and [`Arguments`] that know the value of each. A kernel
//! declares what it needs; a launch asks for the values of what was declared. Tests compare both for all
//! kernels, without a GPU: each parameter has a value of its type.

use super::Copied;
use crate::ptx::ParamKind;

/// The names of a family's parameters: an enum from lines of `/// what it is`, `Variant "name"`.
macro_rules! names {
    ($(#[$doc:meta])* pub enum $Name:ident {
        $($(#[$what:meta])* $Variant:ident $name:literal,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $Name { $($(#[$what])* $Variant,)* }

        impl $crate::kernel::params::Names for $Name {
            const ALL: &'static [Self] = &[$(Self::$Variant),*];

            fn name(self) -> &'static str {
                match self { $(Self::$Variant => $name,)* }
            }
        }

        impl AsRef<str> for $Name {
            fn as_ref(&self) -> &str {
                $crate::kernel::params::Names::name(*self)
            }
        }
    };
}
pub(super) use names;

/// The names of a family's parameters.
pub trait Names: Copy + 'static {
    /// All of them.
    const ALL: &'static [Self];

    /// The name in the text.
    fn name(self) -> &'static str;

    /// The one that has this name in the text.
    fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|known| known.name() == name)
    }
}

/// What a launch passes for a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// A number of 32 bits.
    U32(u32),
    /// A number of 64 bits.
    U64(u64),
    /// A number.
    F32(f32),
    /// An address in global memory.
    Pointer(u64),
    /// A TMA descriptor.
    TensorMap(TensorMap),
}

impl Argument {
    /// What parameter it is for.
    pub fn kind(&self) -> ParamKind {
        match self {
            Self::U32(_) => ParamKind::value::<u32>(),
            Self::U64(_) => ParamKind::value::<u64>(),
            Self::F32(_) => ParamKind::value::<f32>(),
            Self::Pointer(_) => ParamKind::Pointer,
            Self::TensorMap(_) => ParamKind::TensorMap,
        }
    }
}

/// The values of the parameters of a plan's kernels, for one call.
pub trait Arguments {
    /// The family's names.
    type Name: Names;

    /// What the kernel of step `step` of the plan gets for a parameter; `None` if it cannot have one of
    /// that name.
    fn argument(&self, step: usize, name: Self::Name) -> Option<Argument>;
}

/// The most dimensions of a TMA descriptor.
pub const RANK: usize = 5;

/// How a tensor lies in memory, and the box that one transfer of TMA moves, whose lines are swizzled over
/// as many bytes of shared memory as they have, 64 or 128.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorMap {
    /// The elements' type.
    pub element: Copied,
    /// Where it begins: a multiple of 16.
    pub address: u64,
    rank: usize,
    dims: [u64; RANK],
    strides: [u64; RANK],
    boxed: [u32; RANK],
}

impl TensorMap {
    /// Lengths, strides in elements and box, of all dimensions but the innermost one's stride, innermost
    /// first. The stride of a dimension of length 1 may be anything.
    pub fn new<const N: usize, const STRIDES: usize>(
        element: impl Into<Copied>,
        address: u64,
        dims: [u64; N],
        strides: [u64; STRIDES],
        boxed: [u32; N],
    ) -> Self {
        const { assert!(N <= RANK && STRIDES + 1 == N) };
        let element = element.into();
        let mut map = Self {
            element,
            address,
            rank: N,
            dims: [1; RANK],
            strides: [0; RANK],
            boxed: [1; RANK],
        };
        map.dims[..N].copy_from_slice(&dims);
        map.boxed[..N].copy_from_slice(&boxed);
        for (i, stride) in strides.into_iter().enumerate() {
            let bytes = stride * u64::from(element.size());
            map.strides[i] = if dims[i + 1] == 1 { 16 } else { bytes };
        }
        map
    }

    /// Without the dimensions from number `rank` on, whose lengths are 1.
    pub fn cut(self, rank: usize) -> Self {
        debug_assert!(self.dims[rank..].iter().all(|&len| len == 1));
        Self { rank, ..self }
    }

    /// Lengths in elements, innermost first.
    pub fn dims(&self) -> &[u64] {
        &self.dims[..self.rank]
    }

    /// Bytes from one to the next of each dimension but the innermost.
    pub fn strides(&self) -> &[u64] {
        &self.strides[..self.rank - 1]
    }

    /// Elements of a box.
    pub fn boxed(&self) -> &[u32] {
        &self.boxed[..self.rank]
    }

    /// Whether the driver takes it, or the number that is in the way.
    pub fn check(&self) -> Result<(), String> {
        let line = self.boxed[0] * self.element.size();
        let multiple = |n: u64| n.is_multiple_of(16);
        let rules = [
            (multiple(self.address), format!("the address {:#x}", self.address)),
            (
                self.strides().iter().all(|&stride| multiple(stride) && stride < 1 << 40),
                format!("strides of {:?} bytes", self.strides()),
            ),
            (
                self.dims().iter().all(|len| (1..=1 << 32).contains(len)),
                format!("lengths of {:?}", self.dims()),
            ),
            (
                self.boxed().iter().all(|len| (1..=256).contains(len)),
                format!("boxes of {:?}", self.boxed()),
            ),
            (matches!(line, 64 | 128), format!("lines of {line} bytes (64 or 128)")),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }
}
