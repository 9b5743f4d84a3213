//! What configurations are called, where people read about them: `SHAPE, VARIANT`. The shape is what
//! decides about resources; all choices are in the name.

use std::fmt::Write;

use super::attention::{Lengths, Mask, Task};
use super::gemm::{Epilogue, Major, sm80, sm90};
use super::{Config, Element, attention};
use crate::Activation;
use crate::ptx::Half;

impl Config {
    /// What it is called.
    pub fn name(&self) -> String {
        match self {
            Self::MatmulSm90(config) => config.name(),
            Self::MatmulSm80(config) => config.name(),
            Self::MatmulReduce(config) => config.name(),
            Self::FlashSm90(config) => config.name(),
            Self::FlashSm80(config) => config.name(),
            Self::FlashCombine(config) => config.name(),
        }
    }
}

impl sm90::Config {
    /// `sm90 128x256 k64x4 pingpong tma4 raster, nt bf16→f32 +bf16 relu batched boxes64/32`: rows and
    /// columns of a tile, depth and number of stages, split or turns, blocks of a multiprocessor,
    /// store, order; layouts of `A` and `B` as BLAS names them, types, bias, activation, lines of the
    /// boxes of both operands.
    pub fn name(&self) -> String {
        let mut name = format!("sm90 {}x{} k{}x{}", self.rows, self.cols, sm90::DEPTH, self.stages);
        if self.orient == sm90::Orient::Swapped {
            name.push_str(" swapped");
        }
        shared_depth(&mut name, self.split);
        if self.pingpong {
            name.push_str(" pingpong");
        }
        shared_sm(&mut name, self.blocks_per_sm);
        match self.store {
            sm90::Store::Tma => add(&mut name, format_args!(" tma{}", self.slabs)),
            sm90::Store::Staged { unit } => add(&mut name, format_args!(" staged{unit}")),
        }
        name.push_str(match self.order {
            sm90::Order::Grid => " grid",
            sm90::Order::Raster => " raster",
        });
        let layouts = self.orient.order([self.lhs, self.rhs]);
        variant(&mut name, layouts, self.half, self.batched, &self.epilogue);
        add(&mut name, format_args!(" boxes{}/{}", self.lhs_lines, self.rhs_lines));
        name
    }
}

impl sm80::Config {
    /// `sm80 128x256 k64x4 warps2x4 split3 2/sm unit4, nt bf16→f32 +bf16 relu batched`: as
    /// for [`sm90::Config::name`], with the warps of a tile and the elements of a store.
    pub fn name(&self) -> String {
        let [below, beside] = self.warps;
        let mut name = format!(
            "sm80 {}x{} k{}x{} warps{below}x{beside}",
            self.rows, self.cols, self.depth, self.stages
        );
        shared_depth(&mut name, self.split);
        shared_sm(&mut name, self.blocks_per_sm);
        add(&mut name, format_args!(" unit{}", self.unit));
        variant(&mut name, [self.lhs, self.rhs], self.half, self.batched, &self.epilogue);
        name
    }
}

impl sm80::Reduce {
    /// `sm80 reduce split3 unit4, →f32 +bf16 relu`
    pub fn name(&self) -> String {
        let mut name = format!("sm80 reduce split{} unit{}, ", self.split, self.unit);
        epilogue(&mut name, &self.epilogue);
        name
    }
}

impl attention::sm90::Config {
    /// `flash90 128x176 d128/64 x2 slabs1 turns, bf16→f32 causal +bf16 softcap alibi packed lse direct`:
    /// rows of a tile and keys of a block, elements of a query and of a value, stages, slabs of the
    /// result, heads of a tile; types, mask, bias, lengths, what becomes of scores, how what is stored.
    pub fn name(&self) -> String {
        let Self { task, rows, keys, stages, slabs, .. } = self;
        let mut name = format!("flash90 {rows}x{keys} {} x{stages} slabs{slabs}", widths(task));
        name.push_str(if self.turns { " turns" } else { "" });
        let direct = self.store == attention::sm90::Store::Direct;
        flash(&mut name, Element::Half(self.half), task, direct);
        name
    }
}

