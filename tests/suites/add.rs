//! Sums of two tensors, and their gradients.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::{prelude::*, train};

use super::Layout::{self, Plain};
use super::{Nd, Source, Tally, close, identical, pairs, results_alone, ulp};

/// The layouts of both operands and of the upstream gradient.
type Layouts = [Layout; 3];

/// Every layout, odd sizes, all dtypes, in candle's graph and on a tape.
pub fn add(device: &Device) {
    let mut tally = Tally::new("add", device);
    let sizes: [&[usize]; 7] =
        [&[], &[1], &[13], &[5, 7], &[2, 3, 24], &[3, 2056], &[2, 2, 3, 130]];
    let mut cases: Vec<(DType, &[usize], Layouts)> =
        pairs([F32, F16, BF16], sizes).map(|(dtype, dims)| (dtype, dims, [Plain; 3])).collect();
    let layouts = [Plain, Layout::Transposed, Layout::Narrowed, Layout::Rows, Layout::Columns];
    for ((dtype, i), (j, l)) in pairs(pairs([F32, F16, BF16], 0..5), pairs(0..5, 0..5)) {
        cases.push((dtype, &[2, 6, 16], [layouts[i], layouts[j], layouts[l]]));
    }
    for layout in [Layout::Repeated, Layout::Expanded] {
        cases.push((F32, &[2, 6, 16], [Plain, Plain, layout]));
    }
    for ((dtype, dims, layouts), block) in pairs(cases, [false, true]) {
        let name = format!("{dtype:?} {dims:?} {layouts:?}, in a block: {block}");
        tally.case(&name, || check(&mut Source::new(&name, device), dtype, dims, layouts, block));
    }
    for dims in [&[0][..], &[3, 0], &[0, 8], &[2, 0, 8]] {
        tally.case(format!("{dims:?}"), || empty(dims, device));
    }
    tally.case("the same tensor twice", || twice(&mut Source::new("twice", device)));
    tally.finish();
}

fn check(
    source: &mut Source,
    dtype: DType,
    dims: &[usize],
    layouts: Layouts,
    in_block: bool,
) -> Result<()> {
    let mut leaf = |i: usize| source.tensor(dtype, &layouts[i].base(dims), Plain);
    let (a, b, upstream) = (leaf(0)?, leaf(1)?, leaf(2)?);
    let view = |i: usize, t: &Tensor| layouts[i].view(t, dims);
    let [a, b] = [Var::from_tensor(&a)?, Var::from_tensor(&b)?];
    let tracked = |var: &Var| match results_alone() {
        true => var.detach(),
        false => var.as_tensor().clone(),
    };
    let sum = || view(0, &tracked(&a))?.kaio_add(&view(1, &tracked(&b))?);
    let out = if in_block { train::block(|_| sum(), &[])? } else { sum()? };
    if !out.is_contiguous() || out.dtype() != dtype {
        bail!("the result is {:?} {:?}", out.dtype(), out.layout());
    }
    let read = |i: usize, t: &Tensor| Nd::of(&view(i, &Nd::of(t)?.tensor(DType::F64)?)?);
    let (left, right, upstream) = (read(0, &a)?, read(1, &b)?, view(2, &upstream)?);
    let sums = left.data.iter().zip(&right.data).map(|(a, b)| a + b);
    let want = Nd { dims: dims.to_vec(), data: sums.collect() };
    close("sum", &out, &want, |i| ulp(dtype, want.data[i]) / 2.0)?;
    if results_alone() {
        return Ok(());
    }
    let grads = (&out * &upstream)?.sum_all()?.backward()?;
    for (i, var) in [&a, &b].into_iter().enumerate() {
        let Some(grad) = grads.get(var) else { bail!("no gradient") };
        // That of the sum, where a view shows a leaf, and nothing elsewhere.
        let leaf = Var::from_tensor(&Nd::of(var)?.tensor(DType::F64)?)?;
        let upstream = Nd::of(&upstream)?.tensor(DType::F64)?;
        let pulled = (view(i, leaf.as_tensor())? * upstream)?.sum_all()?.backward()?;
        identical("gradient", grad, &Nd::of(pulled.get(&leaf).expect("it depends on it"))?)?;
    }
    Ok(())
}

fn empty(dims: &[usize], device: &Device) -> Result<()> {
    let [a, b] = [Var::zeros(dims, BF16, device)?, Var::zeros(dims, BF16, device)?];
    let out = match results_alone() {
        true => a.detach().kaio_add(&b.detach())?,
        false => a.kaio_add(&b)?,
    };
    identical("sum", &out, &Nd::full(dims, 0.0))?;
    if results_alone() {
        return Ok(());
    }
    let grads = out.sum_all()?.backward()?;
    for var in [&a, &b] {
        let Some(grad) = grads.get(var) else { bail!("no gradient") };
        identical("gradient", grad, &Nd::full(dims, 0.0))?;
    }
    Ok(())
}

/// Whose gradients are added.
fn twice(source: &mut Source) -> Result<()> {
    let x = Var::from_tensor(&source.tensor(F32, &[3, 5], Plain)?)?;
    let upstream = source.tensor(F32, &[3, 5], Plain)?;
    let want = Nd::of(&(&upstream * 2.0)?)?;
    identical("sum", &x.detach().kaio_add(&x.detach())?, &Nd::of(&(x.detach() * 2.0)?)?)?;
    if results_alone() {
        return Ok(());
    }
    for out in [x.kaio_add(&x)?, train::block(|x| x[0].kaio_add(&x[0]), &[&x])?] {
        let grads = (out * &upstream)?.sum_all()?.backward()?;
        let Some(grad) = grads.get(&x) else { bail!("no gradient") };
        identical("gradient", grad, &want)?;
    }
    Ok(())
}
