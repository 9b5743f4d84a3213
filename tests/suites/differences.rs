//! Gradients of the ops of training against central differences of their own values.

use candle_core::DType::{self, BF16, F32};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::Layout::Plain;
use super::{Nd, Source, Tally};

/// An op, from its inputs to its results.
type Call<'a> = dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + 'a;

/// A case: its name, the dtype and the shapes of the inputs that have a gradient, and the op.
struct Case<'a> {
    name: String,
    dtype: DType,
    dims: Vec<&'a [usize]>,
    call: Box<Call<'a>>,
    /// Of a slope, relative to the gradient's norm.
    tolerance: f64,
}

impl<'a> Case<'a> {
    fn new(
        name: &str,
        dtype: DType,
        dims: &[&'a [usize]],
        call: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + 'a,
    ) -> Self {
        // Values in f32 of about 1, a hundred of them, are off by 1e-6 together, and a slope of two over an eighth by 1e-5; what
        // Richardson leaves of slopes of a softmax or a norm is below 1e-3 of the gradient. In 16 bits the gradient is rounded,
        // and what it reads is: by 4e-3 each.
        let tolerance = if dtype == F32 { 2e-3 } else { 2e-2 };
        Self { name: name.into(), dtype, dims: dims.to_vec(), call: Box::new(call), tolerance }
    }

    /// Each input moves along a random direction of ones and minus ones, in which a step takes no element out of what
    /// bf16 holds exactly.
    fn check(&self, device: &Device) -> Result<()> {
        let source = &mut Source::new(&self.name, device);
        let mut random = |dims: &[usize], element: fn(&mut Source) -> f64| {
            Nd::of(&source.tensor_of(F32, dims, Plain, element)?)
        };
        let sixteenths = |s: &mut Source| (s.unit() * 24.0).round() / 16.0;
        let signs = |s: &mut Source| if s.bits().is_multiple_of(2) { 1.0 } else { -1.0 };
        let on_device = |nd: &Nd| nd.tensor(self.dtype)?.to_device(device);

        let x =
            self.dims.iter().map(|dims| random(dims, sixteenths)).collect::<Result<Vec<_>>>()?;
        let vars =
            x.iter().map(|x| Var::from_tensor(&on_device(x)?)).collect::<Result<Vec<_>>>()?;
        let tracked: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let mut results = vec![];
        let backward = Backward::of(|| {
            results = (self.call)(&tracked)?;
            Ok(())
        })?;
        let upstream =
            results.iter().map(|t| random(t.dims(), sixteenths)).collect::<Result<Vec<_>>>()?;
        let given = |(nd, t): (&Nd, &Tensor)| nd.tensor(t.dtype())?.to_device(device).map(Some);
        let given = upstream.iter().zip(&results).map(given).collect::<Result<Vec<_>>>()?;
        let grads = backward.run(&given)?;

        let value = |x: &[Nd]| {
            let x = x.iter().map(on_device).collect::<Result<Vec<_>>>()?;
            let mut sum = 0.0;
            for (t, weights) in (self.call)(&x)?.iter().zip(&upstream) {
                let products = Nd::of(t)?.data.into_iter().zip(&weights.data);
                sum += products.map(|(value, weight)| value * weight).sum::<f64>();
            }
            Ok::<f64, candle_core::Error>(sum)
        };
        for (i, input) in x.iter().enumerate() {
            let Some(Some(grad)) = grads.get(i) else { bail!("input {i} has no gradient") };
            let grad = Nd::of(grad)?;
            let direction = random(&input.dims, signs)?;
            let moved = |by: f64| {
                let mut x = x.clone();
                x[i].data.iter_mut().zip(&direction.data).for_each(|(x, sign)| *x += by * sign);
                value(&x)
            };
            let slope =
                |by: f64| Ok::<f64, candle_core::Error>((moved(by)? - moved(-by)?) / (2.0 * by));
            // What is left are terms of the fourth order (Richardson, 1911).
            let want = (4.0 * slope(1.0 / 16.0)? - slope(1.0 / 8.0)?) / 3.0;
            let got: f64 = grad.data.iter().zip(&direction.data).map(|(g, sign)| g * sign).sum();
            // As large as the slope is in a direction like this one.
            let norm = grad.data.iter().map(|g| g * g).sum::<f64>().sqrt();
            if norm < 1e-3 || (got - want).abs() > self.tolerance * norm {
                bail!("input {i} has the slope {want}, and by its gradient, of norm {norm}, {got}");
            }
        }
        Ok(())
    }
}

/// Norms, losses, rotations, gated units, sums, softmax, embedding and products with activations: attention has a suite of its own.
pub fn ops(device: &Device) {
    let mut tally = Tally::new("differences", device);
    let mut cases = vec![];
    let rows: &[usize] = &[3, 5, 24];
    let width: &[usize] = &[24];
    let one = |t: Tensor| Ok(vec![t]);
    let both = |(a, b): (Tensor, Tensor)| Ok(vec![a, b]);
    cases.extend([
        Case::new("rms_norm", F32, &[rows, width], |x| one(x[0].kaio_rms_norm(&x[1], 1e-3)?)),
        Case::new("layer_norm", F32, &[rows, width, width], |x| {
            one(x[0].kaio_layer_norm(&x[1], Some(&x[2]), 1e-3)?)
        }),
        Case::new("layer_norm without a bias", F32, &[rows, width], |x| {
            one(x[0].kaio_layer_norm(&x[1], None, 1e-3)?)
        }),
        Case::new("add_rms_norm", F32, &[rows, rows, width], move |x| {
            both(x[0].kaio_add_rms_norm(&x[1], &x[2], 1e-3)?)
        }),
        Case::new("add_layer_norm", F32, &[rows, rows, width, width], move |x| {
            both(x[0].kaio_add_layer_norm(&x[1], &x[2], Some(&x[3]), 1e-3)?)
        }),
        Case::new("softmax", F32, &[rows], |x| one(x[0].kaio_softmax()?)),
        Case::new("swiglu", F32, &[rows, rows], |x| one(x[0].kaio_swiglu(&x[1])?)),
        Case::new("geglu", F32, &[rows, rows], |x| one(x[0].kaio_geglu(&x[1])?)),
        Case::new("add", F32, &[rows, rows], |x| one(x[0].kaio_add(&x[1])?)),
    ]);

    let angles = |i: usize, turned: usize| {
        let angles = (0..5 * turned / 2).map(|at| (at as f32 * 0.37 + i as f32).sin());
        Tensor::from_iter(angles, device)?.reshape((5, turned / 2))
    };
    for (layout, turned) in [(RopeLayout::Halves, 24), (RopeLayout::Interleaved, 16)] {
        cases.push(Case::new(&format!("rope {layout:?} {turned}"), F32, &[rows], move |x| {
            one(x[0].kaio_rope(&angles(0, turned)?, &angles(1, turned)?, layout)?)
        }));
    }

    let ids = |of: usize| Tensor::from_iter((0..15).map(|i| (i * i % of) as u32), device);
    cases.push(Case::new("embedding", F32, &[&[7, 24]], move |x| {
        one(x[0].kaio_embedding(&ids(7)?.reshape((3, 5))?)?)
    }));
    let plain = CrossEntropyOptions::default();
    let capped = plain.label_smoothing(0.1).z_loss(0.01).softcap(2.0);
    let losses = [
        ("mean", plain.ignore_index(4)),
        ("sum", capped.reduction(Reduction::Sum)),
        ("each", capped.reduction(Reduction::None)),
    ];
    for (name, opts) in losses {
        let linear = opts;
        cases.push(Case::new(&format!("cross_entropy, {name}"), F32, &[&[15, 24]], move |x| {
            one(x[0].kaio_cross_entropy(&ids(24)?, &opts)?)
        }));
        let name = format!("linear_cross_entropy, {name}");
        let case = Case::new(&name, BF16, &[&[15, 16], &[24, 16]], move |x| {
            one(x[0].kaio_linear_cross_entropy(&x[1], &ids(24)?, &linear)?)
        });
        // Logits of about 4 are rounded to bf16, by up to 8e-3: a loss is off by 3e-3, a mean of 15 by 8e-4, and a slope of
        // two over an eighth by 1e-2, a fortieth of these gradients' norm. Three times that.
        cases.push(Case { tolerance: 8e-2, ..case });
    }

    use Activation::{GeluErf, GeluTanh, Silu};
    for activation in [None, Some(GeluTanh), Some(GeluErf), Some(Silu)] {
        let name = format!("matmul, {activation:?}");
        let call = move |x: &[Tensor]| {
            let opts = MatmulOptions::default().bias(x[2].clone());
            let opts = activation.into_iter().fold(opts, MatmulOptions::activation);
            one(x[0].kaio_matmul_with(&x[1], &opts)?)
        };
        cases.push(Case::new(&name, BF16, &[&[6, 16], &[16, 24], &[24]], call));
    }
    for case in cases {
        tally.case(&case.name, || case.check(device));
    }
    tally.finish();
}
