//! A function that runs again in the backward pass.

use std::collections::HashSet;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, DType, Result, Shape, Storage, Tensor, TensorId, Var, bail,
};

use super::node::{adopt, seed, within};
use super::tape;
use super::{Computed, Differentiable, Op, View, compute};
use crate::error::Error;
use crate::{check, cuda};

const OP: &str = "checkpoint";

/// What is checkpointed.
pub(crate) trait Function:
    Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static
{
}

impl<F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static> Function for F {}

/// `f(inputs)`, of which the graph keeps the inputs and the results.
pub(crate) fn checkpoint(f: impl Function, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let inputs: Vec<_> = inputs.iter().copied().cloned().collect();
    let copied: Vec<_> = inputs.iter().map(|t| t.track_op() && !t.dtype().is_int()).collect();
    let run = Run::new(&f, &inputs, &copied)?;
    let outputs: Vec<_> = run.outputs.iter().map(Output::of).collect();
    run.on_one_device(&inputs)?;
    // Those that nothing tracks are constants, as they are without a checkpoint.
    let stored = run.tracked().map(copy).collect::<Result<Vec<_>>>()?;
    let constants: Vec<_> =
        run.outputs.iter().map(|t| (!is_tracked(t)).then(|| t.detach())).collect();
    // An input on which nothing depends has no gradient, as without a checkpoint.
    let mut kept = inputs;
    for (t, leaf) in kept.iter_mut().zip(&run.leaves) {
        if !run.reached.contains(&leaf.id()) {
            *t = t.detach();
        }
    }
    let op = Checkpoint { f, copied, outputs };
    kept.extend(run.captured.iter().cloned());
    // What the function computed on its way goes before anything is added to the graph.
    drop(run);
    let linked = match stored.is_empty() {
        true => vec![],
        false => adopt(op, &kept.iter().collect::<Vec<_>>(), stored)?,
    };
    let mut linked = linked.into_iter();
    let results = constants.into_iter().map(|constant| constant.or_else(|| linked.next()));
    results.collect::<Option<_>>().ok_or_else(|| candle_core::Error::msg("a node for each result"))
}

/// A function that has run on copies of its inputs that are leaves of a graph of its own.
struct Run {
    /// Those copies, and the other inputs themselves.
    leaves: Vec<Tensor>,
    /// The leaves on which a result depends.
    reached: HashSet<TensorId>,
    outputs: Vec<Tensor>,
    /// Leaves of other graphs on which a result depends.
    captured: Vec<Tensor>,
}

impl Run {
    fn new(f: &impl Function, inputs: &[Tensor], copied: &[bool]) -> Result<Self> {
        let leaf = |(t, &copied): (&Tensor, &bool)| match copied {
            true => Var::from_tensor(&t.detach()).map(Var::into_inner),
            false => Ok(t.clone()),
        };
        let leaves = inputs.iter().zip(copied).map(leaf).collect::<Result<Vec<_>>>()?;
        // Its graph is looked at, and not kept.
        let outputs = tape::paused(|| f(&leaves))?;
        let own: HashSet<_> = leaves.iter().map(Tensor::id).collect();
        let (mut reached, mut captured) = (HashSet::new(), vec![]);
        let nodes: Vec<_> = outputs.iter().flat_map(Tensor::sorted_nodes).collect();
        tape::share(&nodes);
        for leaf in nodes.into_iter().filter(|node| node.is_variable()) {
            if reached.insert(leaf.id()) && !own.contains(&leaf.id()) {
                captured.push(leaf.clone());
            }
        }
        Ok(Self { leaves, reached, outputs, captured })
    }

    /// Those of the results that have a gradient.
    fn tracked(&self) -> impl Iterator<Item = &Tensor> {
        self.outputs.iter().filter(|t| is_tracked(t))
    }

    fn on_one_device(&self, inputs: &[Tensor]) -> Result<()> {
        on_one_device(OP, inputs.iter(), self.outputs.iter(), self.captured.iter())
    }
}

/// That a function's inputs, its results and what it captured are on one device.
pub(super) fn on_one_device<'a>(
    op: &'static str,
    inputs: impl Iterator<Item = &'a Tensor>,
    results: impl Iterator<Item = &'a Tensor>,
    captured: impl Iterator<Item = &'a Tensor>,
) -> Result<()> {
    let own = inputs.map(|t| ("inputs", t));
    let made = results.map(|t| ("a result of `f`", t));
    let captured = captured.map(|t| ("a `Var` in `f`", t));
    let all: Vec<_> = own.chain(made).chain(captured).collect();
    all.windows(2).try_for_each(|pair| {
        let [want, got] = [0, 1].map(|i| (pair[i].0, pair[i].1.device()));
        Ok(check::same_device(op, got, want)?)
    })
}

