//! Functions whose ops are recorded on a tape.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread;

use candle_core::backprop::GradStore;
use candle_core::{Context, DType, Device, Result, Tensor, Var, bail};
use kaio_candle::tune::Backward;
use kaio_candle::{Error, prelude::*, train};

use crate::suites::Layout::Plain;
use crate::suites::{Nd, Source, Tally, close, pairs, results_alone};

const HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const WIDTH: usize = HEADS * HEAD_DIM;
const HIDDEN: usize = 48;
const SEQ: usize = 6;
const EPSILON: f32 = 1e-5;

/// A layer of a Llama, and the angles of its positions.
struct Layer {
    norms: [Var; 2],
    heads: [Var; 3],
    out: Var,
    gate: Var,
    up: Var,
    down: Var,
    angles: [Tensor; 2],
}

impl Layer {
    fn new(source: &mut Source, dtype: DType) -> Result<Self> {
        let mut tensor = |dims: &[usize]| source.tensor(dtype, dims, Plain);
        let angles = [tensor(&[SEQ, HEAD_DIM / 2])?, tensor(&[SEQ, HEAD_DIM / 2])?];
        let mut var = |dims: &[usize]| Var::from_tensor(&tensor(dims)?);
        Ok(Self {
            norms: [var(&[WIDTH])?, var(&[WIDTH])?],
            heads: [var(&[WIDTH, WIDTH])?, var(&[WIDTH, WIDTH])?, var(&[WIDTH, WIDTH])?],
            out: var(&[WIDTH, WIDTH])?,
            gate: var(&[WIDTH, HIDDEN])?,
            up: var(&[WIDTH, HIDDEN])?,
            // As it is in an embedding.
            down: var(&[WIDTH, HIDDEN])?,
            angles,
        })
    }

    fn vars(&self) -> impl Iterator<Item = &Var> {
        let rest = [&self.out, &self.gate, &self.up, &self.down];
        self.norms.iter().chain(&self.heads).chain(rest)
    }

    /// What it adds to a sum, and that sum.
    fn forward(&self, x: &Tensor, added: Option<&Tensor>) -> Result<[Tensor; 2]> {
        let opts = MatmulOptions::default().out_dtype(x.dtype());
        let product = |x: &Tensor, w: &Tensor| x.kaio_matmul_with(w, &opts);
        let [first, second] = &self.norms;
        let (normed, sum) = match added {
            Some(added) => added.kaio_add_rms_norm(x, first, EPSILON)?,
            None => (x.kaio_rms_norm(first, EPSILON)?, x.clone()),
        };
        let (batch, seq, _) = x.dims3()?;
        let heads = |w: &Var| product(&normed, w)?.reshape((batch, seq, HEADS, HEAD_DIM));
        let [cos, sin] = &self.angles;
        let turned = |w: &Var| {
            heads(w)?.transpose(1, 2)?.kaio_rope(cos, sin, RopeLayout::Halves)?.transpose(1, 2)
        };
        let [q, k, v] = &self.heads;
        let opts = FlashAttnOptions::default().causal(true).layout(AttnLayout::Bshd);
        let attended = turned(q)?.kaio_flash_attn_with(&turned(k)?, &heads(v)?, &opts)?;
        let added = product(&attended.flatten_from(2)?, &self.out)?;
        let (normed, sum) = added.kaio_add_rms_norm(&sum, second, EPSILON)?;
        let hidden = product(&normed, &self.gate)?.kaio_swiglu(&product(&normed, &self.up)?)?;
        Ok([product(&hidden, &self.down.t()?)?, sum])
    }
}

fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

fn loss(t: &Tensor) -> Result<Tensor> {
    t.to_dtype(DType::F32)?.sqr()?.sum_all()
}

/// To a part of the largest of each gradient.
fn same<'a>(
    vars: impl IntoIterator<Item = &'a Var>,
    got: &GradStore,
    want: &GradStore,
    tolerance: f64,
) -> Result<()> {
    for (i, var) in vars.into_iter().enumerate() {
        let name = format!("gradient {i}");
        match (got.get(var), want.get(var)) {
            (Some(got), Some(want)) if got.dtype() == want.dtype() => {
                let want = Nd::of(want)?;
                close(&name, got, &want, |_| tolerance * want.peak())?;
            }
            (None, None) => {}
            (got, want) => bail!("{name} is {got:?}, wanted {want:?}"),
        }
    }
    Ok(())
}

