//! How TMA cuts operands.

use crate::kernel::gemm::Major;
use crate::kernel::hopper::LINE;
use crate::ptx::Factor;

/// How TMA cuts a stage of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boxes {
    /// Lines of one box, each a swizzled line wide, and the elements of the outer dimension that a box
    /// adds: along K they are its lines, else as many as a line is wide.
    pub lines: u32,
    /// Bytes of the stage.
    pub bytes: u32,
}

impl Boxes {
    pub(super) fn new(major: Major, extent: u32, lines: u32, element: Factor) -> Self {
        match major {
            Major::K => Self { lines, bytes: extent * LINE },
            // A box has all of the depth.
            Major::Outer => {
                let lines = element.per_line();
                Self { lines, bytes: extent.div_ceil(lines) * lines * LINE }
            }
        }
    }

    /// Bytes of one box.
    pub fn each(&self) -> u32 {
        self.lines * LINE
    }

    /// Boxes of a stage.
    pub fn count(&self) -> u32 {
        self.bytes / self.each()
    }
}
