//! What the choosers return over a grid of problems.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

use kaio_candle::Activation;
use kaio_candle::kernel::attention::{self, Lengths};
use kaio_candle::kernel::gemm::{self, Epilogue, Major, Problem, sm80, sm90};
use kaio_candle::kernel::glu::{self, Gate};
use kaio_candle::kernel::{Config, Device, Element, Plan};
use kaio_candle::ptx::{Half, Target};

/// What a chooser chooses for, and its kernels are assembled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// For `ptxas -arch`.
    pub arch: &'static str,
    pub device: Device,
}

const fn gpu(arch: &'static str, multiprocessors: u32, shared_per_block: u32) -> Gpu {
    let target = if arch.len() > 5 { Target::Sm90a } else { Target::Sm80 };
    Gpu { arch, device: Device { target, multiprocessors, shared_per_block } }
}

/// A family of kernels on some GPUs.
pub struct Chooser {
    gpus: &'static [Gpu],
    /// Kernels of each shape that are assembled.
    of_a_shape: usize,
    kernels: fn(&Facts, &Device) -> Vec<Config>,
}

/// A problem of any family.
#[derive(Clone, Copy, Debug)]
pub enum Facts {
    Matmul(Problem),
    Attention(attention::Problem),
    Glu(glu::Problem),
}

/// All families: a new one is a line here. H100 SXM and PCIe; A100, RTX 4090 and H100.
pub static CHOOSERS: [Chooser; 5] = [
    Chooser { gpus: &HOPPERS, of_a_shape: 3, kernels: products_of },
    Chooser { gpus: &HOPPERS, of_a_shape: 1, kernels: attentions_of },
    Chooser { gpus: &ALL, of_a_shape: 2, kernels: products_of },
    Chooser { gpus: &ALL, of_a_shape: 1, kernels: attentions_of },
    Chooser { gpus: &ALL, of_a_shape: 6, kernels: glus_of },
];

static ALL: [Gpu; 3] =
    [gpu("sm_80", 108, 166_912), gpu("sm_89", 128, 101_376), gpu("sm_90", 132, 232_448)];

static HOPPERS: [Gpu; 2] = [gpu("sm_90a", 132, 232_448), gpu("sm_90a", 114, 232_448)];

fn products_of(facts: &Facts, device: &Device) -> Vec<Config> {
    let Facts::Matmul(problem) = facts else { return vec![] };
    kernels_of::<gemm::Plan>(problem, device)
}

fn attentions_of(facts: &Facts, device: &Device) -> Vec<Config> {
    let Facts::Attention(problem) = facts else { return vec![] };
    // On Hopper f32 takes the portable kernels, which are chosen for the last of `ALL`.
    if device.target == Target::Sm90a && problem.element == Element::F32 {
        return vec![];
    }
    kernels_of::<attention::Plan>(problem, device)
}

fn glus_of(facts: &Facts, device: &Device) -> Vec<Config> {
    let Facts::Glu(problem) = facts else { return vec![] };
    kernels_of::<glu::Plan>(problem, device)
}

/// What a launch takes.
fn kernels_of<P: Plan>(problem: &P::Problem, device: &Device) -> Vec<Config> {
    P::new(problem, device).steps().into_iter().map(|step| step.kernel).collect()
}

/// How many problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Some, for a sample.
    Few,
    All,
}

const BF16: Element = Element::Half(Half::Bf16);

/// All families'.
pub fn problems(extent: Extent) -> impl Iterator<Item = Facts> {
    let products = products(extent).map(Facts::Matmul);
    let attentions = attentions(extent).into_iter().map(Facts::Attention);
    products.chain(attentions).chain(glus().map(Facts::Glu))
}