pub fn block(device: &Device) {
    let mut tally = Tally::new("block", device);
    tally.case("by themselves", || by_themselves(&mut Source::new("by themselves", device)));
    if results_alone() {
        return tally.finish();
    }
    for (dtype, layers) in pairs([DType::BF16, DType::F16], [1, 3]) {
        let name = format!("{dtype:?} {layers} layers");
        tally.case(&name, || transformer(&mut Source::new(&name, device), dtype, layers));
    }
    for (name, case) in CASES {
        tally.case(name, || case(&mut Source::new(name, device)));
    }
    tally.finish();
}

/// As one block up to the loss, a block each, blocks of blocks, with checkpoints within, and within checkpoints.
fn transformer(source: &mut Source, dtype: DType, layers: usize) -> Result<()> {
    // All layers have the same weights, whose gradients are sums too.
    let layer = Arc::new(Layer::new(source, dtype)?);
    let x = Var::from_tensor(&source.tensor(dtype, &[2, SEQ, WIDTH], Plain)?)?;
    let own = layer.clone();
    let forward = move |x: &[Tensor]| own.forward(&x[0], x.get(1));
    type Forward<'a> = &'a dyn Fn(&[Tensor]) -> Result<[Tensor; 2]>;
    let model = |x: &Tensor, forward: Forward| -> Result<Tensor> {
        let (mut sum, mut added) = (x.sqr()?, None);
        for _ in 0..layers {
            let input: Vec<_> = [sum].into_iter().chain(added).collect();
            let [next, of] = forward(&input)?;
            (sum, added) = (of, Some(next));
        }
        match added {
            Some(added) => loss(&(sum + added)?),
            None => loss(&sum),
        }
    };
    let in_block = |x: &[Tensor]| train::block(&forward, &refs(x));
    let in_checkpoint = |x: &[Tensor]| train::checkpoint(forward.clone(), &refs(x));
    let block_in_checkpoint = |x: &[Tensor]| {
        let forward = forward.clone();
        train::checkpoint(move |x: &[Tensor]| train::block(&forward, &refs(x)), &refs(x))
    };
    let whole = |forward: Forward| train::block(|x| model(&x[0], forward), &[&x]);
    let want = model(&x, &forward)?;
    let grads = want.backward()?;
    for (name, got) in [
        ("whole", whole(&forward)?),
        ("each", model(&x, &in_block)?),
        ("nested", whole(&in_block)?),
        ("of checkpoints", whole(&in_checkpoint)?),
        ("in checkpoints", model(&x, &block_in_checkpoint)?),
        ("in checkpoints in a block", whole(&block_in_checkpoint)?),
    ] {
        close(name, &got, &Nd::of(&want)?, |_| 0.0)?;
        // The sums are made in candle's order.
        let vars = || [&x].into_iter().chain(layer.vars());
        let check = || same(vars(), &got.backward()?, &grads, 0.0);
        let check = || check().map_err(|e| e.context(name.to_owned()));
        // A graph can be differentiated again, also by several threads.
        check()?;
        check()?;
        thread::scope(|scope| {
            let passes = [scope.spawn(check), scope.spawn(check)];
            passes.into_iter().try_for_each(|pass| pass.join().expect("no panic"))
        })?;
        same(vars(), &train::backward(&got)?, &grads, 0.0)?;
    }
    Ok(())
}

