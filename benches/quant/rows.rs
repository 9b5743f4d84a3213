//! Which products are timed.

use candle_core::DType;
use kaio_candle::kernel::Element;
use kaio_candle::kernel::w4::{Codes, Scheme};
use kaio_candle::ptx::Half;
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 4] = [
    ('a', "int4, groups of 128: decoding, weights from memory"),
    ('b', "int4, groups of 128: prompts"),
    ('c', "zero points, smaller and larger groups, nf4"),
    ('d', "layers of language models, one token and sixteen"),
];

/// A weight of four bits; its scales are of the type of `x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight {
    pub codes: Codes,
    pub zeros: bool,
    pub group: Option<u32>,
}

impl Weight {
    pub const INT4: Self = Self { codes: Codes::Int4, zeros: false, group: Some(128) };

    pub fn scheme(self, dtype: DType) -> Scheme {
        let half = if dtype == DType::BF16 { Half::Bf16 } else { Half::F16 };
        let Self { codes, zeros, group } = self;
        Scheme { codes, zeros, scale: Element::Half(half), group }
    }

    pub fn name(self) -> String {
        let codes = if self.codes == Codes::Nf4 { "nf4" } else { "int4" };
        let group = self.group.map_or("column".into(), |rows| format!("g{rows}"));
        let zeros = if self.zeros { " zeros" } else { "" };
        format!("{codes} {group}{zeros}")
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub group: char,
    pub weight: Weight,
    pub dtype: DType,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

impl Row {
    pub fn shape(&self) -> String {
        format!("{}×{}×{}", self.m, self.n, self.k)
    }
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        format!("{} {} {} {}", self.group, self.weight.name(), self.shape(), self.dtype.as_str())
    }

    fn json(&self) -> Value {
        json!({
            "id": self.id(), "group": self.group, "op": "quant", "weight": self.weight.name(),
            "dtype": self.dtype.as_str(), "m": self.m, "n": self.n, "k": self.k, "cold": self.cold(),
        })
    }

    /// With few rows the weights' way from memory is the work, and in a model they never wait in L2.
    fn cold(&self) -> bool {
        self.m <= 64
    }

    fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// Of codes, scales and zero points.
    fn cold_bytes(&self) -> f64 {
        let scheme = self.weight.scheme(self.dtype);
        let groups = scheme.groups(self.k as u64) as f64;
        let each = f64::from(scheme.scale.size()) + if scheme.zeros { 1.0 } else { 0.0 };
        (self.n * self.k / 2) as f64 + groups * self.n as f64 * each
    }

    fn bytes(&self) -> f64 {
        (self.m * (self.k + self.n) * self.dtype.size_in_bytes()) as f64 + self.cold_bytes()
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
    let row = |group, weight, dtype, [m, n, k]: [usize; 3]| Row { group, weight, dtype, m, n, k };
    let mut rows = Vec::new();
    for size in [8192, 4096] {
        for dtype in [DType::F16, DType::BF16] {
            rows.extend(
                [1, 4, 8, 16, 32, 64].map(|m| row('a', Weight::INT4, dtype, [m, size, size])),
            );
        }
    }
    for size in [8192, 4096] {
        for m in [128, 256, 512, 1024, 2048, 4096] {
            rows.push(row('b', Weight::INT4, DType::BF16, [m, size, size]));
        }
    }
    let others = [
        Weight { zeros: true, ..Weight::INT4 },
        Weight { group: None, ..Weight::INT4 },
        Weight { group: Some(64), ..Weight::INT4 },
        Weight { group: Some(32), ..Weight::INT4 },
        Weight { group: Some(32), zeros: true, ..Weight::INT4 },
        Weight { codes: Codes::Nf4, group: Some(64), zeros: false },
    ];
    for m in [1, 16, 2048] {
        for weight in others {
            rows.extend(
                [DType::F16, DType::BF16].map(|dtype| row('c', weight, dtype, [m, 8192, 8192])),
            );
        }
    }
    for [n, k] in [[1024, 4096], [6144, 4096], [4096, 14336], [28672, 4096], [128256, 4096]] {
        rows.extend([1, 16].map(|m| row('d', Weight::INT4, DType::BF16, [m, n, k])));
    }
    rows
}