/// Sizes, each with one drawing of everything else.
fn attentions(extent: Extent) -> Vec<attention::Problem> {
    use attention::{Bias, ScoreMod};
    let (dims, queries, keys): (&[(u64, u64)], &[u64], &[u64]) = match extent {
        Extent::Few => (&[(64, 64), (128, 128), (72, 40)], &[1, 100, 4096], &[100, 4096]),
        Extent::All => (
            &[(8, 8), (64, 64), (72, 40), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)],
            &[1, 40, 100, 512, 4096],
            &[1, 100, 4096, 65_536],
        ),
    };
    let heads = [(32, 32), (32, 8), (28, 4)];
    let biases = [
        None,
        None,
        None,
        Some(Bias { element: BF16, pairs: true }),
        Some(Bias { element: BF16, pairs: false }),
        Some(Bias { element: Element::F32, pairs: true }),
        Some(Bias { element: Element::F32, pairs: false }),
    ];
    let lengths = [Lengths::Full, Lengths::Full, Lengths::Padded, Lengths::Packed];
    let kinds = [(true, BF16), (false, BF16), (true, Element::F32), (false, Element::F32)];
    let mut all = Vec::new();
    for &(head_dim, value_dim) in dims {
        for (queries, keys) in cross(queries, keys) {
            for (heads, kv_heads) in heads {
                for mask in 0..3 {
                    for (plain, element) in kinds {
                        let seed = format!("{head_dim} {queries} {keys} {heads} {mask} {plain}");
                        let draw = hash(&seed) >> 8;
                        let pick = |shift: u32, of: usize| (draw >> shift) as usize % of;
                        let scores = ScoreMod {
                            scale_first: pick(0, 7) == 0,
                            softcap: pick(4, 2) == 0,
                            alibi: pick(8, 2) == 0,
                            bias: biases[pick(12, biases.len())].filter(|bias| {
                                bias.element == element || bias.element == Element::F32
                            }),
                        };
                        all.push(attention::Problem {
                            batch: [1, 4][pick(20, 2)],
                            heads,
                            kv_heads,
                            queries,
                            keys,
                            head_dim,
                            value_dim,
                            element,
                            out: if plain || pick(24, 2) == 0 { element } else { Element::F32 },
                            left: (mask == 2).then_some(500),
                            right: (mask > 0).then_some(0),
                            score_mod: if plain { ScoreMod::default() } else { scores },
                            lengths: if plain { Lengths::Full } else { lengths[pick(28, 4)] },
                            lse: pick(32, 2) == 0,
                        });
                    }
                }
            }
        }
    }
    all
}

/// All types and gates, in rows of one thread to those of many blocks.
fn glus() -> impl Iterator<Item = glu::Problem> {
    let elements = [Element::Half(Half::F16), BF16, Element::F32];
    let widths = [1, 3, 8, 40, 4096, 50_257];
    let flags = [[false, false], [false, true], [true, false], [true, true]];
    elements.into_iter().flat_map(move |element| {
        [Gate::Silu, Gate::GeluTanh].into_iter().flat_map(move |gate| {
            cross(&[1, 300], &widths).collect::<Vec<_>>().into_iter().flat_map(
                move |(rows, cols)| {
                    flags.map(|[backward, aligned]| glu::Problem {
                        rows,
                        cols,
                        element,
                        gate,
                        backward,
                        aligned,
                    })
                },
            )
        })
    })
}

/// Of bf16 operands, without bias and activation.
fn products(extent: Extent) -> impl Iterator<Item = Problem> {
    let (outer, depths): (&[u64], &[u64]) = match extent {
        Extent::Few => (&[1, 16, 100, 1000, 4096, 50_257], &[1, 65, 1024, 16_384]),
        Extent::All => (
            &[
                1, 2, 7, 8, 16, 17, 24, 32, 33, 64, 65, 100, 128, 200, 256, 512, 1000, 1024, 2048,
                4096, 5120, 8192, 32_768, 50_257, 131_072,
            ],
            &[1, 16, 64, 65, 128, 500, 1024, 4096, 11_008, 32_768, 131_072],
        ),
    };
    let majors = [Major::K, Major::Outer];
    cross(outer, outer)
        .flat_map(move |(m, n)| cross(depths, &[1, 2, 48]).map(move |(k, batch)| [m, n, k, batch]))
        // What fits a memory of 192 GB.
        .filter(|[m, n, k, batch]| (2 * (m * k + k * n) + 4 * m * n) * batch < 192_000_000_000)
        .flat_map(move |size| majors.map(|lhs| (size, lhs)))
        .flat_map(move |(size, lhs)| majors.map(|rhs| (size, lhs, rhs)))
        .flat_map(|([m, n, k, batch], lhs, rhs)| {
            [BF16, Element::F32].map(|out| {
                let epilogue = Epilogue { out, bias: None, activation: None };
                Problem { m, n, k, batch, elements: [BF16; 2], lhs, rhs, epilogue }
            })
        })
}

