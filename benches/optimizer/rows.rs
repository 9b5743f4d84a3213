//! What is timed.

use candle_core::DType;
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 4] = [
    ('a', "AdamW"),
    ('b', "AdamW with the norm of the gradients clipped"),
    ('c', "gradients alone: clipped, and added to sums"),
    ('d', "the host's time for a step"),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Step,
    ClippedStep,
    Clip,
    Accumulate,
    Host,
}

impl Op {
    pub fn name(self) -> &'static str {
        match self {
            Self::Step => "adamw",
            Self::ClippedStep => "adamw, clipped",
            Self::Clip => "clip",
            Self::Accumulate => "accumulate",
            Self::Host => "host",
        }
    }
}

/// Whose weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// GPT-2 of 124 M parameters: 148 tensors.
    Gpt2,
    /// A Llama of 1.24 B: 114 tensors.
    Llama,
}

impl Model {
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2-124m",
            Self::Llama => "llama-1b",
        }
    }

    pub fn shapes(self) -> Vec<Vec<usize>> {
        let mut shapes = Vec::new();
        let mut add = |of: &[&[usize]]| shapes.extend(of.iter().map(|shape| shape.to_vec()));
        match self {
            Self::Gpt2 => {
                add(&[&[50_304, 768], &[1024, 768], &[768], &[768]]);
                for _ in 0..12 {
                    add(&[&[768], &[768], &[768, 2304], &[2304], &[768, 768], &[768]]);
                    add(&[&[768], &[768], &[768, 3072], &[3072], &[3072, 768], &[768]]);
                }
            }
            Self::Llama => {
                add(&[&[128_256, 2048], &[2048]]);
                for _ in 0..16 {
                    add(&[&[2048], &[2048, 3072], &[2048, 2048]]);
                    add(&[&[2048], &[2048, 8192], &[2048, 8192], &[8192, 2048]]);
                }
            }
        }
        shapes
    }

    fn parameters(self) -> usize {
        self.shapes().iter().map(|shape| shape.iter().product::<usize>()).sum()
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub group: char,
    pub op: Op,
    pub model: Model,
    /// Of variables and gradients.
    pub dtype: DType,
    /// Whether the moments are codes of eight bits.
    pub codes: bool,
}

impl Row {
    pub fn moments(&self) -> &'static str {
        match self.op {
            Op::Clip | Op::Accumulate => "",
            _ if self.codes => "8 bits",
            _ => "f32",
        }
    }

    /// Whether candle-nn does the same, and has the memory.
    pub fn candle(&self) -> bool {
        let step = matches!(self.op, Op::Step | Op::Host) && !self.codes;
        step && self.dtype == DType::F32 && self.model == Model::Gpt2
    }
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        let (op, model, dtype) = (self.op.name(), self.model.name(), self.dtype.as_str());
        let id = format!("{} {op} {model} {dtype} {}", self.group, self.moments());
        id.trim_end().into()
    }

    fn json(&self) -> Value {
        json!({
            "id": self.id(), "group": self.group, "op": "optimizer", "of": self.op.name(),
            "dtype": self.dtype.as_str(), "codes": self.codes, "shapes": self.model.shapes(), "cold": false,
        })
    }

    fn flops(&self) -> f64 {
        0.0
    }

    fn bytes(&self) -> f64 {
        let grad = self.dtype.size_in_bytes();
        // Weights read and written, with their copy in 16 bits; both moments read and written; the gradient.
        let copy = if self.dtype == DType::F32 { 0 } else { grad };
        let step = 8 + copy + if self.codes { 4 } else { 16 } + grad;
        let of_each = match self.op {
            Op::Step | Op::Host => step,
            Op::ClippedStep => step + grad,
            Op::Clip => 3 * grad,
            Op::Accumulate => 8 + grad,
        };
        (of_each * self.model.parameters()) as f64
    }

    /// No model fits L2, and what is left there of the last call is little.
    fn cold(&self) -> bool {
        true
    }

    fn cold_bytes(&self) -> f64 {
        self.bytes()
    }

    fn host(&self) -> bool {
        self.op == Op::Host
    }

    fn sustained(&self) -> bool {
        false
    }
}

/// All rows, group by group.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |group, op, dtype, codes| {
        rows.extend([Model::Gpt2, Model::Llama].map(|model| Row {
            group,
            op,
            model,
            dtype,
            codes,
        }));
    };
    for (group, op) in [('a', Op::Step), ('b', Op::ClippedStep)] {
        add(group, op, DType::F32, false);
        add(group, op, DType::BF16, false);
        add(group, op, DType::F32, true);
        add(group, op, DType::BF16, true);
    }
    for op in [Op::Clip, Op::Accumulate] {
        add('c', op, DType::F32, false);
        add('c', op, DType::BF16, false);
    }
    add('d', Op::Host, DType::F32, false);
    rows
}
