//! Element types, and what of a kernel follows from their sizes.

use crate::ptx::{Factor, Half};

/// An element type in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// f32.
    F32,
    /// f16 or bf16.
    Half(Half),
}

impl Element {
    /// Bytes.
    pub const fn size(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::Half(_) => 2,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Half(half) => half.name(),
        }
    }
}

impl Factor {
    /// Bytes of an element.
    pub const fn size(self) -> u32 {
        match self {
            Self::Half(_) => 2,
            Self::S8 | Self::E4m3 => 1,
        }
    }
}

/// How many elements there are in what a kernel moves at once.
macro_rules! counts {
    ($($Type:ty),*) => {$(
        impl $Type {
            /// Those of a line of shared memory that TMA swizzles: 128 bytes.
            pub const fn per_line(self) -> u32 {
                128 / self.size()
            }

            /// Those of what a thread copies at once: 16 bytes.
            pub const fn per_chunk(self) -> u32 {
                16 / self.size()
            }
        }
    )*};
}
counts!(Element, Factor);

/// An element as TMA copies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// A float.
    Float(Element),
    /// 8 bits of anything.
    Byte,
}

impl Copied {
    /// Bytes.
    pub const fn size(self) -> u32 {
        match self {
            Self::Float(element) => element.size(),
            Self::Byte => 1,
        }
    }
}

impl From<Element> for Copied {
    fn from(element: Element) -> Self {
        Self::Float(element)
    }
}

impl From<Factor> for Copied {
    fn from(factor: Factor) -> Self {
        match factor {
            Factor::Half(half) => Self::Float(Element::Half(half)),
            Factor::S8 | Factor::E4m3 => Self::Byte,
        }
    }
}
