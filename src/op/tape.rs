//! A record of ops in the order in which they ran, in place of candle's graph between them.
//!
//! candle's backward pass adds each gradient to zeros: two reads and two writes of memory at every edge of its graph. On a tape a
//! slot takes the first gradient that arrives as it is, and adds only those that follow.
//!
//! While a tape records, the results of this crate's ops are in candle's graph next to leaves: each hangs on an anchor, a leaf of
//! one element, from which nothing leads on. What is between them in that graph is candle's own, and is differentiated by candle,
//! piece by piece, a segment:
//!
//! ```text
//!   Var ─ op ─ result ─ candle's ops ─ end ─ op ─ result
//!                │                            │     │
//!              anchor       a segment    Var ─┘   anchor
//! ```
//!
//! Views of a result are recognised, and candle has no part in their gradients.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, TensorId, Var};

use super::node::{Link, Step, counted, insert, is_outermost, seed, unread, within};
use super::tensor;
use crate::error::Error;
use shared::Shared;
pub(super) use shared::share;
use sum::Sum;
use view::View;

mod shared;
mod sum;
mod view;

thread_local! {
    /// What this thread records on, the innermost last. `None` interrupts the one before.
    static TAPES: RefCell<Vec<Option<Recorder>>> = const { RefCell::new(vec![]) };
    /// Backward passes of this thread, the innermost last.
    static PASSES: RefCell<Vec<Pass>> = const { RefCell::new(vec![]) };
    /// Whether the passes of this thread are the last ones over their tapes.
    static LAST: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, whose backward passes free what tapes kept as soon as it has been used.
pub(crate) fn last<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    struct Out(bool);
    impl Drop for Out {
        fn drop(&mut self) {
            LAST.set(self.0);
        }
    }
    let _out = Out(LAST.replace(true));
    counted(f())
}

/// Whether this thread records.
pub(super) fn recording() -> bool {
    TAPES.with_borrow(|tapes| matches!(tapes.last(), Some(Some(_))))
}

/// Runs `f`, whose ops are recorded.
pub(super) fn record<T>(
    recorder: Recorder,
    f: impl FnOnce() -> Result<T>,
) -> Result<(T, Recorder)> {
    let _scope = Scope::enter(Some(recorder));
    let result = f()?;
    let recorder = TAPES.with_borrow_mut(|tapes| tapes.last_mut().and_then(Option::take));
    Ok((result, recorder.expect("scopes end in the order in which they began, from the last")))
}

/// Runs `f`, whose ops go into candle's graph.
pub(super) fn paused<T>(f: impl FnOnce() -> T) -> T {
    let _scope = Scope::enter(None);
    f()
}

/// Puts an op on the tape that records, if one does.
pub(super) fn put(
    name: &'static str,
    step: Arc<dyn Step>,
    tracked: &[(usize, Tensor)],
    results: Vec<(Storage, Shape)>,
) -> Result<Vec<Tensor>> {
    TAPES.with_borrow_mut(|tapes| match tapes.last_mut() {
        Some(Some(recorder)) => recorder.op(name, step, tracked, results),
        _ => Ok(results.into_iter().map(tensor).collect()),
    })
}

/// A variable of one element, of which nothing depends on the value: that of the tape that records, or a new one.
pub(super) fn element(dtype: DType, device: &Device) -> Result<Tensor> {
    let new = || Var::zeros((), dtype, device).map(Var::into_inner);
    TAPES.with_borrow_mut(|tapes| {
        let Some(Some(Recorder { elements, .. })) = tapes.last_mut() else { return new() };
        let fits = |t: &&Tensor| t.dtype() == dtype && t.device().same_device(device);
        if let Some(element) = elements.iter().find(fits) {
            return Ok(element.clone());
        }
        let element = new()?;
        elements.push(element.clone());
        Ok(element)
    })
}

struct Scope;

impl Scope {
    fn enter(tape: Option<Recorder>) -> Self {
        TAPES.with_borrow_mut(|tapes| tapes.push(tape));
        Self
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        drop(TAPES.with_borrow_mut(Vec::pop));
    }
}