impl attention::sm80::Config {
    /// `flash80 128x64 d128/64 4warps 2/sm kept pack4, bf16→f32 causal +bf16 softcap alibi packed lse
    /// split`: as for [`attention::sm90::Config::name`], with warps, the blocks of a multiprocessor, and
    /// whether queries stay in registers.
    pub fn name(&self) -> String {
        let Self { task, keys, warps, .. } = self;
        let mut name = format!("flash80 {}x{keys} {} {warps}warps", self.rows(), widths(task));
        shared_sm(&mut name, self.blocks_per_sm);
        name.push_str(if self.kept { " kept" } else { "" });
        flash(&mut name, self.element, task, false);
        name
    }
}

impl attention::combine::Config {
    /// `combine d128 parts32, →bf16 lse`
    pub fn name(&self) -> String {
        let lse = if self.lse { " lse" } else { "" };
        let (dim, parts) = (self.value_dim, 32 * self.rounds);
        format!("combine d{dim} parts{parts}, →{}{lse}", element(self.out))
    }
}

/// Elements of a query and of a value.
fn widths(task: &Task) -> String {
    format!("d{}/{}", task.head_dim, task.value_dim)
}

/// Heads of a tile, and the variant of an attention of operands of a type. `direct`: threads store.
fn flash(name: &mut String, of: Element, task: &Task, direct: bool) {
    if task.pack > 1 {
        add(name, format_args!(" pack{}", task.pack));
    }
    add(name, format_args!(", {}→{}", element(of), element(task.out)));
    name.push_str(match task.mask {
        Mask::None => "",
        Mask::Right => " causal",
        Mask::Window => " window",
    });
    let scores = &task.scores;
    if let Some(bias) = scores.bias {
        let pairs = if bias.pairs { "x2" } else { "" };
        add(name, format_args!(" +{}{pairs}", element(bias.element)));
    }
    name.push_str(match task.lengths {
        Lengths::Full => "",
        Lengths::Padded => " padded",
        Lengths::Packed => " packed",
    });
    let words = [
        (scores.shrunk, " shrunk"),
        (scores.softcap, " softcap"),
        (scores.alibi, " alibi"),
        (task.lse, " lse"),
        (direct, " direct"),
        (task.split, " split"),
    ];
    words.iter().filter(|(holds, _)| *holds).for_each(|(_, word)| name.push_str(word));
}

fn add(name: &mut String, text: std::fmt::Arguments) {
    name.write_fmt(text).expect("a String takes all text");
}

fn shared_depth(name: &mut String, split: u32) {
    if split > 1 {
        add(name, format_args!(" split{split}"));
    }
}

fn shared_sm(name: &mut String, blocks: u32) {
    if blocks > 1 {
        add(name, format_args!(" {blocks}/sm"));
    }
}

fn variant(name: &mut String, [a, b]: [Major; 2], half: Half, batched: bool, after: &Epilogue) {
    let a = if a == Major::K { 'n' } else { 't' };
    let b = if b == Major::K { 't' } else { 'n' };
    add(name, format_args!(", {a}{b} {}", half.name()));
    epilogue(name, after);
    if batched {
        name.push_str(" batched");
    }
}

fn epilogue(name: &mut String, epilogue: &Epilogue) {
    add(name, format_args!("→{}", element(epilogue.out)));
    if let Some(bias) = epilogue.bias {
        add(name, format_args!(" +{}", element(bias)));
    }
    name.push_str(match epilogue.activation {
        None => "",
        Some(Activation::Relu) => " relu",
        Some(Activation::GeluTanh) => " gelu_tanh",
        Some(Activation::GeluErf) => " gelu_erf",
        Some(Activation::Silu) => " silu",
    });
}

fn element(element: Element) -> &'static str {
    match element {
        Element::F32 => "f32",
        Element::Half(half) => half.name(),
    }
}
