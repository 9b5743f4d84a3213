//! Operands in another dtype.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Storage, Tensor};

use super::matmul::CASTABLE;
use super::{Computed, Differentiable, Op, View, apply, cast};
use crate::check;
use crate::error::Error;

/// What operands are multiplied in, if that was asked for.
pub(super) fn check_compute_dtype(op: &'static str, dtype: Option<DType>) -> Result<Option<DType>> {
    match dtype {
        None | Some(DType::F16 | DType::BF16) => Ok(dtype),
        Some(other) => {
            let (got, want) = (other.as_str().into(), "f16 or bf16".into());
            let fix = "leave it out for the operands' dtype";
            Err(Error::Value { op, name: "compute_dtype", got, want, fix }.into())
        }
    }
}

/// What two operands are multiplied in: a dtype that was asked for, to which they can be cast, or else that of both.
pub(super) fn multiplied_in(
    op: &'static str,
    operands @ [a, b]: [check::Arg; 2],
    computed: Option<DType>,
) -> Result<DType> {
    match check_compute_dtype(op, computed)? {
        Some(dtype) => {
            operands.into_iter().try_for_each(|arg| check_castable(op, arg, dtype))?;
            Ok(dtype)
        }
        None => {
            check::dtype(op, a, &[DType::F16, DType::BF16])?;
            check::same_dtype(op, b, a)?;
            Ok(a.1.dtype())
        }
    }
}

/// An argument can be cast to a dtype, if it has another one.
pub(super) fn check_castable(op: &'static str, arg: check::Arg, dtype: DType) -> Result<()> {
    check::dtype(op, arg, &CASTABLE)?;
    if arg.1.dtype() != dtype {
        check::made(op, arg, arg.1.dims())?;
    }
    Ok(())
}

/// Each of two operands in the dtype in which they are multiplied, if it has another one. A matrix on the right is a weight. What they
/// were cast from are inputs of an op after its others: there gradients go, see [`leaf`].
pub(super) fn operands([a, b]: [&Tensor; 2], dtype: DType) -> Result<[Option<Tensor>; 2]> {
    let other = |t: &Tensor| t.dtype() != dtype;
    let b_cast = || if b.rank() == 2 { weight(b, dtype) } else { outside(b, dtype) };
    Ok([other(a).then(|| outside(a, dtype)).transpose()?, other(b).then(b_cast).transpose()?])
}

/// The input that has the gradient of operand `i`: `cast` says which were cast, and what from follows so many inputs.
pub(super) fn leaf(i: usize, cast: [bool; 2], inputs: usize) -> usize {
    if cast[i] { inputs + usize::from(i == 1 && cast[0]) } else { i }
}

/// A tensor in another dtype, in the graph. candle casts no tensor without elements on a GPU, and what depends on one has a
/// gradient nevertheless.
pub(super) fn inside(op: &'static str, t: &Tensor, dtype: DType) -> Result<Tensor> {
    if t.elem_count() > 0 || !t.track_op() {
        return cast(t, dtype);
    }
    let [nothing] = apply(Nothing { name: op, dtype }, &[t])?;
    Ok(nothing)
}

/// A cast of a tensor without elements.
struct Nothing {
    name: &'static str,
    dtype: DType,
}

impl Nothing {
    fn of<S>(&self, (storage, layout): View<S>) -> Result<Vec<Computed<S>>>
    where
        S: BackendStorage<Device: BackendDevice<Storage = S>>,
    {
        let shape = layout.shape();
        Ok(vec![(storage.device().zeros_impl(shape, self.dtype)?, shape.clone())])
    }
}

impl Op for Nothing {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        self.of(inputs[0])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        self.of(inputs[0])
    }
}

impl Differentiable for Nothing {
    fn reads(&self, _: usize, _: &[&Tensor]) -> bool {
        false
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        _: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(inputs[0].zeros_like()?)])
    }
}

/// A tensor in another dtype, outside of the graph. One whose columns are contiguous keeps them so.
pub(super) fn outside(t: &Tensor, dtype: DType) -> Result<Tensor> {
    let t = t.detach();
    if t.rank() >= 2 && !t.is_contiguous() {
        let transposed = t.t()?;
        if transposed.is_contiguous() {
            return cast(&transposed, dtype)?.t();
        }
    }
    cast(&t, dtype)
}

/// A view of a storage, by where they are, and a dtype.
type Key = (usize, Vec<usize>, Vec<usize>, usize, DType);

thread_local! {
    /// Within [`once`]: what was cast, and what it was cast from, whose place in memory is not given to others so.
    static CASTS: RefCell<Option<HashMap<Key, [Tensor; 2]>>> = const { RefCell::new(None) };
}

/// Runs `f`, in which [`weight`] casts each weight once. Within another such call it is that one that remembers.
pub(crate) fn once<T>(f: impl FnOnce() -> T) -> T {
    struct Out;
    impl Drop for Out {
        fn drop(&mut self) {
            CASTS.take();
        }
    }
    let outermost = CASTS.with_borrow_mut(|casts| match casts {
        Some(_) => None,
        None => {
            *casts = Some(HashMap::new());
            Some(Out)
        }
    });
    let result = f();
    drop(outermost);
    result
}

/// [`outside`] of a weight, remembered within [`once`].
pub(super) fn weight(t: &Tensor, dtype: DType) -> Result<Tensor> {
    let key = {
        let (storage, at) = t.storage_and_layout();
        let (storage, at): (&Storage, &Layout) = (&storage, at);
        let place = std::ptr::from_ref(storage).addr();
        (place, at.dims().to_vec(), at.stride().to_vec(), at.start_offset(), dtype)
    };
    let known = CASTS.with_borrow(|casts| Some(casts.as_ref()?.get(&key)?[0].clone()));
    if let Some(known) = known {
        return Ok(known);
    }
    let made = outside(t, dtype)?;
    CASTS.with_borrow_mut(|casts| {
        if let Some(casts) = casts {
            casts.insert(key, [made.clone(), t.detach()]);
        }
    });
    Ok(made)
}
