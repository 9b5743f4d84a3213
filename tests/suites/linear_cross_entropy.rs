//! Cross-entropy of a product's logits, in chunks, and its gradients.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::linear_cross_entropy_within;

use super::Layout::{self, Plain};
use super::cross_entropy::{Case as Rows, Reference, plain};
use super::reference::product;
use super::{Nd, Source, Tally, close, pairs, plain_on, plain_product, results_alone, ulp};

/// One call: rows as of [`Rows`], of so many classes, from hidden states of width `depth`.
#[derive(Clone, Debug)]
struct Case {
    rows: Rows,
    depth: usize,
    layouts: [Layout; 2],
    /// Rows of a chunk, if not as many as there are.
    chunk: Option<usize>,
    /// What is tracked.
    tracked: [bool; 2],
    /// What is f32, and cast inside.
    cast: [bool; 2],
}

impl Case {
    fn new(dtype: DType, dims: &[usize], depth: usize) -> Self {
        let rows = Rows { scale: 1.0, ..Rows::new(dtype, dims) };
        Self { rows, depth, layouts: [Plain; 2], chunk: None, tracked: [true; 2], cast: [false; 2] }
    }

    fn check(&self, device: &Device) -> Result<()> {
        let Self { ref rows, depth, layouts, chunk, tracked, cast } = *self;
        let (dtype, classes) = (rows.dtype, rows.classes());
        let source = &mut Source::new(&format!("{self:?}"), device);
        let batch = &rows.dims[..rows.dims.len() - 1];
        let dims = [[batch, &[depth]].concat(), vec![classes, depth]];
        let leaves = [0, 1].map(|i| {
            source.tensor_of(dtype, &layouts[i].base(&dims[i]), Plain, |s| s.unit() * rows.scale)
        });
        let [x, w] = leaves;
        let leaves = [x?, w?];
        let targets = rows.targets(source);
        let (given, opts) = rows.given(&targets, device)?;
        let opts = if cast.contains(&true) { opts.compute_dtype(dtype) } else { opts };
        let view = |i: usize, t: &Tensor| layouts[i].view(t, &dims[i]);
        let exact = [0, 1].map(|i| Nd::of(&view(i, &Nd::of(&leaves[i])?.tensor(DType::F64)?)?));
        let [x, w] = exact;
        let (x, w) = (matrix(x?, depth), w?);
        let mut z = product(&x, &transposed(&w));
        z.dims = rows.dims.clone();
        let wanted = Reference::new(&z, &targets, &rows.opts);

        let one = opts.reduction != Reduction::None;
        let plain_layouts = layouts == [Plain; 2];
        let tracked = tracked.map(|tracked| tracked && (!results_alone() || one && plain_layouts));
        let var =
            |i: usize| Var::from_tensor(&leaves[i].to_dtype(if cast[i] { F32 } else { dtype })?);
        let vars = [var(0)?, var(1)?];
        let of = |i: usize| match tracked[i] {
            true => view(i, vars[i].as_tensor()),
            false => view(i, &vars[i].detach()),
        };
        let workspace = chunk.map_or(1 << 30, |rows| rows * classes * 2);
        let loss = linear_cross_entropy_within(workspace, &of(0)?, &of(1)?, &given, &opts)?;

        let plain_device = plain_on(device);
        let plain_leaf = |i: usize| Var::from_tensor(&leaves[i].to_device(&plain_device)?);
        let plain_vars = [plain_leaf(0)?, plain_leaf(1)?];
        let plain_loss = {
            let x = view(0, &plain_vars[0])?.contiguous()?.reshape(((), depth))?;
            let logits = plain_product(&x, &view(1, &plain_vars[1])?.t()?)?;
            plain(&logits.reshape(rows.dims.as_slice())?, &targets, &rows.opts)?
        };
        // Logits are rounded to the dtype by one and the other, each its own way.
        let count = if opts.reduction == Reduction::Sum { targets.len().max(1) } else { 1 };
        let size = z.peak().max((classes as f64).ln()).max(1.0);
        let allowed = 2.0 * wanted.loss.max_error(&plain_loss)?
            + (ulp(dtype, z.peak()) + 8.0 * ulp(F32, size)) * count as f64;
        close("loss", &loss, &wanted.loss, |_| allowed)?;
        if tracked == [false; 2] {
            return Ok(());
        }
        let weights = source.tensor_of(F32, wanted.loss.dims.as_slice(), Plain, Source::unit)?;
        let weights = if one { weights.ones_like()? } else { weights };
        let root = |loss: &Tensor| match one {
            true => Ok(loss.clone()),
            false => (loss * weights.to_device(loss.device())?)?.sum_all(),
        };
        let grads = root(&loss)?.backward()?;
        let plain_grads = root(&plain_loss)?.backward()?;
        let slopes = matrix(wanted.gradient(&Nd::of(&weights)?.data), classes);
        let wants = [product(&slopes, &w), product(&transposed(&slopes), &x)];
        for (i, name) in [(0, "dhidden"), (1, "dweight")] {
            let Some(grad) = grads.get(&vars[i]).filter(|_| tracked[i]) else {
                match tracked[i] || grads.get(&vars[i]).is_some() {
                    true => bail!("{name}: a gradient that is missing, or that nobody wants"),
                    false => continue,
                }
            };
            // Back to the leaf, as sums over what the view repeats.
            let zeros = Var::zeros(leaves[i].shape(), DType::F64, &Device::Cpu)?;
            let want = wants[i].tensor(DType::F64)?.reshape(dims[i].as_slice())?;
            let sum = (view(i, &zeros)? * want)?.sum_all()?;
            let want = Nd::of(sum.backward()?.get(&zeros).expect("the sum depends on it"))?;
            let plain_grad = plain_grads.get(&plain_vars[i]).expect("candle has it");
            let allowed = 2.0 * want.max_error(plain_grad)? + 8.0 * ulp(F32, want.peak());
            if grad.dtype() != vars[i].dtype() {
                bail!("{name} in {:?}", grad.dtype());
            }
            close(name, grad, &want, |j| allowed + ulp(dtype, want.data[j]))?;
        }
        Ok(())
    }
}

