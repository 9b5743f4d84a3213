//! Functions that run again in the backward pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kaio_candle::{Error, prelude::*, train};

use crate::suites::Layout::Plain;
use crate::suites::{Nd, Source, Tally, close, pairs, results_alone};

const WIDTH: usize = 32;

/// A transformer's block of few and shared weights: attention, and a gated unit.
#[derive(Clone)]
struct Block {
    qkv: Tensor,
    up: Tensor,
    bias: Tensor,
}

impl Block {
    fn new(vars: &[Var; 3]) -> Self {
        let [qkv, up, bias] = vars.each_ref().map(|var| var.as_tensor().clone());
        Self { qkv, up, bias }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let opts = MatmulOptions::default().out_dtype(x.dtype());
        let qkv = x.kaio_matmul_with(&self.qkv, &opts)?.reshape((2, 6, 3, 2, WIDTH / 2))?;
        let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2);
        let heads = part(0)?.kaio_flash_attn(&part(1)?, &part(2)?, true)?;
        let x = (x + heads.transpose(1, 2)?.flatten_from(2)?)?;
        let opts = opts.bias(self.bias.clone()).activation(Activation::GeluTanh);
        let up = x.kaio_matmul_with(&self.up, &opts)?;
        &x + up.kaio_swiglu(&x)?
    }
}

/// What a function of the input and of weights gives, and its gradients.
struct Problem {
    x: Var,
    vars: [Var; 3],
}

impl Problem {
    fn new(source: &mut Source, dtype: DType) -> Result<Self> {
        let mut var = |dims: &[usize]| Var::from_tensor(&source.tensor(dtype, dims, Plain)?);
        let vars = [var(&[WIDTH, 3 * WIDTH])?, var(&[WIDTH, WIDTH])?, var(&[WIDTH])?];
        Ok(Self { x: var(&[2, 6, WIDTH])?, vars })
    }

    fn all(&self) -> impl Iterator<Item = &Var> {
        [&self.x].into_iter().chain(&self.vars)
    }

    /// Values and gradients, to the bit.
    fn compare(
        &self,
        got: impl Fn(&Tensor, Block) -> Result<Tensor>,
        want: impl Fn(&Tensor, Block) -> Result<Tensor>,
    ) -> Result<()> {
        let [got, want] =
            [got(&self.x, Block::new(&self.vars))?, want(&self.x, Block::new(&self.vars))?];
        same("result", &got, &want)?;
        let want = loss(&want)?.backward()?;
        // A graph can be differentiated again.
        let got = loss(&got)?;
        for grads in [got.backward()?, got.backward()?] {
            self.same(&grads, &want)?;
        }
        thread::scope(|scope| {
            let pass = || self.same(&got.backward()?, &want);
            let passes = [scope.spawn(pass), scope.spawn(pass)];
            passes.into_iter().try_for_each(|pass| pass.join().expect("no panic"))
        })
    }

    fn same(&self, got: &GradStore, want: &GradStore) -> Result<()> {
        for (i, var) in self.all().enumerate() {
            match (got.get(var), want.get(var)) {
                (Some(got), Some(want)) => same(&format!("gradient {i}"), got, want)?,
                (None, None) => {}
                (got, want) => bail!("gradient {i} is {got:?}, wanted {want:?}"),
            }
        }
        Ok(())
    }
}

fn loss(t: &Tensor) -> Result<Tensor> {
    t.to_dtype(DType::F32)?.sqr()?.sum_all()
}

fn same(name: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    if got.dtype() != want.dtype() {
        bail!("{name} is {:?}, wanted {:?}", got.dtype(), want.dtype());
    }
    close(name, got, &Nd::of(want)?, |_| 0.0)
}

/// `f` of one tensor.
fn one(
    f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    x: &Tensor,
) -> Result<Tensor> {
    train::checkpoint(move |x| f(&x[0]), &[x])
}

pub fn checkpoint(device: &Device) {
    let mut tally = Tally::new("checkpoint", device);
    if results_alone() {
        return tally.inapplicable("gradients take more kernels than this crate's");
    }
    for (dtype, layers) in pairs([DType::BF16, DType::F16], [1, 3]) {
        let name = format!("{dtype:?} {layers} blocks");
        tally.case(&name, || {
            let problem = Problem::new(&mut Source::new(&name, device), dtype)?;
            let plain = |x: &Tensor, block: Block| {
                (0..layers).try_fold(x.clone(), |x, _| block.forward(&x))
            };
            let each = |x: &Tensor, block: Block| {
                (0..layers).try_fold(x.clone(), |x, _| {
                    let block = block.clone();
                    one(move |x| block.forward(x), &x)
                })
            };
            problem.compare(each, plain)?;
            // One within another, and a constant input, whose weights have gradients all the same.
            let nested = |x: &Tensor, block: Block| {
                (0..layers).try_fold(x.clone(), |x, _| {
                    let block = block.clone();
                    let inner = move |x: &Tensor| {
                        let block = block.clone();
                        one(move |x| block.forward(x), x)
                    };
                    one(inner, &x)
                })
            };
            problem.compare(nested, plain)?;
            problem
                .compare(|x, block| each(&x.detach(), block), |x, block| plain(&x.detach(), block))
        });
    }
    for (name, case) in CASES {
        tally.case(name, || case(&mut Source::new(name, device)));
    }
    tally.finish();
}