/// A tape while it records. Each tensor that can have a gradient has a slot.
pub(super) struct Recorder {
    id: u64,
    slots: HashMap<TensorId, usize>,
    count: usize,
    entries: Vec<Entry>,
    /// Tensors of the graph around, by their slots or by those of their copies.
    outside: Vec<(usize, Tensor)>,
    /// One for each device.
    anchors: Vec<Tensor>,
    /// One for each dtype and device: see [`element`].
    elements: Vec<Tensor>,
}

enum Entry {
    Op { step: Arc<dyn Step>, results: Range<usize>, inputs: Vec<(usize, Source)> },
    Segment(Vec<End>),
}

/// The end of a segment.
struct End {
    slot: usize,
    tensor: Tensor,
    /// What it depends on: leaves and what was recorded before.
    from: Vec<usize>,
    /// The leaves among them.
    leaves: Vec<(usize, Tensor)>,
}

/// Where the gradient of an input goes.
enum Source {
    /// No leaf is behind the input.
    Nothing,
    /// The input is an anchor: of a checkpoint that captured any of the results so far, whose backward pass finds these itself.
    Anchor,
    Slot(usize),
    View(usize, View),
}

impl Recorder {
    pub(super) fn new() -> Self {
        static TAPES: AtomicU64 = AtomicU64::new(0);
        let (slots, entries, outside, anchors, elements) = Default::default();
        let id = TAPES.fetch_add(1, Relaxed);
        Self { id, slots, count: 0, entries, outside, anchors, elements }
    }

    /// A tensor of the graph around as the ops within may see it: in a copy, behind which that graph is not.
    pub(super) fn input(
        &mut self,
        t: &Tensor,
        copy: impl FnOnce(&Tensor) -> Result<(Storage, Shape)>,
    ) -> Result<Tensor> {
        // A variable is a leaf of any graph.
        if !t.track_op() || t.dtype().is_int() || t.is_variable() {
            return Ok(t.clone());
        }
        let (slot, leaf) = self.result("input", copy(t)?)?;
        self.outside.push((slot, t.clone()));
        Ok(leaf)
    }

    fn slot(&mut self, id: TensorId) -> usize {
        self.slots.insert(id, self.count);
        self.count += 1;
        self.count - 1
    }

    /// A tensor that hangs on an anchor.
    fn result(&mut self, name: &'static str, result: (Storage, Shape)) -> Result<(usize, Tensor)> {
        let device = result.0.device();
        let here = |anchor: &&Tensor| anchor.device().same_device(&device);
        let anchor = match self.anchors.iter().find(here) {
            Some(anchor) => anchor.clone(),
            None => {
                let (storage, shape) = unread(&device)?;
                let anchor = Tensor::from_storage(storage, shape, BackpropOp::none(), true);
                self.anchors.push(anchor.clone());
                anchor
            }
        };
        let (tape, slot) = (self.id, self.count);
        let arrive = move |grad: &Tensor| {
            arrive(tape, slot, |sum| sum.add(grad.detach()))?;
            Ok(vec![None])
        };
        let t = insert(Link::new(name, result, arrive), &[&anchor])?;
        Ok((self.slot(t.id()), t))
    }

    fn op(
        &mut self,
        name: &'static str,
        step: Arc<dyn Step>,
        tracked: &[(usize, Tensor)],
        results: Vec<(Storage, Shape)>,
    ) -> Result<Vec<Tensor>> {
        let inputs = self.sources(tracked.iter().map(|(_, t)| t));
        let inputs = tracked.iter().map(|&(i, _)| i).zip(inputs);
        let inputs: Vec<_> = inputs.filter(|(_, s)| !matches!(s, Source::Nothing)).collect();
        if inputs.is_empty() {
            return Ok(results.into_iter().map(tensor).collect());
        }
        let first = self.count;
        let results = results.into_iter().map(|result| Ok(self.result(name, result)?.1));
        let results = results.collect::<Result<_>>()?;
        self.entries.push(Entry::Op { step, results: first..self.count, inputs });
        Ok(results)
    }

