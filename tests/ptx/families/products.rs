//! Products.

use kaio_candle::Activation;
use kaio_candle::kernel::gemm::{self, Epilogue, Major, PerRow, Plan, Problem, Scale, Scales};
use kaio_candle::kernel::gemm::{sm80, sm90};
use kaio_candle::kernel::{Config, Device, Element};
use kaio_candle::ptx::{Factor, Half, Target};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, hash, passes, rule};

pub struct Products;

impl Family for Products {
    type Problem = Problem;
    type Plan = Plan;

    fn problems(extent: Extent) -> Vec<Problem> {
        products(extent).chain(byte_products(extent)).collect()
    }

    /// `mma.sync` takes no e4m3 on Ampere, and none with scales of blocks.
    fn applies(problem: &Problem, device: &Device) -> bool {
        problem.elements[0] != Factor::E4m3
            || match device.target {
                Target::Sm80 => false,
                Target::Sm89 => problem.epilogue.scale != Scale::Blocks,
                Target::Sm90a => true,
            }
    }

    /// What comes after the sum: for a third of the kernels one such thing, all of them for those that do
    /// little else.
    fn variants(name: &str, problem: &Problem, kernel: &Config) -> Vec<Problem> {
        if problem.elements[0].size() == 1 {
            let all = byte_variants(problem);
            let draw = (hash(name) % all.len() as u64) as usize;
            return match kernel {
                Config::MatmulReduce(_) => all,
                _ => vec![all[draw]],
            };
        }
        let draw = (hash(name) % (3 * VARIANTS.len() as u64)) as usize;
        let variants = match kernel {
            Config::MatmulReduce(_) => &VARIANTS[..],
            _ => VARIANTS.get(draw..=draw).unwrap_or_default(),
        };
        variants.iter().map(|variant| variant.of(*problem)).collect()
    }