type Case = fn(&mut Source) -> Result<()>;

const CASES: &[(&str, Case)] = &[
    ("inputs and results", inputs_and_results),
    ("constants", constants),
    ("inputs without a gradient", inputs_without_a_gradient),
    ("captured graph", captured_graph),
    ("runs", runs),
    ("nothing is kept", nothing_is_kept),
    ("a pass that failed", a_pass_that_failed),
    ("refusals", refusals),
];

/// Five inputs, one of them not read, and four results, one of which nothing depends on.
fn inputs_and_results(source: &mut Source) -> Result<()> {
    let vars = (0..5)
        .map(|_| Var::from_tensor(&source.tensor(DType::F32, &[3, 4], Plain)?))
        .collect::<Result<Vec<_>>>()?;
    let f = |x: &[Tensor]| -> Result<[Tensor; 4]> {
        let product = (&x[0] * &x[1])?;
        Ok([(&product + &x[3])?, product.t()?, x[2].sqr()?, x[0].clone()])
    };
    let loss = |results: [Tensor; 4]| {
        let [a, b, _, d] = results;
        (a.sqr()? + b.t()? * 3.0)?.add(&d)?.sum_all()
    };
    let inputs: Vec<_> = vars.iter().map(Var::as_tensor).collect();
    let views = inputs.iter().map(|t| t.t()).collect::<Result<Vec<_>>>()?;
    let own: Vec<_> = inputs.iter().copied().cloned().collect();
    for inputs in [own, views] {
        let want = loss(f(&inputs)?)?.backward()?;
        let got = train::checkpoint(f, &inputs.iter().collect::<Vec<_>>())?;
        let got = loss(got)?.backward()?;
        for (i, var) in vars.iter().enumerate() {
            match (got.get(var), want.get(var)) {
                (Some(got), Some(want)) => same(&format!("gradient {i}"), got, want)?,
                // Of a result that is not read.
                (Some(got), None) if i == 2 => same("zeros", got, &var.zeros_like()?)?,
                (None, None) if i == 4 => {}
                (got, want) => bail!("gradient {i} is {got:?}, wanted {want:?}"),
            }
        }
    }
    Ok(())
}

/// What tracks nothing stays so: without tracked inputs, of integers, and of results that are constants.
fn constants(source: &mut Source) -> Result<()> {
    let x = source.tensor(DType::F32, &[3, 4], Plain)?;
    let double = |x: &[Tensor]| &x[0] * 2.0;
    let doubled = train::checkpoint(double, &[&x])?;
    same("doubled", &doubled, &(&x * 2.0)?)?;
    let var = Var::from_tensor(&x)?;
    let ids = Tensor::new(&[2u32, 0], x.device())?;
    let constant = x.clone();
    let picked = train::checkpoint(
        move |x| {
            let (ceil, largest) = (x[0].ceil()?, x[0].argmax(1)?);
            // Before and after the one that has a gradient.
            Ok(vec![ceil, x[0].index_select(&x[1], 0)?, largest, constant.clone(), x[0].round()?])
        },
        &[&var, &ids],
    )?;
    let tracks: Vec<_> = [&doubled].into_iter().chain(&picked).map(Tensor::track_op).collect();
    if tracks != [false, false, true, false, false, false] {
        bail!("what tracks a gradient: {tracks:?}");
    }
    let rows = var.index_select(&ids, 0)?;
    same("rows", &picked[1], &rows)?;
    let got = picked[1].sum_all()?.backward()?;
    let want = rows.sum_all()?.backward()?;
    match (got.get(&var), want.get(&var)) {
        (Some(got), Some(want)) => same("gradient", got, want),
        (got, _) => bail!("the gradient is {got:?}"),
    }
}

/// An input that is read through its signs alone, by a checkpoint within, of whose results another has a gradient; and as what is
/// contiguous, which it is not.
fn inputs_without_a_gradient(source: &mut Source) -> Result<()> {
    let mut var = || Var::from_tensor(&source.tensor(DType::F32, &[3, 4], Plain)?);
    let (x, weight) = (var()?, var()?);
    let captured = weight.as_tensor().clone();
    let signed = move |x: &[Tensor]| {
        let signs = x[0].flatten_all()?.reshape((3, 4))?.sign()?;
        let inner = |x: &[Tensor]| Ok([x[0].clone(), x[1].sqr()?]);
        if !x[0].is_contiguous() {
            bail!("an input that is not contiguous");
        }
        train::checkpoint(inner, &[&signs, &captured])
    };
    let [signs, squares] = train::checkpoint(signed, &[&x.t()?])?;
    let got = (&signs * &squares)?.sum_all()?.backward()?;
    let want = (signs.detach() * weight.sqr()?)?.sum_all()?.backward()?;
    match (got.get(&weight), want.get(&weight), got.get(&x)) {
        (Some(got), Some(want), None) => same("gradient", got, want),
        (got, _, of_x) => bail!("the gradients are {got:?} and {of_x:?}"),
    }
}

