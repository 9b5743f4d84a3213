//! The parameters of attention's kernels, and their values.

use std::f32::consts::LOG2_E;

use super::{Attend, Plan, Problem, TileOrder, sm90};
use crate::kernel::Element;
use crate::kernel::hopper::SLAB;
use crate::kernel::params::{self, Argument, TensorMap, names};

names! {
    /// The parameters of attention's kernels. Strides are in elements.
    ///
    /// Descriptors are Hopper's; their dimensions, innermost first, and boxes:
    ///
    /// | | dimensions | box |
    /// |---|---|---|
    /// | `q` | head_dim, queries, heads, batch | 64, 64, 1, 1 |
    /// | `q` with [`Variant::pack`](super::Variant::pack) > 1 | head_dim, pack, queries, heads / pack, batch | 64, pack, [`positions`](sm90::Config::positions), 1, 1 |
    /// | `k` | head_dim, keys, kv_heads, batch | 64, [`keys`](sm90::Config::keys), 1, 1 |
    /// | `v` | value_dim, keys, kv_heads, batch | 64, [`keys`](sm90::Config::keys), 1, 1 |
    /// | `out` | as `q`, with value_dim | as `q`, [`slab_cols`](sm90::Config::slab_cols) wide |
    ///
    /// Addresses and strides of operands are multiples of 16 bytes: rows must be so far apart, not so
    /// long. The batch of packed sequences is one; a bias and slopes have a batch of sequences there, too.
    pub enum Name {
        /// The queries: a descriptor or an address.
        Q "q",
        /// From row to row.
        QRow "q_row",
        /// From head to head.
        QHead "q_head",
        /// From sequence to sequence.
        QBatch "q_batch",
        /// The keys: a descriptor or an address.
        K "k",
        /// From row to row.
        KRow "k_row",
        /// From head to head.
        KHead "k_head",
        /// From sequence to sequence.
        KBatch "k_batch",
        /// The values: a descriptor or an address.
        V "v",
        /// From row to row.
        VRow "v_row",
        /// From head to head.
        VHead "v_head",
        /// From sequence to sequence.
        VBatch "v_batch",
        /// The result: a descriptor for [`sm90::Store::Tma`], and the address where parts are put
        /// together.
        Out "out",
        /// The result where threads store it: its address. With a split f32
        /// `[parts, batch, heads, queries, value_dim]`.
        OutAt "out_at",
        /// From row to row.
        OutRow "out_row",
        /// From head to head.
        OutHead "out_head",
        /// From sequence to sequence.
        OutBatch "out_batch",
        /// With a split: from part to part.
        OutPart "out_part",
        /// The log-sum-exps: the address of f32 `[batch, heads, queries]`.
        Lse "lse",
        /// With a split: from part to part.
        LsePart "lse_part",
        /// Of each query, for the backward pass, f32 `[batch, heads, queries]`: a number near its largest
        /// score, to base 2. Its address.
        RowMax "row_max",
        /// The same: the logarithm to base 2 of the sum of the exponentials of its scores less that number;
        /// ∞ where it sees no key.
        RowLog "row_log",
        /// The gradient of the result, of the operands' type: a descriptor or an address.
        Grad "grad",
        /// From row to row.
        GradRow "grad_row",
        /// From head to head.
        GradHead "grad_head",
        /// From sequence to sequence.
        GradBatch "grad_batch",
        /// The gradient of the log-sum-exp: the address of f32 `[batch, heads, queries]`.
        LseGrad "lse_grad",
        /// Of each query the sum of its result times its gradient, less the gradient of its log-sum-exp: the
        /// address of f32 `[batch, heads, queries]`.
        Delta "delta",
        /// The gradient of the queries: a descriptor.
        Dq "dq",
        /// The same where threads store it: its address.
        DqAt "dq_at",
        /// From row to row.
        DqRow "dq_row",
        /// From head to head.
        DqHead "dq_head",
        /// From sequence to sequence.
        DqBatch "dq_batch",
        /// The gradient of the keys: a descriptor.
        Dk "dk",
        /// The same where threads store it: its address.
        DkAt "dk_at",
        /// From row to row.
        DkRow "dk_row",
        /// From head to head.
        DkHead "dk_head",
        /// From sequence to sequence.
        DkBatch "dk_batch",
        /// The gradient of the values: a descriptor.
        Dv "dv",
        /// The same where threads store it: its address.
        DvAt "dv_at",
        /// From row to row.
        DvRow "dv_row",
        /// From head to head.
        DvHead "dv_head",
        /// From sequence to sequence.
        DvBatch "dv_batch",
        /// The sums of the gradient of the queries: the address of f32, in the order of
        /// the kernel that adds to them.
        DqSums "dq_sums",
        /// Whose turn it is to add to a block of them: the address of u32, one for each block.
        DqTurns "dq_turns",
        /// How many tiles the blocks of a grid have taken, less the first one of each: the address of a u32.
        TilesTaken "tiles_taken",
        /// What the first kernel zeroes for the others: an address that is a multiple of 16 bytes.
        Zeroed "zeroed",
        /// How many times 16 bytes that is.
        ZeroedUnits "zeroed_units",
        /// The scale, to base e.
        GradScale "grad_scale",
        /// The gradient of the bias: the address of its elements, of its own type, without gaps.
        DbiasAt "dbias_at",
        /// Heads that it has.
        BiasHeads "bias_heads",
        /// Sequences that share one.
        RepeatBatch "repeat_batch",
        /// Heads that share one.
        RepeatHeads "repeat_heads",
        /// Queries of the tensor.
        Queries "queries",
        /// Keys of the tensor.
        Keys "keys",
        /// Heads of the queries.
        Heads "heads",
        /// How many of them share keys.
        Group "group",
        /// The scale times log₂e; with a soft cap the scale over the cap.
        Scale "scale",
        /// The soft cap times log₂e.
        Cap "cap",
        /// The bias: its address.
        Bias "bias",
        /// From sequence to sequence.
        BiasBatch "bias_batch",
        /// From head to head.
        BiasHead "bias_head",
        /// From query to query.
        BiasQuery "bias_query",
        /// From key to key.
        BiasKey "bias_key",
        /// ALiBi's slopes: the address of f32.
        Slopes "slopes",
        /// From sequence to sequence.
        SlopesBatch "slopes_batch",
        /// From head to head.
        SlopesHead "slopes_head",
        /// With a mask: that of [`Launch`](super::Launch).
        Right "right",
        /// With a window: that of [`Launch`](super::Launch).
        Left "left",
        /// The address of u32: lengths of each sequence's queries, or, of packed ones, where each begins
        /// and the last one ends.
        LengthsQ "lengths_q",
        /// The same of keys.
        LengthsK "lengths_k",
        /// How many sequences are packed.
        Sequences "sequences",
        /// With a split: the parts of the keys of a tile.
        Parts "parts",
        /// Heads of all sequences, or packs of them: of [`TileOrder`](super::TileOrder), as the next three.
        AllHeads "all_heads",
        /// Tiles of each.
        Columns "columns",
        /// Tiles of all.
        Tiles "tiles",
        /// Heads of a section.
        TileOrder "section",
        /// The results of the parts: the address of f32 `[parts, batch, heads, queries, value_dim]`.
        PartsAt "parts_at",
        /// Their log-sum-exps: the address of f32 `[parts, batch, heads, queries]`.
        LseAt "lse_at",
        /// Queries of all heads and sequences.
        Rows "rows",
    }
}

