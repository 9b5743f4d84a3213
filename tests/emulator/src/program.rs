//! PTX read into instructions: of a text, what the writer in `src/ptx` can write.

use std::collections::HashMap;

use half::{bf16, f16};

use crate::alu;

/// What an instruction is given.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register's place, and the bits that it has.
    Reg(usize, u64),
    Number(u64),
    Special(Special),
    /// A parameter of the kernel, by its place.
    Param(usize),
    List(Vec<Operand>),
    /// `[base + offset]`.
    At(Box<Operand>, i64),
    /// `[map, {coordinates}]`.
    Box(Box<Operand>, Vec<Operand>),
    Label(usize),
    /// `_`.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Special {
    Shared,
    Thread,
    Lane,
    Block(usize),
    Blocks(usize),
    Cluster,
    Rank,
}

/// What an instruction does.
#[derive(Clone, Copy)]
pub enum Op {
    /// Each lane for itself.
    Lanewise(alu::Function),
    /// Of so many bytes; also two registers as one, and back.
    Move(usize),
    Return,
    Branch,
    /// Fences, prefetches, registers that change hands: what all happens in order here does without.
    Nothing,
    /// Nothing, for which all lanes must come.
    Together,
    LoadParam(usize),
    /// Of what blocks count in the GPU's memory.
    LoadCount,
    AddCount,
    AddFloat,
    RaiseCount,
    TakeCount,
    /// Of global memory or of shared memory, with the bytes of each register.
    Load(Space, usize),
    Store(Space, usize),
    StoreCounted(usize),
    Shuffle(Shuffle),
    Ballot,
    Elect,
    Arrive,
    Sync,
    ArriveCluster,
    WaitCluster,
    MapShared,
    /// Of an `mbarrier`.
    Init,
    ArriveCounted,
    ExpectBytes,
    TryWait,
    /// TMA.
    LoadBox,
    LoadBytes,
    StoreBox,
    AddBox,
    AddFloats,
    CommitStores,
    WaitStores,
    /// `cp.async`.
    Copy,
    CommitCopies,
    WaitCopies,
    /// Whether it transposes.
    LoadMatrix(bool),
    StoreMatrix(bool),
    Multiply(Factor),
    MultiplyTf32,
    /// With as many columns.
    MultiplyGroup(Factor, u32),
    FenceGroup,
    CommitGroup,
    WaitGroup,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Space {
    Global,
    Shared,
}

#[derive(Clone, Copy)]
pub enum Shuffle {
    From,
    Xor,
    Up,
}

/// What tensor cores multiply.
#[derive(Clone, Copy)]
pub struct Factor {
    /// Bytes of an element.
    pub size: usize,
    /// An element as a float.
    pub widen: fn(u16) -> f32,
    /// Whether sums are i32, not f32.
    pub integers: bool,
}

impl Factor {
    fn of(kind: &str, sums: &str) -> Option<Self> {
        let (size, widen): (_, fn(u16) -> f32) = match kind {
            "f16" => (2, |x| f16::from_bits(x).to_f32()),
            "bf16" => (2, |x| bf16::from_bits(x).to_f32()),
            "s8" => (1, |x| f32::from(x as u8 as i8)),
            "e4m3" => (1, |x| e4m3(x as u8)),
            _ => return None,
        };
        let integers = kind == "s8";
        (sums == if integers { "s32" } else { "f32" }).then_some(Self { size, widen, integers })
    }

    /// Elements along K of an instruction.
    pub fn depth(&self) -> usize {
        32 / self.size
    }
}

/// The value of an 8-bit float: a sign, 4 bits of exponent from 2^-6 on, 3 of mantissa; all ones are no number.
pub fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7) / 8.0);
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-6),
        _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
    };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

