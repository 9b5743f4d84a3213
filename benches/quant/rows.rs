//! What is timed.

use candle_core::DType;
use kaio_candle::prelude::{Activations, Per, QuantScheme};
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 14] = [
    ('a', "int4, groups of 128: decoding, weights from memory"),
    ('b', "int4, groups of 128: prompts"),
    ('c', "zero points, smaller and larger groups, nf4"),
    ('d', "layers of language models, one token and sixteen"),
    ('e', "int8 weights, activations rounded to int8"),
    ('f', "fp8 weights, activations rounded to fp8"),
    ('g', "weights of eight bits, activations of sixteen"),
    ('h', "products of int8 codes"),
    ('i', "products of fp8 codes, with scales of lines and of blocks"),
    ('j', "three projections, of queries, keys and values"),
    ('k', "gate and up of an MLP"),
    ('l', "the gradient of the activations"),
    ('m', "quantising a weight, and back"),
    ('n', "host time of one call"),
];

pub const INT4: QuantScheme = QuantScheme::Int4 { group: 128, zero_points: false };
const NF4: QuantScheme = QuantScheme::Nf4 { block: 64 };
pub const INT8: QuantScheme = QuantScheme::Int8 { per: Per::Channel };
pub const FP8: QuantScheme = QuantScheme::Fp8 { per: Per::Channel };
const FP8_BLOCKS: QuantScheme = QuantScheme::Fp8 { per: Per::Block };

/// Columns of keys, and of values: eight heads of 128.
const KEYS: usize = 1024;

/// Whose time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `kaio_matmul_quant_with`.
    Product(Activations),
    /// `kaio_matmul_int8_with`, or `kaio_matmul_fp8`.
    Codes,
    /// `kaio_qkv_project`.
    Qkv,
    /// `kaio_swiglu_project`.
    Swiglu,
    /// What `backward` does of `kaio_matmul_quant`.
    Gradient,
    /// `QuantWeight::quantize`.
    Quantize,
    /// `QuantWeight::dequantize`.
    Dequantize,
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub group: char,
    pub op: Op,
    pub scheme: QuantScheme,
    /// Of the activations, and of what a weight is quantised from.
    pub dtype: DType,
    /// Rows of the activations; 0 where there are none.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Whether the time is the host's.
    pub host: bool,
}

impl Row {
    pub fn shape(&self) -> String {
        format!("{}×{}×{}", self.m, self.n, self.k)
    }

    pub fn op(&self) -> &'static str {
        match self.op {
            Op::Product(Activations::Int8) => "int8 x",
            Op::Product(Activations::Fp8) => "fp8 x",
            Op::Product(_) => "product",
            Op::Codes => "codes",
            Op::Qkv => "qkv",
            Op::Swiglu => "swiglu",
            Op::Gradient => "gradient",
            Op::Quantize => "quantise",
            Op::Dequantize => "dequantise",
        }
    }

    pub fn weight(&self) -> String {
        let per = |per| match per {
            Per::Tensor => "tensor",
            Per::Channel => "column",
            _ => "blocks",
        };
        match self.scheme {
            QuantScheme::Int4 { group, zero_points } => {
                let zeros = if zero_points { " zeros" } else { "" };
                match group {
                    -1 => format!("int4 column{zeros}"),
                    rows => format!("int4 g{rows}{zeros}"),
                }
            }
            QuantScheme::Nf4 { block } => format!("nf4 g{block}"),
            QuantScheme::Int8 { per: of } => format!("int8 {}", per(of)),
            QuantScheme::Fp8 { per: of } => format!("fp8 {}", per(of)),
            other => format!("{other:?}"),
        }
    }

    /// Whether blocks of the weight have scales.
    pub fn blocks(&self) -> bool {
        self.scheme == FP8_BLOCKS
    }

    /// Columns of each of the weights.
    pub fn widths(&self) -> Vec<usize> {
        match self.op {
            Op::Qkv => vec![self.n, KEYS, KEYS],
            Op::Swiglu => vec![self.n; 2],
            _ => vec![self.n],
        }
    }

    fn columns(&self) -> usize {
        self.widths().iter().sum()
    }

    /// Of codes, scales and zero points.
    fn weight_bytes(&self) -> f64 {
        let elements = (self.columns() * self.k) as f64;
        let half = self.dtype.size_in_bytes();
        // Bits of a code, elements with a scale, bytes of a scale and its zero point.
        let (bits, group, each) = match self.scheme {
            QuantScheme::Int4 { group, zero_points } => {
                (4, usize::try_from(group).unwrap_or(self.k), half + usize::from(zero_points))
            }
            QuantScheme::Nf4 { block } => (4, block, half),
            QuantScheme::Fp8 { per: Per::Block } => (8, 128 * 128, 4),
            _ => (8, self.k, 4),
        };
        elements * (f64::from(bits) / 8.0 + each as f64 / group as f64)
    }
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        let (op, weight, shape) = (self.op(), self.weight(), self.shape());
        format!("{} {op} {weight} {shape} {}", self.group, self.dtype.as_str())
    }

    fn json(&self) -> Value {
        let group = match self.scheme {
            QuantScheme::Int4 { group, .. } => Some(group),
            _ => None,
        };
        json!({
            "id": self.id(), "group": self.group, "op": if self.host { "host" } else { "quant" },
            "of": self.op(), "weight": self.weight(), "int4_group": group, "dtype": self.dtype.as_str(),
            "m": self.m, "n": self.n, "k": self.k, "cold": self.cold(),
        })
    }

    /// With few rows the weights' way from memory is the work, and in a model they never wait in L2.
    fn cold(&self) -> bool {
        self.m <= 64
    }

    fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.columns() as f64 * self.k as f64
    }

    fn cold_bytes(&self) -> f64 {
        match self.op {
            // The weight in its dtype besides.
            Op::Quantize | Op::Dequantize => {
                (self.n * self.k * self.dtype.size_in_bytes()) as f64 + self.weight_bytes()
            }
            _ => self.weight_bytes(),
        }
    }

    fn bytes(&self) -> f64 {
        let elements = self.m * (self.k + self.columns());
        (elements * self.dtype.size_in_bytes()) as f64 + self.cold_bytes()
    }

    fn host(&self) -> bool {
        self.host
    }

    fn sustained(&self) -> bool {
        !self.cold() && matches!(self.op, Op::Product(_) | Op::Codes)
    }
}