/// Queries, keys or values of a launch, as rows of contiguous elements.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The address of its first element.
    pub address: u64,
    /// Elements of a row.
    pub cols: u64,
    /// Rows, heads and sequences.
    pub lens: [u64; 3],
    /// Elements from one to the next of each.
    pub strides: [u64; 3],
}

/// The destination of results.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// The address of the first element.
    pub address: u64,
    /// Elements between rows, heads and sequences.
    pub strides: [u64; 3],
    /// The address of the log-sum-exps.
    pub lse: Option<u64>,
    /// Those of [`Name::RowMax`] and [`Name::RowLog`].
    pub stats: Option<[u64; 2]>,
}

/// The address of the first element of what is added to scores, and the elements from one to the next of
/// each dimension.
pub type Extra<const N: usize> = (u64, [u64; N]);

/// What both passes read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// Queries, keys and values.
    pub operands: [Operand; 3],
    /// The factor of the scores.
    pub scale: f32,
    /// The soft cap.
    pub softcap: Option<f32>,
    /// The bias, indexed by sequence, head, query and key.
    pub bias: Option<Extra<4>>,
    /// ALiBi's slopes, indexed by sequence and head.
    pub slopes: Option<Extra<2>>,
    /// The addresses of the lengths of queries and keys.
    pub lengths: Option<[u64; 2]>,
}

