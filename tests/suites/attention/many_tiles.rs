//! Blocks of threads that go from tile to tile.

use candle_core::DType::BF16;
use candle_core::Device;

use super::options::{Lengths, Options};
use super::problem::Problem;
use super::{Sizes, results};
use crate::suites::Tally;

/// More tiles than a large GPU has multiprocessors, so that a block of threads goes from tile to tile: to
/// longer and shorter ones, and to some without keys.
pub fn many_tiles(device: &Device) {
    let suite = "flash_attn many tiles";
    if device.is_cpu() {
        return Tally::new(suite, device).inapplicable("the CPU path has no such blocks");
    }
    let (plain, causal) = (Options::default, Options::causal);
    let window = || Options { left: Some(30), ..causal() };
    // A few lengths, again and again.
    let lengths = |of: [u32; 5]| Some(of.into_iter().cycle().take(50).collect());
    let padded = Lengths::Padded([lengths([260, 0, 129, 64, 1]), lengths([150, 300, 0, 17, 140])]);
    let cases: [(_, Sizes, _); 10] = [
        ("one block of keys", (&[20, 8], 8, [250, 176, 80, 80]), plain()),
        ("several", (&[10, 8], 8, [250, 350, 128, 128]), plain()),
        ("narrow heads", (&[10, 8], 8, [300, 300, 64, 64]), plain()),
        ("causal, from none to three", (&[10, 6], 3, [520, 330, 64, 64]), causal()),
        ("causal, one warpgroup", (&[10, 6], 6, [390, 260, 128, 128]), causal()),
        ("causal, two", (&[10, 8], 8, [380, 330, 96, 96]), causal()),
        ("a window", (&[10, 8], 8, [200, 230, 32, 32]), window()),
        ("lengths", (&[50, 2], 1, [260, 300, 64, 64]), Options { lengths: padded, ..causal() }),
        ("heads that share a tile", (&[40, 8], 2, [40, 200, 64, 64]), causal()),
        ("the widest heads", (&[10, 8], 8, [250, 170, 256, 256]), causal()),
    ];
    let problem = |(what, sizes, options)| (what, Problem { options, ..Problem::new(BF16, sizes) });
    results(suite, device, cases.map(problem));
}