/// Ops of which each result is read once, without candle's backward pass: what is between them are views alone.
fn by_themselves(source: &mut Source) -> Result<()> {
    let mut tensor = |dims: &[usize]| source.tensor(DType::BF16, dims, Plain);
    let (x, gain) = (Var::from_tensor(&tensor(&[2, SEQ, WIDTH])?)?, tensor(&[WIDTH])?);
    let (cos, sin) = (tensor(&[SEQ, HEAD_DIM / 2])?, tensor(&[SEQ, HEAD_DIM / 2])?);
    let dims = [2, SEQ, HEADS, HEAD_DIM];
    let (up, upstream) = (tensor(&dims)?, tensor(&dims)?);
    let norm = |x: &Tensor| x.kaio_rms_norm(&gain, EPSILON);
    let heads = |x: &Tensor| x.reshape(&dims[..])?.transpose(1, 2);
    let rope = |x: &Tensor| x.kaio_rope(&cos, &sin, RopeLayout::Halves);
    let gate = |x: &Tensor| x.kaio_swiglu(&up);
    // The first input's gradient by a function's own node.
    let gradient = |f: &dyn Fn(&Tensor) -> Result<Tensor>, x: &Var, grad: &Tensor| {
        let backward = Backward::of(|| f(x).map(drop))?;
        backward.run(&[Some(grad.clone())])?.swap_remove(0).context("a gradient")
    };
    // Through the host, for candle copies with kernels of its own.
    let packed = |t: &Tensor| t.to_device(&Device::Cpu)?.contiguous()?.to_device(x.device());
    let turned = Var::from_tensor(&packed(&heads(&norm(&x.detach())?)?)?)?;
    let gated = Var::from_tensor(&packed(&rope(&turned.detach())?.transpose(1, 2)?)?)?;
    let grad = gradient(&gate, &gated, &upstream)?;
    let grad = gradient(&rope, &turned, &grad.transpose(1, 2)?)?;
    let grad = packed(&grad.transpose(1, 2)?)?.reshape(x.shape())?;
    let want = gradient(&norm, &x, &grad)?;
    let whole = |x: &Tensor| {
        let f = |x: &[Tensor]| gate(&rope(&heads(&norm(&x[0])?)?)?.transpose(1, 2)?);
        train::block(f, &[x])
    };
    let got = gradient(&whole, &x, &upstream)?;
    close("gradient", &got, &Nd::of(&want)?, |_| 0.0)
}

type Case = fn(&mut Source) -> Result<()>;

const CASES: &[(&str, Case)] = &[
    ("views", views),
    ("candle's ops", candles_ops),
    ("inputs and results", inputs_and_results),
    ("constants", constants),
    ("captured tensors", captured_tensors),
    ("captured by a checkpoint", captured_by_a_checkpoint),
    ("one node", one_node),
    ("last passes", last_passes),
    ("refusals", refusals),
];

fn vars<const N: usize>(source: &mut Source, dims: &[usize]) -> Result<[Var; N]> {
    let vars = (0..N).map(|_| Var::from_tensor(&source.tensor(DType::F32, dims, Plain)?));
    let vars = vars.collect::<Result<Vec<_>>>()?;
    Ok(vars.try_into().expect("as many"))
}

/// Of sums of a few f32 in any order.
const REORDERED: f64 = 1e-6;

