//! Norms of rows.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Layout, Result, Shape};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::limit::{SPLIT, countable};
use super::operand::{Rows, element, row};
use super::plan::Plans;
use crate::kernel::norm::{self, Arguments, Pass, Plan, Problem};
use crate::op::{
    Norm, NormEach, NormGrads, NormInputs, NormResults, NormStats, NormUpstream, View,
};

static PLANS: Plans<Plan> = Plans::new();

/// What both ways have in common.
fn facts(
    op: &'static str,
    (x, layout): View<CudaStorage>,
    weight: &CudaStorage,
    centred: bool,
    pass: Pass,
    operands: &[&Rows],
) -> Result<Problem> {
    let cols = layout.dims()[layout.dims().len() - 1];
    let norm = norm::Norm { element: element(x.dtype()), weight: element(weight.dtype()), centred };
    let problem = Problem {
        norm,
        rows: (layout.shape().elem_count() / cols) as u64,
        cols: cols as u64,
        add: false,
        pass,
        aligned: operands.iter().all(|rows| rows.aligned()),
    };
    let limit = problem.limit().map(|(got, most)| (got, format!("{most} of each")));
    countable(op, ["this crate", "norm"], limit, SPLIT)?;
    Ok(problem)
}

/// Normed rows, and what is to be saved. x is not empty.
pub(crate) fn norm(
    norm: &Norm,
    inputs: &NormInputs<View<CudaStorage>>,
) -> Result<NormResults<CudaStorage>> {
    let NormInputs { x: (x, layout), residual, weight, bias } = *inputs;
    let (op, device) = (norm.op, x.device().clone());
    let gpu = Gpu::of(op, &device)?;
    let all = [Some(x), residual.map(|r| r.0), Some(weight.0), bias.map(|b| b.0)];
    let order = Order::new(op, device.cuda_stream(), all.into_iter().flatten());
    let of_x = Rows::of(op, inputs.x)?;
    let of_residual = residual.map(|residual| Rows::of(op, residual)).transpose()?;
    let of_weight = row(op, weight)?;
    let of_bias = bias.map(|bias| row(op, bias)).transpose()?;
    let pass = Pass::Forward { bias: bias.is_some(), save: norm.save };
    let operands: Vec<_> = [Some(&of_x), of_residual.as_ref()].into_iter().flatten().collect();
    let problem = Problem {
        add: residual.is_some(),
        ..facts(op, inputs.x, weight.0, norm.centred, pass, &operands)?
    };
    let compiled = PLANS.get(op, &gpu, &problem)?;

    let like_x = || uninit(&device, layout.shape(), x.dtype());
    let of_rows = || uninit(&device, &Shape::from(problem.rows as usize), DType::F32);
    let mut out = like_x()?;
    let mut sum = residual.map(|_| like_x()).transpose()?;
    let mut rstd = norm.save.then(of_rows).transpose()?;
    let mut mean = (norm.save && norm.centred).then(of_rows).transpose()?;
    {
        let x = of_x.memory(&device);
        let residual = of_residual.as_ref().map(|rows| (rows.memory(&device), rows));
        let weight = Memory::of(of_weight.storage(), &device);
        let bias = of_bias.as_ref().map(|bias| (Memory::of(bias.storage(), &device), bias));
        let out = Memory::of_mut(&mut out, &device);
        let written = [&mut sum, &mut rstd, &mut mean]
            .map(|result| result.as_mut().map(|result| Memory::of_mut(result, &device)));
        let [sum, rstd, mean] = written.each_ref().map(|m| m.as_ref().map(Memory::address));
        let arguments = Arguments {
            problem: &problem,
            plan: &compiled.plan,
            x: of_x.place(&x),
            other: residual.as_ref().map(|(memory, rows)| rows.place(memory)),
            grad: None,
            weight: weight.at(of_weight.offset(0)),
            bias: bias.as_ref().map(|(memory, bias)| memory.at(bias.offset(0))),
            stats: [rstd, mean],
            results: norm::Results { rows: Some(out.address()), sum, ..Default::default() },
            eps: norm.eps,
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(NormResults { out, sum, stats: rstd.map(|rstd| NormStats { rstd, mean }) })
}

/// The gradients that are wanted, at least one. x is not empty.
pub(crate) fn norm_backward(
    op: &'static str,
    inputs: &NormUpstream<View<CudaStorage>>,
    wants: NormEach<bool>,
) -> Result<NormGrads<CudaStorage>> {
    let NormUpstream { x: (x, layout), weight, stats, grad, sum_grad } = *inputs;
    let device = x.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let all = [Some(x), Some(weight.0), Some(grad.0), sum_grad.map(|grad| grad.0)];
    let order = Order::new(op, device.cuda_stream(), all.into_iter().flatten());
    let [of_x, of_grad] = [Rows::of(op, inputs.x), Rows::of(op, grad)];
    let (of_x, of_grad) = (of_x?, of_grad?);
    let of_sum = sum_grad.map(|grad| Rows::of(op, grad)).transpose()?;
    let of_weight = row(op, weight)?;
    let NormEach { x: of_rows, weight: of_columns, bias } = wants;
    let pass = Pass::Backward { x: of_rows, weight: of_columns, bias };
    let operands = [Some(&of_x), Some(&of_grad), of_sum.as_ref()];
    let operands: Vec<_> = operands.into_iter().flatten().collect();
    let centred = stats.mean.is_some();
    let problem = Problem {
        add: sum_grad.is_some(),
        ..facts(op, inputs.x, weight.0, centred, pass, &operands)?
    };
    let compiled = PLANS.get(op, &gpu, &problem)?;

    let vector = |len: u64, dtype| uninit(&device, &Shape::from(len as usize), dtype);
    let mut x_grad = of_rows.then(|| uninit(&device, layout.shape(), x.dtype())).transpose()?;
    let columns = [of_columns, bias].into_iter().filter(|&wanted| wanted);
    let columns = columns.map(|_| vector(problem.cols, weight.0.dtype()));
    let mut columns = columns.collect::<Result<Vec<_>>>()?;
    let floats = |len: u64| (len > 0).then(|| vector(len, DType::F32)).transpose();
    let mut parts = floats(compiled.plan.parts(&problem))?;
    let mut moments = floats(compiled.plan.moments(&problem))?;
    {
        let [x, grad] = [&of_x, &of_grad].map(|rows| rows.memory(&device));
        let sum = of_sum.as_ref().map(|rows| (rows.memory(&device), rows));
        let weight = Memory::of(of_weight.storage(), &device);
        let saved = [Some(stats.rstd), stats.mean]
            .map(|stats| stats.map(|(storage, at)| (Memory::of(storage, &device), at)));
        let at = |(memory, at): &(Memory, &Layout)| memory.at(at.start_offset());
        let x_grad = x_grad.as_mut().map(|grad| Memory::of_mut(grad, &device));
        let written: Vec<_> = columns.iter_mut().map(|c| Memory::of_mut(c, &device)).collect();
        let written: Vec<_> = written.iter().map(Memory::address).collect();
        let scratch = [&mut parts, &mut moments]
            .map(|floats| floats.as_mut().map(|floats| Memory::of_mut(floats, &device)));
        let [parts, moments] = scratch.each_ref().map(|m| m.as_ref().map(Memory::address));
        let arguments = Arguments {
            problem: &problem,
            plan: &compiled.plan,
            x: of_x.place(&x),
            other: sum.as_ref().map(|(memory, rows)| rows.place(memory)),
            grad: Some(of_grad.place(&grad)),
            weight: weight.at(of_weight.offset(0)),
            bias: None,
            stats: saved.each_ref().map(|stats| stats.as_ref().map(at)),
            results: norm::Results {
                rows: x_grad.as_ref().map(Memory::address),
                sum: None,
                columns: &written,
                parts,
                moments,
            },
            eps: 0.0,
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    let mut columns = columns.into_iter();
    let mut next = |wanted: bool| if wanted { columns.next() } else { None };
    Ok(NormEach { x: x_grad, weight: next(of_columns), bias: next(bias) })
}
