//! The parameters of the products' kernels, and their values.

use super::{Major, Plan, Problem, sm80, sm90};
use crate::kernel::params::{self, Argument, TensorMap, names};

names! {
    /// The parameters of the products' kernels. Strides are in elements.
    pub enum Name {
        /// The kernel's left operand: on Hopper a descriptor, whose boxes are a swizzled line wide and have
        /// the lines of [`sm90::Config::lhs_boxes`], else the address of its first element, a multiple
        /// of 16.
        Lhs "lhs",
        /// The right one, likewise.
        Rhs "rhs",
        /// `C`, or the parts of its sums: an address, or for [`sm90::Store::Tma`] a descriptor, with
        /// boxes of [`sm90::Config::result_box`].
        Out "out",
        /// With a bias: its address.
        Bias "bias",
        /// With scales of lines: a number for all sums.
        Scale "scale",
        /// With scales of lines: the address of the rows', f32, of all products. With those of blocks: of `[rows,
        /// blocks along the depth]`.
        RowScales "row_scales",
        /// 1, or 0 if there is one for all rows.
        RowScaleStep "row_scale_step",
        /// The columns' f32 scales, or those of `[blocks along the depth, blocks of columns]`.
        ColScales "col_scales",
        /// With a zero point: it, i32.
        ZeroPoint "zero_point",
        /// The columns' i32 sums of the right operand.
        ColSums "col_sums",
        /// Rows of `C`.
        M "m",
        /// Columns of `C`.
        N "n",
        /// The depth, at least 1; with a split, at least one stage for each part.
        K "k",
        /// Stages along the depth.
        Depth "depth",
        /// Elements between lines: what follows each other along the dimension that is not contiguous.
        LhsLine "lhs_line",
        /// The right operand's.
        RhsLine "rhs_line",
        /// Rows of tiles.
        TileRows "tile_rows",
        /// Columns of tiles.
        TileCols "tile_cols",
        /// Tiles of all products.
        Tiles "tiles",
        /// Rows of tiles that are walked together.
        Group "group",
        /// If batched: the length of the inner batch dimension.
        InnerBatch "inner_batch",
        /// If batched: from operand to operand along the inner batch dimension.
        LhsInner "lhs_inner",
        /// Along the outer one.
        LhsOuter "lhs_outer",
        /// The right operand's, along the inner one.
        RhsInner "rhs_inner",
        /// Along the outer one.
        RhsOuter "rhs_outer",
        /// If batched and split: products.
        Batch "batch",
        /// The parts of the sums: the address of f32 or i32 `[split, rows, cols]`.
        Partial "partial",
        /// Rows of all products.
        Rows "rows",
        /// Columns of `C`.
        Cols "cols",
        /// A right operand of four or eight bits by 16-bit floats: the address of its [codes](crate::kernel::w4), a
        /// multiple of 16.
        Codes "codes",
        /// Where they are bytes along K: from column to column.
        CodesLine "codes_line",
        /// Its scales: the address of `[groups, columns]`, a multiple of 16, as are the bytes of a row.
        Scales "scales",
        /// From row to row.
        ScaleLine "scale_line",
        /// Of bytes with a scale for each column 1, or 0 if there is one for all.
        ScaleStep "scale_step",
        /// Its zero points, likewise, in the order of [the packed form](crate::kernel::w4).
        Zeros "zeros",
        /// From row to row.
        ZeroLine "zero_line",
        /// From row to row of its elements, where they are made.
        OutLine "out_line",
        /// A second weight that the same rows are multiplied with: the same as [`Codes`](Self::Codes).
        Codes1 "codes1",
        /// Where they are bytes along K: from column to column.
        CodesLine1 "codes_line1",
        /// Its scales.
        Scales1 "scales1",
        /// From row to row.
        ScaleLine1 "scale_line1",
        /// Of bytes with a scale for each column 1, or 0 if there is one for all.
        ScaleStep1 "scale_step1",
        /// Its zero points.
        Zeros1 "zeros1",
        /// From row to row.
        ZeroLine1 "zero_line1",
        /// Its columns.
        N1 "n1",
        /// The address of its product.
        Out1 "out1",
        /// A third weight that the same rows are multiplied with: the same as [`Codes`](Self::Codes).
        Codes2 "codes2",
        /// Where they are bytes along K: from column to column.
        CodesLine2 "codes_line2",
        /// Its scales.
        Scales2 "scales2",
        /// From row to row.
        ScaleLine2 "scale_line2",
        /// Of bytes with a scale for each column 1, or 0 if there is one for all.
        ScaleStep2 "scale_step2",
        /// Its zero points.
        Zeros2 "zeros2",
        /// From row to row.
        ZeroLine2 "zero_line2",
        /// Its columns.
        N2 "n2",
        /// The address of its product.
        Out2 "out2",
    }
}

