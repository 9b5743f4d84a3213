//! The families of kernels, and what the tests ask of each: a new one is a file here and a line of [`FAMILIES`].

mod activation;
mod attention;
mod attention_backward;
mod cross_entropy;
mod dequant;
mod embedding;
mod encode;
mod glu;
mod norm;
mod optimizer;
mod products;
mod quantize;
mod regroup;
mod rope;
mod softmax;
mod strided;
mod transpose;
mod w4;

use std::collections::HashSet;
use std::fmt::{Debug, Display};

use kaio_candle::kernel::params::{Argument, Arguments, Names};
use kaio_candle::kernel::{Config, Device, Element, Plan};
use kaio_candle::ptx::{Half, Source, Target};

/// What a chooser chooses for, and its kernels are assembled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// For `ptxas -arch`.
    pub arch: &'static str,
    pub device: Device,
}

const fn gpu(arch: &'static str, multiprocessors: u32, shared_per_block: u32) -> Gpu {
    let target = match arch.as_bytes() {
        [_, _, _, _, _, _] => Target::Sm90a,
        [.., b'8', b'9'] => Target::Sm89,
        _ => Target::Sm80,
    };
    Gpu { arch, device: Device { target, multiprocessors, shared_per_block } }
}

/// A100, RTX 4090 and H100.
static ALL: [Gpu; 3] =
    [gpu("sm_80", 108, 166_912), gpu("sm_89", 128, 101_376), gpu("sm_90", 132, 232_448)];

/// H100 SXM and PCIe.
static HOPPERS: [Gpu; 2] = [gpu("sm_90a", 132, 232_448), gpu("sm_90a", 114, 232_448)];

/// How many problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Some, for a sample.
    Few,
    All,
}

/// The names of the parameters that were declared.
pub type Used = HashSet<&'static str>;

/// What the tests ask of a family.
pub trait Family {
    type Problem: Copy + Debug;
    type Plan: Plan<Problem = Self::Problem>;

    /// A grid of problems.
    fn problems(extent: Extent) -> Vec<Self::Problem>;

    /// Whether the problem is chosen for on a GPU.
    fn applies(_problem: &Self::Problem, _device: &Device) -> bool {
        true
    }

    /// The same problem with what does not change the shape of what is chosen, of which the gate takes some.
    fn variants(_name: &str, _problem: &Self::Problem, _kernel: &Config) -> Vec<Self::Problem> {
        vec![]
    }

    /// Why a choice cannot be built or launched.
    fn fits(kernel: &Config, gpu: &Gpu, problem: &Self::Problem) -> Result<(), String>;

    /// Blocks that are meant to share a multiprocessor.
    fn blocks_per_sm(kernel: &Config) -> u32;

