//! Cross-entropy and its gradient.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{D, Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::Layout::{self, Plain};
use super::{
    Nd, Source, Tally, backward_of_sum, close, identical, pairs, plain_on, results_alone, ulp,
};

const IGNORED: i64 = -100;

/// One call: logits up to `scale` and how they lie, and every how many-th target is ignored.
#[derive(Clone, Debug)]
pub struct Case {
    pub dtype: DType,
    pub dims: Vec<usize>,
    pub layout: Layout,
    pub scale: f64,
    pub ignored: usize,
    pub wide: bool,
    pub opts: CrossEntropyOptions,
}

impl Case {
    pub fn new(dtype: DType, dims: &[usize]) -> Self {
        Self {
            dtype,
            dims: dims.to_vec(),
            layout: Plain,
            scale: 4.0,
            ignored: 3,
            wide: true,
            opts: CrossEntropyOptions::default(),
        }
    }

    pub fn classes(&self) -> usize {
        self.dims[self.dims.len() - 1]
    }

    /// A class for each row, or `None`.
    pub fn targets(&self, source: &mut Source) -> Vec<Option<usize>> {
        let rows = self.dims[..self.dims.len() - 1].iter().product();
        let classes = self.classes() as u64;
        (0..rows)
            .map(|row| {
                let class = (source.bits() % classes) as usize;
                (self.ignored == 0 || row % self.ignored != self.ignored - 1).then_some(class)
            })
            .collect()
    }

    /// As the call takes them, and its options: with targets of u32 the ignored one is no class, either.
    pub fn given(
        &self,
        targets: &[Option<usize>],
        device: &Device,
    ) -> Result<(Tensor, CrossEntropyOptions)> {
        let dims = &self.dims[..self.dims.len() - 1];
        match self.wide {
            true => {
                let of = |t: &Option<usize>| t.map_or(IGNORED, |t| t as i64);
                let targets = targets.iter().map(of).collect::<Vec<_>>();
                Ok((Tensor::from_vec(targets, dims, device)?, self.opts))
            }
            false => {
                let ignored = self.classes() as u32 + 7;
                let of = |t: &Option<usize>| t.map_or(ignored, |t| t as u32);
                let targets = targets.iter().map(of).collect::<Vec<_>>();
                let opts = self.opts.ignore_index(ignored.into());
                Ok((Tensor::from_vec(targets, dims, device)?, opts))
            }
        }
    }

    fn check(&self, device: &Device) -> Result<()> {
        let Self { dtype, ref dims, layout, scale, .. } = *self;
        let source = &mut Source::new(&format!("{self:?}"), device);
        let base = layout.base(dims);
        let leaf = source.tensor_of(dtype, &base, Plain, |s| s.unit() * scale)?;
        let targets = self.targets(source);
        let (given, opts) = self.given(&targets, device)?;
        let exact = Nd::of(&layout.view(&Nd::of(&leaf)?.tensor(DType::F64)?, dims)?)?;
        let wanted = Reference::new(&exact, &targets, &self.opts);

        let var = Var::from_tensor(&leaf)?;
        // A loss that is one number begins candle's backward pass, which then needs no kernel of candle's that the
        // emulator lacks.
        let one = opts.reduction != Reduction::None;
        let tracked = !results_alone() || one && layout == Plain;
        let tensor = if tracked { var.as_tensor().clone() } else { var.detach() };
        let logits = layout.view(&tensor, dims)?;
        let loss = logits.kaio_cross_entropy(&given, &opts)?;
        let plain_var = Var::from_tensor(&leaf.to_device(&plain_on(device))?)?;
        let plain = plain(&layout.view(&plain_var, dims)?, &targets, &self.opts)?;
        if loss.dtype() != F32 {
            bail!("the loss is {:?}", loss.dtype());
        }
        // Twice the plain formula's error, and what exp and log add in f32 to numbers of this size.
        let size = exact.peak().max((self.classes() as f64).ln()).max(1.0);
        let size = size + f64::from(opts.z_loss) * size * size;
        let rows = if opts.reduction == Reduction::Sum { targets.len().max(1) } else { 1 };
        let allowed = 2.0 * wanted.loss.max_error(&plain)? + 8.0 * ulp(F32, size) * rows as f64;
        close("loss", &loss, &wanted.loss, |_| allowed)?;
        if !tracked {
            return Ok(());
        }
        // An upstream gradient for each row.
        let weights = source.tensor_of(F32, wanted.loss.dims.as_slice(), Plain, Source::unit)?;
        let weights = if one { weights.ones_like()? } else { weights };
        let root = |loss: &Tensor| match one {
            true => Ok(loss.clone()),
            false => (loss * weights.to_device(loss.device())?)?.sum_all(),
        };
        let grads = root(&loss)?.backward()?;
        let Some(grad) = grads.get(&var) else { bail!("no gradient") };
        let weights = Nd::of(&weights)?.data;
        let plain_grads = root(&plain)?.backward()?;
        let plain_grad = plain_grads.get(&plain_var).expect("candle has it");
        // Back to the leaf, as sums over what the view repeats.
        let of_leaf = |of_view: Nd| {
            let zeros = Var::zeros(base.as_slice(), DType::F64, &Device::Cpu)?;
            let sum = (layout.view(&zeros, dims)? * of_view.tensor(DType::F64)?)?.sum_all()?;
            Nd::of(sum.backward()?.get(&zeros).expect("the sum depends on it"))
        };
        let want = of_leaf(wanted.gradient(&weights))?;
        let allowed = 2.0 * want.max_error(plain_grad)?;
        let peak = want.peak();
        // A probability is as far off, relative to itself, as its exponent is, a difference of numbers of this size.
        let odds = of_leaf(wanted.odds(&weights).map(f64::abs))?;
        close("gradient", grad, &want, |i| {
            allowed
                + ulp(dtype, want.data[i])
                + 8.0 * ulp(F32, peak)
                + 4.0 * ulp(F32, size) * odds.data[i]
        })?;
        identical("logits", &leaf, &Nd::of(var.as_tensor())?)
    }
}