/// One launch of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The kernels that compute it.
    pub plan: &'a Plan,
    /// What it is computed from.
    pub inputs: Inputs,
    /// The result.
    pub out: Output,
    /// The results of the parts of a split.
    pub parts: Option<Output>,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, step: usize, name: Name) -> Option<Argument> {
        match step {
            0 => self.attend(name),
            1 => self.combine(name),
            _ => None,
        }
    }
}

impl Inputs {
    /// What does not depend on the kernel: strides, sizes, numbers, and what changes scores.
    pub(super) fn argument(&self, problem: &Problem, name: Name) -> Option<Argument> {
        let number = |n: u64| Argument::U32(n as u32);
        let [q, k, v] = &self.operands;
        Some(match name {
            Name::QRow => q.stride(0),
            Name::QHead => q.stride(1),
            Name::QBatch => q.stride(2),
            Name::KRow => k.stride(0),
            Name::KHead => k.stride(1),
            Name::KBatch => k.stride(2),
            Name::VRow => v.stride(0),
            Name::VHead => v.stride(1),
            Name::VBatch => v.stride(2),
            Name::Queries => number(problem.queries),
            Name::Keys => number(problem.keys),
            Name::Heads => number(problem.heads),
            Name::Group => number(problem.heads / problem.kv_heads),
            Name::Scale => Argument::F32(match self.softcap {
                None => self.scale * LOG2_E,
                Some(cap) => self.scale / cap,
            }),
            Name::Cap => Argument::F32(self.softcap? * LOG2_E),
            Name::Bias => Argument::Pointer(self.bias?.0),
            Name::BiasBatch => Argument::U64(self.bias?.1[0]),
            Name::BiasHead => Argument::U64(self.bias?.1[1]),
            Name::BiasQuery => Argument::U64(self.bias?.1[2]),
            Name::BiasKey => Argument::U64(self.bias?.1[3]),
            Name::Slopes => Argument::Pointer(self.slopes?.0),
            Name::SlopesBatch => Argument::U64(self.slopes?.1[0]),
            Name::SlopesHead => Argument::U64(self.slopes?.1[1]),
            Name::LengthsQ => Argument::Pointer(self.lengths?[0]),
            Name::LengthsK => Argument::Pointer(self.lengths?[1]),
            Name::Sequences => number(problem.batch),
            _ => return None,
        })
    }
}

impl TileOrder {
    /// What says which tiles there are.
    pub(super) fn argument(&self, name: Name) -> Option<Argument> {
        Some(Argument::U32(match name {
            Name::AllHeads => self.heads,
            Name::Columns => self.columns,
            Name::Tiles => self.tiles,
            Name::TileOrder => self.section,
            _ => return None,
        }))
    }
}