fn matrix(nd: Nd, cols: usize) -> Nd {
    Nd { dims: vec![nd.data.len() / cols.max(1), cols], data: nd.data }
}

fn transposed(nd: &Nd) -> Nd {
    let [rows, cols] = nd.dims[..] else { panic!("a matrix") };
    let data = (0..rows * cols).map(|i| nd.data[i % rows * cols + i / rows]).collect();
    Nd { dims: vec![cols, rows], data }
}

/// One chunk and many, what is tracked, layouts, options and reductions.
pub fn values(device: &Device) {
    let mut tally = Tally::new("linear_cross_entropy", device);
    let mut cases = vec![];
    for dtype in [BF16, F16] {
        cases.push(Case::new(dtype, &[1], 8));
        cases.push(Case::new(dtype, &[7], 16));
        cases.push(Case::new(dtype, &[2, 5, 24], 16));
        cases.push(Case { chunk: Some(128), ..Case::new(dtype, &[300, 40], 32) });
        // Tiles that TMA adds.
        cases.push(Case { chunk: Some(128), ..Case::new(dtype, &[200, 384], 256) });
        for (chunk, tracked) in pairs(
            [Some(1), Some(4), None],
            [[true, true], [true, false], [false, true], [false; 2]],
        ) {
            cases.push(Case { chunk, tracked, ..Case::new(dtype, &[3, 3, 72], 40) });
        }
        // Rows that do not begin at multiples of 16 bytes.
        cases.push(Case { chunk: Some(3), ..Case::new(dtype, &[7, 77], 21) });
        cases.push(Case { chunk: Some(3), ..Case::new(dtype, &[7, 80], 20) });
        let casts = [[true, true], [true, false], [false, true]];
        for (cast, reduction) in pairs(casts, [Reduction::Mean, Reduction::None]) {
            let case = Case { chunk: Some(4), cast, ..Case::new(dtype, &[3, 3, 72], 40) };
            let opts = case.rows.opts.reduction(reduction);
            cases.push(Case { rows: Rows { opts, ..case.rows.clone() }, ..case });
        }
        let tracked = [false, true];
        cases.push(Case { cast: [true; 2], tracked, ..Case::new(dtype, &[5, 24], 16) });
        let all = [Reduction::Mean, Reduction::Sum, Reduction::None];
        for (reduction, capped) in pairs(all, [false, true]) {
            let opts = CrossEntropyOptions::default().reduction(reduction);
            let opts = match capped {
                true => opts.softcap(2.0).label_smoothing(0.1).z_loss(1e-2),
                false => opts,
            };
            let case = Case { chunk: Some(2), ..Case::new(dtype, &[5, 64], 24) };
            cases.push(Case { rows: Rows { opts, wide: capped, ..case.rows.clone() }, ..case });
        }
        for layouts in [[Layout::Narrowed, Layout::Transposed], [Layout::Transposed, Layout::Rows]]
        {
            cases.push(Case { layouts, chunk: Some(4), ..Case::new(dtype, &[2, 6, 48], 16) });
        }
        for ignored in [1, 2] {
            let case = Case::new(dtype, &[6, 48], 16);
            cases.push(Case { rows: Rows { ignored, ..case.rows.clone() }, ..case });
        }
    }
    for case in &cases {
        tally.case(format!("{case:?}"), || case.check(device));
    }
    for dims in [[0, 8, 5], [4, 0, 5]] {
        tally.case(format!("{dims:?}"), || empty(dims, device));
    }
    tally.finish();
}

/// No rows, or vectors without elements.
fn empty([rows, depth, classes]: [usize; 3], device: &Device) -> Result<()> {
    let x = Var::zeros((rows, depth), BF16, device)?;
    let w = Var::zeros((classes, depth), BF16, device)?;
    let targets = Tensor::zeros(rows, DType::U32, device)?;
    let loss = x.kaio_linear_cross_entropy(&w, &targets, &CrossEntropyOptions::default())?;
    let want = if rows == 0 { f64::NAN } else { (classes as f64).ln() };
    close("loss", &loss, &Nd::full(&[], want), |_| 1e-6)?;
    let grads = loss.backward()?;
    for var in [&x, &w] {
        let Some(grad) = grads.get(var) else { bail!("no gradient") };
        let zeros = Nd::full(var.dims(), 0.0);
        close("gradient", grad, &zeros, |_| 0.0)?;
    }
    Ok(())
}
