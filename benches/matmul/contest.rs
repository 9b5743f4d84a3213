//! Who competes in a row. The results to compare ours with are cuBLASLt's.

use std::rc::Rc;

use candle_core::{DType, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::common::contest::{CANDLE, Contest, OURS, agree};
use super::common::gpu::Gpu;
use super::common::table::Row as _;
use super::cublaslt::{Library, Product};
use super::rows::{Op, Row};
use super::upstream::Upstream;

pub const LT: &str = "cuBLASLt";
pub const LT_BEST: &str = "cuBLASLt best";

pub fn prepare(gpu: &mut Gpu, library: &Rc<Library>, row: &Row) -> Result<Contest> {
    match row.op {
        Op::Matmul => matmul(gpu, library, row),
        Op::Linear | Op::Products => linear(gpu, library, row),
        Op::Host => host(gpu, row),
    }
}

fn matmul(gpu: &mut Gpu, library: &Rc<Library>, row: &Row) -> Result<Contest> {
    let [a, b] = operands(gpu, row)?;
    let opts = MatmulOptions::default().out_dtype(row.out);
    // Before anyone else: what a kernel leaves unwritten cannot be a right result from freed memory.
    let ours = a.kaio_matmul_with(&b, &opts)?;
    let product = Rc::new(Product::new(library, &a, &b, row.out)?);
    product.run(0)?;
    agree("product", &ours, product.out(), row.k)?;
    drop(ours);

    let mut contest = Contest::default();
    let [x, y] = [a.clone(), b.clone()];
    contest.add(OURS, move || x.kaio_matmul_with(&y, &opts).map(drop));
    if row.out == row.dtype {
        contest.add_if_able(CANDLE, move || a.matmul(&b).map(drop));
    }
    contest.add_cublaslt(gpu, row, vec![product])?;
    Ok(contest)
}

/// `y = x·w` and both gradients from a given upstream gradient.
fn linear(gpu: &mut Gpu, library: &Rc<Library>, row: &Row) -> Result<Contest> {
    let opts = MatmulOptions::default().out_dtype(row.out);
    let [x, w] = inputs(gpu, row)?;
    let [_, transposed] = row.transposed();
    // An f32 upstream gradient that the operands' dtype holds exactly: cuBLASLt takes it in that.
    let narrow = random(gpu, [row.m, row.n], row.dtype)?;
    let upstream = narrow.to_dtype(row.out)?;

    let weights = view(&w, transposed)?;
    let forward = Rc::new(Product::new(library, &x, &weights, row.out)?);
    let dx = Rc::new(Product::new(library, &narrow, &weights.t()?, row.dtype)?);
    // In the layout of `w` as it lies in memory.
    let dw = Rc::new(match transposed {
        false => Product::new(library, &x.t()?, &narrow, row.dtype)?,
        true => Product::new(library, &narrow.t()?, &x, row.dtype)?,
    });

    if row.op == Op::Products {
        return three_products(gpu, row, [x, w, narrow], vec![forward, dx, dw]);
    }
    let [x, w] = [Var::from_tensor(&x)?, Var::from_tensor(&w)?];
    let step = move |product: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| {
        let y = product(&x, &view(&w, transposed)?)?;
        let grads = y.apply_op1(Upstream(upstream.clone()))?.backward()?;
        match (grads.get(&x), grads.get(&w)) {
            (Some(dx), Some(dw)) => Ok([y.detach(), dx.clone(), dw.clone()]),
            _ => bail!("a gradient is missing"),
        }
    };
    let ours = {
        let step = step.clone();
        move || step(&|x, w| x.kaio_matmul_with(w, &opts))
    };
    let results = ours()?;
    let products = [("product", &forward, row.k), ("dx", &dx, row.n), ("dw", &dw, row.m)];
    for ((name, product, terms), ours) in products.into_iter().zip(&results) {
        product.run(0)?;
        agree(name, ours, product.out(), terms)?;
    }
    drop(results);

    let mut contest = Contest::default();
    contest.add(OURS, move || ours().map(drop));
    if row.out == row.dtype {
        let candle = move || step(&|x, w| x.matmul(w)).map(drop);
        contest.add_if_able(CANDLE, candle);
    }
    contest.add_cublaslt(gpu, row, vec![forward, dx, dw])?;
    contest.notes.push("cuBLASLt: the three products alone, without candle's graph".into());
    Ok(contest)
}

/// What a layer multiplies, without candle's graph, which adds each gradient to zeros.
fn three_products(
    gpu: &mut Gpu,
    row: &Row,
    [x, w, upstream]: [Tensor; 3],
    peers: Vec<Rc<Product>>,
) -> Result<Contest> {
    let [_, transposed] = row.transposed();
    let (out, dtype) = (row.out, row.dtype);
    type Multiply = fn(&Tensor, &Tensor, DType) -> Result<Tensor>;
    let step = move |multiply: Multiply| {
        let weights = view(&w, transposed)?;
        let dw = match transposed {
            false => multiply(&x.t()?, &upstream, dtype)?,
            true => multiply(&upstream.t()?, &x, dtype)?,
        };
        Ok([multiply(&x, &weights, out)?, multiply(&upstream, &weights.t()?, dtype)?, dw])
    };
    let ours: Multiply =
        |a, b, out| a.kaio_matmul_with(b, &MatmulOptions::default().out_dtype(out));
    for (peer, ours) in peers.iter().zip(step(ours)?) {
        peer.run(0)?;
        agree("product", &ours, peer.out(), row.k)?;
    }
    let mut contest = Contest::default();
    let same = step.clone();
    contest.add(OURS, move || same(ours).map(drop));
    if out == dtype {
        let candle = move || step(|a, b, _| a.matmul(b)).map(drop);
        contest.add_if_able(CANDLE, candle);
    }
    contest.add_cublaslt(gpu, row, peers)?;
    Ok(contest)
}

fn host(gpu: &Gpu, row: &Row) -> Result<Contest> {
    let [a, b] = operands(gpu, row)?;
    let opts = MatmulOptions::default().out_dtype(row.out);
    let [x, y] = [a.clone(), b.clone()];
    let mut contest = Contest::default();
    contest.add(OURS, move || x.kaio_matmul_with(&y, &opts).map(drop));
    contest.add(CANDLE, move || a.matmul(&b).map(drop));
    Ok(contest)
}

impl Contest {
    /// The products one after the other, by cuBLASLt's own choices and, where another one is faster,
    /// by the fastest.
    fn add_cublaslt(&mut self, gpu: &mut Gpu, row: &Row, products: Vec<Rc<Product>>) -> Result<()> {
        let fastest = products.iter().map(|p| p.fastest(gpu, row.cold()));
        let fastest = fastest.collect::<Result<Vec<_>>>()?;
        let firsts = products.clone();
        self.add(LT, move || firsts.iter().try_for_each(|p| p.run(0)));
        let ranks = fastest.iter().zip(&products);
        let ranks = ranks.map(|(choice, p)| format!("{} of {}", choice + 1, p.choices()));
        self.notes.push(format!("best: choice {}", ranks.collect::<Vec<_>>().join(", ")));
        if fastest.iter().any(|&choice| choice != 0) {
            self.add(LT_BEST, move || {
                products.iter().zip(&fastest).try_for_each(|(p, &choice)| p.run(choice))
            });
        }
        Ok(())
    }
}

fn random(gpu: &Gpu, dims: [usize; 2], dtype: DType) -> Result<Tensor> {
    Tensor::randn(0f32, 1., &dims, &gpu.device)?.to_dtype(dtype)
}

/// Contiguous matrices whose [`view`]s are the operands.
fn inputs(gpu: &Gpu, row: &Row) -> Result<[Tensor; 2]> {
    let input = |[rows, cols]: [usize; 2], transposed| {
        let dims = if transposed { [cols, rows] } else { [rows, cols] };
        random(gpu, dims, row.dtype)
    };
    let [a, b] = row.transposed();
    Ok([input([row.m, row.k], a)?, input([row.k, row.n], b)?])
}

fn view(t: &Tensor, transposed: bool) -> Result<Tensor> {
    if transposed { t.t() } else { Ok(t.clone()) }
}

fn operands(gpu: &Gpu, row: &Row) -> Result<[Tensor; 2]> {
    let ([a, b], [a_t, b_t]) = (inputs(gpu, row)?, row.transposed());
    Ok([view(&a, a_t)?, view(&b, b_t)?])
}
