//! A function whose ops are one node of candle's graph.

use candle_core::{CpuStorage, CudaStorage, Result, Tensor, bail};

use super::checkpoint::{copy, on_one_device};
use super::node::adopt;
use super::tape::{self, Recorder, Tape};
use super::{Computed, Differentiable, Op, View};

pub(super) const OP: &str = "block";

/// `f(inputs)`, differentiated on a tape. Within another block it is a part of that.
pub(crate) fn block(
    f: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>,
    inputs: &[&Tensor],
) -> Result<Vec<Tensor>> {
    if tape::recording() {
        return f(&inputs.iter().copied().cloned().collect::<Vec<_>>());
    }
    let mut recorder = Recorder::new();
    let leaves = inputs.iter().map(|t| recorder.input(t, copy)).collect::<Result<Vec<_>>>()?;
    let (results, recorder) = tape::record(recorder, || f(&leaves))?;
    drop(leaves);
    let tape = recorder.finish(&results);
    on_one_device(OP, inputs.iter().copied(), results.iter(), tape.outside())?;
    let tracked = results.iter().enumerate().filter(|&(i, _)| tape.tracks(i));
    let stored = tracked.map(|(_, t)| copy(t)).collect::<Result<Vec<_>>>()?;
    // Those that nothing tracks are constants.
    let constants: Vec<_> =
        results.iter().enumerate().map(|(i, t)| (!tape.tracks(i)).then(|| t.detach())).collect();
    drop(results);
    let outside: Vec<_> = tape.outside().cloned().collect();
    let shared = tape.shared();
    let linked = match stored.is_empty() {
        true => vec![],
        false => adopt(Block(tape), &outside.iter().collect::<Vec<_>>(), stored)?,
    };
    shared.know(&linked);
    let mut linked = linked.into_iter();
    let results = constants.into_iter().map(|constant| constant.or_else(|| linked.next()));
    results.collect::<Option<_>>().ok_or_else(|| candle_core::Error::msg("a node for each result"))
}

/// Inputs: the tensors of the graph around on which a result depends. Results: those that depend on any.
struct Block(Tape);

impl Op for Block {
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

impl Differentiable for Block {
    fn reads_result(&self, _: usize) -> bool {
        false
    }

    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let found = self.0.backward(grads)?;
        let of = |(t, grad): (&&Tensor, Option<Tensor>)| match grad {
            Some(grad) => Ok(Some(grad)),
            // Only results depend on it of which nothing does.
            None => t.zeros_like().map(Some),
        };
        inputs.iter().zip(found).map(of).collect()
    }
}
