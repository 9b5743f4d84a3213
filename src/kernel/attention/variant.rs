//! What a kernel computes, apart from the GPU that it is for.

use super::{Lengths, Mask, Problem, ScoreMod};
use crate::kernel::Element;
use crate::kernel::name::{given, several};

/// The facts of a problem that are in the text of its kernel, and how its work is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// The result's type.
    pub out: Element,
    /// Elements of a query and of a key, at most 256. Hopper's kernel has them rounded up to a multiple
    /// of 16.
    pub head_dim: u32,
    /// Elements of a value, a multiple of 8, at most 256.
    pub value_dim: u32,
    /// What hides keys.
    pub mask: Mask,
    /// The score modification.
    pub score_mod: ScoreMod,
    /// How long sequences are.
    pub lengths: Lengths,
    /// Heads that share keys and whose queries share a tile: row `r` is of head `r % pack`. 1: a tile
    /// is of one head.
    pub pack: u32,
    /// The keys of a tile are divided among several blocks, whose results are
    /// [combined](super::combine) later.
    pub split: bool,
    /// Whether the log-sum-exps are stored.
    pub lse: bool,
    /// Whether [`RowMax`](super::Name::RowMax) and [`RowLog`](super::Name::RowLog) are stored.
    pub stats: bool,
}

impl Variant {
    /// The variant for a problem. Parts of a split are in f32, and come with their sums.
    pub fn new(problem: &Problem, pack: u32, split: bool) -> Self {
        Self {
            out: if split { Element::F32 } else { problem.out },
            head_dim: problem.head_dim as u32,
            value_dim: problem.value_dim as u32,
            mask: problem.mask(),
            score_mod: problem.score_mod,
            lengths: problem.lengths,
            pack,
            split,
            lse: problem.lse || split,
            stats: problem.stats,
        }
    }

    /// In a name: elements of a query and of a value.
    pub(super) fn widths(&self) -> String {
        format!("d{}/{}", self.head_dim, self.value_dim)
    }

    /// The end of a name: heads of a tile, and the variant of an attention of operands of a type.
    /// `direct`: threads store.
    pub(super) fn describe(&self, operands: Element, direct: bool) -> String {
        let pack = several(self.pack, |pack| format!(" pack{pack}"));
        let scores = scores(self.mask, &self.score_mod, self.lengths);
        let words = [
            given(self.lse, " lse"),
            given(self.stats, " stats"),
            given(direct, " direct"),
            given(self.split, " split"),
        ];
        let (operands, out) = (operands.name(), self.out.name());
        format!("{pack}, {operands}→{out}{scores}{}", words.concat())
    }

    /// Whether a split, if it is one, can be put together.
    pub(super) fn can_be_split(&self) -> bool {
        let complete = self.out == Element::F32 && self.lse && !self.stats;
        !self.split || (self.lengths != Lengths::Packed && complete)
    }
}

/// In a name: which keys count, and what is done to scores.
pub(super) fn scores(mask: Mask, score_mod: &ScoreMod, lengths: Lengths) -> String {
    let mask = match mask {
        Mask::None => "",
        Mask::Right => " causal",
        Mask::Window => " window",
    };
    let bias = score_mod.bias.map_or(String::new(), |bias| {
        format!(" +{}{}", bias.element.name(), given(bias.pairs, "x2"))
    });
    let lengths = match lengths {
        Lengths::Full => "",
        Lengths::Padded => " padded",
        Lengths::Packed => " packed",
    };
    let words = [
        given(score_mod.scale_first, " shrunk"),
        given(score_mod.softcap, " softcap"),
        given(score_mod.alibi, " alibi"),
    ];
    format!("{mask}{bias}{lengths}{}", words.concat())
}