/// A tensor with a graph that is captured: ops of several results are passed by two passes, one within the other.
fn captured_graph(source: &mut Source) -> Result<()> {
    let var = Var::from_tensor(&source.tensor(DType::F32, &[1, 2, 5, 8], Plain)?)?;
    let make = |through: bool| -> Result<Tensor> {
        let opts = FlashAttnOptions::default().causal(true);
        let (out, lse) = var.kaio_flash_attn_with_lse(&var, &var, &opts)?;
        let (captured, of) = (out.clone(), lse.clone());
        let f = move |x: &Tensor| (x.sqr()? * &captured)?.broadcast_add(&of.unsqueeze(3)?);
        let y = if through { one(f, &var)? } else { f(&var)? };
        (y + out)?.sum_all()? + lse.sqr()?.sum_all()?
    };
    let [got, want] = [make(true)?.backward()?, make(false)?.backward()?];
    match (got.get(&var), want.get(&var)) {
        (Some(got), Some(want)) => {
            let want = Nd::of(want)?;
            // Another order of the sums.
            close("gradient", got, &want, |_| 1e-5 * want.peak())
        }
        (got, _) => bail!("the gradient is {got:?}"),
    }
}

/// Once, and once again in each backward pass.
fn runs(source: &mut Source) -> Result<()> {
    let var = Var::from_tensor(&source.tensor(DType::F32, &[3], Plain)?)?;
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let y = one(
        move |x| {
            counted.fetch_add(1, Relaxed);
            x.exp()
        },
        &var,
    )?;
    for want in 1..4 {
        if runs.load(Relaxed) != want {
            bail!("{} runs, wanted {want}", runs.load(Relaxed));
        }
        y.sum_all()?.backward()?;
    }
    drop(y);
    match Arc::strong_count(&runs) {
        1 => Ok(()),
        _ => bail!("the function outlives its graph"),
    }
}

/// What `f` captured per run is gone after it: the graph holds no op of it.
fn nothing_is_kept(source: &mut Source) -> Result<()> {
    let var = Var::from_tensor(&source.tensor(DType::F32, &[3], Plain)?)?;
    let mut y = var.as_tensor().clone();
    for _ in 0..4 {
        y = one(|x| (0..20).try_fold(x.clone(), |x, _| x.affine(1.01, 0.1)), &y)?;
    }
    // The leaf, and a node for each.
    match y.sorted_nodes().len() {
        5 => Ok(()),
        nodes => bail!("{nodes} nodes"),
    }
}

/// What it left at an op of several results is not in the next pass, which comes from another result alone.
fn a_pass_that_failed(source: &mut Source) -> Result<()> {
    let var = Var::from_tensor(&source.tensor(DType::F32, &[2, 5, 8], Plain)?)?;
    let (out, lse) = var.kaio_flash_attn_with_lse(&var, &var, &FlashAttnOptions::default())?;
    let want = lse.sum_all()?.backward()?;
    let first = AtomicUsize::new(0);
    let again = one(
        move |x| match first.fetch_add(1, Relaxed) {
            0 => x.sqr(),
            _ => bail!("no memory"),
        },
        &lse,
    )?;
    for loss in [(&out.sum_all()? + again.sum_all()?)?, (again.sum_all()? + out.sum_all()?)?] {
        if loss.backward().is_ok() {
            bail!("a function failed, and its pass did not");
        }
        match (lse.sum_all()?.backward()?.get(&var), want.get(&var)) {
            (Some(got), Some(want)) => same("gradient", got, want)?,
            (got, _) => bail!("the gradient is {got:?}"),
        }
    }
    Ok(())
}

fn refusals(source: &mut Source) -> Result<()> {
    let var = Var::from_tensor(&source.tensor(DType::F32, &[3], Plain)?)?;
    let refused = |result: Result<()>, want: &str| match result {
        Err(e) if e.to_string().contains(want) => Ok(()),
        other => bail!("{other:?}, wanted {want:?}"),
    };
    refused(one(|_| bail!("of f"), &var).map(|_| ()), "of f")?;
    // Another shape, or a `Var` of its own, each time.
    let first = AtomicUsize::new(0);
    let y = one(
        move |x| match first.fetch_add(1, Relaxed) {
            0 => Ok(x.clone()),
            _ => x.narrow(0, 0, 2),
        },
        &var,
    )?;
    let result = y.sum_all()?.backward().map(|_| ());
    if !matches!(&result, Err(e) if matches!(Error::of(e), Some(Error::Value { name: "f", .. }))) {
        bail!("a shape that changes: {result:?}");
    }
    refused(result, "f32 [2]")?;
    let y = one(|x| x * Var::ones(3, DType::F32, x.device())?.as_tensor(), &var)?;
    refused(y.sum_all()?.backward().map(|_| ()), "when it runs again")?;
    for other in crate::other_devices() {
        let other = Var::ones(3, DType::F32, &other)?;
        let both = train::checkpoint(|x| Ok(x.to_vec()), &[&var, &other]).map(|_| ());
        refused(both, "is on")?;
    }
    Ok(())
}
