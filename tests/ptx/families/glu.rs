//! Gated linear units.

use kaio_candle::kernel::glu::{self, Arguments, Gate, Plan, Problem};
use kaio_candle::kernel::{Config, Element};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct Glus;

impl Family for Glus {
    type Problem = Problem;
    type Plan = Plan;

    /// All types and gates, in rows of one thread to those of many blocks.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for element in [F16, BF16, Element::F32] {
            for gate in [Gate::Silu, Gate::GeluTanh] {
                for (rows, cols) in cross(&[1, 300], &[1, 3, 8, 40, 4096, 50_257]) {
                    for [backward, aligned] in
                        [[false, false], [false, true], [true, false], [true, true]]
                    {
                        all.push(Problem { rows, cols, element, gate, backward, aligned });
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Glu(config) = kernel else { return another() };
        let whole = config.unit == 1 || problem.aligned;
        rule(whole && problem.cols.is_multiple_of(config.unit.into()), "a row's end")
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
        let (mut address, row) = (addresses(), problem.cols + 8);
        let (operands, results) = if problem.backward { (3, 2) } else { (2, 1) };
        let operands: Vec<_> = (0..operands).map(|_| (address(), row)).collect();
        let results: Vec<_> = (0..results).map(|_| address()).collect();
        let arguments = Arguments { problem, plan, operands: &operands, results: &results };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let config = glu::Config {
            element: BF16,
            gate: Gate::GeluTanh,
            backward: true,
            unit: 8,
            across: 256,
        };
        vec![("glu_backward", Config::Glu(config))]
    }
}
