//! Norms of rows and their gradients.

use kaio_candle::kernel::norm::{
    Arguments, Backward, Columns, Forward, Moments, Norm, Pass, Plan, Problem, Results, Sums,
};
use kaio_candle::kernel::{Config, Element, Tile};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, passes, rule, within};

pub struct Norms;

impl Family for Norms {
    type Problem = Problem;
    type Plan = Plan;

    /// All types and passes, of rows of part of a warp to those that no team holds.
    fn problems(extent: Extent) -> Vec<Problem> {
        let mut all = vec![];
        let types = [(BF16, BF16), (F16, F16), (BF16, Element::F32), (Element::F32, Element::F32)];
        let widths: &[u64] = match extent {
            Extent::Few => &[1, 7, 64, 768, 1600, 4096, 4099, 16_384, 50_000],
            // f16 has the kernels of bf16 with other conversions: the sample has those.
            Extent::All => &[13, 128, 515, 1024, 2048, 2056, 3072, 8192, 8200, 16_392, 32_768],
        };
        let types = types.iter().filter(|of| extent == Extent::Few || of.0 != F16);
        for ((element, weight), &cols) in types.flat_map(|t| widths.iter().map(move |w| (*t, w))) {
            for (rows, centred, aligned) in [
                (1, false, true),
                (16_384, false, true),
                (16_384, true, true),
                (300, false, false),
                (300, true, false),
            ] {
                let norm = Norm { element, weight, centred };
                for pass in ways(centred) {
                    for add in [false, true] {
                        all.push(Problem { norm, rows, cols, add: add && !centred, pass, aligned });
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
        within(problem.limit())?;
        let tile = match kernel {
            Config::Norm(config) => config.tile,
            Config::NormBackward(config) => config.tile,
            Config::NormMoments(config) => config.tile,
            Config::NormColumns(_) => return Ok(()),
            _ => return another(),
        };
        let held = u64::from(tile.unit * tile.team * tile.chunks);
        let whole = tile.unit == 1 || problem.aligned;
        rule(whole && problem.cols.is_multiple_of(tile.unit.into()), "a row's end")?;
        rule(!tile.full || problem.cols.is_multiple_of(held), "units that are not there")?;
        let all = match kernel {
            Config::Norm(config) => !config.long,
            Config::NormBackward(config) => config.sums == Sums::Own,
            _ => false,
        };
        rule(!all || held >= problem.cols, "a row that no team holds")?;
        rule(kernel.emit().shared <= gpu.device.shared_per_block, "shared memory")
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::Norm(config) => config.blocks_per_sm(),
            Config::NormBackward(config) => config.blocks_per_sm,
            _ => 1,
        }
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let (mut address, row) = (addresses(), problem.cols + 8);
        let rows = (address(), row);
        let (forward, saved, columns) = match problem.pass {
            Pass::Forward { save, .. } => (true, save, 0),
            Pass::Backward { weight, bias, .. } => {
                (false, true, usize::from(weight) + usize::from(bias))
            }
        };
        let columns: Vec<_> = (0..columns).map(|_| address()).collect();
        let arguments = Arguments {
            problem,
            plan,
            x: rows,
            other: problem.add.then(|| (address(), row)),
            grad: (!forward).then(|| (address(), row)),
            weight: address(),
            bias: matches!(problem.pass, Pass::Forward { bias: true, .. }).then(&mut address),
            stats: [saved, saved && problem.norm.centred].map(|is| is.then(&mut address)),
            results: Results {
                rows: (forward || matches!(problem.pass, Pass::Backward { x: true, .. }))
                    .then(&mut address),
                sum: (forward && problem.add).then(&mut address),
                columns: &columns,
                parts: (plan.parts(problem) > 0).then(&mut address),
                moments: (plan.moments(problem) > 0).then(&mut address),
            },
            eps: 1e-5,
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let rms = Norm { element: BF16, weight: BF16, centred: false };
        let layer = Norm { element: Element::F32, weight: Element::F32, centred: true };
        let tile = Tile { unit: 8, team: 256, chunks: 2, full: true };
        let odd = Tile { unit: 1, team: 16, chunks: 1, full: false };
        let forward = Forward { norm: rms, bias: false, add: true, save: true, tile, long: false };
        let backward = Backward {
            norm: rms,
            sums: Sums::Own,
            add: false,
            weight: true,
            bias: false,
            tile,
            blocks_per_sm: 2,
            stages: 3,
            keep: false,
        };
        let of_layer = Backward { norm: layer, bias: true, tile: odd, stages: 0, ..backward };
        vec![
            ("norm_add", forward.into()),
            (
                "norm_layer_long",
                Forward { norm: layer, bias: true, add: false, long: true, tile: odd, ..forward }
                    .into(),
            ),
            ("norm_backward", backward.into()),
            ("norm_backward_layer", of_layer.into()),
            ("norm_backward_kept", Backward { blocks_per_sm: 1, keep: true, ..backward }.into()),
            ("norm_backward_given", Backward { sums: Sums::Given, ..backward }.into()),
            ("norm_moments", Moments { norm: rms, tile }.into()),
            ("norm_columns", Columns { element: BF16, both: true }.into()),
        ]
    }
}

/// Which ways a problem goes.
fn ways(centred: bool) -> Vec<Pass> {
    let mut all = vec![];
    for save in [false, true] {
        all.push(Pass::Forward { bias: centred, save });
    }
    let wants: &[[bool; 3]] = match centred {
        true => &[
            [true, true, true],
            [true, false, false],
            [false, true, true],
            [false, false, true],
            [true, true, false],
        ],
        false => &[[true, true, false], [true, false, false], [false, true, false]],
    };
    all.extend(wants.iter().map(|&[x, weight, bias]| Pass::Backward { x, weight, bias }));
    all
}
