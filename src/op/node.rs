//! A differentiable op as a node of candle's graph.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor,
};

use super::{Differentiable, View, on_cpu, on_cuda};

/// Runs an op in candle's graph, with two inputs or more, of which the first four may track a
/// gradient.
///
/// candle keeps the op alive as long as the graph, so that what the forward pass stores in it is there
/// for the backward pass. One value serves one call.
pub(crate) fn apply<O: Differentiable>(op: O, inputs: &[&Tensor]) -> Result<Tensor> {
    let owned = |tensors: &[&Tensor]| tensors.iter().map(|&t| t.clone()).collect();
    match *inputs {
        [a, b] => a.apply_op2(b, Node { op, rest: vec![], knot: None }),
        [a, b, c, d, ..] if d.track_op() => {
            let knot = Knot::default();
            let tied = c.apply_op2(d, knot.clone())?;
            a.apply_op3(b, &tied, Node { op, rest: owned(&inputs[2..]), knot: Some(knot) })
        }
        [a, b, c, ref rest @ ..] => a.apply_op3(b, c, Node { op, rest: owned(rest), knot: None }),
        _ => unreachable!("an op has two inputs or more"),
    }
}

/// candle's nodes have three inputs at most. Others ride along, unknown to candle; but of those the
/// first may track a gradient, and is then tied to the third.
struct Node<O> {
    op: O,
    /// The inputs from the third on if that is tied, else from the fourth on.
    rest: Vec<Tensor>,
    knot: Option<Knot>,
}

impl<O: Differentiable> Node<O> {
    fn cpu(&self, views: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let guards: Vec<_> = self.rest.iter().map(|t| t.storage_and_layout()).collect();
        let rest = on_cpu(self.op.name(), &guards)?;
        self.op.cpu(&[self.own(views), &rest].concat())
    }

    fn cuda(&self, views: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let guards: Vec<_> = self.rest.iter().map(|t| t.storage_and_layout()).collect();
        let rest = on_cuda(self.op.name(), &guards)?;
        self.op.cuda(&[self.own(views), &rest].concat())
    }

    fn grad(&self, args: &[&Tensor], out: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let rest: Vec<_> = self.rest.iter().collect();
        let mut grads = self.op.grad(&[self.own(args), &rest].concat(), out, grad)?;
        if let Some(knot) = &self.knot {
            knot.leave([grads[2].take(), grads[3].take()]);
            // It says to candle that there is more behind the knot.
            grads[2] = Some(args[2].zeros_like()?);
        }
        Ok(grads)
    }

    /// What the op itself knows of candle's arguments.
    fn own<'a, T>(&self, args: &'a [T]) -> &'a [T] {
        &args[..args.len() - usize::from(self.knot.is_some())]
    }
}

impl<O: Differentiable> CustomOp2 for Node<O> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu(&[(s1, l1), (s2, l2)])
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda(&[(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.grad(&[a, b], out, grad)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next()))
    }
}

impl<O: Differentiable> CustomOp3 for Node<O> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.grad(&[a, b, c], out, grad)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next(), next()))
    }
}

/// Two inputs as one node: an element without meaning, on which the op's node hangs. In a backward pass
/// candle comes to that node first, which leaves both gradients here, then to this one, which hands
/// them on: in one thread, so that passes over one graph in several threads do not mix.
#[derive(Clone, Default)]
struct Knot(Arc<Mutex<HashMap<ThreadId, [Option<Tensor>; 2]>>>);

impl Knot {
    fn leave(&self, grads: [Option<Tensor>; 2]) {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.insert(thread::current().id(), grads);
    }

    fn take(&self) -> [Option<Tensor>; 2] {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.remove(&thread::current().id()).expect("left by the op's node")
    }
}

impl CustomOp2 for Knot {
    fn name(&self) -> &'static str {
        "knot"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
    }

    fn cuda_fwd(
        &self,
        third: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let one = Shape::from(1);
        Ok((third.device().zeros_impl(&one, DType::F32)?, one))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [third, fourth] = self.take();
        Ok((third, fourth))
    }
}
