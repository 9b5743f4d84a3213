//! Which products are timed.

use candle_core::DType;
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 7] = [
    ('a', "large, all layouts"),
    ('b', "square and small"),
    ('c', "one linear layer of a language model, from one token to 4096"),
    ('d', "decoding, weights from memory"),
    ('e', "odd sizes"),
    ('f', "forward and backward of one linear layer"),
    ('g', "host time of one call"),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Matmul,
    /// Forward and backward, through candle's graph.
    Linear,
    /// The same three products alone.
    Products,
    /// What the call costs the host.
    Host,
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub group: char,
    pub op: Op,
    pub dtype: DType,
    pub out: DType,
    /// For each operand whether it lies by rows (`n`) or is the transposed view of one that does
    /// (`t`).
    pub layout: &'static str,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

impl Row {
    /// Which of the operands are transposed views.
    pub fn transposed(&self) -> [bool; 2] {
        [0, 1].map(|i| self.layout.as_bytes()[i] == b't')
    }

    pub fn shape(&self) -> String {
        format!("{}×{}×{}", self.m, self.n, self.k)
    }

    pub fn dtypes(&self) -> String {
        format!("{}→{}", self.dtype.as_str(), self.out.as_str())
    }

    pub fn op(&self) -> &'static str {
        match self.op {
            Op::Matmul => "matmul",
            Op::Linear => "forward+backward",
            Op::Products => "its three products",
            Op::Host => "host",
        }
    }
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        format!("{} {} {} {} {}", self.group, self.op(), self.layout, self.shape(), self.dtypes())
    }

    fn json(&self) -> Value {
        let (dtype, out, layout) = (self.dtype.as_str(), self.out.as_str(), self.layout);
        json!({
            "id": self.id(), "group": self.group, "op": self.op(), "dtype": dtype, "out": out,
            "layout": layout, "m": self.m, "n": self.n, "k": self.k, "cold": self.cold(),
        })
    }

    /// With few rows the weights' way from memory is the work, and in a model they never wait in L2.
    fn cold(&self) -> bool {
        self.op == Op::Matmul && self.m <= 64
    }

    fn flops(&self) -> f64 {
        let products = if matches!(self.op, Op::Linear | Op::Products) { 3.0 } else { 1.0 };
        products * 2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// The weights'.
    fn cold_bytes(&self) -> f64 {
        (self.n * self.k * self.dtype.size_in_bytes()) as f64
    }

    /// Those of one product.
    fn bytes(&self) -> f64 {
        let inputs = self.m * self.k * self.dtype.size_in_bytes();
        let results = self.m * self.n * self.out.size_in_bytes();
        (inputs + results) as f64 + self.cold_bytes()
    }

    fn host(&self) -> bool {
        self.op == Op::Host
    }

    fn sustained(&self) -> bool {
        let plain = self.layout == "nn" && self.dtype == DType::BF16;
        plain && self.op == Op::Matmul && !self.cold()
    }
}

/// All rows, group by group.
pub fn all() -> Vec<Row> {
    const HALVES: [DType; 2] = [DType::BF16, DType::F16];
    let row = |group, dtype, out, layout, [m, n, k]: [usize; 3]| {
        let op = match group {
            'f' => Op::Linear,
            'g' => Op::Host,
            _ => Op::Matmul,
        };
        Row { group, op, dtype, out, layout, m, n, k }
    };
    let mut rows = Vec::new();
    for size in [[4096; 3], [8192; 3], [16384, 4096, 4096]] {
        for dtype in HALVES {
            for out in [dtype, DType::F32] {
                rows.extend(["nn", "nt", "tn", "tt"].map(|l| row('a', dtype, out, l, size)));
            }
        }
    }
    for size in [[2048; 3], [1024; 3], [512; 3]] {
        for dtype in HALVES {
            for out in [dtype, DType::F32] {
                rows.extend(["nn", "nt"].map(|l| row('b', dtype, out, l, size)));
            }
        }
    }
    let bf16 = DType::BF16;
    for [n, k] in [[4096, 4096], [6144, 4096], [4096, 14336], [28672, 4096], [128256, 4096]] {
        for m in [1, 16, 64, 256, 1024, 4096] {
            rows.extend(["nn", "nt"].map(|l| row('c', bf16, bf16, l, [m, n, k])));
        }
    }
    for m in [1, 16] {
        rows.extend(["nn", "nt"].map(|l| row('d', bf16, bf16, l, [m, 8192, 8192])));
    }
    for size in [[4095, 4097, 4093], [4096, 4096, 4100], [4096, 4100, 4096]] {
        for out in [bf16, DType::F32] {
            rows.extend(["nn", "nt"].map(|l| row('e', bf16, out, l, size)));
        }
    }
    for out in [bf16, DType::F32] {
        for layout in ["nn", "nt"] {
            let linear = row('f', bf16, out, layout, [4096; 3]);
            rows.extend([linear, Row { op: Op::Products, ..linear }]);
        }
    }
    rows.extend([512, 64].map(|n| row('g', bf16, bf16, "nn", [n; 3])));
    rows
}