    /// Where the gradients of tensors go, before which the tape takes up the segments between.
    fn sources<'a>(&mut self, tensors: impl Iterator<Item = &'a Tensor>) -> Vec<Source> {
        let mut ends = vec![];
        let sources = tensors.map(|t| self.source(t, &mut ends)).collect();
        if !ends.is_empty() {
            self.entries.push(Entry::Segment(ends));
        }
        sources
    }

    fn source(&mut self, t: &Tensor, ends: &mut Vec<End>) -> Source {
        if let Some(&slot) = self.slots.get(&t.id()) {
            return Source::Slot(slot);
        }
        if self.is_anchor(t) {
            return Source::Anchor;
        }
        // From the tensor to what it was computed from. Its leaves have no further ones behind them.
        let nodes = t.sorted_nodes();
        if nodes.is_empty() {
            return Source::Nothing;
        }
        // Of candle's ops only views share memory with what they are computed from, and each has one argument.
        let mut views = nodes.iter().take_while(|node| view::share(node, t));
        let base = views.find(|node| node.is_variable() || self.slots.contains_key(&node.id()));
        if let Some(base) = base {
            if base.id() == t.id() {
                return Source::Slot(self.leaf(base));
            }
            if let Some(view) = View::between(t.layout(), base.layout()) {
                return Source::View(self.leaf(base), view);
            }
        }
        share(&nodes);
        let (mut from, mut leaves) = (vec![], vec![]);
        for node in nodes {
            if node.is_variable() && !self.is_anchor(node) {
                leaves.push((self.leaf(node), node.clone()));
            }
            from.extend(self.slots.get(&node.id()));
        }
        let slot = self.slot(t.id());
        ends.push(End { slot, tensor: t.clone(), from, leaves });
        Source::Slot(slot)
    }

    fn is_anchor(&self, t: &Tensor) -> bool {
        self.anchors.iter().any(|anchor| anchor.id() == t.id())
    }

    /// The slot of what has one, or of a leaf of the graph around.
    fn leaf(&mut self, t: &Tensor) -> usize {
        if let Some(&slot) = self.slots.get(&t.id()) {
            return slot;
        }
        let slot = self.slot(t.id());
        self.outside.push((slot, t.clone()));
        slot
    }

    /// What of it some results depend on.
    pub(super) fn finish(mut self, results: &[Tensor]) -> Tape {
        let results = self.sources(results.iter());
        let mut live = vec![false; self.count];
        results.iter().for_each(|source| source.mark(&mut live));
        let mut entries = vec![];
        for mut entry in self.entries.into_iter().rev() {
            match &mut entry {
                Entry::Op { results, inputs, .. } => {
                    if !live[results.clone()].contains(&true) {
                        continue;
                    }
                    for (_, source) in inputs {
                        match source {
                            Source::Anchor => live[..results.start].fill(true),
                            source => source.mark(&mut live),
                        }
                    }
                }
                Entry::Segment(ends) => {
                    ends.retain(|end| live[end.slot]);
                    ends.iter().flat_map(|end| &end.from).for_each(|&slot| live[slot] = true);
                }
            }
            entries.push(Arc::new(entry));
        }
        let entries = Mutex::new(Some(entries));
        let outside = self.outside.into_iter().filter(|&(slot, _)| live[slot]).collect();
        let shared = Arc::default();
        Tape { id: self.id, slots: self.count, entries, outside, results, shared }
    }
}

impl Source {
    fn mark(&self, live: &mut [bool]) {
        if let Self::Slot(slot) | Self::View(slot, _) = self {
            live[*slot] = true;
        }
    }
}

/// What was recorded.
pub(super) struct Tape {
    id: u64,
    slots: usize,
    /// From the last to the first; `None` after the last pass.
    entries: Mutex<Option<Vec<Arc<Entry>>>>,
    outside: Vec<(usize, Tensor)>,
    results: Vec<Source>,
    shared: Arc<Shared>,
}

impl Tape {
    /// Whether passes of others come to it, as its results in the graph tell.
    pub(super) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// The tensors of the graph around on which a result depends.
    pub(super) fn outside(&self) -> impl Iterator<Item = &Tensor> {
        self.outside.iter().map(|(_, t)| t)
    }

    /// Whether a result depends on any of them.
    pub(super) fn tracks(&self, result: usize) -> bool {
        !matches!(self.results[result], Source::Nothing)
    }

