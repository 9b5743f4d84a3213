//! Which tiles a product takes on Hopper: those of `Cᵀ` that have a weight of four bits as their left operand.

use super::Problem;
use crate::kernel::Device;
use crate::kernel::gemm::choose::{Shape, estimate};
use crate::kernel::gemm::sm90::{Config, Orient};

/// Columns of a tile, which are rows of `x`.
const WIDTHS: [u32; 10] = [16, 24, 32, 48, 64, 96, 128, 160, 192, 256];

/// The configuration with the least estimated time.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    let product = problem.product();
    candidates(problem, device)
        .into_iter()
        .map(|config| (estimate(&config, &product, device), config))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .expect("each problem has a candidate")
        .1
}

/// Those worth an estimate.
pub fn candidates(problem: &Problem, device: &Device) -> Vec<Config> {
    let product = problem.product();
    let whole = WIDTHS.iter().position(|&cols| u64::from(cols) >= problem.m);
    // All rows of `x` at once, or with as few tiles as there are in narrower ones.
    let (least, most) = match whole {
        Some(i) => (if i < 5 { i } else { 4 }, i),
        None => (6, WIDTHS.len() - 1),
    };
    let mut all = vec![];
    for &cols in &WIDTHS[least..=most] {
        for rows in [64, 128] {
            for split in [1, 2, 4, 8] {
                // Two blocks of three warpgroups have the registers for the fragments of two stages, and few sums.
                let blocks_per_sm = if cols <= 32 || (rows == 64 && cols <= 64) { 2 } else { 1 };
                let shape = Shape {
                    split,
                    blocks_per_sm,
                    weight: Some(problem.scheme),
                    ..Shape::new(Orient::Swapped, rows, cols)
                };
                all.extend(shape.config(&product, device));
            }
        }
    }
    all
}
