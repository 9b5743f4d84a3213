//! What is timed.

use candle_core::DType;
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 1] = [('d', "gated linear units")];

/// Whose time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Swiglu,
}

impl Op {
    pub fn name(self) -> &'static str {
        match self {
            Self::Swiglu => "swiglu",
        }
    }

    /// Elements of `[rows, cols]` that one call has to read or write, by the pass.
    fn matrices(self, pass: Pass) -> usize {
        match (self, pass) {
            (Self::Swiglu, Pass::Forward) => 3,
            (Self::Swiglu, Pass::Backward) => 5,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    Backward,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
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
        format!("{}×{}", self.rows, self.cols)
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
            "cols": self.cols, "cold": true,
        })
    }

    fn flops(&self) -> f64 {
        0.0
    }

    fn bytes(&self) -> f64 {
        let elements = self.op.matrices(self.pass) * self.rows * self.cols;
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
    add('d', Op::Swiglu, DType::BF16, &[[16384, 4096], [8192, 14336], [32768, 3072]]);
    rows
}