    /// The gradients of those tensors, from those of the results that depend on any; `None` for one on which only results depend
    /// that have none.
    pub(super) fn backward(&self, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let entries = self.entries()?;
        let _pass = Pass::enter(self);
        let tracked = self.results.iter().filter(|source| !matches!(source, Source::Nothing));
        for (source, grad) in tracked.zip(grads) {
            self.hand_on(source, grad.clone())?;
        }
        // In the last pass what an entry kept goes with it.
        for entry in entries {
            match &*entry {
                Entry::Op { step, results, inputs } => self.op(&**step, results, inputs)?,
                Entry::Segment(ends) => self.segment(ends)?,
            }
        }
        self.outside.iter().map(|&(slot, _)| self.take(slot)).collect()
    }

    fn entries(&self) -> Result<Vec<Arc<Entry>>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        // A pass within a gradient comes to a block that others may come to as well.
        let last = LAST.get() && is_outermost() && !self.shared.get();
        let these = if last { entries.take() } else { entries.clone() };
        these.ok_or_else(|| {
            Error::Value {
                op: super::block::OP,
                name: "f",
                got: "a pass after `train::backward` or an optimizer's `backward_step`".into(),
                want: "one of these as the last pass: it frees what the block kept".into(),
                fix: "call `loss.backward()` before, and make results of blocks inputs of others",
            }
            .into()
        })
    }

    fn op(
        &self,
        step: &dyn Step,
        results: &Range<usize>,
        inputs: &[(usize, Source)],
    ) -> Result<()> {
        let mut grads = results.clone().map(|slot| self.take(slot)).collect::<Result<Vec<_>>>()?;
        if grads.iter().any(Option::is_some) {
            grads = within(|| step.step(&grads))?;
            for (i, source) in inputs {
                self.hand_on(source, grads[*i].take())?;
            }
        }
        Ok(())
    }

    /// Lets candle find the gradients. Those of results that were recorded arrive on the way.
    fn segment(&self, ends: &[End]) -> Result<()> {
        let mut seeds = vec![];
        for end in ends {
            seeds.extend(self.take(end.slot)?.map(|grad| (end.tensor.clone(), grad)));
        }
        if seeds.is_empty() {
            return Ok(());
        }
        let mut store = within(|| seed(seeds)?.backward())?;
        for (slot, leaf) in ends.iter().flat_map(|end| &end.leaves) {
            self.hand_on(&Source::Slot(*slot), store.remove(leaf))?;
        }
        Ok(())
    }

    fn hand_on(&self, source: &Source, grad: Option<Tensor>) -> Result<()> {
        // It may have been computed from inputs that are tracked.
        let Some(grad) = grad.map(|grad| grad.detach()) else { return Ok(()) };
        match source {
            Source::Nothing | Source::Anchor => Ok(()),
            Source::Slot(slot) => arrive(self.id, *slot, |sum| sum.add(grad)),
            Source::View(slot, view) => arrive(self.id, *slot, |sum| sum.add_view(view, grad)),
        }
    }

    fn take(&self, slot: usize) -> Result<Option<Tensor>> {
        arrive(self.id, slot, |sum| std::mem::take(sum).total())
    }
}

/// A backward pass over a tape.
struct Pass {
    tape: u64,
    sums: Vec<Sum>,
}

/// The pass ends with it.
struct Running;

impl Pass {
    fn enter(tape: &Tape) -> Running {
        let sums = (0..tape.slots).map(|_| Sum::default()).collect();
        PASSES.with_borrow_mut(|passes| passes.push(Self { tape: tape.id, sums }));
        Running
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(PASSES.with_borrow_mut(Vec::pop));
    }
}

/// Lets `f` change the sum in a slot, in the pass over a tape that is going on.
fn arrive<T>(tape: u64, slot: usize, f: impl FnOnce(&mut Sum) -> Result<T>) -> Result<T> {
    let exchange = |with: Sum| {
        PASSES.with_borrow_mut(|passes| {
            let pass = passes.iter_mut().rev().find(|pass| pass.tape == tape)?;
            Some(std::mem::replace(&mut pass.sums[slot], with))
        })
    };
    let Some(mut sum) = exchange(Sum::default()) else {
        return Err(Error::Value {
            op: super::block::OP,
            name: "f",
            got: "a function of which a tensor is differentiated that it did not return".into(),
            want: "a backward pass from its results alone, after it".into(),
            fix: "let `f` return the tensor, or `.detach()` it",
        }
        .into());
    };
    let result = f(&mut sum)?;
    exchange(sum);
    Ok(result)
}

#[cfg(test)]
mod tests;