/// Whether a leaf is behind a tensor: not so behind integers, nor what was rounded to some.
fn is_tracked(t: &Tensor) -> bool {
    !t.sorted_nodes().is_empty()
}

/// What a result is.
#[derive(Debug, PartialEq)]
struct Output {
    shape: Shape,
    dtype: DType,
    tracked: bool,
}

impl Output {
    fn of(t: &Tensor) -> Self {
        Self { shape: t.shape().clone(), dtype: t.dtype(), tracked: is_tracked(t) }
    }
}

/// Inputs: those of the function, and the leaves that it captured. Results: those that track a gradient.
struct Checkpoint<F> {
    f: F,
    /// Which of the function's inputs are copied for it. They are so again when it runs again, also those on which nothing
    /// depended: it sees what it saw.
    copied: Vec<bool>,
    outputs: Vec<Output>,
}

impl<F: Function> Op for Checkpoint<F> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu(&self, _: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        bail!("{OP}: a function of tensors")
    }

    fn cuda(&self, _: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        bail!("{OP}: a function of tensors")
    }
}

impl<F: Function> Differentiable for Checkpoint<F> {
    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// Runs the function again, and a backward pass through it.
    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let (own, captured) = inputs.split_at(self.copied.len());
        let own: Vec<_> = own.iter().copied().cloned().collect();
        // A backward pass that the function makes is not the one that is going on.
        let run = within(|| Run::new(&self.f, &own, &self.copied))?;
        self.same(&run, captured)?;
        let seeds =
            run.tracked().zip(grads).filter_map(|(t, grad)| Some((t.clone(), grad.clone()?)));
        let seed = seed(seeds.collect())?;
        let mut store = within(|| seed.backward())?;
        let mut of = |(t, leaf): (&&Tensor, &Tensor)| match (t.track_op(), store.remove(leaf)) {
            (false, _) => Ok(None),
            (true, Some(grad)) => Ok(Some(grad)),
            // Only results depend on it of which nothing does.
            (true, None) => t.zeros_like().map(Some),
        };
        let leaves = run.leaves.iter().chain(captured.iter().copied());
        inputs.iter().zip(leaves).map(&mut of).collect()
    }
}

impl<F: Function> Checkpoint<F> {
    /// What the function does is what it did.
    fn same(&self, run: &Run, captured: &[&Tensor]) -> Result<()> {
        let outputs: Vec<_> = run.outputs.iter().map(Output::of).collect();
        let known = |leaf: &Tensor| captured.iter().any(|t| t.id() == leaf.id());
        let (got, want) = match (outputs == self.outputs, run.captured.iter().find(|t| !known(t))) {
            (true, None) => return Ok(()),
            (true, Some(leaf)) => (
                format!("dependent on a `Var` {leaf:?} when it runs again"),
                "on those alone on which it depended before".into(),
            ),
            (false, _) => {
                let list = |all: &[Output]| {
                    let one = |Output { shape, dtype, tracked }: &Output| {
                        let tracked = if *tracked { "" } else { " without a gradient" };
                        format!("{} {shape:?}{tracked}", dtype.as_str())
                    };
                    all.iter().map(one).collect::<Vec<_>>().join(", ")
                };
                (
                    format!("one that gives {} when it runs again", list(&outputs)),
                    format!("what it gave before: {}", list(&self.outputs)),
                )
            }
        };
        let fix = "what it captures may not change between the forward and the backward pass";
        Err(Error::Value { op: OP, name: "f", got, want, fix }.into())
    }
}

/// A tensor's elements in memory of their own.
pub(super) fn copy(t: &Tensor) -> Result<(Storage, Shape)> {
    let mut copies = compute(&Copy, &[t])?;
    copies.pop().ok_or_else(|| candle_core::Error::msg("a copy"))
}

struct Copy;

impl Op for Copy {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let (storage, at) = inputs[0];
        let mut out = storage.device().zeros_impl(at.shape(), storage.dtype())?;
        storage.copy_strided_src(&mut out, 0, at)?;
        Ok(vec![(out, at.shape().clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let (storage, at) = inputs[0];
        Ok(vec![(cuda::pack(storage, at)?, at.shape().clone())])
    }
}
