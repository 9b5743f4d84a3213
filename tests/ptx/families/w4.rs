//! Weights of four bits: products, and the codes in other forms.

use kaio_candle::Activation;
use kaio_candle::kernel::gemm::{self, Epilogue, Major, sm90};
use kaio_candle::kernel::w4::{self, Codes, Plan, Problem, Scheme, layout, stream};
use kaio_candle::kernel::{Config, Device, Element};
use kaio_candle::ptx::{Factor, Half, Target};

use super::products::{hopper_fits, portable_fits};
use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

/// With and without zero points, nf4; all groups.
fn schemes(scale: Element) -> Vec<Scheme> {
    let kinds = [(Codes::Int4, false), (Codes::Int4, true), (Codes::Nf4, false)];
    let groups = [None, Some(32), Some(64), Some(128)];
    let all = kinds.into_iter().flat_map(|kind| groups.map(|group| (kind, group)));
    all.map(|((codes, zeros), group)| Scheme { codes, zeros, scale, group }).collect()
}

/// Of bytes.
fn schemes_of_bytes() -> [Scheme; 3] {
    [(Codes::Int8, None), (Codes::E4m3, None), (Codes::E4m3, Some(128))]
        .map(|(codes, group)| Scheme { codes, zeros: false, scale: Element::F32, group })
}

pub struct Products;

impl Family for Products {
    type Problem = Problem;
    type Plan = Plan;

    /// All types, schemes and numbers of tokens, of weights of some sizes.
    fn problems(extent: Extent) -> Vec<Problem> {
        let (tokens, sizes): (&[u64], &[[u64; 2]]) = match extent {
            Extent::Few => (&[1, 8, 16, 100, 4096], &[[4096, 4096], [129, 65]]),
            Extent::All => (
                &[1, 2, 3, 7, 16, 17, 40, 64, 128, 200, 1024, 4096],
                &[[1024, 4096], [4096, 4096], [28_672, 4096], [8192, 28_672], [129, 65]],
            ),
        };
        let mut all = vec![];
        for (i, &m) in tokens.iter().enumerate() {
            for (j, &[n, k]) in sizes.iter().enumerate() {
                for (half, scale) in
                    [(Half::F16, F16), (Half::Bf16, BF16), (Half::Bf16, Element::F32)]
                {
                    // As they are prepared, bytes have scales in f32.
                    let bytes = (scale != Element::F32).then(schemes_of_bytes);
                    for scheme in schemes(scale).into_iter().chain(bytes.into_iter().flatten()) {
                        let out = [Element::Half(half), Element::F32][(i + j) % 2];
                        let epilogue = match (i + j) % 3 {
                            0 => Epilogue {
                                bias: Some(out),
                                activation: Some(Activation::GeluErf),
                                ..Epilogue::round(out)
                            },
                            _ => Epilogue::round(out),
                        };
                        let problem = Problem {
                            m,
                            n,
                            others: [0; 2],
                            gated: false,
                            k,
                            half,
                            scheme,
                            epilogue,
                        };
                        all.push(problem);
                        if half == Half::F16 {
                            // Scales over a power of two.
                            let scale = gemm::Scale::Lines;
                            let epilogue = Epilogue { scale, ..epilogue };
                            all.push(Problem { epilogue, ..problem });
                        }
                        let (others, epilogue) =
                            ([[n, 0], [1024, 1024]][i % 2], Epilogue::round(out));
                        all.push(Problem { others, epilogue, ..problem });
                        if j % 2 == 1 {
                            let epilogue =
                                Epilogue { activation: Some(Activation::Silu), ..epilogue };
                            all.push(Problem { others: [n, 0], gated: true, epilogue, ..problem });
                        }
                    }
                }
            }
        }
        all
    }

    fn applies(problem: &Problem, device: &Device) -> bool {
        Plan::takes(problem.scheme.codes, problem.m, device.target)
            && (problem.others == [0; 2] || w4::together(problem, device))
    }

