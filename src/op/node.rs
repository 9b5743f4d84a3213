//! A differentiable op as nodes of candle's graph.
//!
//! candle's custom ops have one to three inputs and one result; those of this crate have any number of
//! either. What is computed does not depend on the graph: [`apply`] runs the op first, and then builds
//! nodes that hand out results which are already there, and that carry gradients in the backward pass.
//!
//! ```text
//!      a   b   c   d   e          inputs that track a gradient
//!      |   |    \  |  /
//!      |   |     knot             inputs over three are tied, three to a knot
//!       \  |    /
//!          op                     several results hang on one node:
//!        /    \
//!    result  result
//! ```
//!
//! A knot, and the node on which several results hang, is a tensor of one element that nobody reads. A
//! backward pass visits the results first, which leave their gradients in [`Passes`], then the op, which
//! turns them into gradients of the inputs, then the knots, which hand these on.
//!
//! Within a [`block`](super::block) a node goes on a tape instead.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::backend::BackendDevice;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape,
    Storage, Tensor, bail,
};

use super::{Differentiable, alone, compute, tape, tensor};
use crate::error::Error;

/// Runs an op, in candle's graph if an input tracks a gradient.
///
/// It has `N` results for the caller; what it computes besides is saved for its gradient. An input that
/// tracks a gradient and for which the op has none is an error.
pub(crate) fn apply<O: Differentiable, const N: usize>(
    op: O,
    inputs: &[&Tensor],
) -> Result<[Tensor; N]> {
    let tracked: Vec<_> = (0..inputs.len()).filter(|&i| inputs[i].track_op()).collect();
    if tracked.iter().any(|&i| !op.differentiates(i)) {
        return Err(Error::Tracked { op: op.name(), arg: "input" }.into());
    }
    let mut results = compute(&op, inputs)?.into_iter();
    let for_caller: Vec<_> = results.by_ref().take(N).collect();
    let results = match tracked.is_empty() {
        true => for_caller.into_iter().map(tensor).collect(),
        false => {
            let kept = kept(&op, inputs)?;
            let tracked = with_numbers(inputs, &tracked);
            link(Node::new(op, kept, results.map(tensor).collect()), &tracked, for_caller)?
        }
    };
    results.try_into().map_err(|_| candle_core::Error::msg("an op with too few results"))
}

/// A node of the graph for results that are there, of an op whose gradient reads none of them. An input at least tracks a
/// gradient, and all that do have one.
pub(crate) fn adopt(
    op: impl Differentiable,
    inputs: &[&Tensor],
    results: Vec<(Storage, Shape)>,
) -> Result<Vec<Tensor>> {
    let tracked: Vec<_> = (0..inputs.len()).filter(|&i| inputs[i].track_op()).collect();
    let kept = kept(&op, inputs)?;
    link(Node::new(op, kept, vec![]), &with_numbers(inputs, &tracked), results)
}

/// Some of the inputs.
fn with_numbers(inputs: &[&Tensor], some: &[usize]) -> Vec<(usize, Tensor)> {
    some.iter().map(|&i| (i, inputs[i].clone())).collect()
}

/// A tensor whose backward pass is that of some tensors, given the gradient of each.
pub(crate) fn seed(outputs: Vec<(Tensor, Tensor)>) -> Result<Tensor> {
    let mut ends: Vec<(Tensor, Option<Tensor>)> =
        outputs.into_iter().map(|(output, grad)| (output, Some(grad))).collect();
    loop {
        let tied: Vec<_> = ends.drain(ends.len().saturating_sub(3)..).collect();
        let [(first, _), ..] = &tied[..] else { bail!("a backward pass from nothing") };
        let device = first.device().clone();
        let nothing = tensor(unread(&device)?);
        let grads: Vec<_> =
            tied.iter().map(|(_, grad)| Some(grad.as_ref().unwrap_or(&nothing).clone())).collect();
        let args: Vec<_> = tied.iter().map(|(t, _)| t).collect();
        let link = Link::new("seed", unread(&device)?, move |_: &Tensor| Ok(grads.clone()));
        let knot = insert(link, &args)?;
        if ends.is_empty() {
            return Ok(knot);
        }
        ends.push((knot, None));
    }
}

thread_local! {
    /// How many backward passes of this thread are within each other.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// How many failed, of those within as many others.
    static FAILED: RefCell<Vec<u64>> = const { RefCell::new(vec![]) };
}

/// How many passes failed that were within as many others as the one that is going on.
fn failed() -> u64 {
    FAILED.with_borrow(|failed| failed.get(DEPTH.get()).copied().unwrap_or(0))
}

