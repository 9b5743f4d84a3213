//! Which attentions are timed.

use candle_core::DType;
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 11] = [
    ('a', "D = 128"),
    ('b', "D = 128, causal"),
    ('c', "D = 64"),
    ('d', "D = 64, causal"),
    ('e', "D = 256"),
    ('f', "other widths of heads"),
    ('g', "grouped heads"),
    ('h', "sliding window"),
    ('i', "decoding, keys and values from memory"),
    ('j', "f32"),
    ('k', "host time of one call"),
];

/// Tokens of a batch, and the width of all its heads.
pub const TOKENS: usize = 16 << 10;
pub const WIDTH: usize = 2048;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    Full,
    Causal,
    /// Causal, and only so many keys before a query's own.
    Window(usize),
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub group: char,
    pub dtype: DType,
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub dim: usize,
    pub mask: Mask,
}

impl Row {
    pub fn shape(&self) -> String {
        let Self { batch, heads, kv_heads, queries, keys, dim, .. } = self;
        let heads =
            if heads == kv_heads { heads.to_string() } else { format!("{heads}/{kv_heads}") };
        let length = if queries == keys { keys.to_string() } else { format!("{queries}/{keys}") };
        format!("B{batch} H{heads} S{length} D{dim}")
    }

    pub fn mask(&self) -> String {
        match self.mask {
            Mask::Full => "full".into(),
            Mask::Causal => "causal".into(),
            Mask::Window(left) => format!("window {left}"),
        }
    }

    /// All scores of all heads.
    pub fn scores(&self) -> usize {
        self.batch * self.heads * self.queries * self.keys
    }

    /// Those that the mask leaves. Half of them under a causal mask, as everyone counts.
    fn seen(&self) -> f64 {
        let heads = (self.batch * self.heads) as f64;
        match self.mask {
            Mask::Full => self.scores() as f64,
            Mask::Causal => self.scores() as f64 / 2.0,
            Mask::Window(left) => heads * ((left + 1) * (2 * self.keys - left)) as f64 / 2.0,
        }
    }

    fn bytes_of(&self, heads: usize, length: usize) -> f64 {
        (2 * self.batch * heads * length * self.dim * self.dtype.size_in_bytes()) as f64
    }
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        format!("{} {} {} {}", self.group, self.shape(), self.mask(), self.dtype.as_str())
    }

    fn json(&self) -> Value {
        let window = if let Mask::Window(left) = self.mask { Some(left) } else { None };
        json!({
            "id": self.id(), "group": self.group, "op": if self.host() { "host" } else { "attention" },
            "dtype": self.dtype.as_str(), "batch": self.batch, "heads": self.heads,
            "kv_heads": self.kv_heads, "queries": self.queries, "keys": self.keys, "dim": self.dim,
            "causal": self.mask != Mask::Full, "window": window, "cold": self.cold(),
        })
    }

    fn flops(&self) -> f64 {
        4.0 * self.seen() * self.dim as f64
    }

    fn bytes(&self) -> f64 {
        self.bytes_of(self.heads, self.queries) + self.cold_bytes()
    }

    /// In a model the keys and values of other layers come in between.
    fn cold(&self) -> bool {
        self.group == 'i'
    }

    /// Those of keys and values.
    fn cold_bytes(&self) -> f64 {
        self.bytes_of(self.kv_heads, self.keys)
    }

    fn host(&self) -> bool {
        self.group == 'k'
    }

    fn sustained(&self) -> bool {
        self.dtype == DType::BF16 && !self.cold() && !self.host()
    }
}

/// All rows, group by group.
pub fn all() -> Vec<Row> {
    let bf16 = DType::BF16;
    let row = |group, dtype, length: usize, dim: usize, mask| {
        let heads = (WIDTH + dim / 2) / dim;
        let (batch, queries, keys) = (TOKENS / length, length, length);
        Row { group, dtype, batch, heads, kv_heads: heads, queries, keys, dim, mask }
    };
    let mut rows = Vec::new();
    for (groups, dim) in [(['a', 'b'], 128), (['c', 'd'], 64), (['e', 'e'], 256)] {
        for (group, mask) in groups.into_iter().zip([Mask::Full, Mask::Causal]) {
            for dtype in [DType::BF16, DType::F16] {
                let lengths = (0..6).map(|i| 512 << i);
                rows.extend(lengths.map(|length| row(group, dtype, length, dim, mask)));
            }
        }
    }
    for dim in [80, 96, 192] {
        rows.extend([Mask::Full, Mask::Causal].map(|mask| row('f', bf16, 4096, dim, mask)));
    }
    for length in [4096, 16384] {
        let grouped = row('g', bf16, length, 128, Mask::Causal);
        rows.push(Row { heads: 64, kv_heads: 8, ..grouped });
    }
    rows.push(row('h', bf16, 16384, 128, Mask::Window(1024)));
    for keys in [8 << 10, 64 << 10] {
        for queries in [1, 4] {
            let decode = Row {
                batch: 16,
                heads: 32,
                kv_heads: 8,
                queries,
                ..row('i', bf16, 1, 128, Mask::Full)
            };
            rows.push(Row { keys, ..decode });
        }
    }
    // Half of the tokens: candle's scores of all have to fit its kernels' indices.
    rows.extend(
        [64, 128].map(|dim| Row { batch: 2, ..row('j', DType::F32, 4096, dim, Mask::Full) }),
    );
    let host = Row { batch: 1, ..row('k', bf16, 512, 128, Mask::Full) };
    rows.extend([host, Row { queries: 1, ..host }]);
    rows
}
