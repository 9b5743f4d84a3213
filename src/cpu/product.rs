//! Products of stacks of matrices, in blocks.
//!
//! A task owns a block of a result. It goes along K and, block by block, makes both operands f32 and
//! multiplies them, so that a weight of 16 bits or fewer is widened in a core's cache and read from
//! memory once. Few rows are divided among the threads by columns, many by rows.

use std::ops::Range;

use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::gemm::{Mat, Product};
use super::operand::{Operand, operand};
use crate::op::MatmulProblem;
use crate::stack::Stack;

// The sizes below were chosen on 2 cores of an AMD EPYC (Zen 5), 2026-11-29: 1 x 4096 x 4096 takes 1.1 ms in
// f16 (0.6 if the weight is transposed) and 1.3 in int4, 2048^3 73 ms. Tiles of twice the K and tasks of
// twice the rows were within a tenth of that.

/// A call of fewer multiplications does not pay for a second thread.
const SMALL: usize = 1 << 18;
/// Rows of a task at most: over so many products a widened element has paid for itself.
const TASK_ROWS: usize = 256;
/// Tasks for each thread, so that the last to come is not long.
const TASKS: usize = 4;
/// Columns of a task at least, but for the last.
const TASK_COLS: usize = 64;

/// All products of a problem, row-major.
pub(crate) fn matmul(problem: &MatmulProblem, a: &CpuStorage, b: &CpuStorage) -> Result<Vec<f32>> {
    let (a, b) = (operand(a, &problem.lhs)?, operand(b, &problem.rhs)?);
    let MatmulProblem { lhs, rhs, .. } = problem;
    let sizes = Sizes { count: lhs.count(), m: lhs.rows, n: rhs.cols, k: lhs.cols };
    Ok(sizes.products(&*a, &*b, Sums::Float))
}

/// Products with one matrix that all rows share.
pub(super) fn products(lhs: &dyn Operand, stack: &Stack, rhs: &dyn Operand, n: usize) -> Vec<f32> {
    Sizes::of(stack, n).products(lhs, rhs, Sums::Float)
}

/// The same of bytes read as int8, which `finish` makes floats.
pub(super) fn exact_products(
    (a, lhs): (&CpuStorage, &Stack),
    (b, rhs): (&CpuStorage, &Stack),
    finish: &Finish<'_>,
) -> Result<Vec<f32>> {
    let sizes = Sizes::of(lhs, rhs.cols);
    Ok(sizes.products(&*operand(a, lhs)?, &*operand(b, rhs)?, Sums::Exact(finish)))
}

/// Turns sums into results: of a row, counted over all matrices, from a column on.
pub(super) type Finish<'a> = dyn Fn([usize; 2], &[i32], &mut [f32]) + Sync + 'a;

/// What sums along K are kept in.
#[derive(Clone, Copy)]
enum Sums<'a> {
    Float,
    /// i32, of bytes read as int8.
    Exact(&'a Finish<'a>),
}

/// `count` products `[m, k] · [k, n]`.
#[derive(Clone, Copy)]
struct Sizes {
    count: usize,
    m: usize,
    n: usize,
    k: usize,
}

/// Columns and rows of the right-hand side that are made f32 at a time.
#[derive(Clone, Copy)]
struct Tile {
    n: usize,
    k: usize,
}

impl Sizes {
    /// Of activations and a weight of `n` columns.
    fn of(lhs: &Stack, n: usize) -> Self {
        Self { count: lhs.count(), m: lhs.rows, n, k: lhs.cols }
    }

    fn products(self, a: &dyn Operand, b: &dyn Operand, sums: Sums) -> Vec<f32> {
        let Self { count, m, n, k } = self;
        // As much as the caller has seen to be there.
        let mut out = vec![0f32; count * m * n];
        if out.is_empty() || k == 0 {
            return out;
        }
        let work = [m, n, k].into_iter().fold(count, usize::saturating_mul);
        let threads = if work < SMALL { 1 } else { rayon::current_num_threads() };
        let tile = self.tile(b);
        let run = |scratch: &mut Scratch, task: Task| task.run(k, tile, a, b, sums, scratch);
        let tasks = self.tasks(&mut out, threads, b);
        match threads {
            1 => {
                let mut scratch = Scratch::default();
                tasks.into_iter().for_each(|task| run(&mut scratch, task));
            }
            _ => tasks.into_par_iter().for_each_init(Scratch::default, run),
        }
        out
    }