/// Counts the pass that is going on if it failed: what it left on its way is not for the next one.
pub(super) fn counted<T>(result: Result<T>) -> Result<T> {
    if result.is_err() {
        FAILED.with_borrow_mut(|failed| {
            let depth = DEPTH.get();
            failed.resize(failed.len().max(depth + 1), 0);
            failed[depth] += 1;
        });
    }
    result
}

/// Runs a backward pass within a gradient, whose passes through nodes are others than those of the pass around it.
pub(crate) fn within<T>(pass: impl FnOnce() -> T) -> T {
    struct Out;
    impl Drop for Out {
        fn drop(&mut self) {
            DEPTH.set(DEPTH.get() - 1);
        }
    }
    DEPTH.set(DEPTH.get() + 1);
    let _out = Out;
    tape::paused(pass)
}

/// Whether the backward pass of this thread is within no other.
pub(super) fn is_outermost() -> bool {
    DEPTH.get() == 0
}

/// What an op's node keeps of its inputs. candle's graph has those that track a gradient anyway, a tape has not.
fn kept<O: Differentiable>(op: &O, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let mut elements: Vec<Tensor> = vec![];
    let keep = |(i, t): (usize, &&Tensor)| match op.reads(i, inputs) {
        false if tape::recording() || !t.track_op() => hollow(t, &mut elements),
        _ => Ok(Tensor::clone(t)),
    };
    inputs.iter().enumerate().map(keep).collect()
}

/// A tensor's shape, dtype and device, and whether it tracks a gradient, with one element for all: one of `elements` for each
/// dtype of an op's inputs, which are on one device.
fn hollow(t: &Tensor, elements: &mut Vec<Tensor>) -> Result<Tensor> {
    let element = match elements.iter().find(|element| element.dtype() == t.dtype()) {
        Some(element) => element.clone(),
        None => {
            elements.push(tape::element(t.dtype(), t.device())?);
            elements[elements.len() - 1].clone()
        }
    };
    let element = if t.track_op() { element } else { element.detach() };
    element.broadcast_as(t.shape())
}

/// Puts an op's results into the graph.
fn link<O: Differentiable>(
    node: Node<O>,
    tracked: &[(usize, Tensor)],
    results: Vec<(Storage, Shape)>,
) -> Result<Vec<Tensor>> {
    let (name, count, node) = (node.op.name(), results.len(), Arc::new(node));
    let device = node.inputs[0].device();
    alone::offer(&node);
    if tape::recording() {
        let linked = tape::put(name, node.clone(), tracked, results)?;
        node.know(&linked)?;
        return Ok(linked);
    }
    let ends = tie(&node, tracked)?;
    let kinds: Vec<_> = ends.iter().map(|(_, end)| *end).collect();
    let nothing = match count > 1 || kinds.contains(&End::Knot) {
        true => Some(tensor(unread(device)?)),
        false => None,
    };
    let args: Vec<_> = ends.iter().map(|(t, _)| t).collect();
    let backward = {
        let (node, nothing) = (node.clone(), nothing.clone());
        move |grad: &Tensor| {
            let grads = match count {
                1 => vec![Some(grad.clone())],
                _ => node.passes.results(count),
            };
            node.backward(&grads)?;
            Ok(node.passes.gradients(&kinds, &nothing))
        }
    };
    let linked = match nothing.filter(|_| count > 1) {
        None => {
            let result = results.into_iter().next().expect("an op has a result");
            vec![insert(Link::new(name, result, backward), &args)?]
        }
        Some(nothing) => {
            let hub = insert(Link::new(name, unread(device)?, backward), &args)?;
            let result = |(i, result)| {
                let (node, nothing) = (node.clone(), nothing.clone());
                let leave = move |grad: &Tensor| {
                    node.passes.leave_result(i, count, grad.clone());
                    Ok(vec![Some(nothing.clone())])
                };
                insert(Link::new(name, result, leave), &[&hub])
            };
            results.into_iter().enumerate().map(result).collect::<Result<_>>()?
        }
    };
    node.know(&linked)?;
    Ok(linked)
}

/// What one of candle's arguments stands for.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Input(usize),
    Knot,
}

/// The tracked inputs as three arguments at most.
fn tie<O: Differentiable>(
    node: &Arc<Node<O>>,
    tracked: &[(usize, Tensor)],
) -> Result<Vec<(Tensor, End)>> {
    let mut ends: Vec<_> = tracked.iter().map(|(i, t)| (t.clone(), End::Input(*i))).collect();
    while ends.len() > 3 {
        let tied = ends.split_off(ends.len() - 3);
        let kinds: Vec<_> = tied.iter().map(|(_, end)| *end).collect();
        let device = node.inputs[0].device();
        let (node, nothing) = (node.clone(), Some(tensor(unread(device)?)));
        let backward = move |_: &Tensor| Ok(node.passes.gradients(&kinds, &nothing));
        let args: Vec<_> = tied.iter().map(|(t, _)| t).collect();
        ends.push((insert(Link::new("knot", unread(device)?, backward), &args)?, End::Knot));
    }
    Ok(ends)
}