/// An operand of a launch. Its lines are contiguous, along the dimension that the problem says.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The address of its first element.
    pub address: u64,
    /// Elements from line to line.
    pub line: u64,
    /// Length and stride of the inner and the outer batch dimension.
    pub batch: [(u64, u64); 2],
}

/// A number for each row of all products, or one for all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerRow {
    /// The address of the first.
    pub address: u64,
    /// Whether there is one for each.
    pub each: bool,
}

/// The numbers of a [`Scale`](super::Scale), in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Scales {
    /// None.
    #[default]
    None,
    /// Of blocks: the addresses of the left operand's and the right one's.
    Blocks {
        /// `[rows, blocks along the depth]`.
        rows: u64,
        /// `[blocks along the depth, blocks of columns]`.
        cols: u64,
    },
    /// Of rows and columns.
    Lines {
        /// Of all sums.
        one: f32,
        /// Of rows.
        rows: PerRow,
        /// The address of the columns'.
        cols: u64,
        /// The left operand's zero point, and the address of the i32 sums of the right one's columns.
        zero: Option<(i32, u64)>,
    },
}

impl Scales {
    /// Whether it is one of their parameters.
    pub(in crate::kernel) fn has(&self, name: Name) -> bool {
        self.argument(name).is_some()
    }

    /// Its value, if it is one of them.
    pub(in crate::kernel) fn argument(&self, name: Name) -> Option<Argument> {
        Some(match (*self, name) {
            (Self::Lines { one, .. }, Name::Scale) => Argument::F32(one),
            (Self::Lines { rows, .. }, Name::RowScales) => Argument::Pointer(rows.address),
            (Self::Lines { rows, .. }, Name::RowScaleStep) => Argument::U32(rows.each.into()),
            (Self::Blocks { rows, .. }, Name::RowScales) => Argument::Pointer(rows),
            (Self::Lines { cols, .. } | Self::Blocks { cols, .. }, Name::ColScales) => {
                Argument::Pointer(cols)
            }
            (Self::Lines { zero: Some((zero, _)), .. }, Name::ZeroPoint) => {
                Argument::U32(zero.cast_unsigned())
            }
            (Self::Lines { zero: Some((_, sums)), .. }, Name::ColSums) => Argument::Pointer(sums),
            _ => return None,
        })
    }
}

/// One launch of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The kernels that compute it.
    pub plan: &'a Plan,
    /// `A` and `B`.
    pub operands: [Operand; 2],
    /// What the epilogue's scale needs.
    pub scales: Scales,
    /// The address of the bias.
    pub bias: Option<u64>,
    /// The address of `C`.
    pub out: u64,
    /// The address of [`Plan::partial_sums`].
    pub partial: Option<u64>,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, step: usize, name: Name) -> Option<Argument> {
        match (self.plan, step) {
            (Plan::Sm90(config, launch), 0) => self.sm90(config, launch, name),
            (Plan::Sm80(config, launch), 0) => self.sm80(config, launch, self.out, name),
            (Plan::Split(config, launch, _), 0) => self.sm80(config, launch, self.partial?, name),
            (Plan::Split(..), 1) => self.reduce(name),
            _ => None,
        }
    }
}

