//! The bytes of a view of any strides, without gaps. candle copies its other dtypes itself, but not e4m3.
//!
//! A thread loads four bytes that follow each other in the result, and stores them as a word.

use super::Device;
use super::params::{self, Argument, names};
use super::plan::{Step, count};
use crate::ptx::{Kernel, Source, Target};

/// Threads of a block.
const THREADS: u32 = 256;
/// Bytes of a thread: those of a word.
const WORD: u32 = 4;
/// The most dimensions of a view.
pub const MOST_DIMS: usize = 4;

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Bytes of the view, at least 1.
    pub bytes: u64,
    /// Its dimensions: 1 to [`MOST_DIMS`].
    pub dims: usize,
}

impl Problem {
    /// Bytes that are written: those past the view repeat its last one.
    pub fn written(&self) -> u64 {
        self.bytes.next_multiple_of(WORD.into())
    }

    /// What is beyond what threads count, and the most that they do.
    pub fn limit(&self) -> Option<(String, u32)> {
        const MOST: u32 = u32::MAX - THREADS * WORD;
        (self.bytes > MOST.into()).then(|| (format!("a view of {} bytes", self.bytes), MOST))
    }
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The view's dimensions.
    pub dims: usize,
}

impl Config {
    /// `strided 3d, bytes`
    pub fn name(&self) -> String {
        format!("strided {}d, bytes", self.dims)
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    config: Config,
    blocks: u32,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let blocks = count(problem.bytes.div_ceil((THREADS * WORD).into()));
        Self { config: Config { dims: problem.dims }, blocks }
    }

    fn steps(&self) -> Vec<Step> {
        vec![Step { kernel: self.config.into(), grid: [self.blocks, 1, 1] }]
    }
}

names! {
    /// The parameters. Dimensions are counted from the innermost one.
    pub enum Name {
        /// The address of the view's first byte.
        Input "input",
        /// The address of the result.
        Out "out",
        /// Bytes of the view.
        Bytes "bytes",
        /// The length of dimension 0.
        Len0 "len0",
        /// The length of dimension 1.
        Len1 "len1",
        /// The length of dimension 2.
        Len2 "len2",
        /// Bytes from element to element of dimension 0.
        Stride0 "stride0",
        /// Bytes from element to element of dimension 1.
        Stride1 "stride1",
        /// Bytes from element to element of dimension 2.
        Stride2 "stride2",
        /// Bytes from element to element of dimension 3.
        Stride3 "stride3",
    }
}

/// The outermost dimension needs no length.
const LENS: [Name; MOST_DIMS - 1] = [Name::Len0, Name::Len1, Name::Len2];
const STRIDES: [Name; MOST_DIMS] = [Name::Stride0, Name::Stride1, Name::Stride2, Name::Stride3];

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is copied.
    pub problem: &'a Problem,
    /// The address of the view's first byte.
    pub input: u64,
    /// Length and stride of each of its dimensions, the innermost first.
    pub dims: &'a [(u64, u64)],
    /// The address of the result, a multiple of 4.
    pub out: u64,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        match name {
            Name::Input => return Some(Argument::Pointer(self.input)),
            Name::Out => return Some(Argument::Pointer(self.out)),
            Name::Bytes => return Some(Argument::U32(count(self.problem.bytes))),
            _ => {}
        }
        let at = |names: &[Name]| names.iter().position(|&known| known == name);
        match at(&STRIDES) {
            Some(dim) => Some(Argument::U64(self.dims.get(dim)?.1)),
            None => Some(Argument::U32(count(self.dims.get(at(&LENS)?)?.0))),
        }
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("strided", Target::Sm80, THREADS);
    let (input, out) = (k.pointer(Name::Input), k.pointer(Name::Out));
    let bytes = k.param::<u32>(Name::Bytes);
    let lens: Vec<_> = LENS[..config.dims - 1].iter().map(|&name| k.param::<u32>(name)).collect();
    let strides: Vec<_> = STRIDES[..config.dims].iter().map(|&name| k.param::<u64>(name)).collect();
    let first = (k.block_x() * THREADS + k.thread()) * WORD;
    k.if_(first.lt(bytes), || {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| {
            let mut rest = (first + i).min(bytes - 1);
            let mut from = input;
            for (dim, &stride) in strides.iter().enumerate() {
                let here = match lens.get(dim) {
                    None => rest,
                    Some(&len) => {
                        let outer = rest / len;
                        let here = rest - outer * len;
                        rest = outer;
                        here
                    }
                };
                from = from + here.wide() * stride;
            }
            k.ld_global_nc_u8(from)
        });
        let word = k.prmt(k.prmt(a, b, 0x40), k.prmt(c, d, 0x40), 0x5410);
        k.st_global(out + first.wide(), [word]);
    });
    k.finish()
}
