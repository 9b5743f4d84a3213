//! Which attentions are timed.

use candle_core::DType;
use serde_json::{Value, json};

use super::common::table;

/// The groups' letters and headings.
pub const GROUPS: [(char, &str); 23] = [
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
    ('l', "backward, D = 128"),
    ('m', "backward, D = 128, causal"),
    ('n', "backward, D = 64"),
    ('o', "backward, D = 64, causal"),
    ('p', "backward, D = 256"),
    ('q', "backward, other widths of heads"),
    ('r', "backward, grouped heads and a sliding window"),
    ('s', "backward, packed sequences, and as many tokens in equal ones"),
    ('t', "backward, deterministic"),
    ('u', "f32, backward and both passes"),
    ('v', "both passes"),
    ('w', "host time of a backward pass: of the op, and of candle's graph"),
];

/// Tokens of a batch, and the width of all its heads.
pub const TOKENS: usize = 16 << 10;
pub const WIDTH: usize = 2048;

/// Random numbers up to 2048 whose sum is [`TOKENS`].
const LENGTHS: [usize; 16] =
    [1373, 582, 1271, 91, 903, 1039, 84, 631, 113, 1904, 1872, 1214, 919, 1269, 1482, 1637];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    Full,
    Causal,
    /// Causal, and only so many keys before a query's own.
    Window(usize),
}

/// What one call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// The gradients of q, k and v alone. The forward pass ran before.
    Backward,
    /// Both of them.
    Both,
    /// `backward()` of candle's graph, which also makes the upstream gradient and adds gradients up.
    Graph,
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub group: char,
    pub pass: Pass,
    pub dtype: DType,
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// The longest sequence of a packed batch.
    pub queries: usize,
    pub keys: usize,
    /// Of the sequences of a packed batch, of queries as of keys.
    pub lengths: Option<&'static [usize]>,
    pub dim: usize,
    pub mask: Mask,
    /// The peer is then our own default.
    pub deterministic: bool,
}

impl Row {
    pub fn shape(&self) -> String {
        let Self { batch, heads, kv_heads, queries, keys, dim, .. } = self;
        let heads =
            if heads == kv_heads { heads.to_string() } else { format!("{heads}/{kv_heads}") };
        let length = match queries == keys {
            _ if self.lengths.is_some() => format!("≤{keys}"),
            true => keys.to_string(),
            false => format!("{queries}/{keys}"),
        };
        format!("B{batch} H{heads} S{length} D{dim}")
    }

    pub fn mask(&self) -> String {
        match self.mask {
            Mask::Full => "full".into(),
            Mask::Causal => "causal".into(),
            Mask::Window(left) => format!("window {left}"),
        }
    }

    pub fn pass(&self) -> &'static str {
        match self.pass {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::Both => "both",
            Pass::Graph => "graph",
        }
    }

    /// All scores of all heads.
    pub fn scores(&self) -> usize {
        let of_a_head = match self.lengths {
            Some(lengths) => lengths.iter().map(|length| length * length).sum(),
            None => self.batch * self.queries * self.keys,
        };
        self.heads * of_a_head
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

    /// How many forward passes the products of the call make: two there, five in the backward pass.
    fn passes(&self) -> f64 {
        match self.pass {
            Pass::Forward => 1.0,
            Pass::Backward | Pass::Graph => 2.5,
            Pass::Both => 3.5,
        }
    }

    /// Of two tensors with so many heads.
    fn bytes_of(&self, heads: usize, length: usize) -> f64 {
        let rows = self.lengths.map_or(self.batch * length, |lengths| lengths.iter().sum());
        (2 * rows * heads * self.dim * self.dtype.size_in_bytes()) as f64
    }
}

impl table::Row for Row {
    fn group(&self) -> char {
        self.group
    }

    fn id(&self) -> String {
        let id = format!("{} {} {} {}", self.group, self.shape(), self.mask(), self.dtype.as_str());
        match self.pass {
            Pass::Forward => id,
            _ => format!("{id} {}", self.pass()),
        }
    }

    fn json(&self) -> Value {
        let window = if let Mask::Window(left) = self.mask { Some(left) } else { None };
        json!({
            "id": self.id(), "group": self.group, "op": if self.host() { "host" } else { "attention" },
            "pass": self.pass(), "dtype": self.dtype.as_str(), "batch": self.batch,
            "heads": self.heads, "kv_heads": self.kv_heads, "queries": self.queries,
            "keys": self.keys, "lengths": self.lengths, "dim": self.dim,
            "causal": self.mask != Mask::Full, "window": window,
            "deterministic": self.deterministic, "cold": self.cold(),
        })
    }

    fn flops(&self) -> f64 {
        self.passes() * 4.0 * self.seen() * self.dim as f64
    }