fn cross<'a>(a: &'a [u64], b: &'a [u64]) -> impl Iterator<Item = (u64, u64)> + use<'a> {
    a.iter().flat_map(|&a| b.iter().map(move |&b| (a, b)))
}

/// A kernel that a chooser returns, and what for.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub kernel: Config,
    pub gpu: Gpu,
    pub problem: Facts,
    /// Its family's number.
    family: usize,
    /// The problem's number.
    index: usize,
}

impl Choice {
    /// Blocks that are meant to share a multiprocessor.
    pub fn blocks_per_sm(&self) -> u32 {
        match self.kernel {
            Config::MatmulSm90(config) => config.blocks_per_sm,
            Config::MatmulSm80(config) => config.blocks_per_sm,
            Config::FlashSm80(config) => config.blocks_per_sm,
            Config::MatmulReduce(_) | Config::FlashSm90(_) | Config::FlashCombine(_) => 1,
            // Of 256 threads, which is half of what most multiprocessors hold.
            Config::Glu(_) => 4,
        }
    }

    fn family(&self) -> &'static Chooser {
        &CHOOSERS[self.family]
    }

    /// What decides about resources.
    fn shape(&self) -> String {
        let kernel = match self.kernel {
            // The number of parts is a divisor of the depth, and no more.
            Config::MatmulSm80(config) => {
                Config::MatmulSm80(sm80::Config { split: config.split.min(2), ..config })
            }
            other => other,
        };
        let name = Self { kernel, ..*self }.name();
        name.split_once(", ").expect("names have two parts").0.into()
    }

    /// `sm_90a sm90 128x256 …, nt bf16→f32 …`
    pub fn name(&self) -> String {
        format!("{} {}", self.gpu.arch, self.kernel.name())
    }
}

/// Calls `each` with everything that is chosen for the problems of an extent, on all cores.
pub fn for_each_choice(extent: Extent, each: impl Fn(Choice) + Sync) {
    let problems = Mutex::new(problems(extent).enumerate());
    let next = || problems.lock().expect("nobody panicked").by_ref().take(256).collect::<Vec<_>>();
    on_all_cores(|_| {
        loop {
            let some = next();
            if some.is_empty() {
                break;
            }
            for (index, problem) in some {
                for (family, chooser) in CHOOSERS.iter().enumerate() {
                    for &gpu in chooser.gpus {
                        for kernel in (chooser.kernels)(&problem, &gpu.device) {
                            each(Choice { kernel, gpu, problem, family, index });
                        }
                    }
                }
            }
        }
    });
}

/// Runs `work` once for each core, with its number.
pub fn on_all_cores(work: impl Fn(usize) + Sync) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for i in 0..cores {
            let work = &work;
            scope.spawn(move || work(i));
        }
    });
}

/// Everything different that is chosen, by name: each shape, with a sample of its layouts, types,
/// biases and activations.
pub fn choices(extent: Extent) -> BTreeMap<String, Choice> {
    let found = Mutex::new(HashMap::new());
    for_each_choice(extent, |choice| {
        let mut found = found.lock().expect("nobody panicked");
        let first = found.entry((choice.kernel, choice.gpu.arch)).or_insert(choice);
        // Whichever core was faster.
        if choice.index < first.index {
            *first = choice;
        }
    });
    let mut named = BTreeMap::new();
    for choice in found.into_inner().expect("nobody panicked").into_values() {
        let name = choice.name();
        if named.insert(name.clone(), choice).is_some() {
            panic!("two kernels are called {name}");
        }
    }
    let mut shapes: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for (name, choice) in &named {
        shapes.entry(choice.shape()).or_default().push(name);
    }
    let mut chosen = BTreeMap::new();
    for names in shapes.into_values() {
        let some = named[names[0]].family().of_a_shape;
        for name in spread(names, |name| name.to_string()).take(some) {
            let choice = named[name];
            chosen.extend(with_epilogue(name, &choice));
            chosen.insert(name.clone(), choice);
        }
    }
    chosen
}

