//! Norms of rows and their gradients.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{D, Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::Layout::{self, Plain};
use super::{Nd, Source, Tally, close, identical, pairs, plain_on, results_alone, ulp};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Rms,
    Layer {
        bias: bool,
    },
    /// The sum's gradient comes, too, or does not; or it alone.
    AddRms(Upstream),
    /// The same, with a bias.
    AddLayer(Upstream),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Upstream {
    Normed,
    Sum,
    Both,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Rms,
        Self::Layer { bias: true },
        Self::Layer { bias: false },
        Self::AddRms(Upstream::Normed),
        Self::AddRms(Upstream::Sum),
        Self::AddRms(Upstream::Both),
        Self::AddLayer(Upstream::Normed),
        Self::AddLayer(Upstream::Sum),
        Self::AddLayer(Upstream::Both),
    ];

    fn centred(self) -> bool {
        matches!(self, Self::Layer { .. } | Self::AddLayer(_))
    }
}

/// The inputs of a case, in the order of the method's arguments.
const NAMES: [&str; 4] = ["x", "residual", "weight", "bias"];

#[derive(Clone, Debug)]
struct Case {
    kind: Kind,
    dtype: DType,
    /// Of weight and bias.
    vectors: DType,
    dims: Vec<usize>,
    /// Of x, the residual, and each upstream gradient.
    layouts: [Layout; 3],
    /// What of [`NAMES`] has a gradient.
    tracked: [bool; 4],
    scale: f64,
    eps: f32,
}

/// Normed rows and, of a sum, that sum.
type Outputs = Vec<Tensor>;

impl Case {
    fn new(kind: Kind, dtype: DType, dims: &[usize]) -> Self {
        Self {
            kind,
            dtype,
            vectors: dtype,
            dims: dims.to_vec(),
            layouts: [Plain; 3],
            tracked: [true; 4],
            scale: 3.0,
            eps: 1e-5,
        }
    }

    fn has(&self, input: usize) -> bool {
        match input {
            1 => matches!(self.kind, Kind::AddRms(_) | Kind::AddLayer(_)),
            3 => matches!(self.kind, Kind::Layer { bias: true } | Kind::AddLayer(_)),
            _ => true,
        }
    }

    fn ours(&self, t: &[Option<Tensor>; 4]) -> Result<Outputs> {
        let [x, residual, weight, bias] = t.each_ref().map(Option::as_ref);
        let (x, weight) = (x.expect("there is one"), weight.expect("there is one"));
        match (self.kind, residual) {
            (Kind::AddRms(_), Some(residual)) => {
                let (normed, sum) = x.kaio_add_rms_norm(residual, weight, self.eps)?;
                Ok(vec![normed, sum])
            }
            (Kind::AddLayer(_), Some(residual)) => {
                let (normed, sum) = x.kaio_add_layer_norm(residual, weight, bias, self.eps)?;
                Ok(vec![normed, sum])
            }
            (Kind::Layer { .. }, _) => Ok(vec![x.kaio_layer_norm(weight, bias, self.eps)?]),
            _ => Ok(vec![x.kaio_rms_norm(weight, self.eps)?]),
        }
    }

