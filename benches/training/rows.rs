//! What is timed.

use candle_core::DType;
use kaio_candle::RopeLayout;
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 6] = [
    ('a', "norms"),
    ('b', "rotary embeddings"),
    ('c', "softmax"),
    ('d', "gated linear units"),
    ('e', "losses"),
    ('f', "rows of a table by their ids"),
];

/// Whose time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    RmsNorm,
    LayerNorm,
    /// Of [`HEADS`] heads of `cols` elements, at `rows / HEADS` positions.
    Rope(RopeLayout),
    Softmax,
    Swiglu,
    CrossEntropy,
    /// Of hidden states of so many elements.
    LinearCrossEntropy {
        depth: usize,
    },
    /// Rows of `cols` elements, of a table of so many, by `rows` ids.
    Embedding {
        classes: usize,
        ids: Ids,
    },
}

/// Which ids there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// As many of each.
    Uniform,
    /// As words are in text (Zipf 1935): id k in proportion to 1/(k + 1), so that the first is one in twelve.
    Zipf,
}

impl Op {
    pub fn name(self) -> &'static str {
        match self {
            Self::RmsNorm => "rms_norm",
            Self::LayerNorm => "layer_norm",
            Self::Rope(RopeLayout::Halves) => "rope halves",
            Self::Rope(RopeLayout::Interleaved) => "rope interleaved",
            Self::Softmax => "softmax",
            Self::Swiglu => "swiglu",
            Self::CrossEntropy => "cross_entropy",
            Self::LinearCrossEntropy { .. } => "linear_cross_entropy",
            Self::Embedding { ids: Ids::Uniform, .. } => "embedding uniform",
            Self::Embedding { ids: Ids::Zipf, .. } => "embedding zipf",
        }
    }

    /// Rows of a table, if there is one.
    fn classes(self) -> Option<usize> {
        match self {
            Self::Embedding { classes, .. } => Some(classes),
            _ => None,
        }
    }

    /// The depth of a product, if there is one.
    fn depth(self) -> Option<usize> {
        match self {
            Self::LinearCrossEntropy { depth } => Some(depth),
            _ => None,
        }
    }

    /// Elements of `[rows, cols]` that one call has to read or write, by the pass.
    fn matrices(self, pass: Pass) -> usize {
        match (self, pass) {
            (Self::Rope(_), _) => 2,
            (Self::RmsNorm | Self::LayerNorm | Self::Softmax, Pass::Forward) => 2,
            (Self::RmsNorm | Self::LayerNorm | Self::Softmax, _) => 3,
            (Self::Swiglu, Pass::Forward) => 3,
            (Self::Swiglu, _) => 5,
            (Self::CrossEntropy, Pass::Forward) => 1,
            (Self::CrossEntropy, Pass::Backward) => 2,
            (Self::CrossEntropy, Pass::Both) => 3,
            (Self::Embedding { .. }, Pass::Forward) => 2,
            // Besides the table's gradient.
            (Self::Embedding { .. }, _) => 1,
            // Products.
            (Self::LinearCrossEntropy { .. }, _) => 0,
        }
    }
}

/// Heads of rotary embeddings.
pub const HEADS: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    Backward,
    /// Forward and backward.
    Both,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Both => "both",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub group: char,
    pub op: Op,
    pub pass: Pass,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
}

impl Row {
    pub fn shape(&self) -> String {
        let of = self.op.classes().map(|classes| format!(" of {classes}")).unwrap_or_default();
        format!("{}×{}{of}", self.rows, self.cols)
    }
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        let (op, pass, dtype) = (self.op.name(), self.pass.name(), self.dtype.as_str());
        format!("{} {op} {} {dtype} {pass}", self.group, self.shape())
    }

    fn json(&self) -> Value {
        json!({
            "id": self.id(), "group": self.group, "op": "training", "of": self.op.name(),
            "pass": self.pass.name(), "dtype": self.dtype.as_str(), "rows": self.rows,
            "cols": self.cols, "depth": self.op.depth(), "classes": self.op.classes(), "cold": true,
        })
    }

    /// Of products alone: of both passes, of the three that there are.
    fn flops(&self) -> f64 {
        let products = if self.pass == Pass::Forward { 1.0 } else { 3.0 };
        match self.op {
            Op::LinearCrossEntropy { depth } => {
                products * 2.0 * (self.rows * self.cols) as f64 * depth as f64
            }
            _ => 0.0,
        }
    }

    fn bytes(&self) -> f64 {
        let table = self.op.classes().filter(|_| self.pass != Pass::Forward).unwrap_or(0);
        let elements = (self.op.matrices(self.pass) * self.rows + table) * self.cols;
        (elements * self.dtype.size_in_bytes()) as f64
    }

    /// In a training step nothing of a large tensor waits in L2.
    fn cold(&self) -> bool {
        true
    }

    fn cold_bytes(&self) -> f64 {
        self.bytes()
    }

    fn host(&self) -> bool {
        false
    }

    fn sustained(&self) -> bool {
        false
    }
}

/// All rows, group by group.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |group, op, dtype, shapes: &[[usize; 2]]| {
        for &[height, cols] in shapes {
            let passes = [Pass::Forward, Pass::Backward].into_iter();
            rows.extend(passes.map(|pass| Row { group, op, pass, dtype, rows: height, cols }));
        }
    };
    let norms = [[16384, 4096], [32768, 768], [16384, 2048], [8192, 8192], [4096, 16384]];
    for op in [Op::RmsNorm, Op::LayerNorm] {
        add('a', op, DType::BF16, &norms);
    }
    add('a', Op::RmsNorm, DType::BF16, &[[524_288, 128], [16384, 4095]]);
    add('a', Op::RmsNorm, DType::F32, &[[16384, 4096]]);
    for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
        add('b', Op::Rope(layout), DType::BF16, &[[HEADS * 16384, 128], [HEADS * 16384, 64]]);
    }
    add('c', Op::Softmax, DType::BF16, &[[65536, 1024], [32768, 4096], [4096, 50304]]);
    add('c', Op::Softmax, DType::F32, &[[65536, 1024]]);
    add('d', Op::Swiglu, DType::BF16, &[[16384, 4096], [8192, 14336], [32768, 3072]]);
    add('e', Op::CrossEntropy, DType::BF16, &[[16384, 50304], [16384, 50257], [8192, 128_256]]);
    let linear = |pass, depth, cols| Row {
        group: 'e',
        op: Op::LinearCrossEntropy { depth },
        pass,
        dtype: DType::BF16,
        rows: 16384,
        cols,
    };
    for (depth, cols) in [(768, 50304), (2048, 128_256), (4096, 131_072)] {
        rows.extend([Pass::Forward, Pass::Both].map(|pass| linear(pass, depth, cols)));
    }
    for ids in [Ids::Zipf, Ids::Uniform] {
        for (cols, classes) in [(768, 50304), (2048, 128_256), (4096, 131_072)] {
            rows.extend([Pass::Forward, Pass::Backward].map(|pass| Row {
                group: 'f',
                op: Op::Embedding { classes, ids },
                pass,
                dtype: DType::BF16,
                rows: 16384,
                cols,
            }));
        }
    }
    rows
}