/// All rows, group by group; those of the same weight follow each other.
pub fn all() -> Vec<Row> {
    const SQUARE: [usize; 2] = [8192, 8192];
    const FEW: [usize; 6] = [1, 4, 8, 16, 32, 64];
    const MANY: [usize; 6] = [128, 256, 512, 1024, 2048, 4096];
    let (float, bf16) = (Op::Product(Activations::Float), DType::BF16);
    let mut rows = Vec::new();
    let mut add = |group, op, scheme, dtype, [n, k]: [usize; 2], ms: &[usize]| {
        let host = group == 'n';
        rows.extend(ms.iter().map(|&m| Row { group, op, scheme, dtype, m, n, k, host }));
    };
    for size in [8192, 4096] {
        for dtype in [DType::F16, bf16] {
            add('a', float, INT4, dtype, [size, size], &FEW);
        }
    }
    for size in [8192, 4096] {
        add('b', float, INT4, bf16, [size, size], &MANY);
    }
    let int4 = |group, zero_points| QuantScheme::Int4 { group, zero_points };
    for scheme in [
        int4(128, true),
        int4(-1, false),
        int4(64, false),
        int4(32, false),
        int4(32, true),
        NF4,
        QuantScheme::Nf4 { block: 128 },
    ] {
        add('c', float, scheme, bf16, SQUARE, &[1, 16, 2048]);
    }
    for layer in [[1024, 4096], [6144, 4096], [4096, 14336], [28672, 4096], [128256, 4096]] {
        add('d', float, INT4, bf16, layer, &[1, 16]);
    }
    let (int8, fp8) = (Op::Product(Activations::Int8), Op::Product(Activations::Fp8));
    let all = [&FEW[..], &MANY[..]].concat();
    add('e', int8, INT8, bf16, SQUARE, &all);
    add('e', int8, INT8, bf16, [28672, 4096], &[16, 4096]);
    add('f', fp8, FP8, bf16, SQUARE, &all);
    add('f', fp8, FP8_BLOCKS, bf16, SQUARE, &[1, 16, 64, 256, 1024, 4096]);
    for scheme in [INT8, FP8, FP8_BLOCKS] {
        add('g', float, scheme, bf16, SQUARE, &[1, 16, 64, 256, 1024, 4096]);
    }
    for (group, scheme) in [('h', INT8), ('i', FP8), ('i', FP8_BLOCKS)] {
        add(group, Op::Codes, scheme, bf16, [4096, 4096], &[4096]);
        add(group, Op::Codes, scheme, bf16, SQUARE, &[1, 16, 64, 256, 1024, 4096, 8192]);
        add(group, Op::Codes, scheme, bf16, [28672, 4096], &[16, 4096]);
    }
    for layer in [[4096, 4096], SQUARE] {
        add('j', Op::Qkv, INT4, bf16, layer, &[1, 16, 64, 2048]);
    }
    add('j', Op::Qkv, FP8, bf16, [4096, 4096], &[1, 2048]);
    for layer in [[14336, 4096], [28672, 8192]] {
        add('k', Op::Swiglu, INT4, bf16, layer, &[1, 16, 64, 2048]);
    }
    for scheme in [INT4, NF4, FP8] {
        add('l', Op::Gradient, scheme, bf16, [4096, 4096], &[16, 128, 512, 2048, 8192]);
    }
    for op in [Op::Quantize, Op::Dequantize] {
        for scheme in [INT4, int4(128, true), NF4, INT8, FP8, FP8_BLOCKS] {
            add('m', op, scheme, bf16, SQUARE, &[0]);
        }
    }
    let one = [4096, 4096];
    for (op, scheme) in [(float, INT4), (int8, INT8), (fp8, FP8), (float, FP8)] {
        add('n', op, scheme, bf16, one, &[1]);
    }
    for op in [Op::Qkv, Op::Swiglu, Op::Gradient] {
        add('n', op, INT4, bf16, one, &[1]);
    }
    rows
}
