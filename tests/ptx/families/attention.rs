//! Attention.

use kaio_candle::kernel::attention::{self, Lengths, Plan, Problem};
use kaio_candle::kernel::{Config, Device, Element};
use kaio_candle::ptx::Target;

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, hash, passes, rule};

pub struct Attentions;

impl Family for Attentions {
    type Problem = Problem;
    type Plan = Plan;

    fn problems(extent: Extent) -> Vec<Problem> {
        attentions(extent)
    }

    /// On Hopper f32 takes the portable kernels, which are chosen for the last of the others.
    fn applies(problem: &Problem, device: &Device) -> bool {
        device.target != Target::Sm90a || problem.element != Element::F32
    }

    fn fits(kernel: &Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
        match kernel {
            Config::FlashSm90(c) => {
                c.check(gpu.device.shared_per_block)?;
                flash_fits(c.element, c.into(), gpu, problem)
            }
            Config::FlashSm80(c) => {
                c.check(gpu.device.shared_per_block)?;
                flash_fits(c.element, c.into(), gpu, problem)
            }
            Config::FlashCombine(config) => rule(config.out == problem.out, "another type"),
            _ => another(),
        }
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::FlashSm80(config) => config.blocks_per_sm,
            _ => 1,
        }
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let sequences = problem.rows() / problem.heads / problem.queries;
        let mut address = addresses();
        let mut operand = |rows: u64, heads: u64, cols: u64| {
            let row = cols.next_multiple_of(8);
            let strides = [row, rows * row, heads * rows * row];
            attention::Operand { address: address(), cols, lens: [rows, heads, sequences], strides }
        };
        let operands = [
            operand(problem.queries, problem.heads, problem.head_dim),
            operand(problem.keys, problem.kv_heads, problem.head_dim),
            operand(problem.keys, problem.kv_heads, problem.value_dim),
        ];
        let mut output = |lse: bool| attention::Output {
            address: address(),
            strides: [1, problem.queries, problem.heads * problem.queries]
                .map(|rows| rows * problem.value_dim),
            lse: lse.then(&mut address),
            stats: problem.stats.then(|| [address(), address()]),
        };
        let (out, parts) = (output(problem.lse), output(true));
        let arguments = attention::Arguments {
            problem,
            plan,
            inputs: attention::Inputs {
                operands,
                scale: 0.125,
                softcap: problem.score_mod.softcap.then_some(30.0),
                bias: problem.score_mod.bias.map(|_| (address(), [0, 0, problem.keys, 1])),
                slopes: problem.score_mod.alibi.then(|| (address(), [0, 1])),
                lengths: (problem.lengths != Lengths::Full).then(|| [address(), address()]),
            },
            out,
            parts: plan.combine.map(|_| parts),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        flash().into_iter().chain(portable_flash()).collect()
    }
}

/// Sizes, each with one drawing of everything else.
pub fn attentions(extent: Extent) -> Vec<attention::Problem> {
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
                            stats: pick(36, 4) == 0,
                        });
                    }
                }
            }
        }
    }
    all
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
    rule(variant.stats == problem.stats, "another backward pass")?;
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

/// 64 wide, nothing hidden.
const VARIANT: attention::Variant = attention::Variant {
    out: BF16,
    head_dim: 64,
    value_dim: 64,
    mask: attention::Mask::None,
    score_mod: attention::ScoreMod { scale_first: false, softcap: false, bias: None, alibi: false },
    lengths: attention::Lengths::Full,
    pack: 1,
    split: false,
    lse: true,
    stats: false,
};

/// Attention on Hopper: 128×32.
const FLASH: attention::sm90::Config = attention::sm90::Config {
    variant: VARIANT,
    element: BF16,
    rows: 128,
    keys: 32,
    query_stages: 1,
    stages: 2,
    store_stages: 1,
    pingpong: true,
    store: attention::sm90::Store::Tma,
};

/// Attention everywhere: 128×32.
const PORTABLE_FLASH: attention::sm80::Config = attention::sm80::Config {
    variant: VARIANT,
    element: BF16,
    warps: 4,
    m16_tiles: 2,
    keys: 32,
    blocks_per_sm: 2,
    q_in_regs: true,
};

/// What variants show: all that changes scores, packed sequences, keys in parts.
fn variants(bias: attention::Bias) -> [attention::Variant; 3] {
    use attention::{Lengths, Mask, ScoreMod};
    let small = attention::Variant { head_dim: 16, value_dim: 8, ..VARIANT };
    let scores = ScoreMod { softcap: true, alibi: true, bias: Some(bias), ..VARIANT.score_mod };
    [
        attention::Variant {
            mask: Mask::Window,
            score_mod: scores,
            lengths: Lengths::Padded,
            ..small
        },
        attention::Variant {
            out: Element::F32,
            value_dim: 72,
            mask: Mask::Right,
            lengths: Lengths::Packed,
            ..small
        },
        attention::Variant { out: Element::F32, pack: 4, split: true, ..small },
    ]
}

fn flash() -> [(&'static str, Config); 5] {
    use attention::sm90::{Config as Flash, Store};
    let [all, packed, split] = variants(attention::Bias { element: BF16, pairs: true });
    let small = Flash { rows: 64, keys: 16, pingpong: false, ..FLASH };
    let all = Flash { variant: all, ..small };
    let packed = Flash { variant: packed, element: F16, store_stages: 2, ..small };
    let split = Flash { variant: split, store: Store::Direct, store_stages: 0, ..small };
    let combine = attention::combine::Config::new(BF16, 8, 5, true);
    [
        ("flash90_plain", Config::FlashSm90(Flash { query_stages: 2, ..FLASH })),
        ("flash90_window_all", Config::FlashSm90(all)),
        ("flash90_packed", Config::FlashSm90(packed)),
        ("flash90_split", Config::FlashSm90(split)),
        ("flash_combine", Config::FlashCombine(combine)),
    ]
}

fn portable_flash() -> [(&'static str, Config); 5] {
    use attention::sm80::Config as Flash;
    let [all, packed, split] = variants(attention::Bias { element: Element::F32, pairs: false });
    let small = Flash { m16_tiles: 1, keys: 16, ..PORTABLE_FLASH };
    let all = Flash { variant: all, q_in_regs: false, ..small };
    let packed = attention::Variant { head_dim: 20, ..packed };
    let packed = Flash { variant: packed, element: F16, ..small };
    let split = Flash { variant: split, ..small };
    let exact = attention::Variant {
        out: Element::F32,
        head_dim: 12,
        value_dim: 40,
        mask: attention::Mask::Right,
        ..VARIANT
    };
    let exact = Flash { variant: exact, element: Element::F32, q_in_regs: false, ..small };
    [
        ("flash80_plain", Config::FlashSm80(PORTABLE_FLASH)),
        ("flash80_window_all", Config::FlashSm80(all)),
        ("flash80_packed", Config::FlashSm80(packed)),
        ("flash80_split", Config::FlashSm80(split)),
        ("flash80_exact", Config::FlashSm80(exact)),
    ]
}
