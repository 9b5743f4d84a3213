//! Windows.

use candle_core::DType::{BF16, F32};
use candle_core::Device;

use super::options::Options;
use super::problem::Problem;
use super::{MIXED, each, run};
use crate::suites::pairs;

/// Windows narrower than a tile, as wide as all keys, and before the first key.
pub fn windows(device: &Device) {
    let sizes: [[usize; 2]; 8] =
        [[64, 64], [65, 63], [63, 65], [1, 129], [129, 1], [200, 50], [50, 300], [128, 176]];
    let bounds = [None, Some(0), Some(1), Some(7), Some(63), Some(100), Some(usize::MAX)];
    let problems = sizes.into_iter().flat_map(|[sq, sk]| {
        // 16 bits on a GPU: the other problems are of f32, too.
        let dtype = if device.is_cpu() { F32 } else { BF16 };
        let p = Problem::new(dtype, (&[2], 1, [sq, sk, 8, 8]));
        pairs(bounds, bounds).map(move |(left, right)| {
            let options = Options { left, right, causal: right == Some(0), ..Options::default() };
            Problem { options, ..p.clone() }
        })
    });
    let among = Options { left: Some(40), right: Some(3), ..Options::default() };
    run("flash_attn windows", device, problems.chain(each(&MIXED, &[among])));
}
