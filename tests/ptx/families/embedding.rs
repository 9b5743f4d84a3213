//! Rows of a table, and its gradient.

use kaio_candle::kernel::embedding::{Arguments, Config as Embedding, Keys, Plan, Problem};
use kaio_candle::kernel::{Config, Element};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct Embeddings;

impl Family for Embeddings {
    type Problem = Problem;
    type Plan = Plan;

    /// All types, rows of a unit to those of many blocks, and sorts of one pass to those of three.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for element in [F16, BF16, Element::F32] {
            for (rows, cols) in cross(&[1, 16_384], &[1, 8, 768, 4096, 4097]) {
                for (i, classes) in [1, 300, 50_257, 128_256, 1 << 24].into_iter().enumerate() {
                    for [backward, aligned] in
                        [[false, false], [false, true], [true, false], [true, true]]
                    {
                        let wide = i % 2 == 0;
                        all.push(Problem { rows, cols, classes, element, wide, backward, aligned });
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Embedding(config) = kernel else { return another() };
        match *config {
            Embedding::Gather { unit, .. }
            | Embedding::Sum { unit, .. }
            | Embedding::Join { unit, .. } => {
                let whole = unit == 1 || problem.aligned;
                rule(whole && problem.cols.is_multiple_of(unit.into()), "a row's end")
            }
            Embedding::Sort { .. } | Embedding::Scan => Ok(()),
        }
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::Embedding(Embedding::Scan | Embedding::Sort { .. }) => 1,
            _ => 4,
        }
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
            ids: address(),
            operand: (address(), problem.cols + 8),
            out: address(),
            buffers: problem.backward.then(|| [(); 6].map(|()| address())),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let sort = |scatter, keys| Embedding::Sort { scatter, keys }.into();
        let ids = Keys::Ids { wide: true };
        let (element, unit, wide) = (BF16, 8, true);
        vec![
            ("embedding_gather", Embedding::Gather { element, wide, unit, across: 128 }.into()),
            ("embedding_count", sort(false, ids)),
            ("embedding_scan", Embedding::Scan.into()),
            ("embedding_scatter", sort(true, Keys::Sorted)),
            ("embedding_sum", Embedding::Sum { element, unit }.into()),
            ("embedding_join", Embedding::Join { element, unit }.into()),
        ]
    }
}
