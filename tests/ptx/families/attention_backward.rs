//! The backward pass of attention.

use kaio_candle::kernel::attention::backward::sm80::{self, KeySums, Pass};
use kaio_candle::kernel::attention::backward::sm90::keys::{self, Form};
use kaio_candle::kernel::attention::backward::sm90::queries;
use kaio_candle::kernel::attention::backward::{
    Arguments, BiasGrad, Gradient, Launch, Part, Plan, Problem, Variant, delta, dq,
};
use kaio_candle::kernel::attention::{self, Bias, Lengths, Mask, ScoreMod};
use kaio_candle::kernel::{Config, Device, Element};
use kaio_candle::ptx::Target;

use super::attention::attentions;
use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, hash, passes, rule};

pub struct Backwards;

impl Family for Backwards {
    type Problem = Problem;
    type Plan = Plan;

    fn problems(extent: Extent) -> Vec<Problem> {
        let attentions = attentions(extent).into_iter();
        // One query has no kernel of its own, and few keys have none.
        let large = attentions.filter(|attention| attention.queries > 1 && attention.keys > 1);
        large.map(backward).collect()
    }

    /// On Hopper f32 takes the portable kernels, which are chosen for the last of the others.
    fn applies(problem: &Problem, device: &Device) -> bool {
        device.target != Target::Sm90a || problem.attention.element != Element::F32
    }

    fn fits(kernel: &Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
        match kernel {
            Config::FlashBackwardSm80(c) => {
                c.check(gpu.device.shared_per_block)?;
                rule(c.variant == Variant::new(problem), "another problem's facts")?;
                rule(c.element == problem.attention.element, "another type")?;
                let Part::Sm80(_, launch) = Part::sm80(*c, problem, &gpu.device) else {
                    return another();
                };
                launch_fits(&launch)
            }
            Config::FlashKeysSm90(c) => {
                c.check(gpu.device.shared_per_block)?;
                let widths = [c.head_dim, c.value_dim].map(u64::from);
                let sums = c.form == Form::Fused;
                rule(!sums || c.ordered == problem.deterministic, "sums in whatever order")?;
                hopper_fits(widths, (c.mask, c.score_mod, c.lengths), problem)
            }
            Config::FlashQueriesSm90(c) => {
                c.check(gpu.device.shared_per_block)?;
                let widths = [c.head_dim, c.value_dim].map(u64::from);
                hopper_fits(widths, (c.mask, c.score_mod, c.lengths), problem)
            }
            Config::FlashDq(c) => {
                let dim = problem.attention.head_dim.next_multiple_of(8);
                rule(u64::from(c.head_dim) == dim, "another width")?;
                rule(c.queries == 64 || c.queries == 128, "another block")
            }
            Config::FlashDelta(c) => {
                let dim = u64::from(c.value_dim);
                rule(dim == problem.attention.value_dim, "another width")?;
                rule(c.lse_grad == problem.lse_grad, "another gradient")
            }
            _ => another(),
        }
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::FlashBackwardSm80(config) => config.blocks_per_sm,
            Config::FlashDelta(_) => 4,
            _ => 1,
        }
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let attention = &problem.attention;
        let sequences = attention.rows() / attention.heads / attention.queries;
        let mut address = addresses();
        let mut operand = |rows: u64, heads: u64, cols: u64| {
            let row = cols.next_multiple_of(8);
            let strides = [row, rows * row, heads * rows * row];
            attention::Operand { address: address(), cols, lens: [rows, heads, sequences], strides }
        };
        let (queries, keys) = (attention.queries, attention.keys);
        let operands = [
            operand(queries, attention.heads, attention.head_dim),
            operand(keys, attention.kv_heads, attention.head_dim),
            operand(keys, attention.kv_heads, attention.value_dim),
        ];
        let [out, grad] = [0; 2].map(|_| operand(queries, attention.heads, attention.value_dim));
        let mut gradient =
            |like: attention::Operand| Gradient { address: address(), strides: like.strides };
        let grads = operands.map(&mut gradient);
        let arguments = Arguments {
            problem,
            plan,
            inputs: attention::Inputs {
                operands,
                scale: 0.125,
                softcap: attention.score_mod.softcap.then_some(30.0),
                bias: attention.score_mod.bias.map(|_| (address(), [0, 0, keys, 1])),
                slopes: attention.score_mod.alibi.then(|| (address(), [0, 1])),
                lengths: (attention.lengths != Lengths::Full).then(|| [address(), address()]),
            },
            out,
            grad,
            stats: [address(), address()],
            lse_grad: problem.lse_grad.then(&mut address),
            delta: address(),
            grads,
            bias_grad: problem.bias_grad.map(|_| address()),
            zeroed: address(),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        goldens().into_iter().chain(hopper_goldens()).collect()
    }
}