    /// The forward pass's two tensors with queries and two with keys; the backward pass has the gradient of
    /// each besides.
    fn bytes(&self) -> f64 {
        let forward = self.bytes_of(self.heads, self.queries) + self.cold_bytes();
        match self.pass {
            Pass::Forward => forward,
            Pass::Backward | Pass::Graph => 2.0 * forward,
            Pass::Both => 3.0 * forward,
        }
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
        ['k', 'w'].contains(&self.group)
    }

    fn sustained(&self) -> bool {
        self.dtype == DType::BF16 && !self.cold() && !self.host()
    }
}

/// A row of [`TOKENS`] in sequences of one length, with heads of [`WIDTH`] columns together.
fn row(group: char, dtype: DType, length: usize, dim: usize, mask: Mask) -> Row {
    let heads = (WIDTH + dim / 2) / dim;
    Row {
        group,
        pass: Pass::Forward,
        dtype,
        batch: TOKENS / length,
        heads,
        kv_heads: heads,
        queries: length,
        keys: length,
        lengths: None,
        dim,
        mask,
        deterministic: false,
    }
}

/// All rows, group by group.
pub fn all() -> Vec<Row> {
    [forward(), backward()].concat()
}

const BF16: DType = DType::BF16;
const MASKS: [Mask; 2] = [Mask::Full, Mask::Causal];

fn forward() -> Vec<Row> {
    let mut rows = Vec::new();
    for (groups, dim) in [(['a', 'b'], 128), (['c', 'd'], 64), (['e', 'e'], 256)] {
        for (group, mask) in groups.into_iter().zip(MASKS) {
            for dtype in [BF16, DType::F16] {
                let lengths = (0..6).map(|i| 512 << i);
                rows.extend(lengths.map(|length| row(group, dtype, length, dim, mask)));
            }
        }
    }
    for dim in [80, 96, 192] {
        rows.extend(MASKS.map(|mask| row('f', BF16, 4096, dim, mask)));
    }
    for length in [4096, 16384] {
        let grouped = row('g', BF16, length, 128, Mask::Causal);
        rows.push(Row { heads: 64, kv_heads: 8, ..grouped });
    }
    rows.push(row('h', BF16, 16384, 128, Mask::Window(1024)));
    for keys in [8 << 10, 64 << 10] {
        for queries in [1, 4] {
            let decode = Row {
                batch: 16,
                heads: 32,
                kv_heads: 8,
                queries,
                ..row('i', BF16, 1, 128, Mask::Full)
            };
            rows.push(Row { keys, ..decode });
        }
    }
    rows.extend([64, 128].map(|dim| in_f32('j', dim)));
    let host = Row { batch: 1, ..row('k', BF16, 512, 128, Mask::Full) };
    rows.extend([host, Row { queries: 1, ..host }]);
    rows
}

/// Half of the tokens: candle's scores of all have to fit its kernels' indices.
fn in_f32(group: char, dim: usize) -> Row {
    Row { batch: 2, ..row(group, DType::F32, 4096, dim, Mask::Full) }
}

fn backward() -> Vec<Row> {
    let row = |group, length, dim, mask| Row {
        pass: Pass::Backward,
        ..row(group, BF16, length, dim, mask)
    };
    let mut rows = Vec::new();
    for (groups, dim) in [(['l', 'm'], 128), (['n', 'o'], 64), (['p', 'p'], 256)] {
        for (group, mask) in groups.into_iter().zip(MASKS) {
            let lengths = [512, 1024, 2048, 4096, 16384];
            rows.extend(lengths.map(|length| row(group, length, dim, mask)));
        }
    }
    for dim in [80, 96, 192] {
        rows.extend(MASKS.map(|mask| row('q', 4096, dim, mask)));
    }
    for mask in MASKS {
        rows.push(Row { heads: 64, kv_heads: 8, ..row('r', 16384, 128, mask) });
    }
    rows.push(row('r', 16384, 128, Mask::Window(1024)));
    for mask in MASKS {
        let equal = row('s', TOKENS / LENGTHS.len(), 128, mask);
        let longest = LENGTHS.into_iter().max().expect("there are some");
        let packed = Row { queries: longest, keys: longest, lengths: Some(&LENGTHS), ..equal };
        rows.extend([packed, equal]);
    }
    for (length, dim) in [(512, 128), (4096, 64), (4096, 128), (4096, 256), (16384, 128)] {
        rows.extend(MASKS.map(|mask| Row { deterministic: true, ..row('t', length, dim, mask) }));
    }
    for dim in [64, 128] {
        let passes = [Pass::Backward, Pass::Both];
        rows.extend(passes.map(|pass| Row { pass, ..in_f32('u', dim) }));
    }
    for dim in [64, 128, 256] {
        for length in [1024, 4096] {
            rows.extend(MASKS.map(|mask| Row { pass: Pass::Both, ..row('v', length, dim, mask) }));
        }
    }
    let host = Row { batch: 1, ..row('w', 512, 128, Mask::Full) };
    rows.extend([Pass::Backward, Pass::Graph].map(|pass| Row { pass, ..host }));
    rows
}