impl Arguments<'_> {
    fn sm90(&self, c: &sm90::Config, launch: &sm90::Launch, name: Name) -> Option<Argument> {
        let [left, right] = c.orient.order([0, 1]);
        Some(match name {
            Name::Lhs => Argument::TensorMap(self.operand_map(c, left, c.lhs_boxes().lines)),
            Name::Rhs => Argument::TensorMap(self.operand_map(c, right, c.rhs_boxes().lines)),
            Name::Out => match c.store {
                sm90::Store::Tma => Argument::TensorMap(self.result_map(c)),
                sm90::Store::Staged { .. } => Argument::Pointer(self.out),
            },
            Name::Depth => Argument::U32(launch.depth),
            Name::TileRows => Argument::U32(launch.tile_rows),
            Name::TileCols => Argument::U32(launch.tile_cols),
            Name::Tiles => Argument::U32(launch.tiles),
            Name::Group => Argument::U32(launch.group),
            other => return self.size(other),
        })
    }

    fn sm80(
        &self,
        config: &sm80::Config,
        launch: &sm80::Launch,
        out: u64,
        name: Name,
    ) -> Option<Argument> {
        let [lhs, rhs] = &self.operands;
        let [lhs_batch, rhs_batch] = [lhs, rhs].map(|operand| operand.batch.map(|(_, each)| each));
        Some(match name {
            Name::Lhs => Argument::Pointer(lhs.address),
            Name::Rhs => Argument::Pointer(rhs.address),
            Name::Out => Argument::Pointer(out),
            // The epilogue is the second kernel's.
            Name::Bias if config.split > 1 => return None,
            of_scale if config.split > 1 && self.scales.has(of_scale) => return None,
            Name::LhsLine => Argument::U64(lhs.line),
            Name::RhsLine => Argument::U64(rhs.line),
            Name::TileRows => Argument::U32(launch.tile_rows),
            Name::TileCols => Argument::U32(launch.tile_cols),
            Name::Tiles => Argument::U32(launch.tiles),
            Name::Group => Argument::U32(launch.group),
            Name::LhsInner => Argument::U64(lhs_batch[0]),
            Name::LhsOuter => Argument::U64(lhs_batch[1]),
            Name::RhsInner => Argument::U64(rhs_batch[0]),
            Name::RhsOuter => Argument::U64(rhs_batch[1]),
            other => return self.size(other),
        })
    }

    fn reduce(&self, name: Name) -> Option<Argument> {
        let Problem { m, n, batch, .. } = *self.problem;
        Some(match name {
            Name::Partial => Argument::Pointer(self.partial?),
            Name::Out => Argument::Pointer(self.out),
            Name::Rows => Argument::U32((batch * m) as u32),
            Name::Cols => Argument::U32(n as u32),
            Name::Bias => Argument::Pointer(self.bias?),
            other => return self.scales.argument(other),
        })
    }

    /// What all kernels that multiply get alike.
    fn size(&self, name: Name) -> Option<Argument> {
        let Problem { m, n, k, batch, .. } = *self.problem;
        Some(match name {
            Name::M => Argument::U32(m as u32),
            Name::N => Argument::U32(n as u32),
            Name::K => Argument::U32(k as u32),
            Name::Bias => Argument::Pointer(self.bias?),
            Name::InnerBatch => Argument::U32(self.operands[0].batch[0].0 as u32),
            Name::Batch => Argument::U32(batch as u32),
            other => return self.scales.argument(other),
        })
    }

    /// `A` (0) or `B` (1), or those of two batch dimensions. A box is a swizzled line wide.
    fn operand_map(&self, config: &sm90::Config, side: usize, lines: u32) -> TensorMap {
        let problem = self.problem;
        let outer = [problem.m, problem.n][side];
        let [contiguous, across] = match [problem.lhs, problem.rhs][side] {
            Major::K => [problem.k, outer],
            Major::Outer => [outer, problem.k],
        };
        let element = problem.elements[side];
        let Operand { address, line, batch: [inner, last] } = self.operands[side];
        let map = TensorMap::new(
            element,
            address,
            [contiguous, across, inner.0, last.0],
            [line, inner.1, last.1],
            [element.per_line(), lines, 1, 1],
        );
        if config.batched { map } else { map.cut(2) }
    }

    fn result_map(&self, config: &sm90::Config) -> TensorMap {
        let Problem { m, n, batch, .. } = *self.problem;
        let [cols, rows] = config.result_box();
        let (dims, strides) = ([n, m, batch], [n, m * n]);
        let map = TensorMap::new(config.epilogue.out, self.out, dims, strides, [cols, rows, 1]);
        if config.batched { map } else { map.cut(2) }
    }
}