/// A backward pass of a problem, with one drawing of everything else.
fn backward(attention: attention::Problem) -> Problem {
    let draw = hash(&format!("{attention:?}")) >> 8;
    let pick = |shift: u32, of: usize| (draw >> shift) as usize % of;
    let repeated = |of: u64, shift: u32| if pick(shift, 2) == 0 { 1 } else { of };
    let has_bias_grad = attention.score_mod.bias.is_some() && attention.lengths != Lengths::Packed;
    let bias_grad = has_bias_grad.then(|| BiasGrad {
        repeated: [
            repeated(attention.batch, 0),
            repeated(attention.heads, 4),
            repeated(attention.queries, 8),
        ],
    });
    Problem {
        attention,
        aligned: [8, 4, 1][pick(12, 3)],
        lse_grad: pick(16, 2) == 0,
        bias_grad,
        deterministic: pick(20, 2) == 0,
    }
}

/// Whether a kernel of Hopper's is of the problem: its widths, what hides keys, scores, lengths.
fn hopper_fits(
    widths: [u64; 2],
    (mask, scores, lengths): (Mask, ScoreMod, Lengths),
    problem: &Problem,
) -> Result<(), String> {
    let attention = &problem.attention;
    let own = [attention.head_dim, attention.value_dim].map(|dim| dim.next_multiple_of(8));
    rule(widths == own, "other widths")?;
    rule(mask == attention.mask(), "another mask")?;
    rule(scores == attention.score_mod, "other scores")?;
    rule(lengths == attention.lengths, "other lengths")
}

fn launch_fits(launch: &Launch) -> Result<(), String> {
    let tiles = launch.order.heads * launch.order.columns;
    rule(launch.order.tiles == tiles && tiles > 0, "tiles that are not counted")?;
    rule((1..=tiles).contains(&launch.blocks), "blocks without tiles")?;
    rule((1..=launch.order.heads).contains(&launch.order.section), "sections without heads")
}

/// 64 wide, nothing hidden.
const PLAIN: sm80::Config = sm80::Config {
    variant: Variant {
        head_dim: 64,
        value_dim: 64,
        mask: Mask::None,
        score_mod: ScoreMod { scale_first: false, softcap: false, bias: None, alibi: false },
        lengths: Lengths::Full,
    },
    element: BF16,
    pass: Pass::Keys(KeySums::Both),
    warps: 4,
    paired: false,
    m16_tiles: 2,
    cols: 32,
    stages: 2,
    blocks_per_sm: 2,
};

