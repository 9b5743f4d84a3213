//! The native kernels: from the facts of a problem to PTX, as pure functions.
//!
//! A problem holds facts, a chooser turns it into a configuration, which holds all choices, and an
//! emitter turns that into PTX. Nothing here knows candle, the driver or a GPU: the configuration
//! alone decides the text, so that it is the key under which compiled kernels are kept.

pub mod activation;
mod ampere;
pub mod attention;
pub mod cross_entropy;
pub mod dequant;
mod element;
pub mod embedding;
pub mod encode;
mod epilogue;
pub mod gemm;
pub mod glu;
pub(crate) mod hopper;
mod multiprocessor;
mod name;
pub mod norm;
pub mod optimizer;
pub mod params;
mod plan;
pub mod quantize;
mod raster;
pub mod regroup;
pub mod rope;
mod rows;
pub mod softmax;
pub mod strided;
pub mod transpose;
pub mod w4;

pub use element::{Copied, Element};
pub use plan::{Plan, Step};
pub use rows::Tile;

use crate::ptx::{Source, Target};

/// What kernels are chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// What kernels are assembled for.
    pub target: Target,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can have.
    pub shared_per_block: u32,
}

impl Device {
    /// What kernels that need nothing of Ada's are assembled for.
    pub fn target_without_e4m3(&self) -> Target {
        match self.target {
            Target::Sm80 | Target::Sm89 => Target::Sm80,
            Target::Sm90a => Target::Sm90a,
        }
    }
}

/// The kernels: of each, what it is, the type of its configuration, and its emitter. A configuration has a
/// `name()`.
macro_rules! kernels {
    ($($(#[$what:meta])* $Kernel:ident($Config:ty) by $emit:path;)*) => {
        /// A kernel of this crate, with all its choices made.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Config { $($(#[$what])* $Kernel($Config),)* }

        impl Config {
            /// The kernel.
            pub fn emit(&self) -> Source {
                match self { $(Self::$Kernel(config) => $emit(config),)* }
            }

            /// What it is called where people read about it: `SHAPE, VARIANT`. The shape is what decides
            /// about resources; all choices are in the name.
            pub fn name(&self) -> String {
                match self { $(Self::$Kernel(config) => config.name(),)* }
            }
        }

        $(impl From<$Config> for Config {
            fn from(config: $Config) -> Self {
                Self::$Kernel(config)
            }
        })*
    };
}

kernels! {
    /// A product on Hopper.
    MatmulSm90(gemm::sm90::Config) by gemm::sm90::emit;
    /// A product on any GPU from Ampere on.
    MatmulSm80(gemm::sm80::Config) by gemm::sm80::emit;
    /// The sum of a product's parts.
    MatmulReduce(gemm::sm80::Reduce) by gemm::sm80::emit_reduce;
    /// Attention on Hopper.
    FlashSm90(attention::sm90::Config) by attention::sm90::emit;
    /// Attention on any GPU from Ampere on.
    FlashSm80(attention::sm80::Config) by attention::sm80::emit;
    /// The gradients of an attention's keys and values on Hopper, and shares of the queries'.
    FlashKeysSm90(attention::backward::sm90::keys::Config) by attention::backward::sm90::keys::emit;
    /// The gradient of an attention's queries on Hopper.
    FlashQueriesSm90(attention::backward::sm90::queries::Config)
        by attention::backward::sm90::queries::emit;
    /// The gradient of an attention's queries, of its sums.
    FlashDq(attention::backward::dq::Config) by attention::backward::dq::emit;
    /// The results of an attention's parts, put together.
    FlashCombine(attention::combine::Config) by attention::combine::emit;
    /// What the gradients of an attention's scores share.
    FlashDelta(attention::backward::delta::Config) by attention::backward::delta::emit;
    /// A pass over an attention's pairs for some of its gradients, on any GPU from Ampere on.
    FlashBackwardSm80(attention::backward::sm80::Config) by attention::backward::sm80::emit;
    /// An activation, its gradient, or sums of columns, on any GPU.
    Activation(activation::Config) by activation::emit;
    /// A gated linear unit, on any GPU.
    Glu(glu::Config) by glu::emit;
    /// A norm of rows, on any GPU.
    Norm(norm::Forward) by norm::emit_forward;
    /// A norm's gradients.
    NormBackward(norm::Backward) by norm::emit_backward;
    /// The means of a norm's gradient, of long rows.
    NormMoments(norm::Moments) by norm::emit_moments;
    /// The gradients of a norm's weight and bias, of the blocks' sums.
    NormColumns(norm::Columns) by norm::emit_columns;
    /// Softmax of rows, or its gradient, on any GPU.
    Softmax(softmax::Config) by softmax::emit;
    /// A rotary position embedding, on any GPU.
    Rope(rope::Config) by rope::emit;
    /// The losses of rows of logits, or their gradients, on any GPU.
    CrossEntropy(cross_entropy::Config) by cross_entropy::emit;
    /// The sum or the mean of rows' losses, on any GPU.
    CrossEntropySum(cross_entropy::Sum) by cross_entropy::emit_sum;
    /// Rows of a table by their ids, or a step to the table's gradient, on any GPU.
    Embedding(embedding::Config) by embedding::emit;
    /// Activations rounded to eight bits.
    Quantize(quantize::Config) by quantize::emit;
    /// The transposition of a matrix of bytes, on any GPU.
    Transpose(transpose::Config) by transpose::emit;
    /// A copy of bytes without gaps, on any GPU.
    Strided(strided::Config) by strided::emit;
    /// A product of a few rows with a weight of four bits, on any GPU from Ampere on.
    W4Stream(w4::stream::Config) by w4::stream::emit;
    /// Codes of four bits in another form, or elements, on any GPU.
    W4Layout(w4::layout::Config) by w4::layout::emit;
    /// A weight rounded to codes, on any GPU.
    Encode(encode::Config) by encode::emit;
    /// Words of checkpoints regrouped along rows, on any GPU.
    Regroup(regroup::Config) by regroup::emit;
    /// A quantised weight in floats, on any GPU.
    Dequant(dequant::Config) by dequant::emit;
    /// A pass over all tensors of a model at once, on any GPU.
    Optimizer(optimizer::Config) by optimizer::emit;
}

/// Hands out shared memory: each region has one owner and an offset that nobody types in.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    pub used: u32,
}

impl Arena {
    /// The offset of the next region.
    pub fn region(&mut self, bytes: u32, align: u32) -> u32 {
        let offset = self.used.next_multiple_of(align);
        self.used = offset + bytes;
        offset
    }
}