/// Gradients of the sum of squares of what `f` gives, through a block and without it.
fn compare<const N: usize>(
    vars: &[Var; N],
    tolerance: f64,
    f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<()> {
    let leaves: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let computed = vars.iter().map(|var| var.affine(1.5, 0.25)).collect::<Result<Vec<_>>>()?;
    for inputs in [leaves, computed] {
        let grads = |results: Vec<Tensor>| {
            // candle's CUDA kernels do not launch for tensors without elements.
            let some = results.iter().filter(|t| t.elem_count() > 0);
            let losses = some.map(loss).collect::<Result<Vec<_>>>()?;
            Tensor::stack(&losses, 0)?.sum_all()?.backward()
        };
        let (got, want) = (train::block(&f, &refs(&inputs))?, f(&inputs)?);
        for (got, want) in got.iter().zip(&want) {
            close("result", got, &Nd::of(want)?, |_| 0.0)?;
        }
        same(vars.iter(), &grads(got)?, &grads(want)?, tolerance)?;
    }
    Ok(())
}

/// Of results, of inputs and of variables, that ops read and that leave the block.
fn views(source: &mut Source) -> Result<()> {
    type View = fn(&Tensor) -> Result<Vec<Tensor>>;
    let views: &[(&str, View)] = &[
        ("reshape", |x| Ok(vec![x.reshape((6, 20))?, x.flatten_all()?])),
        ("transpose", |x| Ok(vec![x.transpose(0, 1)?, x.transpose(1, 2)?.unsqueeze(0)?])),
        ("permute", |x| Ok(vec![x.permute((2, 0, 1))?.reshape((10, 12))?])),
        ("permute of parts", |x| Ok(vec![x.reshape((2, 3, 4, 5))?.permute((3, 1, 0, 2))?])),
        ("narrow", |x| Ok(vec![x.narrow(2, 3, 5)?])),
        ("narrow of rows", |x| Ok(vec![x.narrow(0, 1, 2)?.reshape((20, 4))?])),
        ("narrows", |x| (0..3).map(|i| x.narrow(2, 4 * i, 2)?.transpose(0, 1)).collect()),
        ("chunks", |x| x.chunk(5, 2)),
        ("heads", |x| {
            let heads = x.reshape((3, 4, 5, 2))?;
            (0..5).map(|i| heads.narrow(2, i, 1)?.squeeze(2)?.transpose(0, 1)).collect()
        }),
        ("overlapping narrows", |x| {
            Ok(vec![x.narrow(2, 0, 6)?, x.narrow(2, 4, 6)?, x.narrow(1, 1, 2)?, x.clone()])
        }),
        ("columns", |x| Ok(vec![x.narrow(2, 7, 1)?.squeeze(2)?])),
        ("narrow of a narrow", |x| Ok(vec![x.narrow(1, 1, 2)?.narrow(2, 2, 4)?])),
        ("broadcast", |x| Ok(vec![x.narrow(1, 1, 1)?.broadcast_as((3, 7, 10))?])),
        ("broadcast of ones", |x| Ok(vec![x.unsqueeze(1)?.broadcast_as((3, 1, 4, 10))?])),
        ("nothing", |x| Ok(vec![x.narrow(1, 0, 0)?, x.clone()])),
    ];
    for (name, view) in views {
        let var = vars::<1>(source, &[3, 4, 10])?;
        let read = |views: Vec<Tensor>| -> Result<Vec<Tensor>> {
            let read = |view: &Tensor| view.kaio_swiglu(&view.detach());
            views.iter().filter(|view| view.elem_count() > 0).map(read).collect()
        };
        let case = || -> Result<()> {
            // Of an input, of a result, of a result that is used as it is too, and as results.
            compare(&var, 0.0, |x| read(view(&x[0])?))?;
            compare(&var, 0.0, |x| read(view(&x[0].kaio_swiglu(&x[0])?)?))?;
            compare(&var, 0.0, |x| {
                let y = x[0].kaio_swiglu(&x[0])?;
                let mut views = read(view(&y)?)?;
                views.push(y.kaio_swiglu(&x[0])?);
                Ok(views)
            })?;
            compare(&var, 0.0, |x| view(&x[0].kaio_swiglu(&x[0])?))
        };
        case().map_err(|e| e.context(*name))?;
    }
    Ok(())
}

/// Before, between and after ops, also such as read several tensors or one of them several times.
fn candles_ops(source: &mut Source) -> Result<()> {
    let vars = vars::<3>(source, &[4, 8])?;
    compare(&vars, REORDERED, |x| {
        let [a, b, c] = x else { bail!("three inputs") };
        let product = a.sqr()?.kaio_swiglu(&(b * c)?)?;
        let mixed = (product.exp()? + product.sqr()?.mul(a)?)?;
        // An end of a segment, which candle's ops read again.
        let next = mixed.kaio_geglu(&mixed.affine(0.5, 0.1)?)?;
        let last = (&next + &mixed)?.kaio_rms_norm(&c.get(0)?, EPSILON)?;
        Ok(vec![last.broadcast_add(&b.get(1)?)?, product, (&next * &last)?, c.kaio_softmax()?])
    })?;
    // Layers that candle adds.
    compare(&vars, REORDERED, |x| {
        let (mut sum, gain) = (x[0].clone(), x[1].get(0)?);
        for _ in 0..4 {
            sum = (&sum + sum.kaio_rms_norm(&gain, EPSILON)?.kaio_swiglu(&x[2])?)?;
        }
        Ok(vec![sum])
    })
}

/// Inputs that are results, twice, as views, or not read, and results of which nothing depends on some.
fn inputs_and_results(source: &mut Source) -> Result<()> {
    let vars = vars::<3>(source, &[4, 6])?;
    compare(&vars, 0.0, |x| {
        let y = x[0].kaio_swiglu(&x[1])?;
        Ok(vec![x[0].clone(), y.clone(), x[1].t()?, y.t()?, y])
    })?;
    let [a, b, unread] = vars.each_ref().map(Var::as_tensor);
    let [_, read, dead] = train::block(
        |x| {
            // No result depends on this one.
            dead_end(&x[2])?;
            Ok([x[0].kaio_swiglu(&x[0])?, x[1].kaio_swiglu(&x[1])?, x[0].sqr()?])
        },
        &[a, b, unread],
    )?;
    drop(dead);
    let grads = read.sum_all()?.backward()?;
    let want = b.kaio_swiglu(b)?.sum_all()?.backward()?;
    same([&vars[1]], &grads, &want, 0.0)?;
    close("zeros", grads.get(a).expect("one"), &Nd::of(&a.zeros_like()?)?, |_| 0.0)?;
    match grads.get(unread) {
        None => Ok(()),
        Some(grad) => bail!("what no result depends on has the gradient {grad}"),
    }
}

fn dead_end(x: &Tensor) -> Result<()> {
    x.kaio_swiglu(x)?.kaio_softmax().map(drop)
}

/// What tracks nothing stays so.
fn constants(source: &mut Source) -> Result<()> {
    let [var] = vars::<1>(source, &[4, 6])?;
    let constant = var.detach();
    let y = train::block(|x| x[0].kaio_swiglu(&x[0]), &[&constant])?;
    close("result", &y, &Nd::of(&constant.kaio_swiglu(&constant)?)?, |_| 0.0)?;
    let ids = Tensor::new(&[2u32, 0], var.device())?;
    let results = train::block(
        |x| {
            let y = x[0].kaio_swiglu(&x[0])?;
            let rounded = x[0].ceil()?.kaio_swiglu(&constant)?;
            Ok(vec![y.index_select(&x[1], 0)?, y.argmax(1)?, constant.clone(), rounded])
        },
        &[&var, &ids],
    )?;
    let tracks: Vec<_> = [&y].into_iter().chain(&results).map(Tensor::track_op).collect();
    if tracks != [false, true, false, false, false] {
        bail!("what tracks a gradient: {tracks:?}");
    }
    let want = var.kaio_swiglu(&var)?.index_select(&ids, 0)?.sum_all()?.backward()?;
    same([&var], &results[0].sum_all()?.backward()?, &want, 0.0)
}

/// Tensors with graphs that `f` captures, of this crate's ops and of blocks.
fn captured_tensors(source: &mut Source) -> Result<()> {
    let vars = vars::<2>(source, &[4, 6])?;
    let before = vars[0].kaio_swiglu(&vars[1])?;
    let of_block = train::block(|x| x[0].kaio_swiglu(&x[0]), &[vars[1].as_tensor()])?;
    compare(&vars, 0.0, |x| {
        let y = x[0].kaio_swiglu(&before)?;
        Ok(vec![of_block.kaio_softmax()?.kaio_swiglu(&y)?, y])
    })
}

/// The result of an op on the tape that a checkpoint within reads without having it as an input.
fn captured_by_a_checkpoint(source: &mut Source) -> Result<()> {
    let vars = vars::<2>(source, &[4, 6])?;
    compare(&vars, REORDERED, |x| {
        let y = x[0].kaio_swiglu(&x[1])?;
        let captured = y.clone();
        let f = move |x: &[Tensor]| x[0].kaio_swiglu(&captured);
        let first = train::checkpoint(f.clone(), &[&x[1]])?;
        // On which nothing else depends.
        let captured = x[1].kaio_softmax()?;
        let second = train::checkpoint(
            move |x| train::block(|x| x[0].kaio_swiglu(&captured), &[&x[0]]),
            &[&first],
        )?;
        Ok(vec![first, second])
    })
}

/// The graph around a block is the node, what ties its inputs, and these, however many ops are within.
fn one_node(source: &mut Source) -> Result<()> {
    let vars = vars::<2>(source, &[4, 6])?;
    let chain = |x: &[Tensor]| {
        (0..20)
            .try_fold(x[0].clone(), |y, _| y.kaio_swiglu(&x[1])?.reshape((6, 4))?.reshape((4, 6)))
    };
    let inputs = vars.each_ref().map(Var::as_tensor);
    match train::block(chain, &inputs)?.sorted_nodes().len() {
        3 => Ok(()),
        nodes => bail!("{nodes} nodes"),
    }
}

/// Through blocks to which other blocks come as well, and once more.
fn last_passes(source: &mut Source) -> Result<()> {
    let [a, b] = vars::<2>(source, &[4, 6])?;
    let first = train::block(|x| x[0].kaio_swiglu(&x[1]), &[&a, &b])?;
    let read = |_: &[Tensor]| first.kaio_swiglu(&b);
    let loss = (train::block(read, &[])? + train::block(read, &[])?)?.sqr()?.sum_all()?;
    let grads = loss.backward()?;
    same([&a, &b], &train::backward(&loss)?, &grads, 0.0)?;
    match loss.backward() {
        Err(e) if matches!(Error::of(&e), Some(Error::Value { op: "block", name: "f", .. })) => {}
        other => bail!("{other:?} after the last pass"),
    }
    // It was the last one of those alone to which it came.
    let alone = train::backward(&first.sum_all()?)?;
    same([&a, &b], &alone, &a.kaio_swiglu(&b)?.sum_all()?.backward()?, 0.0)?;
    // The pass of a block, or of a checkpoint, that captured another one's result comes to that as well, before or after.
    let captured = || train::block(|x| x[0].kaio_swiglu(&x[1]), &[&a, &b]);
    let again = |first: Tensor| train::checkpoint(move |x: &[Tensor]| &x[0] * &first, &[&b]);
    for late in [false, true] {
        let first = captured()?;
        let second = train::block(|_| first.kaio_swiglu(&b), &[])?;
        let third = again(first.clone())?;
        let sum = if late { ((first + second)? + third)? } else { (third + (second + first)?)? };
        let loss = sum.sqr()?.sum_all()?;
        let grads = loss.backward()?;
        same([&a, &b], &train::backward(&loss)?, &grads, 0.0)?;
    }
    Ok(())
}

fn refusals(source: &mut Source) -> Result<()> {
    let [var] = vars::<1>(source, &[4, 6])?;
    let refused = |result: Result<()>, want: &str| match result {
        Err(e) if e.to_string().contains(want) => Ok(()),
        other => bail!("{other:?}, wanted {want:?}"),
    };
    let escapes = |result: Result<()>| match &result {
        Err(e) if matches!(Error::of(e), Some(Error::Value { op: "block", name: "f", .. })) => {
            Ok(())
        }
        _ => bail!("{result:?} of a tensor that `f` did not return"),
    };
    let x = var.sqr()?;
    refused(train::block(|_| -> Result<Tensor> { bail!("of f") }, &[&x]).map(drop), "of f")?;
    // A gradient that would end in the block.
    let within = |x: &[Tensor]| {
        x[0].kaio_swiglu(&x[0])?.sum_all()?.backward()?;
        Ok(x[0].clone())
    };
    escapes(train::block(within, &[&x]).map(drop))?;
    let out = RefCell::new(None);
    let y = train::block(
        |x| {
            let y = x[0].kaio_swiglu(&x[0])?;
            out.replace(Some(y.clone()));
            y.kaio_softmax()
        },
        &[&x],
    )?;
    let out = out.take().expect("the block ran");
    escapes(out.sum_all()?.backward().map(drop))?;
    escapes((out + y)?.sum_all()?.backward().map(drop))?;
    for other in crate::other_devices() {
        let other = Var::ones(3, DType::F32, &other)?;
        refused(train::block(|x| Ok(x.to_vec()), &[&var, &other]).map(drop), "is on")?;
    }
    // What failed has left nothing behind: ops are in candle's graph again.
    let y = x.kaio_swiglu(&x)?;
    match y.sum_all()?.backward()?.get(&var) {
        Some(_) => Ok(()),
        None => bail!("no gradient after a block"),
    }
}