    /// Of one row, where [`Operand::add_row`] has no loop for it, a tile stays in the first cache, since
    /// each of its elements is used once; else in the second. It is longer the way its elements lie; where
    /// that is by columns, few rows have a tile for which gemm takes inner products (up to 256 results)
    /// and packs nothing.
    fn tile(self, b: &dyn Operand) -> Tile {
        let [rows, cols] = b.steps();
        let (n, k): (usize, usize) = match (self.m, b.by_columns()) {
            (1, false) => (8192 / rows.max(8), 8),
            (1..=16, true) => (16, 512),
            _ => (256, 256),
        };
        Tile { n: n.next_multiple_of(cols), k: k.next_multiple_of(rows) }
    }

    /// A division of the results.
    fn tasks<'a>(self, out: &'a mut [f32], threads: usize, b: &dyn Operand) -> Vec<Task<'a>> {
        let Self { count, m, n, .. } = self;
        let height = m.min(TASK_ROWS);
        let by_rows = count * m.div_ceil(height);
        // A single row's weight is best read in long lines, which columns are in any task.
        let each = if m == 1 && !b.by_columns() { 1 } else { TASKS };
        let wanted = if threads == 1 { 1 } else { (each * threads).div_ceil(by_rows) };
        let width = n.div_ceil(wanted).next_multiple_of(TASK_COLS.max(b.steps()[1])).min(n);
        let mut tasks = Vec::with_capacity(by_rows * n.div_ceil(width));
        for (matrix, out) in out.chunks_mut(m * n).enumerate() {
            for (i, out) in out.chunks_mut(height * n).enumerate() {
                let rows = i * height..i * height + out.len() / n;
                let task =
                    |first_col, out| Task { matrix, height: m, rows: rows.clone(), first_col, out };
                if width == n {
                    tasks.push(task(0, Rows::Together(out)));
                    continue;
                }
                let mut parts: Vec<Vec<&mut [f32]>> =
                    (0..n.div_ceil(width)).map(|_| Vec::with_capacity(rows.len())).collect();
                for row in out.chunks_mut(n) {
                    parts
                        .iter_mut()
                        .zip(row.chunks_mut(width))
                        .for_each(|(part, row)| part.push(row));
                }
                let parts = parts.into_iter().enumerate();
                tasks.extend(parts.map(|(j, out)| task(j * width, Rows::Apart(out))));
            }
        }
        tasks
    }
}

/// A block of one result.
struct Task<'a> {
    matrix: usize,
    /// Rows of the matrix.
    height: usize,
    rows: Range<usize>,
    first_col: usize,
    out: Rows<'a>,
}

/// The rows of a block of a result.
enum Rows<'a> {
    /// Whole rows, one after another.
    Together(&'a mut [f32]),
    Apart(Vec<&'a mut [f32]>),
}

impl Rows<'_> {
    /// The length of each of `count` rows.
    fn width(&self, count: usize) -> usize {
        match self {
            Self::Together(all) => all.len() / count,
            Self::Apart(rows) => rows[0].len(),
        }
    }

    fn row(&mut self, i: usize, width: usize) -> &mut [f32] {
        match self {
            Self::Together(all) => &mut all[i * width..][..width],
            Self::Apart(rows) => rows[i],
        }
    }
}

/// What a thread keeps from block to block.
#[derive(Default)]
struct Scratch {
    whole: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    sums: Vec<f32>,
    exact: Vec<i32>,
}