/// In f64.
pub struct Reference {
    pub loss: Nd,
    /// Slopes of each row's loss by its logits, of the reduced loss if there is one.
    slopes: Nd,
    /// What probabilities add to them.
    odds: Nd,
    classes: usize,
    each: bool,
}

impl Reference {
    pub fn new(logits: &Nd, targets: &[Option<usize>], opts: &CrossEntropyOptions) -> Self {
        let (classes, rows) = (logits.dims[logits.dims.len() - 1], targets.len());
        let smoothing = f64::from(opts.label_smoothing);
        let (z_loss, cap) = (f64::from(opts.z_loss), opts.softcap.map(f64::from));
        let counted = targets.iter().flatten().count();
        let share = if opts.reduction == Reduction::Mean { 1.0 / counted as f64 } else { 1.0 };
        let mut losses = vec![0.0; rows];
        let mut slopes = vec![0.0; rows * classes];
        let mut odds = slopes.clone();
        for (row, target) in targets.iter().enumerate() {
            let Some(target) = *target else { continue };
            let x = &logits.data[row * classes..][..classes];
            let tanh = |x: f64| cap.map_or(0.0, |cap| (x / cap).tanh());
            let z: Vec<_> = x.iter().map(|&x| cap.map_or(x, |cap| cap * tanh(x))).collect();
            let max = z.iter().fold(f64::NEG_INFINITY, |max, &z| max.max(z));
            let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
            losses[row] = (1.0 - smoothing) * (lse - z[target]) + z_loss * lse * lse;
            if smoothing > 0.0 {
                losses[row] += smoothing * z.iter().map(|z| lse - z).sum::<f64>() / classes as f64;
            }
            for (class, slope) in slopes[row * classes..][..classes].iter_mut().enumerate() {
                let hot = if class == target { 1.0 - smoothing } else { 0.0 };
                let p = (z[class] - lse).exp() * (1.0 + 2.0 * z_loss * lse);
                let share = share * (1.0 - tanh(x[class]).powi(2));
                *slope = share * (p - hot - smoothing / classes as f64);
                odds[row * classes + class] = share * p;
            }
        }
        let loss = match opts.reduction {
            Reduction::Mean => Nd::full(&[], losses.iter().sum::<f64>() * share),
            Reduction::Sum => Nd::full(&[], losses.iter().sum()),
            _ => Nd { dims: logits.dims[..logits.dims.len() - 1].to_vec(), data: losses },
        };
        let [slopes, odds] = [slopes, odds].map(|data| Nd { dims: logits.dims.clone(), data });
        Self { loss, slopes, odds, classes, each: opts.reduction == Reduction::None }
    }

    /// Of the logits, given the gradients of losses.
    pub fn gradient(&self, upstream: &[f64]) -> Nd {
        self.times(&self.slopes, upstream)
    }

    /// What probabilities add to that.
    fn odds(&self, upstream: &[f64]) -> Nd {
        self.times(&self.odds, upstream)
    }

    fn times(&self, slopes: &Nd, upstream: &[f64]) -> Nd {
        let of = |i: usize| upstream[if self.each { i / self.classes } else { 0 }];
        let data = slopes.data.iter().enumerate();
        Nd { dims: slopes.dims.clone(), data: data.map(|(i, slope)| slope * of(i)).collect() }
    }
}

