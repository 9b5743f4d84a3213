//! What kernels declare and what launches pass is the same, by name and type, for all that is chosen.

use std::collections::HashSet;

use kaio_candle::kernel::attention::{self, Lengths};
use kaio_candle::kernel::gemm::{self, Major};
use kaio_candle::kernel::glu;
use kaio_candle::kernel::params::{Argument, Arguments, Names};
use kaio_candle::kernel::{Config, Device, Plan};
use kaio_candle::ptx::Source;

use crate::choices::{Choice, Extent, Facts, choices};

/// Each parameter that kernels declare has a value of its type, descriptors are what the driver takes,
/// and no name is nobody's.
#[test]
fn launches_pass_what_kernels_declare() {
    let [mut products, mut attentions, mut glus] = [0; 3].map(|_| HashSet::new());
    for (name, Choice { kernel, gpu, problem, .. }) in choices(Extent::Few) {
        let asked = match &problem {
            Facts::Matmul(problem) => matmul(problem, &gpu.device, &kernel, &mut products),
            Facts::Attention(problem) => attention(problem, &gpu.device, &kernel, &mut attentions),
            Facts::Glu(problem) => glu(problem, &gpu.device, &kernel, &mut glus),
        };
        asked.unwrap_or_else(|why| panic!("{name}: {why} for {problem:?}"));
    }
    all_are_used::<gemm::Name>(&products);
    all_are_used::<attention::Name>(&attentions);
    all_are_used::<glu::Name>(&glus);
}

type Used = HashSet<&'static str>;

fn all_are_used<N: Names>(used: &Used) {
    let unused: Vec<_> =
        N::ALL.iter().map(|name| name.name()).filter(|n| !used.contains(n)).collect();
    assert!(unused.is_empty(), "no kernel declares {unused:?}");
}

/// Addresses that no two parameters share.
fn addresses() -> impl FnMut() -> u64 {
    let mut last = 0;
    move || {
        last += 0x1000;
        last
    }
}

fn matmul(
    problem: &gemm::Problem,
    device: &Device,
    kernel: &Config,
    used: &mut Used,
) -> Result<(), String> {
    let plan = gemm::Plan::new(problem, device);
    let mut address = addresses();
    let mut operand = |major: Major, outer: u64| {
        let [contiguous, lines] = match major {
            Major::K => [problem.k, outer],
            Major::Outer => [outer, problem.k],
        };
        let line = contiguous.next_multiple_of(8);
        gemm::Operand { address: address(), line, batch: [(problem.batch, lines * line), (1, 0)] }
    };
    let operands = [operand(problem.lhs, problem.m), operand(problem.rhs, problem.n)];
    let arguments = gemm::Arguments {
        problem,
        plan: &plan,
        operands,
        bias: problem.epilogue.bias.map(|_| address()),
        out: address(),
        partial: plan.partial_sums(problem).map(|_| address()),
    };
    passes(&plan, &arguments, kernel, used)
}

fn attention(
    problem: &attention::Problem,
    device: &Device,
    kernel: &Config,
    used: &mut Used,
) -> Result<(), String> {
    let plan = attention::Plan::new(problem, device);
    let sequences = problem.rows() / problem.heads / problem.queries;
    let mut address = addresses();
    let mut operand = |rows: u64, heads: u64, cols: u64| {
        let row = cols.next_multiple_of(8);
        let strides = [row, rows * row, heads * rows * row];
        attention::Operand { address: address(), cols, lens: [rows, heads, sequences], strides }
    };
    let operands = [
        operand(problem.queries, problem.heads, problem.head_dim),
        operand(problem.keys, problem.kv_heads, problem.head_dim),
        operand(problem.keys, problem.kv_heads, problem.value_dim),
    ];
    let mut output = |lse: bool| attention::Output {
        address: address(),
        strides: [1, problem.queries, problem.heads * problem.queries]
            .map(|rows| rows * problem.value_dim),
        lse: lse.then(&mut address),
    };
    let (out, parts) = (output(problem.lse), output(true));
    let arguments = attention::Arguments {
        problem,
        plan: &plan,
        operands,
        scale: 0.125,
        softcap: problem.score_mod.softcap.then_some(30.0),
        bias: problem.score_mod.bias.map(|_| (address(), [0, 0, problem.keys, 1])),
        slopes: problem.score_mod.alibi.then(|| (address(), [0, 1])),
        lengths: (problem.lengths != Lengths::Full).then(|| [address(), address()]),
        out,
        parts: plan.combine.map(|_| parts),
    };
    passes(&plan, &arguments, kernel, used)
}

fn glu(
    problem: &glu::Problem,
    device: &Device,
    kernel: &Config,
    used: &mut Used,
) -> Result<(), String> {
    let plan = glu::Plan::new(problem, device);
    let (mut address, row) = (addresses(), problem.cols + 8);
    let backward = problem.backward;
    let arguments = glu::Arguments {
        problem,
        plan: &plan,
        operands: [true, true, backward].map(|given| given.then(|| (address(), row))),
        results: [true, backward].map(|given| given.then(&mut address)),
    };
    passes(&plan, &arguments, kernel, used)
}

/// What the step with this kernel declares.
fn passes<P: Plan<Name = A::Name>, A: Arguments>(
    plan: &P,
    arguments: &A,
    kernel: &Config,
    used: &mut Used,
) -> Result<(), String> {
    let steps = plan.steps();
    let step = steps.iter().position(|step| step.kernel == *kernel).ok_or("another plan")?;
    let source: Source = kernel.emit();
    let mut declared = HashSet::new();
    for param in &source.params {
        let name = A::Name::of(&param.name).ok_or(format!("no value is called {}", param.name))?;
        if !declared.insert(name.name()) {
            return Err(format!("two parameters are called {}", param.name));
        }
        let argument = arguments.argument(step, name);
        let argument = argument.ok_or(format!("no value for {}", param.name))?;
        if argument.kind() != param.kind {
            return Err(format!("{:?} for {param:?}", argument.kind()));
        }
        if let Argument::TensorMap(map) = argument {
            map.check().map_err(|why| format!("{}: {why}", param.name))?;
        }
    }
    used.extend(declared);
    Ok(())
}
