//! Products of 8-bit operands with a scale for each row and column, beside our own product of the same codes as bf16, on
//! the first GPU:
//!
//! ```text
//! cargo bench --features cuda --bench bytes -- --quick --rows a
//! ```
//!
//! - `--rows a,b`: only these groups
//! - `--quick`: fewer rounds
//! - `--torch FILE`, `--list`: as for the bench `matmul`
//!
//! Contestants take turns, on random codes; weights come from memory where M ≤ 64: see benches/README.md. The weight lies
//! along K, as a prepared one does.
//!
//! The table goes to the terminal, the same as JSON to `out/bench` (`KAIO_BENCH_DIR`).

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Result, Tensor};
use common::args::Args;
use common::contest::{CANDLE, Contest, OURS, agree};
use common::gpu::Gpu;
use common::race;
use common::table::{self, Bench, Outcome};
use kaio_candle::prelude::*;
use serde_json::{Value, json};

const BF16: &str = "bf16";
/// Elements of a side of a block.
const BLOCK: usize = 128;

const GROUPS: [(char, &str); 6] = [
    ('a', "int8, large"),
    ('b', "int8, few rows, weights from memory"),
    ('c', "fp8, large"),
    ('d', "fp8, few rows, weights from memory"),
    ('e', "fp8 by blocks, large"),
    ('f', "fp8 by blocks, few rows, weights from memory"),
];

#[derive(Clone, Copy)]
struct Row {
    group: char,
    m: usize,
    n: usize,
    k: usize,
}

impl Row {
    fn int8(&self) -> bool {
        matches!(self.group, 'a' | 'b')
    }

    fn shape(&self) -> String {
        format!("{}×{}×{}", self.m, self.n, self.k)
    }

    /// Whether blocks have scales, not lines.
    fn blocks(&self) -> bool {
        matches!(self.group, 'e' | 'f')
    }

    fn dtype(&self) -> &'static str {
        match (self.int8(), self.blocks()) {
            (true, _) => "int8",
            (_, false) => "e4m3",
            (_, true) => "e4m3/128",
        }
    }
}

fn rows() -> Vec<Row> {
    const LARGE: &[[usize; 3]] = &[
        [4096; 3],
        [8192; 3],
        [4096, 8192, 8192],
        [4096, 28672, 4096],
        [1024, 8192, 8192],
        [256, 8192, 8192],
    ];
    const FEW: &[[usize; 3]] =
        &[[1, 8192, 8192], [16, 8192, 8192], [64, 8192, 8192], [16, 28672, 4096]];
    let of = |group, sizes: &'static [[usize; 3]]| {
        sizes.iter().map(move |&[m, n, k]| Row { group, m, n, k })
    };
    let groups = "abcdef".chars().zip([LARGE, FEW].into_iter().cycle());
    groups.flat_map(|(group, sizes)| of(group, sizes)).collect()
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        format!("{} {} {}", self.group, self.dtype(), self.shape())
    }

    fn json(&self) -> Value {
        json!({
            "id": self.id(), "group": self.group, "op": "bytes", "dtype": self.dtype(),
            "m": self.m, "n": self.n, "k": self.k, "cold": self.cold(),
        })
    }

    fn cold(&self) -> bool {
        self.m <= 64
    }

    fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    fn cold_bytes(&self) -> f64 {
        (self.n * self.k) as f64
    }

    fn bytes(&self) -> f64 {
        (self.m * self.k + 2 * self.m * self.n) as f64 + self.cold_bytes()
    }

    fn host(&self) -> bool {
        false
    }

    fn sustained(&self) -> bool {
        !self.cold()
    }
}

fn main() -> common::Result<()> {
    let args = Args::parse(&GROUPS, |_, _| Ok(false))?;
    let rows = args.select(rows());
    if args.list {
        return race::list(&rows);
    }
    race::run(&Bytes, &mut Gpu::new(0)?, &rows, &args)
}

struct Bytes;

