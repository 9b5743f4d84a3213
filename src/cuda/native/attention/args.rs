//! The parameters of attention's kernels.

use std::f32::consts::LOG2_E;

use candle_core::Result;

use super::{Call, Place};
use crate::cuda::launch::{Args, Memory, TensorMap};
use crate::kernel::Element;
use crate::kernel::attention::sm90::{self, Store};
use crate::kernel::attention::{Attend, Lengths, Mask, Plan};
use crate::kernel::hopper::SLAB;
use crate::stack::Stack;

impl Call<'_> {
    /// Of `kernel::attention::sm90::emit` and `sm80::emit`: they differ in how operands are given. Not
    /// returned: in a `Result` their kilobytes would be moved.
    pub(super) fn attend_args(
        &self,
        args: &mut Args,
        plan: &Plan,
        out: &Place,
        rows: usize,
    ) -> Result<()> {
        let (launch, facts, device) = (&plan.launch, &self.facts, self.device);
        let task = plan.task();
        let part = |args: &mut Args, each: usize| {
            if task.split {
                args.value(each as u64);
            }
        };
        let by_threads = match &plan.attend {
            Attend::Sm90(config) => {
                self.descriptors(args, config, out)?;
                config.store == Store::Direct || task.lengths == Lengths::Packed
            }
            Attend::Sm80(_) => {
                self.addresses(args);
                true
            }
        };
        if by_threads {
            args.pointer(out.address);
            strides(args, &out.strides);
            part(args, rows * facts.value_dim as usize);
        }
        if let Some(lse) = out.lse {
            args.pointer(lse);
            part(args, rows);
        }
        args.value(facts.queries as i32).value(facts.keys as i32);
        args.value(facts.heads as u32).value((facts.heads / facts.kv_heads) as u32);
        match self.softcap {
            None => _ = args.value(self.scale * LOG2_E),
            Some(cap) => _ = args.value(self.scale / cap).value(cap * LOG2_E),
        }
        let [bias, slopes] = [self.bias, self.slopes]
            .map(|extra| extra.map(|(storage, stack)| (Memory::of(storage, device), stack)));
        if let Some((memory, s)) = &bias {
            args.pointer(memory.at(s.matrix_offset(0)));
            strides(args, &[s.batch()[0].1, s.batch()[1].1, s.row_stride, s.col_stride]);
        }
        if let Some((memory, s)) = &slopes {
            args.pointer(memory.at(s.matrix_offset(0)));
            strides(args, &[s.batch()[0].1, s.batch()[1].1]);
        }
        match task.mask {
            Mask::None => {}
            Mask::Right => _ = args.value(launch.right),
            Mask::Window => _ = args.value(launch.right).value(launch.left),
        }
        let lengths = self.lengths.as_ref().map(|sides| {
            sides.each_ref().map(|side| (Memory::of(side.storage(), device), side.offset(0)))
        });
        for (memory, first) in lengths.iter().flatten() {
            args.pointer(memory.at(*first));
        }
        if task.lengths == Lengths::Packed {
            args.value(facts.batch as u32);
        }
        if task.split {
            args.value(launch.parts);
        }
        let order = &launch.order;
        args.value(order.heads).value(order.columns).value(order.tiles).value(order.section);
        Ok(())
    }

    /// Where queries, keys and values begin.
    fn begins(&self) -> [u64; 3] {
        self.operands
            .each_ref()
            .map(|fitted| Memory::of(fitted.storage(), self.device).at(fitted.offset(0)))
    }

    /// The operands, and the result if the copy engine stores it.
    fn descriptors(&self, args: &mut Args, config: &sm90::Config, out: &Place) -> Result<()> {
        let begins = self.begins();
        let [q, k, v] = self.operands.each_ref().map(|fitted| Lines::of(&fitted.stack));
        let (pack, half) = (config.task.pack, self.facts.element);
        let rows_of = |lines: &Lines, element, address, cols| match pack {
            1 => lines.map(element, address, [cols, SLAB]),
            _ => lines.packed(element, address, [cols, pack, config.positions()]),
        };
        args.tensor_map(rows_of(&q, half, begins[0], SLAB)?)
            .tensor_map(k.map(half, begins[1], [SLAB, config.keys])?)
            .tensor_map(v.map(half, begins[2], [SLAB, config.keys])?);
        if config.store == Store::Tma {
            let lines = Lines { cols: self.facts.value_dim as usize, strides: out.strides, ..q };
            args.tensor_map(rows_of(&lines, config.task.out, out.address, config.slab_cols())?);
        }
        Ok(())
    }

    /// The operands. The stride of a single row or matrix may be anything, but threads reckon with it.
    fn addresses(&self, args: &mut Args) {
        for (address, fitted) in self.begins().into_iter().zip(&self.operands) {
            let Lines { lens, strides: each, .. } = Lines::of(&fitted.stack);
            args.pointer(address);
            let used = |i: usize| if lens[i] == 1 { 0 } else { each[i] };
            strides(args, &[0, 1, 2].map(used));
        }
    }

    /// Of `kernel::attention::combine::emit`.
    pub(super) fn combine_args(
        &self,
        plan: &Plan,
        parts: &Place,
        out: &Place,
        rows: usize,
    ) -> Args {
        let mut args = Args::new();
        args.pointer(parts.address).pointer(parts.lse.expect("parts have sums"));
        args.pointer(out.address);
        strides(&mut args, &out.strides);
        if let Some(lse) = out.lse {
            args.pointer(lse);
        }
        args.value(plan.launch.parts).value(self.facts.queries as u32);
        args.value(self.facts.heads as u32).value(rows as u32);
        args
    }
}