    fn fits(kernel: &Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
        match kernel {
            Config::MatmulSm90(config) => hopper_fits(config, gpu, problem),
            Config::MatmulSm80(config) => portable_fits(config, gpu, problem),
            Config::MatmulReduce(reduce) => divides(reduce.unit, problem),
            _ => another(),
        }
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::MatmulSm90(config) => config.blocks_per_sm,
            Config::MatmulSm80(config) => config.blocks_per_sm,
            _ => 1,
        }
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let mut address = addresses();
        let mut operand = |major: Major, outer: u64| {
            let [contiguous, lines] = match major {
                Major::K => [problem.k, outer],
                Major::Outer => [outer, problem.k],
            };
            let line = contiguous.next_multiple_of(problem.elements[0].per_chunk().into());
            gemm::Operand {
                address: address(),
                line,
                batch: [(problem.batch, lines * line), (1, 0)],
            }
        };
        let operands = [operand(problem.lhs, problem.m), operand(problem.rhs, problem.n)];
        let arguments = gemm::Arguments {
            problem,
            plan,
            operands,
            scales: match problem.epilogue.scale {
                Scale::None | Scale::Exact => Scales::None,
                Scale::Blocks => Scales::Blocks { rows: address(), cols: address() },
                lines => {
                    let rows = PerRow { address: address(), each: true };
                    let zero = (lines == Scale::ZeroPoint).then(|| (-3, address()));
                    Scales::Lines { one: 0.5, rows, cols: address(), zero }
                }
            },
            bias: problem.epilogue.bias.map(|_| address()),
            out: address(),
            partial: plan.partial_sums(problem).map(|_| address()),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        use sm90::{Order, Orient, Store};
        let f32_out = Epilogue { out: Element::F32, ..PLAIN };
        let after =
            |bias, activation| Epilogue { bias: Some(bias), activation: Some(activation), ..PLAIN };
        let swapped = sm90::Config {
            lhs: Major::Outer,
            rhs: Major::K,
            orient: Orient::Swapped,
            cols: 8,
            rhs_lines: 8,
            split: 2,
            stages: 10,
            blocks_per_sm: 2,
            store: Store::Staged { unit: 4 },
            ..HOPPER
        };
        let odd = sm90::Config {
            elements: [Factor::Half(Half::F16); 2],
            cols: 16,
            rhs_lines: 16,
            batched: true,
            store: Store::Staged { unit: 1 },
            epilogue: Epilogue { bias: Some(Element::F32), ..f32_out },
            ..HOPPER
        };
        let lines = Epilogue { scale: Scale::Lines, ..PLAIN };
        let bytes = sm90::Config {
            elements: [Factor::S8; 2],
            rhs: Major::K,
            epilogue: Epilogue { scale: Scale::ZeroPoint, bias: Some(Element::F32), ..PLAIN },
            ..HOPPER
        };
        let turns = sm90::Config { rows: 128, pingpong: true, order: Order::Raster, ..HOPPER };
        let hopper = [
            ("sm90_large", sm90::Config { rows: 128, cols: 256, ..HOPPER }),
            (
                "sm90_f32_batched",
                sm90::Config { order: Order::Raster, batched: true, epilogue: f32_out, ..HOPPER },
            ),
            ("sm90_decode", swapped),
            ("sm90_split", sm90::Config { split: 2, store: Store::Staged { unit: 4 }, ..HOPPER }),
            ("sm90_pingpong", turns),
            (
                "sm90_pingpong_columns",
                sm90::Config {
                    orient: Orient::Swapped,
                    epilogue: Epilogue { bias: Some(BF16), ..f32_out },
                    ..turns
                },
            ),
            (
                "sm90_bias_gelu",
                sm90::Config { epilogue: after(BF16, Activation::GeluErf), ..HOPPER },
            ),
            ("sm90_odd_batched", odd),
            ("sm90_int8", bytes),
            (
                "sm90_int8_swapped",
                sm90::Config {
                    orient: Orient::Swapped,
                    epilogue: lines,
                    pingpong: true,
                    rows: 128,
                    order: Order::Raster,
                    ..bytes
                },
            ),
            (
                "sm90_blocks",
                sm90::Config {
                    elements: [Factor::E4m3; 2],
                    epilogue: Epilogue { scale: Scale::Blocks, ..PLAIN },
                    rows: 128,
                    cols: 128,
                    ..bytes
                },
            ),
            ("sm90_e4m3", sm90::Config { elements: [Factor::E4m3; 2], epilogue: lines, ..bytes }),
        ];
        let large = sm80::Config {
            rows: 128,
            cols: 128,
            depth: 32,
            stages: 3,
            blocks_per_sm: 2,
            ..PORTABLE
        };
        let small = sm80::Config {
            rows: 32,
            cols: 32,
            depth: 32,
            epilogue: after(BF16, Activation::Silu),
            ..PORTABLE
        };
        let split = sm80::Config {
            elements: [Factor::Half(Half::F16); 2],
            lhs: Major::Outer,
            rhs: Major::K,
            rows: 16,
            cols: 128,
            warps: [1, 4],
            split: 4,
            blocks_per_sm: 2,
            batched: true,
            unit: 1,
            epilogue: after(Element::F32, Activation::GeluTanh),
            ..PORTABLE
        };
        let int8 = sm80::Config {
            elements: [Factor::S8; 2],
            rhs: Major::K,
            depth: 128,
            stages: 3,
            epilogue: lines,
            ..PORTABLE
        };
        let portable = [
            ("sm80_int8", int8),
            ("sm89_e4m3", sm80::Config { elements: [Factor::E4m3; 2], ..int8 }),
            ("sm80_large", large),
            ("sm80_silu", small),
            ("sm80_split_batched", split),
        ];
        let reduce = split.reduce().expect("it is split");
        let hopper = hopper.into_iter().map(|(name, config)| (name, Config::MatmulSm90(config)));
        let portable =
            portable.into_iter().map(|(name, config)| (name, Config::MatmulSm80(config)));
        let exact = sm80::Config { split: 3, ..int8 }.reduce().expect("it is split");
        let reduce = [("sm80_reduce", reduce), ("sm80_int8_reduce", exact)];
        let reduce = reduce.map(|(name, config)| (name, Config::MatmulReduce(config)));
        hopper.chain(portable).chain(reduce).collect()
    }
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
                let epilogue = Epilogue::round(out);
                Problem { m, n, k, batch, elements: [BF16_FACTOR; 2], lhs, rhs, epilogue }
            })
        })
}

