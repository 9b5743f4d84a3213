//! A stable sort of ids by their digits, the last one first, which carries their places along (a radix sort: Knuth, volume 3,
//! 5.2.5). Each pass counts the digits of each block's keys, adds the counts up in the order of the digits, and puts keys there.

use super::{Keys, Name, id};
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Kernel, Reg, Source, Target};

/// Bits of a digit at most: two passes for tables of up to 2¹⁸ rows, as vocabularies have.
pub const DIGIT: u32 = 9;
/// Digits.
pub const BINS: u32 = 1 << DIGIT;
/// Threads of a block: one for each digit.
const THREADS: u32 = BINS;
const WARPS: u32 = THREADS / WARP;
/// Keys of a lane, all on their way together.
const KEYS: u32 = 8;
/// Keys of a block.
pub const BLOCK: u32 = THREADS * KEYS;
/// Threads of the block that adds counts.
const SCAN_THREADS: u32 = 1024;

/// Keys are read by warps in their order, 32 at a time. Lanes with one digit find each other by a vote on each of its bits.
pub fn emit(scatter: bool, keys: Keys) -> Source {
    let name = if scatter { "embedding_scatter" } else { "embedding_count" };
    let k = &Kernel::new(name, Target::Sm80, THREADS);
    let (from, classes) = (k.pointer(Name::Keys), k.param::<u32>(Name::Classes));
    let places = (scatter && keys == Keys::Sorted).then(|| k.pointer(Name::Places));
    let counts = k.pointer(Name::Counts);
    let to = scatter.then(|| (k.pointer(Name::KeysTo), k.pointer(Name::PlacesTo)));
    let [rows, shift, blocks] =
        [Name::Rows, Name::Shift, Name::SortBlocks].map(|name| k.param::<u32>(name));
    let shared = k.shared(WARPS * BINS * 4);
    let (thread, block, lane) = (k.thread(), k.block_x(), k.lane());
    for warp in 0..WARPS {
        k.st_shared(shared + (thread + warp * BINS) * 4, [k.var(0u32)]);
    }
    k.sync_block();

    let warp = thread / WARP;
    let own = shared + warp * (BINS * 4);
    let first = block * BLOCK + warp * (WARP * KEYS) + lane;
    let below = (k.var(1u32) << lane) - 1;
    let loaded: Vec<_> = (0..KEYS)
        .map(|i| {
            let at = first + i * WARP;
            let valid = at.lt(rows);
            let at = at.min(rows - 1);
            let key = match keys {
                Keys::Ids { wide } => id(k, wide, from, at, classes),
                Keys::Sorted => k.ld_global_nc::<u32, 1>(from.element(at, 4))[0],
            };
            let place = match places {
                None => at,
                Some(places) => k.ld_global_nc::<u32, 1>(places.element(at, 4))[0],
            };
            (key, place, valid)
        })
        .collect();
    let digits = |visit: &dyn Fn(Key)| {
        for &(key, place, valid) in &loaded {
            let digit = (key >> shift) % BINS;
            let mut same = k.vote_ballot(valid);
            for bit in 0..DIGIT {
                let set = digit.bfe(bit, 1).ne(0);
                let all = k.vote_ballot(set);
                same = same & k.select(set, all, all ^ u32::MAX);
            }
            let before = (same & below).popc();
            let counted = own + digit * 4;
            visit(Key { key, place, valid, counted, before, count: same.popc() });
        }
    };
    digits(&|Key { valid, counted, before, count, .. }| {
        let first = valid & before.eq(0);
        k.when(first, || {
            let [sum] = k.ld_shared::<u32, 1>(counted);
            k.st_shared(counted, [sum + count]);
        });
        k.bar_warp_sync();
    });
    k.sync_block();

    let place = counts.element(thread * blocks + block, 4);
    let Some((keys_to, places_to)) = to else {
        let sum = k.var(0u32);
        for warp in 0..WARPS {
            let [count] = k.ld_shared::<u32, 1>(shared + (thread + warp * BINS) * 4);
            sum.increase(count);
        }
        k.st_global(place, [sum]);
        return k.finish();
    };
    let [begin] = k.ld_global_nc::<u32, 1>(place);
    let begin = k.var(begin);
    for warp in 0..WARPS {
        let of_warp = shared + (thread + warp * BINS) * 4;
        let [count] = k.ld_shared::<u32, 1>(of_warp);
        k.st_shared(of_warp, [begin]);
        begin.increase(count);
    }
    k.sync_block();
    digits(&|Key { key, place, valid, counted, before, count }| {
        let [begin] = k.ld_shared::<u32, 1>(counted);
        let index = begin + before;
        k.when(valid, || k.st_global(keys_to.element(index, 4), [key]));
        k.when(valid, || k.st_global(places_to.element(index, 4), [place]));
        k.bar_warp_sync();
        k.when(valid & before.eq(0), || k.st_shared(counted, [begin + count]));
        k.bar_warp_sync();
    });
    k.finish()
}

/// A key of a lane.
struct Key<'k> {
    key: Reg<'k, u32>,
    /// Its place among the ids.
    place: Reg<'k, u32>,
    /// Whether there is one.
    valid: Reg<'k, bool>,
    /// Where its digit is counted.
    counted: Reg<'k, u32>,
    /// Those of its digit in the warp: before it, and all.
    before: Reg<'k, u32>,
    count: Reg<'k, u32>,
}

/// Counts become sums of those before them: one block, each of whose threads has some that follow each other.
pub fn emit_scan() -> Source {
    let k = &Kernel::new("embedding_scan", Target::Sm80, SCAN_THREADS);
    let (counts, blocks) = (k.pointer(Name::Counts), k.param::<u32>(Name::SortBlocks));
    let shared = k.shared(SCAN_THREADS / WARP * 4);
    let (thread, lane) = (k.thread(), k.lane());
    let total = blocks * BINS;
    let each = total.div_ceil(SCAN_THREADS);
    let first = (thread * each).min(total);
    let end = (first + each).min(total);
    let sum = k.var(0u32);
    k.for_(first, end, 1u32, |at| {
        let [count] = k.ld_global::<u32, 1>(counts.element(at, 4));
        sum.increase(count);
    });
    let up_to = up_to(sum, lane);
    let warp = thread / WARP;
    k.when(lane.eq(WARP - 1), || k.st_shared(shared + warp * 4, [up_to]));
    k.sync_block();
    let [of_warp] = k.ld_shared::<u32, 1>(shared + lane * 4);
    let before = self::up_to(of_warp, lane) - of_warp;
    let begin = k.var(k.shfl_idx(before, warp) + up_to - sum);
    k.for_(first, end, 1u32, |at| {
        let place = counts.element(at, 4);
        let [count] = k.ld_global::<u32, 1>(place);
        k.st_global(place, [begin]);
        begin.increase(count);
    });
    k.finish()
}

/// The sum of a number of each lane up to this one.
fn up_to<'k>(value: Reg<'k, u32>, lane: Reg<'k, u32>) -> Reg<'k, u32> {
    let k = value.kernel();
    let mut sum = value;
    for by in [1, 2, 4, 8, 16] {
        let other = k.shfl_up(sum, by);
        sum = sum + k.select(lane.ge(by), other, 0);
    }
    sum
}