impl Op {
    fn of(name: &str) -> Option<Self> {
        if let Some(function) = alu::function(name) {
            return Some(Self::Lanewise(function));
        }
        let parts: Vec<_> = name.split('.').collect();
        Some(match parts[..] {
            ["mov", kind] => Self::Move(size(kind)),
            ["ret"] => Self::Return,
            ["bra"] => Self::Branch,
            ["fence" | "prefetch" | "griddepcontrol", ..] => Self::Nothing,
            ["setmaxnreg", ..] | ["bar", "warp", "sync"] => Self::Together,
            ["ld", "param", kind] => Self::LoadParam(size(kind)),
            ["ld", "acquire", "gpu", "global", "u32"] => Self::LoadCount,
            ["red", "release", "gpu", "global", "add", "u32"] => Self::AddCount,
            ["red", "relaxed", "gpu", "global", "add", "f32"] => Self::AddFloat,
            ["red", "relaxed", "gpu", "global", "max", "u32"] => Self::RaiseCount,
            ["atom", "relaxed", "gpu", "global", "add", "u32"] => Self::TakeCount,
            ["ld", "global", .., kind] => Self::Load(Space::Global, size(kind)),
            ["ld", "shared" | "shared::cluster", .., kind] => Self::Load(Space::Shared, size(kind)),
            ["st", "global", .., kind] => Self::Store(Space::Global, size(kind)),
            ["st", "async", "weak", "shared::cluster", _, .., kind] => {
                Self::StoreCounted(size(kind))
            }
            ["st", "shared", .., kind] => Self::Store(Space::Shared, size(kind)),
            ["shfl", "sync", "idx", _] => Self::Shuffle(Shuffle::From),
            ["shfl", "sync", "bfly", _] => Self::Shuffle(Shuffle::Xor),
            ["shfl", "sync", "up", _] => Self::Shuffle(Shuffle::Up),
            ["vote", "sync", "ballot", _] => Self::Ballot,
            ["elect", "sync"] => Self::Elect,
            ["bar", "arrive"] => Self::Arrive,
            ["bar", "sync"] => Self::Sync,
            ["barrier", "cluster", "arrive", ..] => Self::ArriveCluster,
            ["barrier", "cluster", "wait", ..] => Self::WaitCluster,
            ["mapa", "shared::cluster", _] => Self::MapShared,
            ["mbarrier", "init", ..] => Self::Init,
            ["mbarrier", "arrive", "shared::cta", _] => Self::ArriveCounted,
            ["mbarrier", "arrive", "expect_tx", "shared::cta", _] => Self::ExpectBytes,
            ["mbarrier", "try_wait", "parity", "shared::cta", _] => Self::TryWait,
            ["cp", "async", "bulk", "commit_group"] => Self::CommitStores,
            ["cp", "async", "bulk", "wait_group", ..] => Self::WaitStores,
            ["cp", "async", "bulk", "tensor", _, "global", ..] => Self::StoreBox,
            ["cp", "reduce", "async", "bulk", "tensor", _, "global", _, "add", ..] => Self::AddBox,
            ["cp", "reduce", "async", "bulk", "global", "shared::cta", _, "add", "f32"] => {
                Self::AddFloats
            }
            ["cp", "async", "bulk", "tensor", .., "multicast::cluster"] => return None,
            ["cp", "async", "bulk", "tensor", _, "shared::cluster", ..] => Self::LoadBox,
            ["cp", "async", "bulk", "shared::cluster", "global", ..] => Self::LoadBytes,
            ["cp", "async", "commit_group"] => Self::CommitCopies,
            ["cp", "async", "wait_group"] => Self::WaitCopies,
            ["cp", "async", "cg" | "ca", "shared", "global"]
            | ["cp", "async", "cg", "shared", "global", "L2::128B"] => Self::Copy,
            ["ldmatrix", .., "trans", "shared", "b16"] => Self::LoadMatrix(true),
            ["ldmatrix", ..] => Self::LoadMatrix(false),
            ["stmatrix", .., "trans", "shared", "b16"] => Self::StoreMatrix(true),
            ["stmatrix", ..] => Self::StoreMatrix(false),
            ["mma", "sync", "aligned", "m16n8k8", .., "tf32", "tf32", "f32"] => Self::MultiplyTf32,
            ["mma", "sync", "aligned", shape, .., kind, sums] => {
                let factor = Factor::of(kind, sums)?;
                (shape.strip_prefix("m16n8k")?.parse() == Ok(factor.depth()))
                    .then_some(Self::Multiply(factor))?
            }
            ["wgmma", "mma_async", _, _, shape, sums, kind, _] => {
                let factor = Factor::of(kind, sums)?;
                let (columns, depth) = shape.strip_prefix("m64n")?.split_once('k')?;
                (depth.parse() == Ok(factor.depth()))
                    .then_some(Self::MultiplyGroup(factor, columns.parse().ok()?))?
            }
            ["wgmma", "fence", ..] => Self::FenceGroup,
            ["wgmma", "commit_group", ..] => Self::CommitGroup,
            ["wgmma", "wait_group", ..] => Self::WaitGroup,
            _ => return None,
        })
    }
}

