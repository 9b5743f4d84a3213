//! `x·W` for a few rows of `x`: as fast as the codes come from memory.
//!
//! A block has 64 columns of `W`, or 32, and its warps take pairs of blocks of codes along K in turn, each for itself: a
//! warp has a ring of slots that it fills with `cp.async`, its products are `mma.sync` with the codes as the left
//! operand and the rows of `x` along N, and it waits for no other warp before its sums are added to theirs.
//!
//! ```text
//!  K →          pair 0    pair 1    pair 2    pair 3    pair 4    ...
//!  columns 0   ┌─────────┬─────────┬─────────┬─────────┬─────────
//!  to 63       │ warp 0  │ warp 1  │ warp 2  │ warp 3  │ warp 0        a pair: 128 rows of W, 4 KiB
//!              └─────────┴─────────┴─────────┴─────────┴─────────
//! ```
//!
//! Scales multiply sums, not codes: a group's products are added up without them first.
//!
//! Of a gated result half of the warps have the gate's columns, and the others those that it is multiplied with.

mod choose;
mod config;
mod copies;
mod groups;
mod launch;
mod lines;
mod mail;
mod store;

pub use choose::{MOST, candidates, choose, time};
pub use config::Config;
pub use launch::Launch;

use crate::kernel::ampere::swizzle::CHUNK;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::gemm::share::Share;
use crate::kernel::gemm::terms::Terms;
use crate::kernel::multiprocessor::WARP;
use crate::kernel::w4::BLOCK;
use crate::kernel::w4::nibbles::{Decoder, Offset, Zero};
use crate::kernel::w4::weight::Weight;
use crate::ptx::{Kernel, Mma, Reg, Source, Target};
use config::{LINE, Slot, TOKENS};
use copies::{Copies, Operands, PAIR};
use groups::Group;
use lines::PairScales;
use mail::Mailbox;
use store::Tile;

/// Rows of `W` of an `mma`, columns of `W`, and such steps of a block.
const STEP: u32 = 16;
const STEPS: u32 = BLOCK / STEP;

/// The kernel of a configuration that [`Config::check`] accepts. The grid has a block for its columns, each block of
/// tokens and each part of the split in x; those of a column follow each other, and those of a weight the ones of the
/// weight before.
///
/// Its parameters are those of [`Name`](crate::kernel::gemm::Name).
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("w4_stream", config.target, config.threads());
    k.blocks_per_sm(config.blocks_per_sm);
    if config.clustered() {
        k.cluster(config.split);
    }
    let (mut operands, weights) = Operands::params(k, config);
    let terms = Terms::params(k, config.epilogue);
    let base = k.shared(config.shared_bytes());
    let (thread, lane) = (k.thread(), k.lane());
    let warp = k.shfl_idx(thread / WARP, 0);
    if config.target == Target::Sm90a {
        k.griddepcontrol_wait();
        k.griddepcontrol_launch_dependents();
    }
    let (part, block) = match config.split {
        1 => (k.var(0), k.block_x()),
        split => (k.block_x() % split, k.block_x() / split),
    };
    let (line, token) = match config.several {
        false => (block, k.var(0)),
        true => {
            let blocks = operands.m.div_ceil(config.tokens);
            (block / blocks, block % blocks * config.tokens)
        }
    };
    let column;
    // The warp's place among those that share its weight.
    let place;
    match (config.gated, weights.as_slice()) {
        (true, &[gate, up]) => {
            operands.weight = up.or(gate, warp.ge(config.together()));
            (column, place) = (line, warp % config.together());
        }
        _ => {
            (operands.weight, column) = Weight::of_line(&weights, line, config.cols);
            place = warp;
        }
    }
    let share = Share::new(operands.pairs(), config.split, || part);
    let first = share.first + place;
    let (whole, of_pairs) = match (config.scheme.group, config.scheme.codes.are_bytes()) {
        (None, _) => (Some(Group::of_columns(config, operands, lane, column)), None),
        (Some(_), true) => (None, Some(PairScales::new(config, &operands, column, first))),
        _ => (None, None),
    };
    if whole.is_some() || of_pairs.is_some() {
        // ptxas would have these loads come after the first copies, and memory answer them after all of these: 16 rows of 8192² in
        // bf16, whole columns, took 14.5 µs instead of 13.2 (H200, 2026-12-01).
        k.bar_warp_sync();
    }
    let s = Stream {
        k,
        c: config,
        slot: config.slot(),
        lane,
        ring: base + warp * (config.slots * config.slot().bytes),
        copies: Copies::new(config, operands, lane, [token, column], first),
        // Of a share of fewer pairs than warps, the last ones have none.
        pairs: (share.count + (config.together() - 1) - place) / config.together(),
        whole,
        of_pairs,
    };
    let decoder = s.begin(base);
    let mailbox = config.clustered().then(|| Mailbox::open(config, base, thread, part));
    let sums = s.run(&decoder);
    let tile = Tile { k, c: config, base, warp, lane, thread, part, mailbox, token, column };
    tile.store(&sums, operands, terms);
    k.finish()
}