    /// Whether each parameter of the kernel has a value, for a launch of the problem's plan.
    fn passes(
        problem: &Self::Problem,
        plan: &Self::Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String>;

    /// Kernels that together show all that the emitters have, small where size shows nothing.
    fn goldens() -> Vec<(&'static str, Config)>;
}

/// A family on some GPUs.
#[derive(Clone, Copy)]
pub struct Chooser {
    pub gpus: &'static [Gpu],
    /// Kernels of each shape that are assembled.
    pub of_a_shape: usize,
    /// Whether a problem is of the family.
    of: fn(&Facts) -> bool,
}

/// `Family(its type): (its GPUs, kernels of a shape)`
macro_rules! families {
    ($($Name:ident($Family:ty): $(($gpus:expr, $of_a_shape:literal)),+;)*) => {
        /// A problem of any family.
        #[derive(Clone, Copy, Debug)]
        pub enum Facts { $($Name(<$Family as Family>::Problem),)* }

        /// All families.
        pub static FAMILIES: &[Chooser] = &[$($(
            Chooser {
                gpus: $gpus,
                of_a_shape: $of_a_shape,
                of: |facts| matches!(facts, Facts::$Name(_)),
            },
        )+)*];

        /// All families' problems.
        pub fn problems(extent: Extent) -> impl Iterator<Item = Facts> {
            let none = std::iter::empty();
            $(let none = none.chain(<$Family>::problems(extent).into_iter().map(Facts::$Name));)*
            none
        }

        /// All families' representatives.
        pub fn goldens() -> Vec<(&'static str, Config)> {
            let mut all = vec![];
            $(all.extend(<$Family>::goldens());)*
            all
        }

        /// The names of parameters, by what [`Facts::names`] calls those that some families have together.
        pub fn params() -> Vec<(&'static str, Vec<&'static str>)> {
            vec![$((
                std::any::type_name::<<<$Family as Family>::Plan as Plan>::Name>(),
                <<$Family as Family>::Plan as Plan>::Name::ALL.iter().map(|n| n.name()).collect(),
            ),)*]
        }

        impl Facts {
            /// What the names of the family's parameters are called.
            pub fn names(&self) -> &'static str {
                match self { $(
                    Self::$Name(_) => {
                        std::any::type_name::<<<$Family as Family>::Plan as Plan>::Name>()
                    }
                )* }
            }

            /// What a launch takes.
            fn kernels(&self, device: &Device) -> Vec<Config> {
                match self { $(
                    Self::$Name(problem) if <$Family>::applies(problem, device) => {
                        steps::<<$Family as Family>::Plan>(problem, device)
                    }
                    Self::$Name(_) => vec![],
                )* }
            }

            pub fn variants(&self, name: &str, kernel: &Config) -> Vec<Self> {
                match self { $(
                    Self::$Name(problem) => {
                        let variants = <$Family>::variants(name, problem, kernel);
                        variants.into_iter().map(Self::$Name).collect()
                    }
                )* }
            }

            pub fn fits(&self, kernel: &Config, gpu: &Gpu) -> Result<(), String> {
                match self { $(Self::$Name(problem) => <$Family>::fits(kernel, gpu, problem),)* }
            }

            pub fn blocks_per_sm(&self, kernel: &Config) -> u32 {
                match self { $(Self::$Name(_) => <$Family>::blocks_per_sm(kernel),)* }
            }

            pub fn passes(
                &self,
                device: &Device,
                kernel: &Config,
                used: &mut Used,
            ) -> Result<(), String> {
                match self { $(
                    Self::$Name(problem) => {
                        let plan = <$Family as Family>::Plan::new(problem, device);
                        <$Family>::passes(problem, &plan, kernel, used)
                    }
                )* }
            }
        }
    };
}

families! {
    Matmul(products::Products): (&HOPPERS, 3), (&ALL, 2);
    Attention(attention::Attentions): (&HOPPERS, 1), (&ALL, 1);
    AttentionBackward(attention_backward::Backwards): (&HOPPERS, 1), (&ALL, 1);
    Activation(activation::Activations): (&ALL, 4);
    Glu(glu::Glus): (&ALL, 6);
    Softmax(softmax::Softmaxes): (&HOPPERS, 2), (&ALL, 2);
    Rope(rope::Ropes): (&ALL, 4);
    Norm(norm::Norms): (&HOPPERS, 2), (&ALL, 2);
    Embedding(embedding::Embeddings): (&ALL, 6);
    CrossEntropy(cross_entropy::CrossEntropies): (&ALL, 6);
    Dequant(dequant::Dequants): (&ALL, 4);
    Encode(encode::Encoders): (&ALL, 4);
    Optimizer(optimizer::Optimizers): (&ALL, 2);
    Quantize(quantize::Quantizers): (&HOPPERS, 2), (&ALL, 2);
    Regroup(regroup::Regroupings): (&ALL, 4);
    Transpose(transpose::Transpositions): (&ALL, 1);
    Strided(strided::Copies): (&ALL, 1);
    W4(w4::Products): (&HOPPERS, 1), (&ALL, 1);
    W4Layout(w4::Layouts): (&ALL, 3);
}

impl Chooser {
    /// What a launch takes for a problem, if it is of the family.
    pub fn kernels(&self, facts: &Facts, device: &Device) -> Vec<Config> {
        if (self.of)(facts) { facts.kernels(device) } else { vec![] }
    }
}

fn steps<P: Plan>(problem: &P::Problem, device: &Device) -> Vec<Config> {
    P::new(problem, device).steps().into_iter().map(|step| step.kernel).collect()
}

const BF16: Element = Element::Half(Half::Bf16);
const F16: Element = Element::Half(Half::F16);

fn cross<'a>(a: &'a [u64], b: &'a [u64]) -> impl Iterator<Item = (u64, u64)> + use<'a> {
    a.iter().flat_map(|&a| b.iter().map(move |&b| (a, b)))
}

/// Addresses that no two parameters share.
fn addresses() -> impl FnMut() -> u64 {
    let mut last = 0;
    move || {
        last += 0x1000;
        last
    }
}

/// What the step with this kernel declares.
fn passes<P: Plan<Name = A::Name>, A: Arguments>(
    plan: &P,
    arguments: &A,
    kernel: &Config,
    used: &mut Used,
) -> Result<(), String> {
    let steps = plan.steps();
    let step = steps.iter().position(|step| step.kernel == *kernel).ok_or("another plan")?;
    let source: Source = kernel.emit();
    let mut declared = HashSet::new();
    for param in &source.params {
        let name = A::Name::of(&param.name).ok_or(format!("no value is called {}", param.name))?;
        if !declared.insert(name.name()) {
            return Err(format!("two parameters are called {}", param.name));
        }
        let argument = arguments.argument(step, name);
        let argument = argument.ok_or(format!("no value for {}", param.name))?;
        if argument.kind() != param.kind {
            return Err(format!("{:?} for {param:?}", argument.kind()));
        }
        if let Argument::TensorMap(map) = argument {
            map.check().map_err(|why| format!("{}: {why}", param.name))?;
        }
    }
    used.extend(declared);
    Ok(())
}

/// A kernel of another family.
fn another() -> Result<(), String> {
    Err("another family".into())
}

fn rule(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

/// A problem's limit, if it is beyond one, is why nothing fits it.
fn within(limit: Option<(String, impl Display)>) -> Result<(), String> {
    limit.map_or(Ok(()), |(got, most)| Err(format!("{got}, at most {most}")))
}

/// FNV-1a: the same in each run and with each compiler.
pub fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
