//! Gated linear units and their gradients.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::Layout::{self, Plain};
use super::{Nd, Source, Tally, close, identical, pairs, plain_on, results_alone, ulp};

/// The two functions: the method, candle's own ops, the formula, and its slope.
struct Function {
    name: &'static str,
    method: fn(&Tensor, &Tensor) -> Result<Tensor>,
    plain: fn(&Tensor) -> Result<Tensor>,
    formula: fn(f64) -> f64,
    slope: fn(f64) -> f64,
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

const ROOT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;

const FUNCTIONS: [Function; 2] = [
    Function {
        name: "swiglu",
        method: |gate, up| gate.kaio_swiglu(up),
        plain: Tensor::silu,
        formula: |x| x * sigmoid(x),
        slope: |x| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))),
    },
    Function {
        name: "geglu",
        method: |gate, up| gate.kaio_geglu(up),
        plain: Tensor::gelu,
        formula: |x| 0.5 * x * (1.0 + (ROOT_2_OVER_PI * (x + 0.044715 * x.powi(3))).tanh()),
        slope: |x| {
            let tanh = (ROOT_2_OVER_PI * (x + 0.044715 * x.powi(3))).tanh();
            let inner = ROOT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x);
            0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner
        },
    },
];

/// One call: gates up to `scale`, the layouts of gate, up and the upstream gradient.
#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    dims: Vec<usize>,
    layouts: [Layout; 3],
    scale: f64,
}

impl Case {
    fn check(&self, function: &Function, device: &Device) -> Result<()> {
        let Self { dtype, ref dims, layouts, scale } = *self;
        let source = &mut Source::new(&format!("{} {self:?}", function.name), device);
        let leaf = |source: &mut Source, i: usize, scale: f64| -> Result<Tensor> {
            let base = layouts[i].base(dims);
            source.tensor_of(dtype, &base, Plain, |s| s.unit() * scale)
        };
        let leaves = [leaf(source, 0, scale)?, leaf(source, 1, 2.0)?];
        let weights = leaf(source, 2, 1.0)?;
        let exact = [&leaves[0], &leaves[1], &weights].map(Nd::of);
        let exact = [&exact[0], &exact[1], &exact[2]].map(|nd| nd.as_ref().expect("readable"));
        let view = |i: usize, t: &Tensor| layouts[i].view(t, dims);
        let views = [0, 1, 2].map(|i| Nd::of(&view(i, &exact[i].tensor(DType::F64)?)?));
        let [gate, up, grad] = views;
        let (gate, up, grad) = (gate?, up?, grad?);

        let run = |leaves: &[Tensor; 2], f: &dyn Fn(&Tensor, &Tensor) -> Result<Tensor>| {
            let tracked = !results_alone();
            let vars = leaves.each_ref().map(Var::from_tensor);
            let [a, b] = vars;
            let (a, b) = (a?, b?);
            let of = |var: &Var| if tracked { var.as_tensor().clone() } else { var.detach() };
            let out = f(&view(0, &of(&a))?, &view(1, &of(&b))?)?;
            if !tracked {
                return Ok((out, None));
            }
            let weights = view(2, &weights.to_device(out.device())?)?;
            let grads = (&out * &weights)?.sum_all()?.backward()?;
            let grad = |var| grads.get(var).cloned().ok_or(candle_core::Error::msg("no gradient"));
            Ok::<_, candle_core::Error>((out, Some([grad(&a)?, grad(&b)?])))
        };
        let (out, grads) = run(&leaves, &function.method)?;
        if !out.is_contiguous() || out.dtype() != dtype || out.dims() != dims.as_slice() {
            bail!("the result is {:?} {:?}", out.dtype(), out.layout());
        }
        let plain_device = plain_on(device);
        let moved = [leaves[0].to_device(&plain_device)?, leaves[1].to_device(&plain_device)?];
        let plain = |gate: &Tensor, up: &Tensor| (function.plain)(&gate.contiguous()?)? * up;
        let (plain_out, plain_grads) = run(&moved, &plain)?;

        let each = |f: &dyn Fn(usize) -> f64| Nd {
            dims: dims.clone(),
            data: (0..gate.data.len()).map(f).collect(),
        };
        let want = each(&|i| (function.formula)(gate.data[i]) * up.data[i]);
        let near = |name: &str, got: &Tensor, want: &Nd, plain: &Tensor| {
            // Twice the plain formula's error, and what exp and division add in f32.
            let allowed = 2.0 * want.max_error(plain)?;
            close(name, got, want, |i| {
                allowed + ulp(dtype, want.data[i]) + 8.0 * ulp(F32, want.data[i])
            })
        };
        near("out", &out, &want, &plain_out)?;
        let Some(([of_gate, of_up], [plain_gate, plain_up])) = grads.zip(plain_grads) else {
            return Ok(());
        };
        let wanted = [
            each(&|i| grad.data[i] * up.data[i] * (function.slope)(gate.data[i])),
            each(&|i| grad.data[i] * (function.formula)(gate.data[i])),
        ];
        // Back to the leaves, as sums over what the views repeat.
        let pulled = |i: usize| -> Result<Nd> {
            let var = Var::from_tensor(&exact[i].map(|_| 0.0).tensor(DType::F64)?)?;
            let sum = (view(i, var.as_tensor())? * wanted[i].tensor(DType::F64)?)?.sum_all()?;
            Nd::of(sum.backward()?.get(&var).expect("the sum depends on it"))
        };
        near("dgate", &of_gate, &pulled(0)?, &plain_gate)?;
        near("dup", &of_up, &pulled(1)?, &plain_up)?;
        for (leaf, before) in leaves.iter().zip(exact) {
            identical("input", leaf, before)?;
        }
        Ok(())
    }
}

