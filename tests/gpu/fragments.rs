//! Masks and score modifications on fragments, whose rows are queries or keys, against the formula in f64.
#![allow(unsafe_code)] // A kernel that is launched.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, Result};
use kaio_candle::kernel::Element;
use kaio_candle::kernel::attention::mask::Bounds;
use kaio_candle::kernel::attention::scores::{Query, ScoreParams};
use kaio_candle::kernel::attention::{Bias, ScoreMod};
use kaio_candle::launch::{Args, Function, Memory};
use kaio_candle::ptx::{Kernel, Reg, Source, Target};

use super::gpu;

/// Rows and columns of a fragment of a warp.
const ROWS: u32 = 16;
const COLS: u32 = 32;

const SCALE: f32 = 0.3;
const CAP: f32 = 5.0;

#[derive(Clone, Copy, Debug)]
struct Case {
    /// Sequences, heads, queries, keys.
    sizes: [u32; 4],
    window: [Option<i32>; 2],
    score_mod: ScoreMod,
    /// The fragment's rows are keys.
    transposed: bool,
}

impl Case {
    fn all() -> Vec<Self> {
        let bias = |pairs| Some(Bias { element: Element::F32, pairs });
        let plain = ScoreMod::default();
        let modifications = [
            plain,
            ScoreMod { softcap: true, ..plain },
            ScoreMod { bias: bias(true), ..plain },
            ScoreMod { softcap: true, bias: bias(false), ..plain },
            ScoreMod { alibi: true, ..plain },
            ScoreMod { scale_first: true, softcap: true, bias: bias(true), alibi: true },
        ];
        let windows = [[None, None], [None, Some(0)], [Some(3), Some(2)], [Some(40), Some(0)]];
        let mut all = Vec::new();
        for (i, (score_mod, window)) in
            modifications.into_iter().flat_map(|m| windows.map(|w| (m, w))).enumerate()
        {
            let [queries, keys] = [[5, 10], [33, 20], [70, 64], [1, 34]][i % 4];
            for transposed in [false, true] {
                all.push(Self { sizes: [2, 3, queries, keys], window, score_mod, transposed });
            }
        }
        all
    }

    /// Rows and columns of a head's matrix.
    fn matrix(&self) -> [u32; 2] {
        let [.., queries, keys] = self.sizes;
        if self.transposed { [keys, queries] } else { [queries, keys] }
    }

    /// The same, in whole fragments.
    fn padded(&self) -> [u32; 2] {
        let [rows, cols] = self.matrix();
        [rows.next_multiple_of(ROWS), cols.next_multiple_of(COLS)]
    }

    /// A warp for 16 rows of a head: products to scores to base 2, and by what these change with them.
    fn kernel(&self) -> Source {
        let k = &Kernel::new("fragments", Target::Sm80, 32);
        let [products, scores, changes] = ["products", "scores", "changes"].map(|n| k.pointer(n));
        let [queries, keys] = ["queries", "keys"].map(|name| k.param::<i32>(name));
        let [left, right] = ["left", "right"].map(|name| k.param::<i32>(name));
        let params = ScoreParams::params(k, self.score_mod, Element::F32);

        let (lane, head, batch) = (k.lane(), k.block_y(), k.block_z());
        let row = k.block_x() * ROWS + lane / 4;
        let rows = [row, row + 8];
        let positions = rows.map(Reg::cast::<i32>);
        let offset = keys - queries;
        let by_queries = Bounds {
            cols: keys,
            end: self.window[1].map(|_| offset + right + 1),
            begin: self.window[0].map(|_| offset - left),
            rows: Some(queries),
        };
        let (bounds, fragment) = match self.transposed {
            false => {
                let rows = positions.map(|row| Query { batch, head, row });
                (by_queries, params.of_queries(rows, queries, offset))
            }
            true => {
                let fragment = params.of_keys(positions, (batch, head), keys, offset);
                (by_queries.transposed(queries), fragment)
            }
        };
        let [height, width] = self.padded();
        let matrix = (batch * self.sizes[1] + head) * (height * width);
        k.for_(0, width, COLS, |block| {
            let col = block + lane % 4 * 2;
            let first = col.cast::<i32>();
            // Score 4j + 2h + c is of row h, column 8j + c.
            let places = (0..COLS / 2).map(|i| {
                let row = rows[(i / 2 % 2) as usize];
                matrix + row * width + (col + (i / 4 * 8 + i % 2))
            });
            let places: Vec<_> = places.collect();
            let values: Vec<Reg<f32>> = places
                .iter()
                .map(|&place| k.var(k.ld_global::<f32, 1>(products.element(place, 4))[0]))
                .collect();
            let bias = fragment.load(values.len(), first, Some(bounds.cols));
            let slopes = fragment.apply_with_slopes(&values, &bias, first);
            if let Some(scale) = params.scale_left() {
                values.iter().for_each(|x| x.scale(scale));
            }
            bounds.hide(&values, positions, first);
            let ones: Vec<_> = values.iter().map(|_| k.var(1f32)).collect();
            slopes.back(&ones);
            for ((&place, &score), &change) in places.iter().zip(&values).zip(&ones) {
                k.st_global(scores.element(place, 4), [score]);
                k.st_global(changes.element(place, 4), [change]);
            }
        });
        k.finish()
    }

    /// A number between -1 and 1 that depends on its place.
    fn noise(series: u32, at: [u32; 4]) -> f32 {
        let mixed =
            at.into_iter().fold(series, |sum, i| (sum ^ i).wrapping_mul(0x9e37_79b1) ^ (sum >> 7));
        mixed as i32 as f32 / i32::MAX as f32
    }

    fn product(at: [u32; 4]) -> f32 {
        30.0 * Self::noise(1, at)
    }

