//! A call of flash attention: from options and layouts to a problem.

use candle_core::{DType, Layout, Result, Shape, Tensor};

use super::super::View;
use super::problem::{AttentionInputs, AttentionProblem, Extras, Mask};
use crate::stack::Stack;
use crate::{AttnLayout, Engine, FlashAttnOptions};

/// What a call of flash attention says beside its tensors.
#[derive(Clone)]
pub(super) struct Call {
    pub name: &'static str,
    pub layout: AttnLayout,
    /// Bounds on the left and the right.
    window: [Option<usize>; 2],
    scale: Option<f32>,
    softcap: Option<f32>,
    out_dtype: DType,
    pub engine: Engine,
    pub deterministic: bool,
    /// Which of the optional operands follow q, k and v.
    extras: Extras<()>,
    packed: bool,
}

impl Call {
    pub fn new<T>(
        name: &'static str,
        dtype: DType,
        opts: &FlashAttnOptions,
        extras: &Extras<T>,
    ) -> Self {
        Self {
            name,
            layout: opts.layout,
            window: [
                opts.window_size_left,
                if opts.causal { Some(0) } else { opts.window_size_right },
            ],
            scale: opts.softmax_scale,
            softcap: opts.softcap,
            out_dtype: opts.out_dtype.unwrap_or(dtype),
            engine: opts.engine,
            deterministic: opts.deterministic,
            extras: extras.map(|_| ()),
            packed: opts.cu_seqlens_q.is_some(),
        }
    }

    /// Whether a bias follows q, k and v.
    pub fn has_bias(&self) -> bool {
        self.extras.bias.is_some()
    }

    /// The inputs in their order.
    pub fn inputs<'a, T>(&self, list: &[&'a T]) -> AttentionInputs<'a, T> {
        let mut rest = list[3..].iter();
        let extras = self.extras.map(|()| *rest.next().expect("one input for each"));
        AttentionInputs { q: list[0], k: list[1], v: list[2], extras }
    }

    /// The facts and the storages of the inputs in their order.
    pub fn read<'a, S>(&self, views: &[View<'a, S>]) -> (AttentionProblem, AttentionInputs<'a, S>) {
        let storages: Vec<_> = views.iter().map(|&(storage, _)| storage).collect();
        (self.problem(views.iter().map(|&(_, layout)| layout)), self.inputs(&storages))
    }

    /// The facts, given the layouts of the inputs in their order.
    pub fn problem<'a>(&self, layouts: impl Iterator<Item = &'a Layout>) -> AttentionProblem {
        let AttentionInputs { q, k, v, extras } = self.inputs(&layouts.collect::<Vec<_>>());
        let shape = [&q.dims()[..q.dims().len() - 1], &v.dims()[v.dims().len() - 1..]].concat();
        let out = heads_first(self.layout, &Layout::contiguous(shape.as_slice()));
        let [q, k, v] = [q, k, v].map(|layout| heads_first(self.layout, layout));
        let [batch, heads] = [q.batch()[0].0, q.batch()[1].0];
        let lengths = extras.lengths.map(|t| t.map(|t| Stack::new(&with_ones(t, [1, 0]))));
        let packed = lengths[0].as_ref().filter(|_| self.packed).map(|ends| ends.cols - 1);
        let repeated = |t: &Layout, dims: &[usize]| {
            t.broadcast_as(dims).expect("checked before the op was made")
        };
        let bias = extras.bias.map(|t| Stack::new(&repeated(t, &[batch, heads, q.rows, k.rows])));
        let slopes = extras.slopes.map(|t| {
            let each = repeated(t, &[packed.unwrap_or(batch), heads]);
            Stack::new(&with_ones(&each, [0, 2]))
        });
        let [left, right] = self.window;
        AttentionProblem {
            group: heads / k.batch()[1].0.max(1),
            mask: Mask::new(left, right, q.rows, k.rows),
            scale: self.scale.unwrap_or(1.0 / (q.cols as f32).sqrt()),
            softcap: self.softcap,
            extras: Extras { bias, slopes, lengths },
            packed,
            out_dtype: self.out_dtype,
            shape: shape.into(),
            out,
            q,
            k,
            v,
        }
    }
}

/// A layout with dimensions of 1 before and after its own.
fn with_ones(layout: &Layout, [before, after]: [usize; 2]) -> Layout {
    let around = |own: &[usize], one| [&vec![one; before], own, &vec![one; after]].concat();
    let dims = around(layout.dims(), 1);
    Layout::new(dims.into(), around(layout.stride(), 0), layout.start_offset())
}

/// The matrices of a tensor of rank 2 to 4 as those of `[B, H, S, D]`.
pub(super) fn heads_first(layout: AttnLayout, tensor: &Layout) -> Stack {
    let rank = tensor.dims().len();
    let stack = match layout {
        AttnLayout::Bshd if rank > 2 => {
            Stack::new(&tensor.transpose(rank - 3, rank - 2).expect("it has these dimensions"))
        }
        _ => Stack::new(tensor),
    };
    stack.with_batch_dims(2)
}

/// Elements in the order of `[B, H, S, D]`, without gaps, as a tensor of a shape.
pub(super) fn heads_first_back(layout: AttnLayout, t: &Tensor, shape: &Shape) -> Result<Tensor> {
    match layout {
        AttnLayout::Bshd if shape.rank() > 2 => {
            let (heads, rows) = (shape.rank() - 2, shape.rank() - 3);
            let mut dims = shape.dims().to_vec();
            dims.swap(heads, rows);
            t.reshape(dims)?.transpose(heads, rows)
        }
        _ => t.reshape(shape),
    }
}
