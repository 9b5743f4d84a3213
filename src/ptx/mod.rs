//! A writer of PTX, the assembly language of NVIDIA GPUs.
//!
//! A [`Kernel`] collects instructions while ordinary Rust runs: operators on typed registers emit
//! arithmetic, closures make control flow, a Rust loop unrolls, and each method named after a PTX
//! instruction emits that instruction. [`Kernel::finish`] gives the module's [`Source`]. Nothing here
//! needs a GPU, CUDA or candle.
//!
//! ```
//! use kaio_candle::ptx::{Kernel, Target};
//!
//! // y[i] = a * x[i]
//! let k = &Kernel::new("scale", Target::Sm80, 256);
//! let (x, y) = (k.pointer("x"), k.pointer("y"));
//! let (a, len) = (k.param::<f32>("a"), k.param::<u32>("len"));
//! let i = k.block_x() * 256 + k.thread();
//! k.if_(i.lt(len), || {
//!     let [value] = k.ld_global::<f32, 1>(x.element(i, 4));
//!     k.st_global(y.element(i, 4), [value * a]);
//! });
//! let source = k.finish();
//! assert!(source.text.starts_with(".version 7.0\n.target sm_80\n"));
//! assert!(source.text.contains("mul.f32"));
//! ```
//!
//! The text asks for the lowest PTX version that has the instructions used. Instruction semantics:
//! [PTX ISA](https://docs.nvidia.com/cuda/parallel-thread-execution/).

mod arithmetic;
mod control;
mod copy;
mod mbarrier;
mod memory;
mod mma;
mod pairs;
mod param;
mod reg;
mod sync;
mod tma;

use std::cell::RefCell;
use std::fmt::{Arguments, Write};

pub use control::Exit;
pub use mma::{Factor, Half, Mma, Operand, Wgmma, WgmmaRegs};
pub use pairs::Logic3;
pub use param::{Param, ParamKind, TENSOR_MAP_BYTES};
pub use reg::{Address, Float, Integer, Number, Reg, Scalar, Value};
pub use tma::Delivery;

use reg::Class;

/// What a kernel is assembled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Ampere and everything later.
    Sm80,
    /// Ada and everything later: `mma.sync` of 8-bit floats, and conversions to them.
    Sm89,
    /// Hopper with its own instructions: wgmma, setmaxnreg. Runs on compute capability 9.0 alone.
    Sm90a,
}

impl Target {
    /// The name in `.target` and for `ptxas -arch`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm89 => "sm_89",
            Self::Sm90a => "sm_90a",
        }
    }
}

/// A module with one kernel, ready to assemble, and what a launch must match.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The kernel's name in the module.
    pub entry: &'static str,
    /// The module's PTX.
    pub text: String,
    /// What it is assembled for.
    pub target: Target,
    /// Threads of a block, in x.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// Blocks of a cluster, in x. 1 is no cluster.
    pub cluster: u32,
    /// Whether it may start while the kernel before it in the stream still runs: it waits by itself
    /// ([`Kernel::griddepcontrol_wait`]).
    pub starts_early: bool,
    /// Whether warpgroups give and take registers ([`Kernel::setmaxnreg_inc`]).
    pub moves_registers: bool,
    /// The parameters, in order.
    pub params: Vec<Param>,
}

/// A kernel being written.
///
/// Registers borrow it and are `Copy`, so keep a reference: `let k = &Kernel::new(..)`.
#[derive(Debug)]
pub struct Kernel {
    entry: &'static str,
    target: Target,
    threads: u32,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    body: String,
    params: Vec<Param>,
    /// Their declarations.
    declared: Vec<String>,
    registers: [u32; Class::COUNT],
    labels: u32,
    version: (u32, u32),
    /// The predicate of [`Kernel::when`], if within one.
    guard: Option<u32>,
    shared: u32,
    cluster: u32,
    blocks_per_sm: u32,
    starts_early: bool,
    moves_registers: bool,
}

impl Kernel {
    /// A kernel of blocks of `threads` threads.
    pub fn new(entry: &'static str, target: Target, threads: u32) -> Self {
        let version = match target {
            Target::Sm80 => (7, 0),
            Target::Sm89 => (7, 8),
            Target::Sm90a => (8, 0),
        };
        let state = State { version, cluster: 1, ..State::default() };
        Self { entry, target, threads, state: RefCell::new(state) }
    }

    /// What the kernel is assembled for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Blocks that must fit a multiprocessor together: bounds the registers (`.minnctapersm`).
    pub fn blocks_per_sm(&self, blocks: u32) {
        self.state.borrow_mut().blocks_per_sm = blocks;
    }

    /// Blocks of a cluster, in x (`.reqnctapercluster`, sm_90).
    pub fn cluster(&self, blocks: u32) {
        if blocks > 1 {
            self.needs(7, 8);
        }
        self.state.borrow_mut().cluster = blocks;
    }