fn goldens() -> [(&'static str, Config); 9] {
    let small = sm80::Config { m16_tiles: 1, cols: 16, blocks_per_sm: 1, ..PLAIN };
    let variant = Variant { head_dim: 16, value_dim: 8, ..PLAIN.variant };
    let bias = Some(Bias { element: Element::F32, pairs: false });
    let all = Variant {
        mask: Mask::Window,
        score_mod: ScoreMod { softcap: true, alibi: true, bias, ..PLAIN.variant.score_mod },
        lengths: Lengths::Padded,
        ..variant
    };
    let packed = Variant { head_dim: 20, mask: Mask::Right, lengths: Lengths::Packed, ..variant };
    let sums = |sums| Pass::Keys(sums);
    let of_bias = |pairs, shared| Pass::Bias { pairs, shared };
    let wide = Variant { head_dim: 128, value_dim: 128, ..PLAIN.variant };
    let pairs = sm80::Config { variant: wide, warps: 8, paired: true, cols: 64, ..PLAIN };
    let shares = sm80::Config { pass: sums(KeySums::All), blocks_per_sm: 1, ..pairs };
    let passes = [
        ("backward80_keys", PLAIN),
        ("backward80_shares", shares),
        ("backward80_queries", sm80::Config { pass: Pass::Queries, ..PLAIN }),
        ("backward80_window_all", sm80::Config { variant: all, ..small }),
        (
            "backward80_packed",
            sm80::Config { variant: packed, element: F16, pass: sums(KeySums::Keys), ..small },
        ),
        (
            "backward80_exact",
            sm80::Config { variant, element: Element::F32, pass: sums(KeySums::Values), ..small },
        ),
        (
            "backward80_bias",
            sm80::Config { variant: all, pass: of_bias(true, false), stages: 1, ..small },
        ),
        (
            "backward80_shared_bias",
            sm80::Config { variant: all, pass: of_bias(false, true), stages: 1, ..small },
        ),
    ];
    let delta = delta::Config::new(Element::F32, BF16, 40, 4, true);
    let delta = delta::Config { zeroes: true, ..delta };
    let passes = passes.map(|(name, config)| (name, Config::FlashBackwardSm80(config)));
    let [a, b, c, d, e, f, g, h] = passes;
    [a, b, c, d, e, f, g, h, ("backward_delta", Config::FlashDelta(delta))]
}

/// The forms of Hopper's kernels, with what the others have not.
fn hopper_goldens() -> [(&'static str, Config); 7] {
    let plain = keys::Config {
        form: Form::Fused,
        element: BF16,
        head_dim: 128,
        value_dim: 128,
        mask: Mask::None,
        score_mod: ScoreMod::default(),
        lengths: Lengths::Full,
        grouped: false,
        queries: 64,
        stages: 2,
        ordered: false,
    };
    let narrow = keys::Config { head_dim: 64, value_dim: 64, queries: 128, ..plain };
    let ordered = keys::Config {
        ordered: true,
        element: F16,
        head_dim: 24,
        value_dim: 16,
        mask: Mask::Right,
        lengths: Lengths::Packed,
        ..plain
    };
    let bias = Some(Bias { element: Element::F32, pairs: false });
    let all = ScoreMod { softcap: true, alibi: true, bias, ..ScoreMod::default() };
    let wide = keys::Config {
        form: Form::Wide,
        grouped: true,
        ordered: false,
        mask: Mask::Window,
        score_mod: all,
        lengths: Lengths::Padded,
        ..ordered
    };
    let queries = queries::Config {
        element: BF16,
        head_dim: 24,
        value_dim: 16,
        mask: Mask::Right,
        score_mod: all,
        lengths: Lengths::Packed,
        keys: 64,
        query_stages: 1,
        key_stages: 2,
        value_stages: 2,
    };
    let dq = dq::Config {
        element: BF16,
        head_dim: 72,
        columns: 64,
        queries: 64,
        lengths: Lengths::Padded,
        portable: false,
    };
    [
        ("backward90_fused", Config::FlashKeysSm90(plain)),
        ("backward90_narrow", Config::FlashKeysSm90(narrow)),
        ("backward90_ordered_packed", Config::FlashKeysSm90(ordered)),
        ("backward90_wide_all", Config::FlashKeysSm90(wide)),
        ("backward90_queries_packed", Config::FlashQueriesSm90(queries)),
        ("backward90_dq", Config::FlashDq(dq)),
        ("backward80_dq", Config::FlashDq(dq::Config { portable: true, ..dq })),
    ]
}