    /// candle's own ops, in f32 where the dtype is narrower.
    fn plain(&self, t: &[Option<Tensor>; 4]) -> Result<Outputs> {
        let sum = match &t[1] {
            Some(residual) => Some((t[0].as_ref().expect("there is one") + residual)?),
            None => None,
        };
        let x = sum.as_ref().or(t[0].as_ref()).expect("there is one").to_dtype(F32)?;
        let x = match self.kind.centred() {
            true => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
            false => x,
        };
        let variance = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.eps))?;
        let weight = t[2].as_ref().expect("there is one").to_dtype(F32)?;
        let normed = x.broadcast_div(&variance.sqrt()?)?.broadcast_mul(&weight)?;
        let normed = match &t[3] {
            Some(bias) => normed.broadcast_add(&bias.to_dtype(F32)?)?,
            None => normed,
        };
        Ok([Some(normed.to_dtype(self.dtype)?), sum].into_iter().flatten().collect())
    }

    /// The results in f64, of what was normed.
    fn normed(&self, x: &Nd, weight: &Nd, bias: Option<&Nd>) -> Nd {
        let mut out = x.clone();
        for row in out.data.chunks_exact_mut(weight.data.len().max(1)) {
            let (mean, rstd) = self.moments(row);
            for (i, x) in row.iter_mut().enumerate() {
                *x = (*x - mean) * rstd * weight.data[i] + bias.map_or(0.0, |bias| bias.data[i]);
            }
        }
        out
    }

    fn moments(&self, row: &[f64]) -> (f64, f64) {
        let count = row.len() as f64;
        let mean = if self.kind.centred() { row.iter().sum::<f64>() / count } else { 0.0 };
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        (mean, 1.0 / (variance + f64::from(self.eps)).sqrt())
    }

    /// The gradients of what was normed, the weight and the bias in f64: `dx = Jᵀ·(dy·weight)`, of which
    /// `J = rstd · (1 − mean) · (1 − x̂·x̂ᵀ/width)`.
    fn gradients(&self, x: &Nd, weight: &Nd, grad: &Nd, sum_grad: Option<&Nd>) -> [Nd; 3] {
        let width = weight.data.len();
        let mut of_x = sum_grad.cloned().unwrap_or_else(|| Nd::full(&x.dims, 0.0));
        let [mut of_weight, mut of_bias] = [0, 1].map(|_| Nd::full(&[width], 0.0));
        for (at, row) in x.data.chunks_exact(width.max(1)).enumerate() {
            let (mean, rstd) = self.moments(row);
            let normed: Vec<_> = row.iter().map(|x| (x - mean) * rstd).collect();
            let grad = &grad.data[at * width..][..width];
            let g: Vec<_> = grad.iter().zip(&weight.data).map(|(dy, w)| dy * w).collect();
            let along = g.iter().zip(&normed).map(|(g, x)| g * x).sum::<f64>() / width as f64;
            let mut of_row: Vec<_> = g.iter().zip(&normed).map(|(g, x)| g - x * along).collect();
            if self.kind.centred() {
                let mean = of_row.iter().sum::<f64>() / width as f64;
                of_row.iter_mut().for_each(|x| *x -= mean);
            }
            for i in 0..width {
                of_x.data[at * width + i] += of_row[i] * rstd;
                of_weight.data[i] += grad[i] * normed[i];
                of_bias.data[i] += grad[i];
            }
        }
        [of_x, of_weight, of_bias]
    }

    fn check(&self, device: &Device) -> Result<()> {
        let Self { kind, dtype, vectors, ref dims, layouts, scale, .. } = *self;
        let source = &mut Source::new(&format!("{self:?}"), device);
        let width = *dims.last().expect("a dimension");
        let mut inputs: [Option<Tensor>; 4] = [const { None }; 4];
        for (i, input) in inputs.iter_mut().enumerate().filter(|&(i, _)| self.has(i)) {
            let (dtype, layout, scale) =
                if i < 2 { (dtype, layouts[i], scale) } else { (vectors, Plain, 1.0) };
            let dims = if i < 2 { dims } else { &vec![width] };
            let base = layout.base(dims);
            let base = source.tensor_of(dtype, &base, Plain, |s| s.unit() * scale + 0.5)?;
            let var = Var::from_tensor(&base)?;
            let leaf = if self.tracked[i] { var.as_tensor().clone() } else { base };
            *input = Some(layout.view(&leaf, dims)?);
        }
        let before = inputs.iter().flatten().map(Nd::of).collect::<Result<Vec<_>>>()?;
        let with_grads = self.with_grads(source, &inputs)?;
        let (outputs, upstream, grads) = &with_grads;

        let plain_device = plain_on(device);
        let moved = |t: &Tensor| t.to_device(&plain_device)?.contiguous();
        let vars = inputs.each_ref().map(|t| t.as_ref().map(|t| Var::from_tensor(&moved(t)?)));
        let [x, residual, weight, bias] = vars.map(Option::transpose);
        let vars = [x?, residual?, weight?, bias?];
        let plain =
            self.plain(&vars.each_ref().map(|v| v.as_ref().map(|v| v.as_tensor().clone())))?;
        let exact = |i: usize| inputs[i].as_ref().map(Nd::of).transpose();
        let (weight, bias) = (exact(2)?.expect("there is one"), exact(3)?);
        // What is normed is the sum as it was rounded.
        let normed = match outputs.get(1) {
            Some(sum) => {
                let [a, b] = [exact(0)?, exact(1)?].map(|nd| nd.expect("there is one"));
                let data = a.data.iter().zip(&b.data).map(|(a, b)| a + b).collect();
                let want = Nd { dims: dims.clone(), data };
                close("sum", sum, &want, |i| ulp(dtype, want.data[i]))?;
                Nd::of(sum)?
            }
            None => exact(0)?.expect("there is one"),
        };
        // Of terms up to `peak`.
        let near = |name: &str, got: &Tensor, want: &Nd, plain: &Tensor, terms: f64, peak: f64| {
            // Twice the plain formula's error, and what an approximate root and another order of sums make in f32.
            let allowed = 2.0 * want.max_error(plain)?;
            let order = terms.sqrt() * ulp(F32, peak);
            close(name, got, want, |i| {
                let own = want.data[i];
                allowed + ulp(got.dtype(), own) + 8.0 * ulp(F32, own) + order
            })
        };
        for (name, out) in ["out", "sum"].into_iter().zip(outputs) {
            if !out.is_contiguous() || out.dtype() != dtype || out.dims() != dims.as_slice() {
                bail!("{name} is {:?} {:?}", out.dtype(), out.layout());
            }
        }
        let want = self.normed(&normed, &weight, bias.as_ref());
        near("out", &outputs[0], &want, &plain[0], width as f64, want.peak())?;

        let seen: Vec<_> = upstream.iter().map(|t| t.as_ref().map(Nd::of).transpose()).collect();
        let mut seen = seen.into_iter().collect::<Result<Vec<_>>>()?.into_iter();
        let (grad, sum_grad) = (seen.next().flatten(), seen.next().flatten());
        let grad = grad.unwrap_or_else(|| Nd::full(dims, 0.0));
        let [of_x, of_weight, of_bias] = self.gradients(&normed, &weight, &grad, sum_grad.as_ref());
        let mut loss = Tensor::zeros((), F32, &plain_device)?;
        for (out, upstream) in plain.iter().zip(upstream) {
            if let Some(upstream) = upstream {
                loss =
                    (loss + (out.to_dtype(F32)? * moved(upstream)?.to_dtype(F32)?)?.sum_all()?)?;
            }
        }
        let plain_grads = loss.backward()?;
        let rows = (normed.data.len() / width.max(1)) as f64;
        let wants = [&of_x, &of_x, &of_weight, &of_bias];
        let terms = [width as f64, width as f64, rows, rows];
        let steepest = normed.data.chunks(width.max(1)).map(|row| self.moments(row).1);
        let of_row = steepest.fold(0.0, f64::max) * grad.peak() * weight.peak();
        let peaks = [of_row, of_row, of_weight.peak(), of_bias.peak()];
        for (i, grad) in grads.iter().enumerate() {
            let wanted = self.has(i) && self.tracked[i];
            let (name, Some(grad)) = (NAMES[i], grad) else {
                if wanted {
                    bail!("{} has no gradient", NAMES[i]);
                }
                continue;
            };
            if !wanted {
                bail!("{name} is a constant, and has a gradient");
            }
            let plain = plain_grads.get(vars[i].as_ref().expect("it is there"));
            let zeros;
            let plain = match plain {
                Some(plain) => plain,
                None => {
                    zeros = wants[i].tensor(grad.dtype())?.zeros_like()?;
                    &zeros
                }
            };
            near(&format!("d{name}"), grad, wants[i], plain, terms[i], peaks[i])?;
        }
        for (input, before) in inputs.iter().flatten().zip(&before) {
            identical("input", input, before)?;
        }
        if kind == Kind::Rms && !results_alone() {
            self.through_candle(&inputs, upstream, grads)?;
        }
        Ok(())
    }

    /// Results, upstream gradients, and the gradients that the op alone makes of them.
    #[allow(clippy::type_complexity, reason = "of one caller")]
    fn with_grads(
        &self,
        source: &mut Source,
        inputs: &[Option<Tensor>; 4],
    ) -> Result<(Outputs, Vec<Option<Tensor>>, [Option<Tensor>; 4])> {
        let mut outputs = vec![];
        let backward = Backward::of(|| {
            outputs = self.ours(inputs)?;
            Ok(())
        })?;
        let mut upstream = || source.tensor(self.dtype, &self.dims, self.layouts[2]).map(Some);
        let upstream = match self.kind {
            Kind::AddRms(Upstream::Normed) | Kind::AddLayer(Upstream::Normed) => {
                vec![upstream()?, None]
            }
            Kind::AddRms(Upstream::Sum) | Kind::AddLayer(Upstream::Sum) => vec![None, upstream()?],
            Kind::AddRms(Upstream::Both) | Kind::AddLayer(Upstream::Both) => {
                vec![upstream()?, upstream()?]
            }
            _ => vec![upstream()?],
        };
        let at_least_two = |t: &Tensor| if t.rank() < 2 { t.unsqueeze(0) } else { Ok(t.clone()) };
        let of_op = upstream.iter().map(|t| t.as_ref().map(at_least_two).transpose());
        let mut given = backward.run(&of_op.collect::<Result<Vec<_>>>()?)?.into_iter();
        let mut grads = [const { None }; 4];
        for (i, grad) in grads.iter_mut().enumerate().filter(|&(i, _)| self.has(i)) {
            let Some(input) = &inputs[i] else { continue };
            let of_input = given.next().flatten();
            // What is not asked for may be there of x and residual, whose gradients are one.
            let of_input = of_input.filter(|_| i > 1 || self.tracked[i]);
            *grad = of_input.map(|grad| grad.reshape(input.shape())).transpose()?;
        }
        Ok((outputs, upstream, grads))
    }

    /// candle's backward pass gives the same.
    fn through_candle(
        &self,
        inputs: &[Option<Tensor>; 4],
        upstream: &[Option<Tensor>],
        grads: &[Option<Tensor>; 4],
    ) -> Result<()> {
        let [Some(x), _, Some(weight), _] = inputs else { bail!("an input is missing") };
        let [x, weight] = [Var::from_tensor(&x.contiguous()?)?, Var::from_tensor(weight)?];
        let of = |var: &Var, i: usize| {
            if self.tracked[i] { var.as_tensor().clone() } else { var.detach() }
        };
        let out = of(&x, 0).kaio_rms_norm(&of(&weight, 2), self.eps)?;
        let Some(Some(upstream)) = upstream.first() else { bail!("no upstream gradient") };
        let store = (out * upstream)?.sum_all()?.backward()?;
        for (var, grad) in [&x, &weight].into_iter().zip([&grads[0], &grads[2]]) {
            match (store.get(var), grad) {
                (None, None) => {}
                (Some(got), Some(want)) => identical("through candle", got, &Nd::of(want)?)?,
                _ => bail!("a gradient is where none was, or the reverse"),
            }
        }
        Ok(())
    }
}