/// In an order that shows much at once: first those with a word in their names that none before had.
pub fn spread<T>(mut items: Vec<T>, name: impl Fn(&T) -> String) -> impl Iterator<Item = T> {
    items.sort_by_key(|item| hash(&name(item)));
    let mut seen = HashSet::new();
    let (first, others): (Vec<_>, Vec<_>) = items.into_iter().partition(|item| {
        name(item).split(' ').filter(|word| seen.insert(word.to_string())).count() > 0
    });
    first.into_iter().chain(others)
}

/// What is chosen if something comes after the sum: for a third of the kernels with one such thing,
/// with all of them for those that do little else.
fn with_epilogue(name: &str, choice: &Choice) -> Vec<(String, Choice)> {
    let Facts::Matmul(of) = choice.problem else { return vec![] };
    let draw = (hash(name) % (3 * VARIANTS.len() as u64)) as usize;
    let variants = match choice.kernel {
        Config::MatmulReduce(_) => &VARIANTS[..],
        _ => VARIANTS.get(draw..=draw).unwrap_or_default(),
    };
    let chosen = variants.iter().flat_map(|variant| {
        let problem = Facts::Matmul(variant.of(of));
        let kernels = (choice.family().kernels)(&problem, &choice.gpu.device);
        kernels.into_iter().map(move |kernel| Choice { kernel, problem, ..*choice })
    });
    chosen.map(|choice| (choice.name(), choice)).collect()
}

/// FNV-1a: the same in each run and with each compiler.
pub fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Types, bias and activation that do not change the shape of what is chosen.
struct Variant {
    half: Half,
    bias: Option<Bias>,
    activation: Option<Activation>,
}

#[derive(Clone, Copy)]
enum Bias {
    F32,
    /// The operands' type.
    Same,
}

impl Variant {
    fn of(&self, problem: Problem) -> Problem {
        let same = Element::Half(self.half);
        let out = if problem.epilogue.out == Element::F32 { Element::F32 } else { same };
        let bias = self.bias.map(|bias| match bias {
            Bias::F32 => Element::F32,
            Bias::Same => same,
        });
        let epilogue = Epilogue { out, bias, activation: self.activation };
        Problem { elements: [same; 2], epilogue, ..problem }
    }
}

/// f16 alone, and each bias with each activation, with one or the other type.
static VARIANTS: [Variant; 15] = {
    use Activation::{GeluErf, GeluTanh, Relu, Silu};
    use Half::{Bf16, F16};
    const fn variant(half: Half, bias: Option<Bias>, activation: Option<Activation>) -> Variant {
        Variant { half, bias, activation }
    }
    [
        variant(F16, None, None),
        variant(Bf16, None, Some(Relu)),
        variant(F16, None, Some(GeluTanh)),
        variant(Bf16, None, Some(GeluErf)),
        variant(F16, None, Some(Silu)),
        variant(Bf16, Some(Bias::F32), None),
        variant(F16, Some(Bias::F32), Some(Relu)),
        variant(Bf16, Some(Bias::F32), Some(GeluTanh)),
        variant(F16, Some(Bias::F32), Some(GeluErf)),
        variant(Bf16, Some(Bias::F32), Some(Silu)),
        variant(F16, Some(Bias::Same), None),
        variant(Bf16, Some(Bias::Same), Some(Relu)),
        variant(F16, Some(Bias::Same), Some(GeluTanh)),
        variant(Bf16, Some(Bias::Same), Some(GeluErf)),
        variant(F16, Some(Bias::Same), Some(Silu)),
    ]
};

/// A choice that cannot be built, or not launched.
#[test]
fn choices_fit_their_problems() {
    for_each_choice(Extent::Few, |choice| {
        let Choice { kernel, gpu, problem, .. } = &choice;
        let fits = match (kernel, problem) {
            (Config::MatmulSm90(config), Facts::Matmul(problem)) => {
                hopper_fits(config, gpu, problem)
            }
            (Config::MatmulSm80(config), Facts::Matmul(problem)) => {
                portable_fits(config, gpu, problem)
            }
            (Config::MatmulReduce(reduce), Facts::Matmul(problem)) => divides(reduce.unit, problem),
            (Config::FlashSm90(c), Facts::Attention(problem)) => {
                let fits = c.check(gpu.device.shared_per_block);
                fits.and_then(|()| flash_fits(c.element, c.into(), gpu, problem))
            }
            (Config::FlashSm80(c), Facts::Attention(problem)) => {
                let fits = c.check(gpu.device.shared_per_block);
                fits.and_then(|()| flash_fits(c.element, c.into(), gpu, problem))
            }
            (Config::FlashCombine(config), Facts::Attention(problem)) => {
                rule(config.out == problem.out, "another type")
            }
            (Config::Glu(config), Facts::Glu(problem)) => {
                let whole = config.unit == 1 || problem.aligned;
                rule(whole && problem.cols.is_multiple_of(config.unit.into()), "a row's end")
            }
            _ => Err("another family".into()),
        };
        if let Err(why) = fits {
            panic!("{why}: {} for {problem:?}", choice.name());
        }
    });
}