/// Every layout of each operand and of the gradient, sizes around a thread's and a block's, all dtypes.
pub fn glu(device: &Device) {
    let mut tally = Tally::new("glu", device);
    let plain = |dtype, dims: &[usize]| Case {
        dtype,
        dims: dims.to_vec(),
        layouts: [Plain; 3],
        scale: 4.0,
    };
    let sizes: [&[usize]; 10] = [
        &[1],
        &[13],
        &[3, 1],
        &[1, 8],
        &[5, 7],
        &[2, 3, 24],
        &[300, 8],
        &[3, 2056],
        &[2, 2, 3, 130],
        &[7, 4099],
    ];
    let mut cases: Vec<_> =
        pairs([F32, F16, BF16], sizes).map(|(t, dims)| plain(t, dims)).collect();
    // candle's own sums of gradients over repeated views are rounded in their dtype.
    let layouts = [Plain, Layout::Transposed, Layout::Narrowed, Layout::Rows, Layout::Columns];
    for ((dtype, i), (j, l)) in pairs(pairs([F32, F16, BF16], 0..5), pairs(0..5, 0..5)) {
        let layouts = [layouts[i], layouts[j], layouts[l]];
        cases.push(Case { layouts, ..plain(dtype, &[2, 6, 16]) });
    }
    for layout in [Layout::Repeated, Layout::Expanded] {
        cases.push(Case { layouts: [Plain, Plain, layout], ..plain(F32, &[2, 6, 16]) });
    }
    // Where σ is 0 or 1, and where the powers of x are infinite.
    for (dtype, scale) in [(F32, 50.0), (F32, 1e30), (F16, 6e4), (BF16, 1e30)] {
        cases.push(Case { scale, ..plain(dtype, &[4, 64]) });
    }
    for (case, function) in cases.iter().flat_map(|case| FUNCTIONS.iter().map(move |f| (case, f))) {
        tally.case(format!("{} {case:?}", function.name), || case.check(function, device));
    }
    for function in &FUNCTIONS {
        for dims in [&[0][..], &[3, 0], &[0, 8], &[2, 0, 8]] {
            tally.case(format!("{} {dims:?}", function.name), || empty(function, dims, device));
        }
        // The second: rows do not begin at multiples of 16 bytes, though the first one does.
        for (width, cols) in [(48, 24), (20, 8)] {
            tally.case(format!("{}: {cols} of {width} columns", function.name), || {
                parts(function, device, width, cols)
            });
        }
        tally.case(format!("{}: NaN and infinities", function.name), || specials(function, device));
    }
    tally.finish();
}

fn empty(function: &Function, dims: &[usize], device: &Device) -> Result<()> {
    let [gate, up] = [Var::zeros(dims, F16, device)?, Var::zeros(dims, F16, device)?];
    let tracked = !results_alone();
    let of = |var: &Var| if tracked { var.as_tensor().clone() } else { var.detach() };
    let out = (function.method)(&of(&gate), &of(&up))?;
    close("out", &out, &Nd::full(dims, 0.0), |_| 0.0)?;
    if tracked {
        let grads = out.sum_all()?.backward()?;
        for var in [&gate, &up] {
            let Some(grad) = grads.get(var) else { bail!("no gradient") };
            close("gradient", grad, &Nd::full(dims, 0.0), |_| 0.0)?;
        }
    }
    Ok(())
}

/// Read in place, parts of a projection give what two tensors of their own give.
fn parts(function: &Function, device: &Device, width: usize, cols: usize) -> Result<()> {
    let mut source = Source::new("parts", device);
    let projection = source.tensor(BF16, &[3, 5, width], Plain)?;
    let [gate, up] = [0, cols].map(|first| projection.narrow(2, first, cols));
    let (gate, up) = (gate?, up?);
    let own = (function.method)(&gate.contiguous()?, &up.contiguous()?)?;
    identical("parts", &(function.method)(&gate, &up)?, &Nd::of(&own)?)
}

fn specials(function: &Function, device: &Device) -> Result<()> {
    let gate = Tensor::new(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, 1.0], device)?;
    let up = Tensor::new(&[1f32, 1.0, 1.0, f32::NAN, f32::NEG_INFINITY], device)?;
    let got = (function.method)(&gate, &up)?.to_vec1::<f32>()?;
    // -inf · σ(-inf) is NaN, as the formula has it.
    let want = [f32::NAN, f32::INFINITY, f32::NAN, f32::NAN, f32::NEG_INFINITY];
    match got.iter().zip(want).all(|(&got, want)| got == want || got.is_nan() && want.is_nan()) {
        true => Ok(()),
        false => bail!("{got:?}, wanted {want:?}"),
    }
}