    fn bias(at: [u32; 4]) -> f32 {
        3.0 * Self::noise(2, at)
    }

    fn slope([batch, head, ..]: [u32; 4]) -> f32 {
        0.25 + 0.5 * Self::noise(3, [batch, head, 0, 0]).abs()
    }

    fn scale(&self) -> f32 {
        if self.score_mod.scale_first { -SCALE } else { SCALE }
    }

    /// The score of a query and a key to base 2, and by what it changes with the product beside the scale.
    fn want(&self, at: [u32; 4]) -> [f64; 2] {
        let [.., queries, keys] = self.sizes.map(f64::from);
        let [.., query, key] = at.map(f64::from);
        let place = query + keys - queries;
        let hidden = self.window[0].is_some_and(|left| key < place - f64::from(left))
            || self.window[1].is_some_and(|right| key > place + f64::from(right));
        let mut score = f64::from(Self::product(at)) * f64::from(self.scale());
        let mut change = 1.0;
        if self.score_mod.softcap {
            let tanh = (score / f64::from(CAP)).tanh();
            (score, change) = (f64::from(CAP) * tanh, 1.0 - tanh * tanh);
        }
        if self.score_mod.bias.is_some() {
            score += f64::from(Self::bias(at));
        }
        if self.score_mod.alibi {
            score -= f64::from(Self::slope(at)) * (place - key).abs();
        }
        [if hidden { f64::NEG_INFINITY } else { score * std::f64::consts::LOG2_E }, change]
    }

    fn indices([batch, heads, rows, cols]: [u32; 4]) -> impl Iterator<Item = [u32; 4]> {
        (0..batch).flat_map(move |b| {
            (0..heads).flat_map(move |h| {
                (0..rows).flat_map(move |r| (0..cols).map(move |c| [b, h, r, c]))
            })
        })
    }

    /// Scores and changes of all fragments.
    fn run(&self, device: &CudaDevice) -> Result<[Vec<f32>; 2]> {
        let function = Function::compile(device, &self.kernel())?;
        let ([batch, heads, queries, keys], [rows, cols]) = (self.sizes, self.padded());
        // Rows and columns past the last are other sequences', as far as a kernel knows.
        let products: Vec<_> = Self::indices([batch, heads, rows, cols])
            .map(|at| Self::product(self.pair(at)))
            .collect();
        let biases: Vec<_> = Self::indices(self.sizes).map(Self::bias).collect();
        let slopes: Vec<_> =
            (0..batch).flat_map(|b| (0..heads).map(move |h| Self::slope([b, h, 0, 0]))).collect();
        let of = |slice: &CudaSlice<f32>| Memory::of_slice(slice, device).address();
        let [products, biases, slopes] =
            [products, biases, slopes].map(|host| device.clone_htod(&host));
        let (products, biases, slopes) = (products?, biases?, slopes?);
        let poison = vec![f32::NAN; (batch * heads * rows * cols) as usize];
        let (scores, changes) = (device.clone_htod(&poison)?, device.clone_htod(&poison)?);
        let log2e = std::f32::consts::LOG2_E;
        let mut args = Args::new();
        args.pointer(of(&products)).pointer(of(&scores)).pointer(of(&changes));
        args.value(queries).value(keys);
        for width in self.window {
            args.value(width.unwrap_or(0));
        }
        match self.score_mod.softcap {
            false => args.value(self.scale() * log2e),
            true => args.value(self.scale() / CAP).value(CAP * log2e),
        };
        if self.score_mod.bias.is_some() {
            args.pointer(of(&biases));
            let strides = [heads * queries * keys, queries * keys, keys, 1];
            for stride in strides {
                args.value(u64::from(stride));
            }
        }
        if self.score_mod.alibi {
            args.pointer(of(&slopes)).value(u64::from(heads)).value(1u64);
        }
        // SAFETY: these are the parameters; warps stay within their rows of the three matrices, a bias is
        // read where there is one, and all live until they are copied back below.
        unsafe { function.launch(device, [rows / ROWS, heads, batch], &args)? };
        Ok([device.clone_dtoh(&scores)?, device.clone_dtoh(&changes)?])
    }

    /// A row and a column as a query and a key.
    fn pair(&self, [batch, head, row, col]: [u32; 4]) -> [u32; 4] {
        if self.transposed { [batch, head, col, row] } else { [batch, head, row, col] }
    }
}

#[test]
fn scores_and_their_slopes() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let device = gpu.as_cuda_device()?;
    for case in Case::all() {
        let [scores, changes] = case.run(device)?;
        let ([batch, heads, queries, keys], [rows, cols]) = (case.sizes, case.padded());
        let (mut seen, mut hidden) = (0, 0);
        for (i, at) in Case::indices([batch, heads, rows, cols]).enumerate() {
            let [.., query, key] = case.pair(at);
            let (score, change) = (f64::from(scores[i]), f64::from(changes[i]));
            if query >= queries || key >= keys {
                assert_eq!(score, f64::NEG_INFINITY, "past the last: {case:?} {at:?}");
                hidden += 1;
                continue;
            }
            let [want_score, want_change] = case.want(case.pair(at));
            if want_score == f64::NEG_INFINITY {
                assert_eq!(score, want_score, "{case:?} {at:?}");
                hidden += 1;
                continue;
            }
            seen += 1;
            let error = (score - want_score).abs();
            assert!(
                error <= 2e-6 * (1.0 + want_score.abs()),
                "{score} {want_score} {case:?} {at:?}"
            );
            let error = (change - want_change).abs();
            assert!(error <= 1e-6, "a change of {change}, not {want_change}: {case:?} {at:?}");
        }
        assert!(seen > 0 && hidden > 0, "{case:?}");
    }
    Ok(())
}