fn hopper_fits(config: &sm90::Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
    config.check(gpu.device.shared_per_block)?;
    let lines = match config.orient {
        sm90::Orient::Plain => [problem.lhs, problem.rhs],
        sm90::Orient::Swapped => [problem.rhs, problem.lhs],
    };
    let facts = (config.orient.order(config.elements), config.epilogue, config.batched);
    rule([config.lhs, config.rhs] == lines, "other layouts")?;
    let wanted = (problem.elements, problem.epilogue, problem.batch > 1);
    rule(facts == wanted, "another problem's facts")?;
    match config.store {
        sm90::Store::Tma => {
            let bytes = problem.n * u64::from(config.epilogue.out.size());
            rule(bytes.is_multiple_of(16), "rows that TMA cannot store")?;
        }
        sm90::Store::Staged { unit } => divides(unit, problem)?,
    }
    let launch = sm90::Launch::new(config, problem, gpu.device.multiprocessors);
    let [x, y, z] = launch.grid;
    rule(x > 0 && x < 1 << 31 && y.max(z) < 1 << 16 && y.min(z) > 0, "a grid that is too large")?;
    rule(x.is_multiple_of(config.split), "a cluster that is cut off")?;
    rule(config.split <= launch.depth, "a block without depth")
}

fn flash_fits(
    element: Element,
    tile_shape: attention::TileShape,
    gpu: &Gpu,
    problem: &attention::Problem,
) -> Result<(), String> {
    let variant = tile_shape.variant;
    let facts = (element, variant.mask, variant.score_mod, variant.lengths);
    let wanted = (problem.element, problem.mask(), problem.score_mod, problem.lengths);
    rule(facts == wanted, "another problem's facts")?;
    rule(variant.split || variant.out == problem.out, "another type")?;
    rule(variant.lse || !problem.lse, "sums that are not stored")?;
    let dims = [variant.head_dim, variant.value_dim].map(u64::from);
    let widened = [problem.head_dim, problem.head_dim.next_multiple_of(16)];
    rule(widened.contains(&dims[0]) && dims[1] == problem.value_dim, "other sizes")?;
    let group = problem.heads / problem.kv_heads;
    rule(group.is_multiple_of(variant.pack.into()), "heads that share no keys")?;
    launch_fits(&attention::Launch::new(tile_shape, problem, gpu.device.multiprocessors))
}

fn launch_fits(launch: &attention::Launch) -> Result<(), String> {
    let tiles = launch.order.heads * launch.order.columns;
    rule(launch.order.tiles == tiles && tiles > 0, "tiles that are not counted")?;
    rule((1..=tiles).contains(&launch.blocks), "blocks without tiles")?;
    rule((1..=launch.order.heads).contains(&launch.order.section), "sections without heads")?;
    rule(launch.order.columns.is_multiple_of(launch.parts), "parts of no tile")
}

fn portable_fits(config: &sm80::Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
    config.check(gpu.device.shared_per_block)?;
    let facts = (config.elements, config.lhs, config.rhs, config.batched);
    let wanted = (problem.elements, problem.lhs, problem.rhs, problem.batch > 1);
    rule(facts == wanted, "another problem's facts")?;
    divides(config.unit, problem)?;
    let depth = problem.k.div_ceil(config.depth.into());
    rule(u64::from(config.split) <= depth, "a block without depth")
}

fn divides(unit: u32, problem: &Problem) -> Result<(), String> {
    rule(problem.n.is_multiple_of(unit.into()), "units that do not divide a row")
}

fn rule(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}