/// Every layout, sizes around a thread's, a warp's, a team's and a block's, all dtypes.
pub fn norm(device: &Device) {
    let mut tally = Tally::new("norm", device);
    let mut cases = vec![];
    let sizes: [&[usize]; 13] = [
        &[1],
        &[13],
        &[5, 1],
        &[40, 8],
        &[1, 32],
        &[70, 7],
        &[2, 3, 24],
        &[3, 264],
        &[5, 768],
        &[2, 2, 3, 130],
        &[3, 2056],
        &[7, 515],
        &[2, 4096],
    ];
    for (kind, (dtype, dims)) in pairs(Kind::ALL, pairs([F32, F16, BF16], sizes)) {
        cases.push(Case::new(kind, dtype, dims));
    }
    for (kind, dtype) in pairs(Kind::ALL, [F16, BF16]) {
        for dims in [&[9, 72][..], &[4, 9]] {
            cases.push(Case { vectors: F32, ..Case::new(kind, dtype, dims) });
        }
    }
    let layouts = [
        Plain,
        Layout::Transposed,
        Layout::Narrowed,
        Layout::Rows,
        Layout::Columns,
        Layout::Repeated,
        Layout::Expanded,
        Layout::Permuted,
    ];
    for (dtype, (i, j)) in pairs([F32, BF16], pairs(0..8, 0..8)) {
        let kind = Kind::ALL[(i + j) % Kind::ALL.len()];
        let layouts = [layouts[i], layouts[(i + j) % 8], layouts[j]];
        cases.push(Case { layouts, ..Case::new(kind, dtype, &[2, 6, 16]) });
    }
    for tracked in [
        [true, false, false, false],
        [false, false, true, false],
        [false, false, false, true],
        [false, true, false, false],
        [true, true, false, true],
    ] {
        for kind in Kind::ALL {
            let case = Case { tracked, ..Case::new(kind, BF16, &[33, 48]) };
            if (0..4).any(|i| case.has(i) && tracked[i]) {
                cases.push(case);
            }
        }
    }
    // Far from 1, around a large mean, and without eps.
    for (scale, eps) in [(1e-12, 1e-5), (1e15, 1e-5), (100.0, 0.0)] {
        for kind in [Kind::Rms, Kind::Layer { bias: true }] {
            cases.push(Case { scale, eps, ..Case::new(kind, F32, &[6, 100]) });
        }
    }
    for case in cases {
        tally.case(format!("{case:?}"), || case.check(device));
    }
    tally.finish();
}

/// Rows longer than a team of threads holds, and more of them than go at once.
pub fn long_rows(device: &Device) {
    let mut tally = Tally::new("norm of long rows", device);
    let kinds = [Kind::Rms, Kind::Layer { bias: true }, Kind::AddRms(Upstream::Both)];
    for kind in kinds {
        for (dtype, dims) in [
            (BF16, [3, 16_392]),
            (BF16, [2, 40_000]),
            (F32, [3, 8196]),
            (BF16, [2, 8195]),
            (BF16, [2100, 40]),
            (BF16, [700, 513]),
        ] {
            let case = Case::new(kind, dtype, &dims);
            tally.case(format!("{case:?}"), || case.check(device));
        }
    }
    // Parts of rows without a gradient of the rows.
    for kind in [Kind::Rms, Kind::Layer { bias: true }] {
        let case = Case::new(kind, BF16, &[5, 16_392]);
        let case = Case { tracked: [false, false, true, true], ..case };
        tally.case(format!("{case:?}"), || case.check(device));
    }
    tally.finish();
}