pub struct Instruction {
    /// A predicate, and what it has to be.
    pub guard: Option<(usize, bool)>,
    pub op: Op,
    pub args: Vec<Operand>,
    pub text: String,
}

pub struct Program {
    pub entry: String,
    pub instructions: Vec<Instruction>,
    /// Sizes of the parameters.
    pub params: Vec<usize>,
    /// What each register holds before it is written.
    pub registers: Vec<u64>,
    /// Blocks of a cluster, in x.
    pub cluster: u32,
}

impl Program {
    /// Whether blocks wait for one another, so that all of them have to run.
    pub fn waits_for_blocks(&self) -> bool {
        self.instructions.iter().any(|i| matches!(i.op, Op::LoadCount))
    }
}

/// Registers by the letter of their class: bits that they have, and what they hold first.
const CLASSES: [(char, u64, u64); 5] = [
    ('p', 1, 0),
    ('h', 0xffff, 0x7fff),
    ('r', 0xffff_ffff, 0xdead_beef),
    ('d', u64::MAX, 0xdead_beef_dead),
    ('f', 0xffff_ffff, 0x7fc0_0000),
];

/// What stands for something while a text is read.
#[derive(Default)]
struct Names {
    labels: HashMap<String, usize>,
    params: HashMap<String, usize>,
    /// Where a class of registers begins.
    classes: HashMap<char, usize>,
}

impl Program {
    pub fn read(text: &str) -> Self {
        let mut names = Names::default();
        let (mut params, mut registers, mut entry, mut cluster) =
            (vec![], vec![], String::new(), 1);
        let mut lines = vec![];
        let mut inside = false;
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix(".visible .entry ") {
                let (name, rest) = rest.split_once('(').expect("parameters");
                entry = name.into();
                for (i, param) in list(rest.trim_end_matches(')')).iter().enumerate() {
                    let (kind, name) = param.rsplit_once(' ').expect("a type and a name");
                    params.push(if kind.ends_with(".b8") { 128 } else { size(kind) });
                    names.params.insert(name.split('[').next().unwrap_or(name).into(), i);
                }
            } else if let Some(sizes) = line.strip_prefix(".reqnctapercluster ") {
                cluster = sizes.split(',').next().and_then(|x| x.parse().ok()).expect("a size");
            } else if line == "{" {
                inside = true;
            } else if !inside
                || line == "}"
                || line.starts_with("//")
                || line.starts_with(".pragma")
            {
            } else if let Some(rest) = line.strip_prefix(".reg ") {
                let (_, rest) = rest.split_once('%').expect("a register's name");
                let class = rest.chars().next().expect("a class");
                let count: usize = rest[2..].trim_end_matches(">;").parse().expect("a count");
                let &(.., first) = CLASSES.iter().find(|c| c.0 == class).expect("a known class");
                names.classes.insert(class, registers.len());
                registers.resize(registers.len() + count, first);
            } else if let Some(label) = line.strip_suffix(':') {
                names.labels.insert(label.into(), lines.len());
            } else {
                lines.push(line);
            }
        }
        let instructions = lines.into_iter().map(|line| names.instruction(line)).collect();
        Self { entry, instructions, params, registers, cluster }
    }
}