impl Bench for Bytes {
    type Row = Row;
    const NAME: &str = "bytes";
    const GROUPS: &[(char, &str)] = &GROUPS;
    const LEGEND: &str = "M×N×K; caches are flushed for M ≤ 64 and not for other rows";
    const COLUMNS: &[(&str, usize)] = &[("shape", 17), ("codes", 8)];
    const PEERS: &[&'static str] = &[BF16, CANDLE, "torch"];

    fn cells(&self, row: &Row) -> Vec<String> {
        vec![row.shape(), row.dtype().into()]
    }

    fn prepare(&self, gpu: &mut Gpu, row: &Row) -> Result<Contest> {
        let int8 = row.int8();
        let (a, b) = (codes(gpu, [row.m, row.k], int8)?, codes(gpu, [row.n, row.k], int8)?);
        let scale = |dims: &[usize]| Tensor::rand(0.01f32, 0.02, dims, &gpu.device);
        let [depth, blocks] = [row.k, row.n].map(|len| len.div_ceil(BLOCK));
        let scales = match row.blocks() {
            false => [scale(&[row.m])?, scale(&[row.n])?],
            true => [scale(&[row.m, depth])?, scale(&[depth, blocks])?],
        };
        let run = {
            let ([a, b], scales) = ([a.0, b.0], scales.clone());
            move || {
                let [rows, cols] = &scales;
                kaio_candle::tune::matmul_bytes([&a, &b], [rows, cols], int8, None)
            }
        };
        let (ours, _) = run()?;
        let (a, b) = (a.1, b.1.t()?);
        agree("product", &ours, &expected(row, [&a, &b], &scales)?, row.k)?;
        drop(ours);

        let mut contest = Contest::default();
        contest.add(OURS, move || run().map(drop));
        let opts = MatmulOptions::default();
        let [x, y] = [a.clone(), b.clone()];
        contest.add(BF16, move || x.kaio_matmul_with(&y, &opts).map(drop));
        contest.add_if_able(CANDLE, move || a.matmul(&b).map(drop));
        Ok(contest)
    }

    fn draw(&self, _: &[Outcome<Row>], _: &Gpu) -> common::Result<()> {
        Ok(())
    }
}

/// The result by products of bf16, which codes are, in f32: one for each block along the depth.
fn expected(row: &Row, [a, b]: [&Tensor; 2], [rows, cols]: &[Tensor; 2]) -> Result<Tensor> {
    let opts = MatmulOptions::default().out_dtype(DType::F32);
    if !row.blocks() {
        let sums = a.kaio_matmul_with(b, &opts)?.broadcast_mul(&rows.unsqueeze(1)?)?;
        return sums.broadcast_mul(cols)?.to_dtype(DType::BF16);
    }
    let mut total: Option<Tensor> = None;
    for (i, first) in (0..row.k).step_by(BLOCK).enumerate() {
        let len = BLOCK.min(row.k - first);
        let sums = a.narrow(1, first, len)?.kaio_matmul_with(&b.narrow(0, first, len)?, &opts)?;
        let of_cols = cols.get(i)?.unsqueeze(1)?.repeat((1, BLOCK))?.flatten_all()?;
        let sums = sums.broadcast_mul(&rows.narrow(1, i, 1)?)?;
        let sums = sums.broadcast_mul(&of_cols.narrow(0, 0, row.n)?)?;
        total = Some(match total {
            None => sums,
            Some(total) => (total + sums)?,
        });
    }
    total.expect("there are blocks").to_dtype(DType::BF16)
}

/// Random codes, and the same as bf16.
fn codes(gpu: &Gpu, dims: [usize; 2], int8: bool) -> Result<(Tensor, Tensor)> {
    let random = Tensor::randn(0f32, 1., &dims, &gpu.device)?;
    if int8 {
        let values = (random * 30.0)?.round()?.clamp(-127f32, 127f32)?;
        // A byte above 127 is 256 more than the number that it stands for.
        let negative = values.lt(0f32)?.to_dtype(DType::F32)?;
        let bytes = (&values + (negative * 256.0)?)?.to_dtype(DType::U8)?;
        return Ok((bytes, values.to_dtype(DType::BF16)?));
    }
    let codes = random.to_dtype(DType::F8E4M3)?;
    let values = codes.to_dtype(DType::BF16)?;
    Ok((codes, values))
}