/// One element of which nothing depends on the value.
pub(super) fn unread(device: &Device) -> Result<(Storage, Shape)> {
    let one = Shape::from(1);
    let storage = match device {
        Device::Cpu => Storage::Cpu(CpuStorage::F32(vec![0.0])),
        Device::Cuda(device) => Storage::Cuda(device.zeros_impl(&one, DType::F32)?),
        Device::Metal(_) => bail!("no Metal kernels"),
    };
    Ok((storage, one))
}

/// An op that has run, for its gradient.
pub(super) struct Node<O> {
    op: O,
    inputs: Vec<Tensor>,
    /// Results that the caller does not see.
    saved: Vec<Tensor>,
    /// The caller's results, outside of the graph, if they are read.
    results: OnceLock<Vec<Tensor>>,
    passes: Passes,
}

impl<O: Differentiable> Node<O> {
    fn new(op: O, inputs: Vec<Tensor>, saved: Vec<Tensor>) -> Self {
        Self { op, inputs, saved, results: OnceLock::new(), passes: Passes::default() }
    }

    /// Keeps the caller's results.
    fn know(&self, results: &[Tensor]) -> Result<()> {
        // Detached, they share the results' memory and nothing else: no circle keeps the graph alive.
        let known = |(i, t): (usize, &Tensor)| match self.op.reads_result(i) {
            true => Ok(t.detach()),
            false => Tensor::zeros(0, DType::F32, &Device::Cpu),
        };
        let results = results.iter().enumerate().map(known).collect::<Result<_>>()?;
        self.results.set(results).map_err(|_| candle_core::Error::msg("an op runs once"))
    }

    /// From the results' gradients to the inputs', as the op computes them.
    pub(super) fn gradients(&self, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let inputs: Vec<_> = self.inputs.iter().collect();
        let results = self.results.get().map_or(&[][..], Vec::as_slice);
        self.op.grad(&inputs, &[results, &self.saved].concat(), grads)
    }

    /// The same, which it leaves for the nodes before.
    fn backward(&self, grads: &[Option<Tensor>]) -> Result<()> {
        self.passes.leave_gradients(self.step(grads)?);
        Ok(())
    }
}

/// A node whose op is any.
pub(super) trait Step: Send + Sync {
    /// From the results' gradients to those of the inputs that track one, which all have it.
    fn step(&self, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>;
}

impl<O: Differentiable> Step for Node<O> {
    fn step(&self, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let mut grads = self.gradients(grads)?;
        grads.resize(self.inputs.len(), None);
        for (i, (t, grad)) in self.inputs.iter().zip(&mut grads).enumerate() {
            // No one takes the others.
            *grad = grad.take().filter(|_| t.track_op());
            // candle would panic later, or the weight would stay as it is without a word.
            match grad {
                None if t.track_op() => bail!("{}: input {i} has no gradient", self.op.name()),
                Some(grad) if grad.shape() != t.shape() => {
                    let (got, want) = (grad.shape(), t.shape());
                    bail!("{}: the gradient of input {i} is {got:?}, not {want:?}", self.op.name())
                }
                // candle would find it when it adds the gradient to zeros, which a tape does not.
                Some(grad) if grad.dtype() != t.dtype() => {
                    let (got, want) = (grad.dtype(), t.dtype());
                    bail!("{}: the gradient of input {i} is {got:?}, not {want:?}", self.op.name())
                }
                _ => {}
            }
        }
        Ok(grads)
    }
}

/// Gradients on their way between the nodes of one op: in one thread and one of its passes within each other, so that those over
/// one graph do not mix.
#[derive(Default)]
struct Passes(Mutex<HashMap<PassId, Pass>>);

type PassId = (ThreadId, usize);

/// The pass that is going on.
fn pass_id() -> PassId {
    (thread::current().id(), DEPTH.get())
}

#[derive(Default)]
struct Pass {
    /// How many had failed.
    after: u64,
    of_results: Vec<Option<Tensor>>,
    of_inputs: Vec<Option<Tensor>>,
}

impl Passes {
    fn all(&self) -> MutexGuard<'_, HashMap<PassId, Pass>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Result `i` of `count` leaves its gradient.
    fn leave_result(&self, i: usize, count: usize, grad: Tensor) {
        let mut all = self.all();
        let pass = all.entry(pass_id()).or_default();
        if pass.after != failed() || pass.of_results.get(i).is_none_or(Option::is_some) {
            // The first of this pass. What is there is of one that failed on its way to the op.
            *pass = Pass { after: failed(), of_results: vec![None; count], of_inputs: vec![] };
        }
        pass.of_results[i] = Some(grad);
    }