    fn fits(kernel: &Config, gpu: &Gpu, problem: &Problem) -> Result<(), String> {
        let product = problem.product();
        match kernel {
            Config::W4Stream(config) => {
                config.check(gpu.device.shared_per_block)?;
                rule(config.target == gpu.device.target_without_e4m3(), "another target")?;
                let room = config.several || problem.m <= config.tokens.into();
                rule(room, "more tokens than there is room for")?;
                rule(problem.n.is_multiple_of(config.unit.into()), "units of a row")?;
                let cuts = stream::Config::cuts(problem, config.cols);
                rule(config.cut || !cuts, "less than is copied")?;
                let facts = (config.scheme, config.half) == (problem.scheme, problem.half);
                rule(facts, "another problem's facts")
            }
            Config::MatmulSm90(config) => {
                rule(config.weights == problem.weights(), "another number of weights")?;
                let widths = problem.widths().into_iter().filter(|&n| n > 0);
                let product = |n| gemm::Problem { n, ..product };
                widths.map(product).try_for_each(|one| hopper_fits(config, gpu, &one))
            }
            Config::MatmulSm80(config) => portable_fits(config, gpu, &product),
            Config::MatmulReduce(_) | Config::W4Layout(_) => Ok(()),
            _ => another(),
        }
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::W4Stream(config) => config.blocks_per_sm,
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
        let lines = problem.n.next_multiple_of(16);
        let weights = problem.widths().map(|_| w4::Weight {
            codes: address(),
            codes_line: problem.k.next_multiple_of(16),
            scale_each: true,
            scales: (address(), lines),
            zeros: problem.scheme.zeros.then(|| (address(), lines)),
            out: address(),
        });
        let arguments = w4::Arguments {
            problem,
            plan,
            x: (address(), problem.k.next_multiple_of(8)),
            weights: &weights,
            sum_scales: match problem.epilogue.scale {
                gemm::Scale::Lines => {
                    let rows = gemm::PerRow { address: address(), each: false };
                    gemm::Scales::Lines { one: 1.0, rows, cols: address(), zero: None }
                }
                _ => gemm::Scales::None,
            },
            bias: problem.epilogue.bias.map(|_| address()),
            panel: plan.panel_elements(problem).map(|_| address()),
            partial: plan.partial_sums(problem).map(|_| address()),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let scheme = Scheme { codes: Codes::Int4, zeros: false, scale: F16, group: Some(128) };
        let plain = stream::Config {
            target: Target::Sm90a,
            half: Half::F16,
            scheme,
            tokens: 8,
            several: false,
            cols: 64,
            cut: true,
            warps: 8,
            slots: 4,
            table: w4::Table::Narrow,
            split: 2,
            blocks_per_sm: 2,
            unit: 4,
            weights: 1,
            gated: false,
            epilogue: Epilogue::round(F16),
        };
        let several = stream::Config { weights: 3, ..plain };
        let silu = Epilogue { activation: Some(Activation::Silu), ..plain.epilogue };
        let gated = stream::Config { weights: 2, gated: true, epilogue: silu, ..plain };
        let zeros = stream::Config {
            target: Target::Sm80,
            half: Half::Bf16,
            scheme: Scheme { zeros: true, scale: BF16, group: Some(32), ..scheme },
            tokens: 16,
            several: true,
            unit: 1,
            split: 1,
            epilogue: Epilogue { bias: Some(BF16), ..Epilogue::round(Element::F32) },
            ..plain
        };
        let narrow = stream::Config { cols: 32, cut: false, tokens: 1, split: 1, ..plain };
        let table = stream::Config {
            scheme: Scheme { codes: Codes::Nf4, group: Some(64), ..scheme },
            tokens: 1,
            warps: 16,
            table: w4::Table::Wide,
            blocks_per_sm: 1,
            ..plain
        };
        let column = stream::Config {
            scheme: Scheme { zeros: true, group: None, ..scheme },
            tokens: 4,
            split: 1,
            ..plain
        };
        let bytes = stream::Config {
            scheme: schemes_of_bytes()[0],
            tokens: 16,
            slots: 2,
            split: 1,
            blocks_per_sm: 1,
            ..plain
        };
        let blocks = stream::Config {
            half: Half::Bf16,
            scheme: schemes_of_bytes()[2],
            epilogue: Epilogue::round(BF16),
            tokens: 1,
            ..bytes
        };
        let tile = sm90::Config {
            elements: [Factor::Half(Half::Bf16); 2],
            weight: Some(Scheme { scale: BF16, ..scheme }),
            weights: 1,
            lhs: Major::K,
            rhs: Major::K,
            orient: sm90::Orient::Swapped,
            rows: 128,
            cols: 256,
            lhs_lines: 64,
            rhs_lines: 64,
            stages: 5,
            split: 1,
            teams: 1,
            pingpong: false,
            store_stages: 2,
            order: sm90::Order::Raster,
            blocks_per_sm: 1,
            batched: false,
            store: sm90::Store::Tma,
            epilogue: Epilogue::round(BF16),
        };
        let small = sm90::Config {
            weight: Some(Scheme { zeros: true, scale: Element::F32, group: Some(32), ..scheme }),
            rows: 64,
            cols: 32,
            rhs_lines: 32,
            split: 2,
            order: sm90::Order::Grid,
            blocks_per_sm: 2,
            store: sm90::Store::Staged { unit: 4 },
            ..tile
        };
        let teams = sm90::Config {
            cols: 64,
            stages: 12,
            split: 2,
            teams: 2,
            order: sm90::Order::Grid,
            store: sm90::Store::Staged { unit: 4 },
            ..tile
        };
        let several_tiles = sm90::Config { weights: 3, ..tile };
        let lines = sm90::Config { weight: Some(schemes_of_bytes()[0]), ..tile };
        let scaled = sm90::Config { weight: Some(schemes_of_bytes()[2]), stages: 4, ..small };
        vec![
            ("w4_stream", Config::W4Stream(plain)),
            ("w4_stream_narrow", Config::W4Stream(narrow)),
            ("w4_stream_gated", Config::W4Stream(gated)),
            ("w4_stream_several", Config::W4Stream(several)),
            ("w4_stream_zeros", Config::W4Stream(zeros)),
            ("w4_stream_nf4", Config::W4Stream(table)),
            ("w4_stream_column", Config::W4Stream(column)),
            ("w8_stream", Config::W4Stream(bytes)),
            ("w8_stream_blocks", Config::W4Stream(blocks)),
            ("w4_tile", Config::MatmulSm90(tile)),
            ("w4_tile_zeros", Config::MatmulSm90(small)),
            ("w4_tile_teams", Config::MatmulSm90(teams)),
            ("w4_tile_several", Config::MatmulSm90(several_tiles)),
            ("w8_tile", Config::MatmulSm90(lines)),
            ("w8_tile_blocks", Config::MatmulSm90(scaled)),
        ]
    }
}

pub struct Layouts;

impl Family for Layouts {
    type Problem = layout::Problem;
    type Plan = layout::Plan;

