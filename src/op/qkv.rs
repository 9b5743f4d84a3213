//! Three projections of one input: `q = x·Wq`, `k = x·Wk`, `v = x·Wv` with quantised weights.

use candle_core::{CpuStorage, CudaStorage, DType, Result, Tensor};

use super::quantized::rows;
use super::{Computed, Op, View, apply_constant};
use crate::{check, cpu, cuda, stack::Stack};

/// The weights of the three projections.
pub(crate) enum QkvWeights<'a> {
    Int8 { weights: [&'a Tensor; 3], scales: [f32; 3] },
    Int4 { packed: [&'a Tensor; 3], scales: [&'a Tensor; 3] },
}

const NAMES: [&str; 3] = ["weights[0]", "weights[1]", "weights[2]"];
const SCALE_NAMES: [&str; 3] = ["scales[0]", "scales[1]", "scales[2]"];

/// Three f16 `[.., M, N]`.
pub(crate) fn qkv_project(x: &Tensor, weights: QkvWeights) -> Result<(Tensor, Tensor, Tensor)> {
    let (op, kind, inputs) = match weights {
        QkvWeights::Int8 { weights, scales } => {
            let op = "kaio_qkv_project_int8";
            let args = check_common(op, x, weights)?;
            for arg in &args[1..] {
                check::dtype(op, *arg, &[DType::U8])?;
            }
            let k = check::activations(op, ("x", x))?;
            for i in 0..3 {
                check::int8_weight(op, ("x", x, k), (NAMES[i], weights[i]))?;
                check::finite(op, SCALE_NAMES[i], scales[i])?;
            }
            check_same_n(op, weights)?;
            check::untracked(op, &args)?;
            (op, Kind::Int8(scales), args.map(|(_, t)| t).to_vec())
        }
        QkvWeights::Int4 { packed, scales } => {
            let op = "kaio_qkv_project_int4";
            let args = check_common(op, x, packed)?;
            for arg in &args[1..] {
                check::int4_words(op, *arg)?;
            }
            let k = check::activations(op, ("x", x))?;
            let scale_args = std::array::from_fn::<_, 3, _>(|i| (SCALE_NAMES[i], scales[i]));
            check::tensors(op, &[[("x", x)].as_slice(), &scale_args].concat())?;
            for i in 0..3 {
                check::dtype(op, scale_args[i], &[DType::F16])?;
                check::int4_weight(op, ("x", k), (NAMES[i], packed[i]), scale_args[i])?;
            }
            check_same_n(op, packed)?;
            check::untracked(op, &[args.as_slice(), &scale_args].concat())?;
            (op, Kind::Int4, [[x].as_slice(), &packed, &scales].concat())
        }
    };
    let [q, k, v] = apply_constant(&Qkv { op, kind }, &inputs)?;
    Ok((q, k, v))
}

fn check_common<'a>(
    op: &'static str,
    x: &'a Tensor,
    weights: [&'a Tensor; 3],
) -> Result<[check::Arg<'a>; 4]> {
    let args = [("x", x), (NAMES[0], weights[0]), (NAMES[1], weights[1]), (NAMES[2], weights[2])];
    check::tensors(op, &args)?;
    check::dtype(op, args[0], &[DType::F16])?;
    Ok(args)
}

fn check_same_n(op: &'static str, weights: [&Tensor; 3]) -> Result<()> {
    let n = weights[0].dims()[1];
    let fix = "for grouped heads call `kaio_matmul_int4` or `kaio_matmul_tc` once for each weight";
    for i in 1..3 {
        check::dim(op, NAMES[i], ("N", weights[i].dims()[1]), (n, "the N of `weights[0]`"), fix)?;
    }
    Ok(())
}

enum Kind {
    Int8([f32; 3]),
    Int4,
}

/// Inputs: x, three weights and, for int4, three scales. Results: three f16 `[.., M, N]`.
struct Qkv {
    op: &'static str,
    kind: Kind,
}

impl Op for Qkv {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let (x, lx) = inputs[0];
        let n = inputs[1].1.dims()[1];
        let (lhs, shape) = rows(self.op, lx, n)?;
        let all = [&[3], shape.dims()].concat();
        check::memory(self.op, "the three results", &all, DType::F32)?;
        let projection = |i: usize| {
            let weight = inputs[1 + i];
            let sums = match &self.kind {
                Kind::Int8(scales) => cpu::matmul_weight((x, &lhs), weight, scales[i])?,
                Kind::Int4 => cpu::matmul_int4((x, &lhs), weight, inputs[4 + i])?,
            };
            Ok((cpu::narrow_to(DType::F16, sums)?, shape.clone()))
        };
        (0..3).map(projection).collect()
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let (x, lx) = inputs[0];
        let (lhs, shape) = rows(self.op, lx, inputs[1].1.dims()[1])?;
        let stacks: Vec<_> = inputs.iter().map(|(_, layout)| Stack::new(layout)).collect();
        let operands: Vec<_> = inputs.iter().map(|&(s, _)| s).zip(&stacks).collect();
        let x = (x, &lhs);
        let out = match &self.kind {
            Kind::Int8(scales) => cuda::qkv_int8(self.op, x, &operands[1..4], *scales)?,
            Kind::Int4 => cuda::qkv_int4(self.op, x, &operands[1..4], &operands[4..7])?,
        };
        Ok(out.into_iter().map(|out| (out, shape.clone())).collect())
    }
}