impl Arguments<'_> {
    fn attend(&self, name: Name) -> Option<Argument> {
        let (problem, launch) = (self.problem, &self.plan.launch);
        let out = if self.plan.variant().split { self.parts? } else { self.out };
        Some(match name {
            Name::Q | Name::K | Name::V | Name::Out => self.tensor(name, &out)?,
            Name::OutAt => Argument::Pointer(out.address),
            Name::OutRow => Argument::U64(out.strides[0]),
            Name::OutHead => Argument::U64(out.strides[1]),
            Name::OutBatch => Argument::U64(out.strides[2]),
            Name::OutPart => Argument::U64(problem.rows() * problem.value_dim),
            Name::Lse => Argument::Pointer(out.lse?),
            Name::LsePart => Argument::U64(problem.rows()),
            Name::RowMax => Argument::Pointer(out.stats?[0]),
            Name::RowLog => Argument::Pointer(out.stats?[1]),
            Name::Right => Argument::U32(launch.right.cast_unsigned()),
            Name::Left => Argument::U32(launch.left.cast_unsigned()),
            Name::Parts => Argument::U32(launch.parts),
            _ => {
                let of_tiles = launch.order.argument(name);
                return of_tiles.or_else(|| self.inputs.argument(problem, name));
            }
        })
    }

    fn combine(&self, name: Name) -> Option<Argument> {
        let (problem, parts) = (self.problem, self.parts?);
        Some(match name {
            Name::PartsAt => Argument::Pointer(parts.address),
            Name::LseAt => Argument::Pointer(parts.lse?),
            Name::Out => Argument::Pointer(self.out.address),
            Name::OutRow => Argument::U64(self.out.strides[0]),
            Name::OutHead => Argument::U64(self.out.strides[1]),
            Name::OutBatch => Argument::U64(self.out.strides[2]),
            Name::Lse => Argument::Pointer(self.out.lse?),
            Name::Parts => Argument::U32(self.plan.launch.parts),
            Name::Queries => Argument::U32(problem.queries as u32),
            Name::Heads => Argument::U32(problem.heads as u32),
            Name::Rows => Argument::U32(problem.rows() as u32),
            _ => return None,
        })
    }

    fn tensor(&self, name: Name, out: &Output) -> Option<Argument> {
        let [q, k, v] = &self.inputs.operands;
        let config = match (&self.plan.attend, name) {
            (Attend::Sm90(config), _) => config,
            (Attend::Sm80(_), Name::Q) => return Some(Argument::Pointer(q.address)),
            (Attend::Sm80(_), Name::K) => return Some(Argument::Pointer(k.address)),
            (Attend::Sm80(_), Name::V) => return Some(Argument::Pointer(v.address)),
            (Attend::Sm80(_), _) => return None,
        };
        let element = config.element;
        Some(Argument::TensorMap(match name {
            Name::Q => q.queries_map(config, element, element.per_line()),
            Name::K => k.map(element, [element.per_line(), config.keys]),
            Name::V => v.map(element, [element.per_line(), config.keys]),
            Name::Out if config.store == sm90::Store::Tma => {
                let &Output { address, strides, .. } = out;
                let result = Operand { address, cols: self.problem.value_dim, strides, ..*q };
                result.queries_map(config, config.variant.out, config.slab_cols())
            }
            _ => return None,
        }))
    }
}

impl Operand {
    /// The stride along a dimension. That of a single row or matrix may be anything, but threads compute with
    /// it.
    pub(super) fn stride(&self, dim: usize) -> Argument {
        Argument::U64(if self.lens[dim] == 1 { 0 } else { self.strides[dim] })
    }

    /// A descriptor with boxes of some columns, and the rows of a warpgroup.
    fn queries_map(&self, config: &sm90::Config, element: Element, cols: u32) -> TensorMap {
        match config.variant.pack {
            1 => self.map(element, [cols, SLAB]),
            pack => self.packed_map(element, [cols, pack, config.positions()]),
        }
    }

    /// A descriptor with boxes of some columns and rows.
    pub(super) fn map(&self, element: Element, [cols, rows]: [u32; 2]) -> TensorMap {
        let [len, heads, batch] = self.lens;
        let dims = [self.cols, len, heads, batch];
        TensorMap::new(element, self.address, dims, self.strides, [cols, rows, 1, 1])
    }

    /// A descriptor with boxes of some columns, heads and rows of each.
    fn packed_map(&self, element: Element, [cols, pack, rows]: [u32; 3]) -> TensorMap {
        let ([len, heads, batch], [row, head, each]) = (self.lens, self.strides);
        let together = u64::from(pack);
        let dims = [self.cols, together, len, heads / together, batch];
        let strides = [head, row, head * together, each];
        TensorMap::new(element, self.address, dims, strides, [cols, pack, rows, 1, 1])
    }
}