impl Task<'_> {
    fn run(
        self,
        depth: usize,
        tile: Tile,
        a: &dyn Operand,
        b: &dyn Operand,
        sums: Sums,
        scratch: &mut Scratch,
    ) {
        let Self { matrix, height, rows, first_col, mut out } = self;
        let m = rows.len();
        let width = out.width(m);
        let whole = (m * depth <= KEPT)
            .then(|| a.block(matrix, rows.clone(), 0..depth, &mut scratch.whole));
        if let (1, Some(row), Sums::Float) = (m, whole, sums) {
            let cols = first_col..first_col + width;
            let x = &row.data[..depth];
            if row.col_stride == 1 && b.add_row(matrix, x, cols, out.row(0, width)) {
                return;
            }
        }
        for first in (0..width).step_by(tile.n) {
            let n = tile.n.min(width - first);
            let cols = first_col + first..first_col + first + n;
            scratch.sums.resize(m * n, 0.0);
            if let Sums::Exact(_) = sums {
                scratch.exact.clear();
                scratch.exact.resize(m * n, 0);
            }
            for start in (0..depth).step_by(tile.k) {
                let ks = start..depth.min(start + tile.k);
                let lhs = match whole {
                    Some(whole) => {
                        Mat { data: &whole.data[ks.start * whole.col_stride..], ..whole }
                    }
                    None => a.block(matrix, rows.clone(), ks.clone(), &mut scratch.a),
                };
                let rhs = b.block(matrix, ks.clone(), cols.clone(), &mut scratch.b);
                let add = start > 0 && matches!(sums, Sums::Float);
                multiply(&mut scratch.sums, [m, n, ks.len()], add, lhs, rhs);
                if let Sums::Exact(_) = sums {
                    // f32 holds every integer up to 2²⁴, so that a tile's sum of products of int8,
                    // each at most 2¹⁴, is exact in whatever order.
                    const { assert!(LONGEST << 14 <= 1 << 24) };
                    scratch
                        .exact
                        .iter_mut()
                        .zip(&scratch.sums)
                        .for_each(|(sum, part)| *sum += *part as i32);
                }
            }
            for i in 0..m {
                let out = &mut out.row(i, width)[first..first + n];
                match sums {
                    Sums::Float => out.copy_from_slice(&scratch.sums[i * n..][..n]),
                    Sums::Exact(finish) => {
                        let place = [matrix * height + rows.start + i, first_col + first];
                        finish(place, &scratch.exact[i * n..][..n], out);
                    }
                }
            }
        }
    }
}

/// The most elements of the left-hand side that a task makes f32 once, for all of its tiles.
const KEPT: usize = 1 << 17;
/// The most rows of a tile.
const LONGEST: usize = 512;

