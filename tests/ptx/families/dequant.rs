//! Quantised weights in floats.

use kaio_candle::kernel::dequant::{self, Arguments, Codes, Plan, Problem};
use kaio_candle::kernel::{Config, Element};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct Dequants;

const CODES: [Codes; 6] = [
    Codes::Int4 { signed: false },
    Codes::Int4 { signed: true },
    Codes::Uint4,
    Codes::Table([0x3f80_0000; 16]),
    Codes::Int8,
    Codes::E4m3,
];

impl Family for Dequants {
    type Problem = Problem;
    type Plan = Plan;

    /// All codes and types, of sizes that are and are not those of words and units.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for codes in CODES {
            for (scale, out) in [(F16, F16), (BF16, BF16), (Element::F32, F16), (F16, Element::F32)]
            {
                for (rows, cols) in cross(&[1, 300, 4096], &[1, 40, 4096, 50_257]) {
                    for [down, aligned] in [[false, false], [false, true], [true, true]] {
                        if down && !(codes.are_nibbles() && rows.is_multiple_of(8)) {
                            continue;
                        }
                        let group = if codes.are_nibbles() { [128, 1] } else { [0, 1] };
                        all.push(Problem { rows, cols, codes, scale, out, down, aligned, group });
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Dequant(config) = kernel else { return another() };
        let whole = config.unit == 1 || problem.aligned && !problem.down;
        rule(whole && problem.cols.is_multiple_of(config.unit.into()), "a line's end")
    }

    /// Of 256 threads, which is half of what most multiprocessors hold.
    fn blocks_per_sm(_: &Config) -> u32 {
        4
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let mut address = addresses();
        let arguments = Arguments {
            problem,
            plan,
            codes: (address(), problem.cols),
            scales: (address(), [problem.cols, 1]),
            zeros: Some((address(), problem.cols)),
            out: address(),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let of = |codes, unit, down, ragged| {
            let config = dequant::Config { codes, scale: F16, out: BF16, unit, down, ragged };
            Config::Dequant(config)
        };
        vec![
            ("dequant_int4", of(Codes::Uint4, 4, false, true)),
            ("dequant_down", of(Codes::Int4 { signed: true }, 1, true, false)),
            ("dequant_table", of(CODES[3], 1, false, false)),
            ("dequant_e4m3", of(Codes::E4m3, 8, false, false)),
        ]
    }
}