    /// The address of `bytes` of dynamic shared memory, aligned to 1024.
    pub fn shared(&self, bytes: u32) -> Reg<'_, u32> {
        self.state.borrow_mut().shared = bytes;
        let base = self.reg();
        self.emit(format_args!("mov.u32 {base}, smem"));
        base
    }

    /// Declares the next parameter and loads it.
    ///
    /// # Panics
    ///
    /// If there is one of this name, as in [`pointer`](Self::pointer) and
    /// [`tensor_map`](Self::tensor_map).
    pub fn param<T: Scalar>(&self, name: impl AsRef<str>) -> Reg<'_, T> {
        self.declare_number(name.as_ref(), ParamKind::value::<T>())
    }

    /// Declares a number, of whatever meaning, and loads it.
    fn declare_number<T: Scalar>(&self, name: &str, kind: ParamKind) -> Reg<'_, T> {
        self.declare(name, kind, format!(".param .{} {name}", T::BITS));
        let value = self.reg();
        self.emit(format_args!("ld.param.{} {value}, [{name}]", T::BITS));
        value
    }

    /// Declares a parameter that points to global memory.
    pub fn pointer(&self, name: impl AsRef<str>) -> Reg<'_, u64> {
        let generic = self.declare_number::<u64>(name.as_ref(), ParamKind::Pointer);
        let global = self.reg();
        self.emit(format_args!("cvta.to.global.u64 {global}, {generic}"));
        global
    }

    /// Declares a TMA descriptor that is passed by value; gives its address.
    pub fn tensor_map(&self, name: impl AsRef<str>) -> Reg<'_, u64> {
        let name = name.as_ref();
        let declaration = format!(".param .align 64 .b8 {name}[{TENSOR_MAP_BYTES}]");
        self.declare(name, ParamKind::TensorMap, declaration);
        let address = self.reg::<u64>();
        self.emit(format_args!("mov.u64 {address}, {name}"));
        self.emit(format_args!("cvta.param.u64 {address}, {address}"));
        address
    }

    /// A comment in the text.
    pub fn note(&self, text: &str) {
        writeln!(self.state.borrow_mut().body, "  // {text}").expect("a String takes all text");
    }

    /// The module.
    pub fn finish(&self) -> Source {
        let state = self.state.borrow();
        let mut text = String::with_capacity(state.body.len() + 1024);
        self.write_module(&state, &mut text).expect("a String takes all text");
        Source {
            entry: self.entry,
            text,
            target: self.target,
            threads: self.threads,
            shared: state.shared,
            cluster: state.cluster,
            starts_early: state.starts_early,
            moves_registers: state.moves_registers,
            params: state.params.clone(),
        }
    }

    fn write_module(&self, state: &State, out: &mut String) -> std::fmt::Result {
        let (major, minor) = state.version;
        writeln!(out, ".version {major}.{minor}\n.target {}", self.target.name())?;
        writeln!(out, ".address_size 64\n.extern .shared .align 1024 .b8 smem[];")?;
        writeln!(out, ".visible .entry {}({})", self.entry, state.declared.join(", "))?;
        writeln!(out, ".reqntid {}, 1, 1", self.threads)?;
        if state.blocks_per_sm > 0 {
            writeln!(out, ".minnctapersm {}", state.blocks_per_sm)?;
        }
        if state.cluster > 1 {
            writeln!(out, ".explicitcluster\n.reqnctapercluster {}, 1, 1", state.cluster)?;
        }
        writeln!(out, "{{")?;
        for (class, &count) in Class::ALL.iter().zip(&state.registers) {
            if count > 0 {
                writeln!(out, "  .reg .{} %{}<{count}>;", class.kind(), class.letter())?;
            }
        }
        writeln!(out, "{}  ret;\n}}", state.body)
    }

    fn declare(&self, name: &str, kind: ParamKind, declaration: String) {
        let state = &mut *self.state.borrow_mut();
        let taken = state.params.iter().any(|param| param.name == name);
        assert!(!taken, "two parameters of `{}` are called {name}", self.entry);
        state.params.push(Param { name: name.into(), kind });
        state.declared.push(declaration);
    }

    /// A new register with undefined contents: for instructions that write several.
    pub fn reg<T: Scalar>(&self) -> Reg<'_, T> {
        let count = &mut self.state.borrow_mut().registers[T::CLASS as usize];
        let id = *count;
        *count += 1;
        Reg::new(self, id)
    }

    /// `N` new registers with undefined contents.
    pub fn regs<T: Scalar, const N: usize>(&self) -> [Reg<'_, T>; N] {
        std::array::from_fn(|_| self.reg())
    }

    /// A register that holds `value`.
    pub fn var<'k, T: Scalar>(&'k self, value: impl Into<Value<'k, T>>) -> Reg<'k, T> {
        let r = self.reg();
        r.set(value);
        r
    }

    /// Adds one instruction, without its semicolon. A way out for what has no method.
    pub fn emit(&self, instruction: Arguments) {
        let state = &mut *self.state.borrow_mut();
        let body = &mut state.body;
        match state.guard {
            None => writeln!(body, "  {instruction};"),
            Some(id) => writeln!(body, "  @%p{id} {instruction};"),
        }
        .expect("a String takes all text");
    }

    /// The text needs at least this PTX version.
    pub fn needs(&self, major: u32, minor: u32) {
        let version = &mut self.state.borrow_mut().version;
        *version = (*version).max((major, minor));
    }

    fn special<T: Scalar>(&self, name: &str) -> Reg<'_, T> {
        let r = self.reg();
        self.emit(format_args!("mov.{} {r}, %{name}", T::SUFFIX));
        r
    }

    /// `%tid.x`
    pub fn thread(&self) -> Reg<'_, u32> {
        self.special("tid.x")
    }

    /// `%ctaid.x`
    pub fn block_x(&self) -> Reg<'_, u32> {
        self.special("ctaid.x")
    }

    /// `%ctaid.y`
    pub fn block_y(&self) -> Reg<'_, u32> {
        self.special("ctaid.y")
    }

    /// `%ctaid.z`
    pub fn block_z(&self) -> Reg<'_, u32> {
        self.special("ctaid.z")
    }

    /// `%nctaid.x`
    pub fn blocks_x(&self) -> Reg<'_, u32> {
        self.special("nctaid.x")
    }

    /// `%laneid`
    pub fn lane(&self) -> Reg<'_, u32> {
        self.special("laneid")
    }
}
