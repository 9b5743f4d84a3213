//! The rounding of weights.

use kaio_candle::kernel::encode::{Arguments, Code, Config as Encode, Output, Plan, Problem};
use kaio_candle::kernel::{Config, Device, Element};
use kaio_candle::ptx::Target;

use super::{
    BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule, within,
};

pub struct Encoders;

const INT4: Code = Code::Int4 { zeros: false };
const ZEROS: Code = Code::Int4 { zeros: true };

impl Family for Encoders {
    type Problem = Problem;
    type Plan = Plan;

    /// All types, codes and groups.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for element in [F16, BF16, Element::F32] {
            for (rows, cols) in cross(&[1, 129, 8192], &[1, 33, 28_672]) {
                let of = |output, group| Problem { rows, cols, group, element, output };
                for code in [INT4, ZEROS, Code::Nf4] {
                    all.extend(
                        [32, 64, 128, rows].map(|height| of(Output::Codes(code), [height, 1])),
                    );
                }
                for code in [Code::Int8, Code::E4m3] {
                    let groups = [[rows, cols], [rows, 1], [128, 128]];
                    all.extend(groups.map(|group| of(Output::Codes(code), group)));
                }
                let divided = [8, 448].map(|farthest| Output::Divided { farthest });
                let whole = [Output::Ranges].into_iter().chain(divided);
                all.extend(whole.map(|output| of(output, [rows, cols])));
            }
        }
        all
    }

    fn fits(kernel: &Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Encode(config) = kernel else { return another() };
        within(problem.limit())?;
        match *config {
            Encode::Ranges { element, wide } => {
                rule(wide || problem.group[1] == 1, "groups of more columns")?;
                rule(element == problem.element, "another type")
            }
            Encode::Codes { element, code, rounds } => {
                let Device { target, .. } = gpu.device;
                let has = code != Code::E4m3 || target != Target::Sm80;
                rule(!rounds || has, "an instruction that there is not")?;
                rule(Output::Codes(code) == problem.output, "other codes")?;
                rule(element == problem.element, "another type")
            }
            Encode::Divided { element, farthest } => {
                rule(Output::Divided { farthest } == problem.output, "another output")?;
                rule(element == problem.element, "another type")
            }
        }
    }

    /// As many as hide the way from memory.
    fn blocks_per_sm(_: &Config) -> u32 {
        8
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
            input: (address(), [problem.cols, 1]),
            ranges: address(),
            results: (problem.output != Output::Ranges).then(|| [address(), address()]),
            zeros: (problem.output == Output::Codes(ZEROS)).then(&mut address),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let codes = |element, code, rounds| Encode::Codes { element, code, rounds }.into();
        vec![
            ("encode_ranges", Encode::Ranges { element: BF16, wide: true }.into()),
            ("encode_words", codes(F16, ZEROS, true)),
            ("encode_nf4", codes(Element::F32, Code::Nf4, true)),
            ("encode_bytes", codes(BF16, Code::E4m3, false)),
            ("encode_divided", Encode::Divided { element: F16, farthest: 8 }.into()),
        ]
    }
}
