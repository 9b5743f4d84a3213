//! The gradient of one op outside of a backward pass, for benches: candle adds each gradient to zeros, which would be timed
//! with it.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::Differentiable;
use super::node::Node;

/// From the gradients of an op's results to those of its inputs.
type Run = dyn Fn(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>;

thread_local! {
    /// Of the op that ran last, while someone waits for it.
    static LAST: RefCell<Option<Option<Backward>>> = const { RefCell::new(None) };
}

/// The gradient of an op that ran.
#[derive(Clone)]
pub struct Backward(Arc<Run>);

impl Backward {
    /// That of the last op with inputs that track a gradient among those of a call.
    pub fn of(call: impl FnOnce() -> Result<()>) -> Result<Self> {
        LAST.set(Some(None));
        let result = call();
        let last = LAST.take().flatten();
        result?;
        match last {
            Some(backward) => Ok(backward),
            None => bail!("no op of this crate has an input that tracks a gradient"),
        }
    }

    /// The gradients of the inputs, from those of the results.
    pub fn run(&self, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        (self.0)(grads)
    }
}

/// An op ran.
pub(super) fn offer<O: Differentiable>(node: &Arc<Node<O>>) {
    LAST.with_borrow_mut(|last| {
        if let Some(last) = last {
            let node = node.clone();
            *last = Some(Backward(Arc::new(move |grads| node.gradients(grads))));
        }
    });
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::prelude::*;

    #[test]
    fn what_candle_makes_of_it() -> Result<()> {
        let vars = [(); 2].map(|()| Var::randn(0f32, 1., (3, 5), &Device::Cpu));
        let [gate, up] = vars;
        let (gate, up) = (gate?, up?);
        let mut out = None;
        let backward = Backward::of(|| {
            out = Some(gate.kaio_swiglu(&up)?);
            Ok(())
        })?;
        let out = out.expect("the call ran");
        let alone = backward.run(&[Some(out.ones_like()?)])?;
        let grads = out.sum_all()?.backward()?;
        for (var, grad) in [&gate, &up].into_iter().zip(alone) {
            let (got, want) = (grad.expect("of both"), grads.get(var).expect("of both"));
            assert_eq!(got.to_vec2::<f32>()?, want.to_vec2::<f32>()?);
        }
        assert!(Backward::of(|| gate.detach().kaio_swiglu(&up.detach()).map(drop)).is_err());
        Ok(())
    }
}