/// Sums of 16 columns of `W` for a lane: for each eight tokens, as an `mma` has them.
type Sums<'k> = Vec<Vec<[Reg<'k, f32>; 4]>>;

/// A warp's part.
struct Stream<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    slot: Slot,
    lane: Reg<'k, u32>,
    /// Where the warp's ring begins.
    ring: Reg<'k, u32>,
    copies: Copies<'k>,
    /// How many it has.
    pairs: Reg<'k, u32>,
    /// The group that a whole column is.
    whole: Option<Group<'k>>,
    /// The scales of blocks of bytes.
    of_pairs: Option<PairScales<'k>>,
}

/// What a lane loads of a slot.
struct Loaded<'k> {
    /// For each 16 columns of `W`, or of bytes for each eight, a word for each 16 of its rows.
    words: Vec<[Reg<'k, u32>; STEPS as usize]>,
    /// For each eight tokens, the right operands of all steps.
    x: Vec<Vec<[Reg<'k, u32>; 2]>>,
    groups: Vec<Group<'k>>,
}

impl<'k> Stream<'k, '_> {
    /// Fills the ring, and makes the decoder meanwhile.
    fn begin(&self, base: Reg<'k, u32>) -> Decoder<'k> {
        let (k, c) = (self.k, self.c);
        for number in 0..c.slots {
            k.if_(self.pairs.gt(number / PAIR), || {
                self.copies.copy(number % PAIR, self.ring + number * self.slot.bytes);
                if number % PAIR == PAIR - 1 {
                    self.copies.advance();
                }
            });
            k.cp_async_commit();
        }
        let codes = c.scheme.codes;
        let begin = base + (c.shared_bytes() - Decoder::shared_bytes(codes, c.table));
        Decoder::new(k, c.half, codes, (c.table, begin), c.threads()).for_sums()
    }

    /// The sums over all of the warp's pairs, scaled.
    fn run(&self, decoder: &Decoder<'k>) -> Sums<'k> {
        let (k, c) = (self.k, self.c);
        let zeros = || -> Sums<'k> {
            let quads = || (0..c.token_tiles()).map(|_| [0f32; 4].map(|x| k.var(x))).collect();
            (0..c.cols / STEP).map(|_| quads()).collect()
        };
        let totals = zeros();
        let symmetric = decoder.symmetric();
        let stage = k.var(self.ring);
        let end = self.ring + c.slots * self.slot.bytes;
        k.for_(0, self.pairs, 1, |pair| {
            // A group of two blocks has its scales from the first one on.
            let mut group = None;
            let of_pair = self.of_pairs.as_ref().map(|scales| scales.of(pair));
            for block in 0..PAIR {
                k.cp_async_wait(c.slots - 1);
                k.bar_warp_sync();
                let loaded = self.load(stage, block);
                // All lanes have what they need of the slot.
                k.bar_warp_sync();
                let further = pair + c.slots / PAIR;
                k.if_(further.lt(self.pairs), || {
                    self.copies.copy(block, stage);
                    if block == PAIR - 1 {
                        self.copies.advance();
                    }
                });
                k.cp_async_commit();
                stage.increase(self.slot.bytes);
                let Some(rows) = c.scheme.group else {
                    let points = self.whole.as_ref().and_then(|of| of.zeros.as_ref());
                    self.multiply(decoder, &totals, &loaded, 0..STEPS, symmetric, points);
                    continue;
                };
                let steps = (rows / STEP).min(STEPS);
                for number in 0..STEPS / steps {
                    // The second block of a pair that shares a group adds to the same sums.
                    let first = rows <= BLOCK || block == 0;
                    if first {
                        let of = match &of_pair {
                            Some(scale) => Group::of_all(*scale),
                            None => loaded.groups[number as usize].clone(),
                        };
                        group = Some((zeros(), of));
                    }
                    let (sums, of) = group.as_ref().expect("it begins");
                    let steps = number * steps..(number + 1) * steps;
                    self.multiply(decoder, sums, &loaded, steps, symmetric, of.zeros.as_ref());
                    if rows <= BLOCK || block == PAIR - 1 {
                        of.add_scaled(&totals, sums);
                    }
                }
            }
            let wrapped = stage.ge(end);
            k.when(wrapped, || stage.set(self.ring));
        });
        k.cp_async_wait(0);
        if let Some(by) = decoder.of_sums() {
            totals.iter().flatten().flatten().for_each(|total| total.scale(by));
        }
        if let Some(whole) = &self.whole {
            whole.scale(&totals);
        }
        totals
    }

    /// What a lane needs of the slot at `stage`, which has block `block` of a pair.
    fn load(&self, stage: Reg<'k, u32>, block: u32) -> Loaded<'k> {
        let (k, c, slot) = (self.k, self.c, self.slot);
        let bytes = c.scheme.codes.are_bytes();
        let words = match bytes {
            true => lines::load(k, stage, self.lane),
            false => {
                let words = stage + self.lane * CHUNK;
                let tiles = 0..c.cols / STEP;
                tiles.map(|tile| k.ld_shared(words.at((tile * WARP * CHUNK).into()))).collect()
            }
        };
        // Four chunks of eight lines: the right operands of two steps. Of fewer tokens, some are taken twice.
        let (line, chunk) = match bytes {
            true => (self.lane / 4, lines::chunk(self.lane)),
            false => (self.lane, self.lane / TOKENS),
        };
        let place = SwizzledTile::place(line % c.tokens.min(TOKENS), chunk);
        let x = (0..c.token_tiles()).map(|tile| {
            let tokens = slot.x + tile * TOKENS * LINE;
            if bytes {
                let chunk = |more: u32| (stage + (place ^ (more * CHUNK))).at(tokens.into());
                return lines::right(k, [0, 1].map(chunk));
            }
            let steps = (0..STEPS / 2).flat_map(|two| {
                let at = stage + (place ^ (two * 4 * CHUNK));
                let [a, b, c, d] = k.ldmatrix(at.at(tokens.into()), false);
                [[a, b], [c, d]]
            });
            steps.collect()
        });
        let x = x.collect();
        let rows = match c.scheme.group {
            Some(rows) if rows > BLOCK && block > 0 => 0,
            _ => c.scale_rows(),
        };
        let groups = Group::load(k, c, stage, self.lane, rows);
        Loaded { words, x, groups }
    }

    /// Adds the products of some steps. Without zero points, codes have `symmetric` ones.
    fn multiply(
        &self,
        decoder: &Decoder<'k>,
        sums: &Sums<'k>,
        loaded: &Loaded<'k>,
        steps: std::ops::Range<u32>,
        symmetric: Offset<'k>,
        zeros: Option<&Vec<[Zero<'k>; 2]>>,
    ) {
        let of_tile = loaded.words.len() / sums.len();
        for (tile, (words, sums)) in loaded.words.chunks(of_tile).zip(sums).enumerate() {
            let offsets = match zeros {
                Some(zeros) => zeros[tile].map(|zero| decoder.zero(zero)),
                None => [symmetric; 2],
            };
            for step in steps.clone() {
                let step = step as usize;
                let a = match (decoder.bytes(), words) {
                    (Some(bytes), &[first, second]) => bytes.fragment([first[step], second[step]]),
                    _ => decoder.fragment(words[0][step], offsets),
                };
                for (x, &sum) in loaded.x.iter().zip(sums) {
                    self.k.mma(self.c.half, sum, Mma { a, b: x[step] });
                }
            }
        }
    }
}

/// Both of a lane's columns of each 16 of `cols`, given what is so many columns after its first.
fn by_tile<T>(cols: u32, of: impl Fn(u32) -> T) -> Vec<[T; 2]> {
    (0..cols / STEP).map(|tile| [0, STEP / 2].map(|more| of(tile * STEP + more))).collect()
}