fn multiply(out: &mut [f32], [m, n, k]: [usize; 3], add: bool, lhs: Mat, rhs: Mat) {
    let product = Product { m, n, k, factor: 1.0, add };
    product.run(out, lhs, rhs);
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Layout;
    use half::{bf16, f16};

    /// Sizes on both sides of those of tiles and tasks.
    const SIZES: [[usize; 3]; 9] = [
        [1, 1, 1],
        [1, 1100, 70],
        [3, 512, 600],
        [4, 513, 16],
        [5, 257, 300],
        [16, 1025, 65],
        [300, 530, 270],
        [513, 3, 2],
        [2, 2, 2000],
    ];

    /// How a matrix lies: its strides, given its rows and columns, and the length of its storage.
    type Order = fn(usize, usize) -> ([usize; 2], usize);

    const ORDERS: [Order; 4] = [
        |rows, cols| ([cols, 1], rows * cols),
        |rows, cols| ([1, rows], rows * cols),
        |rows, cols| ([cols + 3, 1], rows * (cols + 3)),
        |rows, cols| ([2 * cols, 2], rows * 2 * cols),
    ];

    /// A small integer of any two numbers: sums of products are exact in whatever order.
    fn value(i: usize, j: usize, seed: usize) -> i64 {
        (((i * 31 + j * 17 + seed) * 2_654_435_761) >> 7) as i64 % 8 - 4
    }

    /// A matrix whose other elements are 99.
    struct Matrix {
        data: Vec<i64>,
        layout: Layout,
    }

    impl Matrix {
        fn new(rows: usize, cols: usize, order: Order, seed: usize) -> Self {
            let ([row, col], len) = order(rows, cols);
            let mut data = vec![99; len];
            for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                data[i * row + j * col] = value(i, j, seed);
            }
            Self { data, layout: Layout::new((rows, cols).into(), vec![row, col], 0) }
        }

        fn stack(&self) -> Stack {
            Stack::new(&self.layout)
        }

        fn of<T>(&self, from: impl Fn(f32) -> T) -> Vec<T> {
            self.data.iter().map(|&x| from(x as f32)).collect()
        }

        fn storages(&self) -> [CpuStorage; 3] {
            let [f16, bf16, f32] = [
                CpuStorage::F16(self.of(f16::from_f32)),
                CpuStorage::BF16(self.of(bf16::from_f32)),
                CpuStorage::F32(self.of(|x| x)),
            ];
            [f16, bf16, f32]
        }

        fn bytes(&self) -> CpuStorage {
            CpuStorage::U8(self.of(|x| x as i8 as u8))
        }
    }

    fn expected([m, k, n]: [usize; 3], b: impl Fn(usize, usize) -> i64) -> Vec<f32> {
        let mut out = vec![0i64; m * n];
        for (i, row) in out.chunks_mut(n).enumerate() {
            for p in 0..k {
                let x = value(i, p, 1);
                row.iter_mut().enumerate().for_each(|(j, sum)| *sum += x * b(p, j));
            }
        }
        out.into_iter().map(|x| x as f32).collect()
    }

    fn orders() -> impl Iterator<Item = [Order; 2]> {
        ORDERS.into_iter().flat_map(|a| ORDERS.map(move |b| [a, b]))
    }

    #[test]
    fn floats() {
        for [m, k, n] in SIZES {
            let want = expected([m, k, n], |p, j| value(p, j, 2));
            for [a, b] in orders() {
                let (a, b) = (Matrix::new(m, k, a, 1), Matrix::new(k, n, b, 2));
                for (x, y) in a.storages().iter().zip(&b.storages()) {
                    let out = (m, n).into();
                    let problem = MatmulProblem { lhs: a.stack(), rhs: b.stack(), out };
                    assert_eq!(matmul(&problem, x, y).unwrap(), want, "{m} {k} {n}");
                }
            }
        }
    }

    #[test]
    fn int8() {
        let half = |_: [usize; 2], sums: &[i32], out: &mut [f32]| {
            out.iter_mut().zip(sums).for_each(|(x, sum)| *x = 0.5 * *sum as f32);
        };
        for [m, k, n] in SIZES {
            let want = expected([m, k, n], |p, j| value(p, j, 2));
            let halves: Vec<_> = want.iter().map(|x| 0.5 * x).collect();
            for [a, b] in orders() {
                let (a, b) = (Matrix::new(m, k, a, 1), Matrix::new(k, n, b, 2));
                let ([f16, ..], lhs, rhs) = (a.storages(), a.stack(), b.stack());
                let got = exact_products((&a.bytes(), &lhs), (&b.bytes(), &rhs), &half).unwrap();
                assert_eq!(got, halves, "{m} {k} {n}");
                let (x, w) = (f16, b.bytes());
                let got =
                    products(&*operand(&x, &lhs).unwrap(), &lhs, &*operand(&w, &rhs).unwrap(), n);
                assert_eq!(got, want, "{m} {k} {n}");
            }
        }
    }

    /// The largest sums of int8 that i32 must hold, of which f32 holds no part of more rows than a
    /// tile has.
    #[test]
    fn int8_sums_are_exact() {
        let k = 131_071;
        let (a, b) = (vec![0x80u8; k], vec![0x80u8; k]);
        let stack = |rows, cols| Layout::contiguous((rows, cols));
        let (a, b) = (CpuStorage::U8(a), CpuStorage::U8(b));
        let lhs = Stack::new(&stack(1, k));
        let rhs = Stack::new(&stack(k, 1));
        let finish = |_: [usize; 2], sums: &[i32], out: &mut [f32]| {
            assert_eq!(sums, [k as i32 * (1 << 14)]);
            out[0] = 1.0;
        };
        assert_eq!(exact_products((&a, &lhs), (&b, &rhs), &finish).unwrap(), [1.0]);
    }
}