/// Bytes of `.param .b32`, `b64`, `f32`.
pub fn size(kind: &str) -> usize {
    let bits = kind.trim_start_matches(|c: char| !c.is_ascii_digit());
    bits.parse::<usize>().expect("a type with its bits") / 8
}

/// Parts between commas that no bracket encloses.
fn list(text: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for c in text.chars() {
        depth += i32::from("{[".contains(c)) - i32::from("}]".contains(c));
        match (c, depth) {
            (',', 0) => parts.push(String::new()),
            _ => parts.last_mut().expect("one at least").push(c),
        }
    }
    parts.retain(|part| !part.trim().is_empty());
    parts
}

impl Names {
    fn instruction(&self, line: &str) -> Instruction {
        let mut text = line.trim_end_matches(';');
        let mut guard = None;
        if let Some(rest) = text.strip_prefix('@') {
            let (predicate, rest) = rest.split_once(' ').expect("an instruction");
            let Operand::Reg(place, _) = self.operand(predicate.trim_start_matches('!')) else {
                panic!("{line}")
            };
            guard = Some((place, !predicate.starts_with('!')));
            text = rest;
        }
        let (name, args) = text.split_once(' ').unwrap_or((text, ""));
        // The elected lane, which nobody asks for.
        let args = list(&args.replace("_|", ""));
        Instruction {
            guard,
            op: Op::of(name).unwrap_or_else(|| panic!("the emulator does not know {line}")),
            args: args.iter().map(|arg| self.operand(arg)).collect(),
            text: line.into(),
        }
    }

    fn operand(&self, text: &str) -> Operand {
        let text = text.trim();
        let all = |text: &str| list(text).iter().map(|part| self.operand(part)).collect();
        if let Some(parts) = text.strip_prefix('{') {
            return Operand::List(all(parts.trim_end_matches('}')));
        }
        if let Some(place) = text.strip_prefix('[') {
            let place = place.trim_end_matches(']');
            if let Some((map, at)) = place.split_once(", {") {
                return Operand::Box(self.operand(map).into(), all(at.trim_end_matches('}')));
            }
            let (base, offset) = place.split_once('+').unwrap_or((place, "0"));
            return Operand::At(self.operand(base).into(), offset.parse().expect("an offset"));
        }
        if let Some(name) = text.strip_prefix('%') {
            let axis = || "xyz".find(&name[name.len() - 1..]).expect("an axis");
            let special = match name.split('.').next().unwrap_or(name) {
                "tid" => Special::Thread,
                "laneid" => Special::Lane,
                "ctaid" => Special::Block(axis()),
                "nctaid" => Special::Blocks(axis()),
                "clusterid" => Special::Cluster,
                "cluster_ctarank" => Special::Rank,
                _ => {
                    let class = name.chars().next().expect("a name");
                    let &(_, bits, _) =
                        CLASSES.iter().find(|c| c.0 == class).expect("a known class");
                    let number: usize = name[1..].parse().expect("a register's number");
                    return Operand::Reg(self.classes[&class] + number, bits);
                }
            };
            return Operand::Special(special);
        }
        let number = match (text.strip_prefix("0f"), text.strip_prefix("0x")) {
            (Some(hex), _) | (_, Some(hex)) => u64::from_str_radix(hex, 16).ok(),
            _ => text.parse::<i64>().map(|n| n as u64).or_else(|_| text.parse()).ok(),
        };
        match (number, text) {
            (Some(number), _) => Operand::Number(number),
            (_, "smem") => Operand::Special(Special::Shared),
            (_, "_") => Operand::Nothing,
            _ => match (self.labels.get(text), self.params.get(text)) {
                (Some(&label), _) => Operand::Label(label),
                (_, Some(&param)) => Operand::Param(param),
                _ => panic!("what is `{text}`?"),
            },
        }
    }
}