/// candle's own ops, in f32, which it differentiates.
pub fn plain(
    logits: &Tensor,
    targets: &[Option<usize>],
    opts: &CrossEntropyOptions,
) -> Result<Tensor> {
    let z = logits.contiguous()?.to_dtype(F32)?;
    let z = match opts.softcap {
        Some(cap) => ((z / f64::from(cap))?.tanh()? * f64::from(cap))?,
        None => z,
    };
    let z = z.flatten_to(z.rank().max(2) - 2)?;
    let z = if z.rank() == 1 { z.unsqueeze(0)? } else { z };
    let max = z.detach().max_keepdim(D::Minus1)?;
    let lse = (z.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?.log()? + max)?;
    let one = |t: &Option<usize>| t.unwrap_or(0) as u32;
    let at = Tensor::from_vec(targets.iter().map(one).collect(), (targets.len(), 1), z.device())?;
    let smoothing = f64::from(opts.label_smoothing);
    let hot = ((&lse - z.gather(&at, D::Minus1)?)? * (1.0 - smoothing))?;
    let even = ((&lse - z.mean_keepdim(D::Minus1)?)? * smoothing)?;
    let squared = (lse.sqr()? * f64::from(opts.z_loss))?;
    let losses = ((hot + even)? + squared)?.flatten_all()?;
    let counts = targets.iter().map(|t| f32::from(u8::from(t.is_some()))).collect::<Vec<_>>();
    let losses = (losses * Tensor::new(counts, z.device())?)?;
    match opts.reduction {
        Reduction::Mean => losses.sum_all()? / targets.iter().flatten().count() as f64,
        Reduction::Sum => losses.sum_all(),
        _ => losses.reshape(&logits.dims()[..logits.rank() - 1]),
    }
}

/// Rows from a lane's to those of many passes, all dtypes, views, options and reductions.
pub fn values(device: &Device) {
    let mut tally = Tally::new("cross_entropy", device);
    let sizes: [&[usize]; 12] = [
        &[1],
        &[7],
        &[3, 1],
        &[4, 5],
        &[2, 3, 32],
        &[5, 257],
        &[3, 1000],
        &[2, 4096],
        &[9, 2, 130],
        &[3, 5003],
        &[2, 20_480],
        &[2, 50_257],
    ];
    let mut cases: Vec<_> =
        pairs([F32, F16, BF16], sizes).map(|(dtype, dims)| Case::new(dtype, dims)).collect();
    let all = [Reduction::Mean, Reduction::Sum, Reduction::None];
    for (dtype, (i, reduction)) in pairs([F32, F16, BF16], pairs(0..6, all)) {
        let opts = CrossEntropyOptions::default().reduction(reduction);
        let opts = match i {
            0 => opts,
            1 => opts.label_smoothing(0.1),
            2 => opts.z_loss(1e-2),
            3 => opts.softcap(3.0),
            4 => opts.softcap(30.0).label_smoothing(0.3).z_loss(1e-3),
            _ => opts.label_smoothing(1.0),
        };
        let case = Case { opts, wide: i % 2 == 0, ..Case::new(dtype, &[2, 7, 72]) };
        cases.push(Case { ignored: 0, ..case.clone() });
        cases.push(Case { dims: vec![3, 2053], ..case.clone() });
        cases.push(case);
    }
    let layouts = [Layout::Transposed, Layout::Narrowed, Layout::Rows, Layout::Columns];
    for (dtype, layout) in pairs([F32, F16, BF16], layouts) {
        for dims in [&[2, 6, 16][..], &[3, 2, 1031]] {
            cases.push(Case { layout, ..Case::new(dtype, dims) });
        }
    }
    for dtype in [F32, F16, BF16] {
        cases.push(Case { ignored: 1, ..Case::new(dtype, &[3, 24]) });
    }
    for layout in [Layout::Repeated, Layout::Expanded] {
        cases.push(Case { layout, ..Case::new(F32, &[2, 6, 16]) });
    }
    // Probabilities of 0 and 1, and logits whose exponentials are infinite.
    for (dtype, scale) in [(F32, 200.0), (F32, 1e30), (F16, 6e4), (BF16, 3e4), (BF16, 1e30)] {
        cases.push(Case { scale, ..Case::new(dtype, &[5, 40]) });
    }
    for case in &cases {
        tally.case(format!("{case:?}"), || case.check(device));
    }
    tally.finish();
}

