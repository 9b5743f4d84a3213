//! Passes over all tensors of a model.

use kaio_candle::kernel::Config;
use kaio_candle::kernel::optimizer::{self, Arguments, Betas, Moments, Plan, Problem, Task};
use kaio_candle::ptx::Half;

use super::{Extent, Family, Gpu, Used, addresses, another, passes, within};

pub struct Optimizers;

const TASKS: [Task; 7] = [
    Task::AdamW(Moments::F32),
    Task::AdamW(Moments::Bits8),
    Task::Norm,
    Task::Accumulate,
    Task::Scale(None),
    Task::Scale(Some(Half::F16)),
    Task::Scale(Some(Half::Bf16)),
];

impl Family for Optimizers {
    type Problem = Problem;
    type Plan = Plan;

    fn problems(_: Extent) -> Vec<Problem> {
        let of = |task| {
            [false, true].map(|clipped| Problem { task, chunks: 7600, tensors: 148, clipped })
        };
        TASKS.into_iter().flat_map(of).collect()
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Optimizer(_) = kernel else { return another() };
        within(problem.limit())
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            // The one that adds is alone.
            Config::Optimizer(optimizer::Config::Norm) => 1,
            // Of 256 threads, each with several loads in flight.
            _ => 4,
        }
    }

    fn passes(_: &Problem, plan: &Plan, kernel: &Config, used: &mut Used) -> Result<(), String> {
        let mut address = addresses();
        let arguments = Arguments {
            plan,
            rows: address(),
            states: address(),
            books: address(),
            clip: address(),
            partials: address(),
            scale: 1.0,
            max_norm: 1.0,
            betas: Betas { first: [0.9, 0.1], second: [0.99, 0.01], epsilon: 1e-8 },
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        vec![
            ("adamw_f32", optimizer::Config::AdamW { moments: Moments::F32, clipped: true }.into()),
            (
                "adamw_bits8",
                optimizer::Config::AdamW { moments: Moments::Bits8, clipped: false }.into(),
            ),
            ("grad_squares", optimizer::Config::Squares.into()),
            ("grad_norm", optimizer::Config::Norm.into()),
            ("grad_accumulate", optimizer::Config::Accumulate.into()),
            ("grad_scale", optimizer::Config::Scale(None).into()),
            ("grad_scale_bf16", optimizer::Config::Scale(Some(Half::Bf16)).into()),
        ]
    }
}