fn strides(args: &mut Args, strides: &[usize]) {
    strides.iter().for_each(|&stride| _ = args.value(stride as u64));
}

/// The matrices of `[B, H, S, D]`, as rows of contiguous elements.
#[derive(Clone, Copy)]
struct Lines {
    cols: usize,
    /// Rows, heads and sequences.
    lens: [usize; 3],
    strides: [usize; 3],
}

impl Lines {
    fn of(stack: &Stack) -> Self {
        let [(batch, each_batch), (heads, each_head)] = [0, 1].map(|i| stack.batch()[i]);
        Self {
            cols: stack.cols,
            lens: [stack.rows, heads, batch],
            strides: [stack.row_stride, each_head, each_batch],
        }
    }

    /// With boxes of some columns and rows.
    fn map(&self, element: Element, address: u64, [cols, rows]: [u32; 2]) -> Result<TensorMap> {
        let [len, heads, batch] = self.lens;
        descriptor(
            element,
            address,
            [self.cols, len, heads, batch],
            self.strides,
            [cols, rows, 1, 1],
        )
    }

    /// With boxes of some columns, heads and rows of each.
    fn packed(
        &self,
        element: Element,
        address: u64,
        [cols, pack, rows]: [u32; 3],
    ) -> Result<TensorMap> {
        let ([len, heads, batch], [row, head, each]) = (self.lens, self.strides);
        let together = pack as usize;
        let dims = [self.cols, together, len, heads / together, batch];
        descriptor(
            element,
            address,
            dims,
            [head, row, head * together, each],
            [cols, pack, rows, 1, 1],
        )
    }
}

fn descriptor<const N: usize, const M: usize>(
    element: Element,
    address: u64,
    dims: [usize; N],
    strides: [usize; M],
    boxed: [u32; N],
) -> Result<TensorMap> {
    let dims = dims.map(|len| len as u64);
    // The stride of a single row or matrix may be anything.
    let mut bytes = strides.map(|stride| stride as u64 * u64::from(element.size()));
    for (stride, &len) in bytes.iter_mut().zip(&dims[1..]) {
        if len == 1 {
            *stride = 16;
        }
    }
    Ok(TensorMap::new(element, address, &dims, &bytes, &boxed)?)
}