/// What PyTorch does with them.
pub fn specials(device: &Device) {
    let mut tally = Tally::new("cross_entropy specials", device);
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows: [[f32; 3]; 8] = [
        [0.0, -inf, 0.0],
        [-inf, 0.0, 1.0],
        [-inf, -inf, -inf],
        [inf, 0.0, 0.0],
        [0.0, 0.0, nan],
        [nan, nan, nan],
        [f32::MAX, -f32::MAX, 0.0],
        [-f32::MAX, -f32::MAX, -f32::MAX],
    ];
    let none = CrossEntropyOptions::default().reduction(Reduction::None);
    let of = |targets: Vec<i64>, opts: &CrossEntropyOptions| {
        let (logits, targets) = (Tensor::new(&rows, device)?, Tensor::new(targets, device)?);
        logits.kaio_cross_entropy(&targets, opts)?.to_vec1::<f32>()
    };
    let check = |got: Vec<f32>, want: [f32; 8]| {
        let near = |got: f32, want: f32| {
            got == want || got.is_nan() && want.is_nan() || (got - want).abs() < 1e-6
        };
        match got.iter().zip(want).all(|(&got, want)| near(got, want)) {
            true => Ok(()),
            false => bail!("{got:?}, wanted {want:?}"),
        }
    };
    let (two, three) = (2f32.ln(), 3f32.ln());
    tally.case("plain", || {
        let got = of(vec![0, 0, 0, 0, 0, 0, 0, 0], &none)?;
        check(got, [two, inf, nan, nan, nan, nan, 0.0, three])
    });
    tally.case("ignored", || check(of(vec![IGNORED; 8], &none)?, [0.0; 8]));
    tally.case("smoothed", || {
        let got = of(vec![0; 8], &none.label_smoothing(0.5))?;
        check([&got[..6], &[0.0; 2]].concat(), [inf, inf, nan, nan, nan, nan, 0.0, 0.0])
    });
    tally.case("capped", || {
        let got = of(vec![0; 8], &none.softcap(2.0))?;
        let lse = |z: [f32; 3]| z.iter().map(|z| z.exp()).sum::<f32>().ln();
        let (low, high) = (lse([0.0, -2.0, 0.0]), lse([2.0, 0.0, 0.0]) - 2.0);
        let second = lse([-2.0, 0.0, 2.0 * 0.5f32.tanh()]) + 2.0;
        check(got, [low, second, three, high, nan, nan, lse([2.0, -2.0, 0.0]) - 2.0, three])
    });
    tally.case("all ignored", || {
        let logits = Var::ones((2, 3), F32, device)?;
        let targets = Tensor::new(&[IGNORED; 2], device)?;
        let loss = logits.kaio_cross_entropy(&targets, &CrossEntropyOptions::default())?;
        if !loss.to_scalar::<f32>()?.is_nan() {
            bail!("{loss}, wanted NaN");
        }
        let grads = loss.backward()?;
        close(
            "gradient",
            grads.get(&logits).expect("it is tracked"),
            &Nd::full(&[2, 3], 0.0),
            |_| 0.0,
        )
    });
    for opts in [CrossEntropyOptions::default(), none.reduction(Reduction::Sum), none] {
        for dims in [[0, 4], [0, 0]] {
            tally.case(format!("{dims:?} {:?}", opts.reduction), || {
                let logits = Var::zeros(&dims, BF16, device)?;
                let targets = Tensor::zeros(0, DType::U32, device)?;
                let loss = logits.kaio_cross_entropy(&targets, &opts)?;
                let want = match opts.reduction {
                    Reduction::Mean => Nd::full(&[], f64::NAN),
                    Reduction::Sum => Nd::full(&[], 0.0),
                    _ => Nd::full(&[0], 0.0),
                };
                close("loss", &loss, &want, |_| 0.0)?;
                let grads = backward_of_sum(&loss)?;
                close(
                    "gradient",
                    grads.get(&logits).expect("tracked"),
                    &Nd::full(&dims, 0.0),
                    |_| 0.0,
                )
            });
        }
    }
    // Nobody waits for a GPU to say so: its row is NaN, and no other one.
    if !device.is_cpu() {
        tally.case("out of range", || {
            for (class, wide) in
                [(3, true), (-1, true), (i64::MAX, true), (1 << 32, true), (3, false)]
            {
                let logits = Var::zeros((2, 3), F32, device)?;
                let targets = match wide {
                    true => Tensor::new(&[class, 1], device)?,
                    false => Tensor::new(&[class as u32, 1], device)?,
                };
                let got = logits.kaio_cross_entropy(&targets, &none)?.to_vec1::<f32>()?;
                if !got[0].is_nan() || (got[1] - three).abs() > 1e-6 {
                    bail!("{got:?} of target {class}");
                }
                let sum = none.reduction(Reduction::Sum);
                let grads = logits.kaio_cross_entropy(&targets, &sum)?.backward()?;
                let grad = grads.get(&logits).expect("tracked").to_vec2::<f32>()?;
                if !grad[0].iter().all(|x| x.is_nan()) || grad[1].iter().any(|x| x.is_nan()) {
                    bail!("{grad:?} of target {class}");
                }
            }
            Ok(())
        });
    }
    tally.finish();
}