    fn problems(_: Extent) -> Vec<layout::Problem> {
        let unpack = |codes| layout::Config::Unpack { codes };
        let mut configs = [Codes::Int4, Codes::Nf4].map(unpack).to_vec();
        let pack = |(codes, zero, signed)| layout::Config::Pack { codes, zero, signed };
        let int4 =
            [(0, false), (8, false), (8, true)].map(|(zero, signed)| (Codes::Int4, zero, signed));
        configs.extend(int4.into_iter().chain([(Codes::Nf4, 7, false)]).map(pack));
        for scale in [F16, BF16, Element::F32] {
            for scheme in schemes(scale) {
                for out in [F16, BF16, Element::F32] {
                    let of = |transposed| layout::Config::Elements { scheme, out, transposed };
                    configs.extend([false, true].map(of));
                }
            }
        }
        let sizes = || cross(&[1, 100, 4096], &[1, 70, 128_256]);
        let of = |config| sizes().map(move |(k, n)| layout::Problem { k, n, config });
        configs.into_iter().flat_map(of).collect()
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &layout::Problem) -> Result<(), String> {
        let Config::W4Layout(config) = kernel else { return another() };
        rule(*config == problem.config, "another problem's choices")
    }

    /// Of 128 threads.
    fn blocks_per_sm(_: &Config) -> u32 {
        4
    }

    fn passes(
        problem: &layout::Problem,
        plan: &layout::Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let mut address = addresses();
        let (mut plain, mut out, mut scales, mut zeros) = (None, None, None, None);
        match problem.config {
            layout::Config::Elements { scheme, .. } => {
                scales = Some((address(), problem.n));
                zeros = scheme.zeros.then(|| (address(), problem.n.next_multiple_of(16)));
                out = Some((address(), problem.n));
            }
            _ => plain = Some((address(), [problem.n, 1])),
        }
        let codes = address();
        let arguments = layout::Arguments { problem: *problem, plain, codes, scales, zeros, out };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let scheme = Scheme { codes: Codes::Int4, zeros: true, scale: F16, group: Some(32) };
        let elements = layout::Config::Elements { scheme, out: BF16, transposed: false };
        let pack = layout::Config::Pack { codes: Codes::Int4, zero: 8, signed: true };
        vec![
            ("w4_pack", Config::W4Layout(pack)),
            ("w4_unpack", Config::W4Layout(layout::Config::Unpack { codes: Codes::Nf4 })),
            ("w4_elements", Config::W4Layout(elements)),
        ]
    }
}