/// Of bytes, with scales of lines.
fn byte_products(extent: Extent) -> impl Iterator<Item = Problem> {
    let (outer, depths): (&[u64], &[u64]) = match extent {
        Extent::Few => (&[1, 16, 100, 4096], &[1, 129, 4096]),
        Extent::All => (
            &[
                1, 7, 8, 16, 17, 32, 33, 64, 100, 128, 200, 256, 500, 1000, 1024, 2048, 4096, 5120,
                8192, 28_672, 131_072,
            ],
            &[1, 128, 500, 1024, 4096, 8192, 28_672],
        ),
    };
    cross(outer, outer)
        .flat_map(move |(m, n)| cross(depths, &[1, 3]).map(move |(k, batch)| [m, n, k, batch]))
        .filter(|[m, n, k, batch]| (m * k + k * n + 4 * m * n) * batch < 192_000_000_000)
        .flat_map(|[m, n, k, batch]| {
            let lines = Scale::Lines;
            [
                (Factor::S8, BF16, lines),
                (Factor::S8, Element::F32, lines),
                (Factor::E4m3, BF16, lines),
                (Factor::E4m3, BF16, Scale::Blocks),
            ]
            .map(|(factor, out, scale)| Problem {
                m,
                n,
                k,
                batch,
                elements: [factor; 2],
                lhs: Major::K,
                rhs: Major::K,
                epilogue: Epilogue { scale, ..Epilogue::round(out) },
            })
        })
}

/// The same with other scales, biases and an activation.
fn byte_variants(problem: &Problem) -> Vec<Problem> {
    let Epilogue { out, .. } = problem.epilogue;
    let round = Epilogue::round(out);
    if problem.epilogue.scale == Scale::Blocks {
        let epilogue = Epilogue { bias: Some(Element::F32), ..problem.epilogue };
        return vec![Problem { epilogue, ..*problem }];
    }
    let biases = [None, Some(Element::F32), Some(F16), Some(BF16)];
    let mut all = vec![];
    for scale in [Scale::Lines, Scale::ZeroPoint] {
        all.extend(biases.map(|bias| Epilogue { scale, bias, ..round }));
        let activation = Some(Activation::GeluErf);
        all.push(Epilogue { scale, bias: Some(Element::F32), activation, ..round });
    }
    if out == Element::F32 {
        all.push(Epilogue { scale: Scale::Exact, ..round });
    }
    all.retain(|e| problem.elements[0] == Factor::S8 || e.scale != Scale::ZeroPoint);
    all.into_iter().map(|epilogue| Problem { epilogue, ..*problem }).collect()
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
        let epilogue = Epilogue { bias, activation: self.activation, ..Epilogue::round(out) };
        Problem { elements: [Factor::Half(self.half); 2], epilogue, ..problem }
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

pub(super) fn hopper_fits(
    config: &sm90::Config,
    gpu: &Gpu,
    problem: &Problem,
) -> Result<(), String> {
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

pub(super) fn portable_fits(
    config: &sm80::Config,
    gpu: &Gpu,
    problem: &Problem,
) -> Result<(), String> {
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

const BF16_FACTOR: Factor = Factor::Half(Half::Bf16);
const PLAIN: Epilogue = Epilogue::round(BF16);

/// Hopper: `nn`, 64×64.
const HOPPER: sm90::Config = sm90::Config {
    elements: [BF16_FACTOR; 2],
    weight: None,
    weights: 1,
    lhs: Major::K,
    rhs: Major::Outer,
    orient: sm90::Orient::Plain,
    rows: 64,
    cols: 64,
    lhs_lines: 64,
    rhs_lines: 64,
    stages: 4,
    split: 1,
    teams: 1,
    pingpong: false,
    store_stages: 2,
    order: sm90::Order::Grid,
    blocks_per_sm: 1,
    batched: false,
    store: sm90::Store::Tma,
    epilogue: PLAIN,
};

/// Everywhere: `nn`, 64×64.
const PORTABLE: sm80::Config = sm80::Config {
    elements: [BF16_FACTOR; 2],
    lhs: Major::K,
    rhs: Major::Outer,
    rows: 64,
    cols: 64,
    depth: 64,
    warps: [2, 2],
    stages: 4,
    split: 1,
    blocks_per_sm: 3,
    batched: false,
    unit: 4,
    epilogue: PLAIN,
};
