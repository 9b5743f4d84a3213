//! How long sequences are, and where they lie.

use super::Name;
use crate::ptx::{Kernel, Reg};

/// How long sequences are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lengths {
    /// All are as long as the tensors.
    Full,
    /// Each has a length of its own: those of the queries and keys are in memory.
    Padded,
    /// They follow one another in a batch of one: where each begins is in memory, and where the
    /// last one ends.
    Packed,
}

/// The parameters.
#[derive(Clone, Copy)]
pub struct Sequences<'k> {
    /// Positions of the tensors.
    size: [Reg<'k, i32>; 2],
    /// Lengths, or where sequences begin.
    memory: Option<[Reg<'k, u64>; 2]>,
    /// How many are packed.
    count: Option<Reg<'k, u32>>,
}

/// Queries or keys of a sequence.
#[derive(Clone, Copy)]
pub struct Span<'k> {
    /// The first one's position in the tensor, if it is not 0.
    pub begin: Option<Reg<'k, u32>>,
    pub count: Reg<'k, i32>,
}

impl<'k> Span<'k> {
    /// The position in the tensor.
    pub fn at(&self, position: Reg<'k, i32>) -> Reg<'k, u32> {
        let position = position.cast::<u32>();
        self.begin.map_or(position, |begin| begin + position)
    }
}

/// A tile of the queries or keys of a sequence.
#[derive(Clone, Copy)]
pub struct FoundTile<'k> {
    /// Whether there is one.
    pub exists: Reg<'k, bool>,
    pub sequence: Reg<'k, u32>,
    /// Its number in the sequence, and how many there are.
    pub tile: Reg<'k, u32>,
    pub tiles: Reg<'k, u32>,
    /// Where the sequence's queries or keys lie.
    pub span: Span<'k>,
}

impl<'k> Sequences<'k> {
    /// Declares its parameters: of lengths unless all are full, and of sequences if they are packed.
    pub fn params(k: &'k Kernel, lengths: Lengths, size: [Reg<'k, i32>; 2]) -> Self {
        let memory = (lengths != Lengths::Full).then_some([Name::LengthsQ, Name::LengthsK]);
        Self {
            size,
            memory: memory.map(|names| names.map(|name| k.pointer(name))),
            count: (lengths == Lengths::Packed).then(|| k.param(Name::Sequences)),
        }
    }

    /// How many are packed, if they are.
    pub fn count(&self) -> Option<Reg<'k, u32>> {
        self.count
    }

    /// Queries (0) or keys (1) of a sequence. A length beyond the tensor is the tensor's.
    pub fn span(&self, which: usize, sequence: Reg<'k, u32>) -> Span<'k> {
        let (k, size) = (sequence.kernel(), self.size[which]);
        let Some(memory) = self.memory else {
            return Span { begin: None, count: size };
        };
        let at = memory[which].element(sequence, 4);
        let load = |at: Reg<'k, u64>| {
            let [entry] = k.ld_global_nc::<u32, 1>(at);
            entry.min(size.cast::<u32>())
        };
        match self.count {
            None => Span { begin: None, count: load(at).cast() },
            Some(_) => Self::between(load(at), load(at + 4u64)),
        }
    }

    fn between(begin: Reg<'k, u32>, end: Reg<'k, u32>) -> Span<'k> {
        Span { begin: Some(begin), count: (end.max(begin) - begin).cast() }
    }

    /// Looks for tile number `tile` of all sequences, whose queries (0) or keys (1) are cut into tiles of
    /// `rows`. All lanes of a warp look together.
    pub fn find(&self, which: usize, tile: Reg<'k, u32>, rows: u32) -> FoundTile<'k> {
        let k = tile.kernel();
        let (Some(memory), Some(count)) = (self.memory, self.count) else {
            panic!("sequences are packed");
        };
        let (memory, limit) = (memory[which], self.size[which].cast::<u32>());
        let lane = k.lane();
        let [sequence, number, tiles, begin, length] = k.regs();
        let (chunk, before, exists) = (k.var(0u32), k.var(0u32), k.var(0u32));
        k.loop_(|exit| {
            exit.when(chunk.ge(count));
            // A sequence for each lane; past the last one they are empty.
            let entry = |more: u32| {
                let index = (chunk + lane + more).min(count);
                k.ld_global_nc::<u32, 1>(memory.element(index, 4))[0].min(limit)
            };
            let (first, last) = (entry(0), entry(1));
            let span = Self::between(first, last);
            let mine = span.count.cast::<u32>().div_ceil(rows);
            let up_to = [1, 2, 4, 8, 16].into_iter().fold(mine, |sum, by| {
                let more = k.shfl_up(sum, by);
                sum + k.select(lane.ge(by), more, 0)
            });
            let all = k.shfl_idx(up_to, 31);
            let here = tile.lt(before + all);
            k.if_(here, || {
                let holder = k.vote_ballot((before + up_to).le(tile)).popc();
                let of = |value: Reg<'k, u32>| k.shfl_idx(value, holder);
                exists.set(1);
                sequence.set(chunk + holder);
                number.set(tile - before - of(up_to - mine));
                tiles.set(of(mine));
                begin.set(of(first));
                length.set(of(span.count.cast()));
            });
            exit.when(here);
            before.increase(all);
            chunk.increase(32);
        });
        let span = Span { begin: Some(begin), count: length.cast() };
        FoundTile { exists: exists.ne(0), sequence, tile: number, tiles, span }
    }
}