    /// What the results left, of which those are missing on which nothing depends.
    fn results(&self, count: usize) -> Vec<Option<Tensor>> {
        let left = self.all().remove(&pass_id());
        left.map_or_else(|| vec![None; count], |pass| pass.of_results)
    }

    fn leave_gradients(&self, grads: Vec<Option<Tensor>>) {
        let pass = Pass { after: failed(), of_results: vec![], of_inputs: grads };
        self.all().insert(pass_id(), pass);
    }

    /// The gradients of a node's arguments. `nothing` says to candle that there is more past a knot.
    fn gradients(&self, ends: &[End], nothing: &Option<Tensor>) -> Vec<Option<Tensor>> {
        let (mut all, id) = (self.all(), pass_id());
        let Some(pass) = all.get_mut(&id) else { return vec![None; ends.len()] };
        let mut of = |end: &End| match *end {
            End::Input(i) => pass.of_inputs[i].take(),
            End::Knot => nothing.clone(),
        };
        let grads = ends.iter().map(&mut of).collect();
        if pass.of_inputs.iter().all(Option::is_none) {
            all.remove(&id);
        }
        grads
    }
}

/// A node of candle's graph: a result that is there, and what becomes of its gradient.
pub(super) struct Link<B> {
    name: &'static str,
    result: Mutex<Option<(Storage, Shape)>>,
    backward: B,
}

/// From the result's gradient to those of candle's arguments.
pub(super) trait Backward:
    Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static
{
}

impl<F: Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static> Backward for F {}

pub(super) fn insert<B: Backward>(link: Link<B>, args: &[&Tensor]) -> Result<Tensor> {
    match *args {
        [a] => a.apply_op1(link),
        [a, b] => a.apply_op2(b, link),
        [a, b, c] => a.apply_op3(b, c, link),
        _ => bail!("{}: {} arguments for a node of candle's", link.name, args.len()),
    }
}

impl<B: Backward> Link<B> {
    pub(super) fn new(name: &'static str, result: (Storage, Shape), backward: B) -> Self {
        Self { name, result: Mutex::new(Some(result)), backward }
    }

    fn take(&self) -> Result<(Storage, Shape)> {
        let taken = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| candle_core::Error::msg(format!("{}: a node runs once", self.name)))
    }

    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: a result on another device than its inputs", self.name),
        }
    }

    fn on_cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => bail!("{}: a result on another device than its inputs", self.name),
        }
    }

    fn grads<const N: usize>(&self, grad: &Tensor) -> Result<[Option<Tensor>; N]> {
        let grads = counted((self.backward)(grad))?;
        grads.try_into().map_err(|_| candle_core::Error::msg("a gradient for each argument"))
    }
}

/// candle's three traits differ in the number of arguments alone, none of which a link reads.
macro_rules! custom_op {
    ($trait:ident: $($storage:ident $layout:ident $arg:ident),+ => $grad:ty) => {
        impl<B: Backward> $trait for Link<B> {
            fn name(&self) -> &'static str {
                self.name
            }

            fn cpu_fwd(&self, $(_: &CpuStorage, $layout: &Layout),+) -> Result<(CpuStorage, Shape)> {
                $(let _ = $layout;)+
                self.on_cpu()
            }

            fn cuda_fwd(&self, $(_: &CudaStorage, $layout: &Layout),+) -> Result<(CudaStorage, Shape)> {
                $(let _ = $layout;)+
                self.on_cuda()
            }

            fn bwd(&self, $($arg: &Tensor,)+ _: &Tensor, grad: &Tensor) -> Result<$grad> {
                let [$($storage),+] = {
                    $(let _ = $arg;)+
                    self.grads(grad)?
                };
                Ok(($($storage),+))
            }
        }
    };
}

custom_op!(CustomOp1: a l1 t1 => Option<Tensor>);
custom_op!(CustomOp2: a l1 t1, b l2 t2 => (Option<Tensor>, Option<Tensor>));
custom_op!(CustomOp3: a l1 t1, b l2 t2, c l3 t3 => (Option<Tensor>, Option<Tensor>, Option<Tensor>));

#[cfg(test)]
mod tests;
