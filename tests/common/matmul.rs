//! Tables of the f16 and bf16 products and their gradients.

use candle_core::{D, DType, Device, Error, Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer};
use kaio_candle::prelude::*;
use proptest::prelude::*;

use super::Layout::{self, *};
use super::{
    Nd, Source, Tally, close, identical, pairs, plain_product, product, product_within, property,
    ulp,
};

pub const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

type Method = fn(&Tensor, &Tensor) -> Result<Tensor>;

/// Every way to ask for a product, and the dtype of what it gives.
const METHODS: [(&str, DType, Method); 5] = [
    ("kaio_matmul_tc", DType::F32, |a, b| a.kaio_matmul_tc(b)),
    ("kaio_matmul_tc_async", DType::F32, |a, b| a.kaio_matmul_tc_async(b)),
    ("kaio_matmul_with", DType::F32, |a, b| a.kaio_matmul_with(b, &MatmulOptions::default())),
    ("kaio_matmul_with f16", DType::F16, |a, b| {
        a.kaio_matmul_with(b, &MatmulOptions::default().out_dtype(DType::F16))
    }),
    ("kaio_matmul_with bf16", DType::BF16, |a, b| {
        a.kaio_matmul_with(b, &MatmulOptions::default().out_dtype(DType::BF16))
    }),
];

/// M, K, N around the tiles of 16, 64 and 128, and primes.
const SIZES: [[usize; 3]; 17] = [
    [1, 1, 1],
    [1, 129, 1],
    [1, 64, 128],
    [128, 1, 64],
    [64, 17, 1],
    [2, 1000, 3],
    [7, 11, 13],
    [31, 97, 53],
    [15, 16, 17],
    [16, 16, 16],
    [17, 15, 16],
    [63, 64, 65],
    [64, 64, 64],
    [65, 63, 64],
    [127, 128, 129],
    [128, 128, 128],
    [129, 127, 128],
];

/// A dimension of size zero in every place.
pub const EMPTY: [[&[usize]; 2]; 12] = [
    [&[0, 5], &[5, 3]],
    [&[4, 0], &[0, 3]],
    [&[4, 5], &[5, 0]],
    [&[0, 0], &[0, 0]],
    [&[2, 0, 5], &[5, 3]],
    [&[2, 4, 0], &[0, 3]],
    [&[2, 4, 5], &[5, 0]],
    [&[0, 4, 5], &[5, 3]],
    [&[0, 4, 5], &[0, 5, 3]],
    [&[0, 4, 5], &[1, 5, 3]],
    [&[2, 4, 0], &[2, 0, 3]],
    [&[1, 4, 5], &[3, 0, 5, 3]],
];

/// Batch dimensions: none, equal, missing and broadcast on either side.
pub const BATCHES: [[&[usize]; 2]; 14] = [
    [&[5, 7], &[7, 3]],
    [&[3, 5, 7], &[7, 4]],
    [&[2, 3, 17, 32], &[32, 5]],
    [&[2, 5, 7], &[2, 7, 3]],
    [&[2, 3, 5, 7], &[2, 3, 7, 4]],
    [&[5, 7], &[3, 7, 4]],
    [&[1, 5, 7], &[4, 7, 3]],
    [&[4, 5, 7], &[1, 7, 3]],
    [&[3, 5, 7], &[2, 3, 7, 4]],
    [&[2, 1, 5, 7], &[3, 7, 4]],
    [&[1, 3, 5, 7], &[5, 1, 7, 4]],
    [&[2, 2, 2, 3, 4], &[2, 1, 2, 4, 3]],
    // Many small products, and a few that are worth threads of their own.
    [&[70, 2, 3], &[70, 3, 2]],
    [&[2, 80, 65], &[2, 65, 51]],
];

pub fn sizes(device: &Device) {
    let mut tally = Tally::new("matmul sizes", device);
    for (dtype, [m, k, n]) in pairs(DTYPES, SIZES) {
        forward_case(&mut tally, device, dtype, [&[m, k], &[k, n]], [Plain, Plain]);
    }
    tally.finish();
}

pub fn empty(device: &Device) {
    let mut tally = Tally::new("matmul empty", device);
    for (dtype, dims) in pairs(DTYPES, EMPTY) {
        for layouts in [[Plain, Plain], [Transposed, Narrowed], [Narrowed, Transposed]] {
            forward_case(&mut tally, device, dtype, dims, layouts);
        }
    }
    tally.finish();
}

pub fn layouts(device: &Device) {
    let mut tally = Tally::new("matmul layouts", device);
    for (dtype, dims) in pairs(DTYPES, BATCHES) {
        for layouts in pairs(Layout::ALL, Layout::ALL) {
            forward_case(&mut tally, device, dtype, dims, layouts.into());
        }
    }
    tally.finish();
}

/// Infinities and NaN give what the formula gives, also beside padding; sums over the result's range
/// are infinite.
pub fn specials(device: &Device) {
    let mut tally = Tally::new("matmul specials", device);
    let sizes: [[usize; 3]; 4] = [[5, 7, 3], [16, 16, 16], [33, 17, 65], [1, 130, 1]];
    for (dtype, [m, k, n]) in pairs(DTYPES, sizes) {
        let case = format!("{dtype:?} {m}x{k}x{n}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let a = source.tensor_of(dtype, &[m, k], Narrowed, Source::special)?;
            let b = source.tensor_of(dtype, &[k, n], Narrowed, Source::special)?;
            check_forward(&a, &b)
        });
    }
    tally.finish();
}

/// Random shapes, layouts and broadcasts.
pub fn random(device: &Device) {
    let mut tally = Tally::new("matmul random", device);
    let size = 0..40usize;
    let layout = prop::sample::select(Layout::ALL.as_slice());
    let batch = prop::collection::vec((0..4usize, 0..3usize), 0..3);
    let strategy = (
        prop::sample::select(DTYPES.as_slice()),
        batch,
        (size.clone(), size.clone(), size),
        (layout.clone(), layout),
    );
    property(&mut tally, strategy, |(dtype, batch, (m, k, n), layouts)| {
        // Each batch dimension is whole on both sides, or 1 on the left or on the right.
        let side =
            |one: usize| batch.iter().map(move |&(len, who)| if who == one { 1 } else { len });
        let a = side(1).chain([m, k]).collect::<Vec<_>>();
        let b = side(2).chain([k, n]).collect::<Vec<_>>();
        let source = &mut Source::new(&format!("{dtype:?} {a:?} {b:?} {layouts:?}"), device);
        let (a, b) = (source.tensor(dtype, &a, layouts.0)?, source.tensor(dtype, &b, layouts.1)?);
        check_forward(&a, &b)
    });
    tally.finish();
}

fn forward_case(
    tally: &mut Tally,
    device: &Device,
    dtype: DType,
    dims: [&[usize]; 2],
    layouts: [Layout; 2],
) {
    let case = format!("{dtype:?} {dims:?} {layouts:?}");
    tally.case(&case, || {
        let mut source = Source::new(&case, device);
        let a = source.tensor(dtype, dims[0], layouts[0])?;
        let b = source.tensor(dtype, dims[1], layouts[1])?;
        check_forward(&a, &b)
    });
}

/// All methods against the f64 loop.
fn check_forward(a: &Tensor, b: &Tensor) -> Result<()> {
    let (na, nb) = (Nd::of(a)?, Nd::of(b)?);
    let (want, allowed) = product_within(&na, &nb, &nb)?;
    for (name, dtype, method) in METHODS {
        let c = method(a, b)?;
        if c.dtype() != dtype {
            bail!("{name} gives {:?}", c.dtype());
        }
        close(name, &c, &want, |i| allowed + ulp(dtype, want.data[i]))?;
    }
    identical("lhs", a, &na)?;
    identical("rhs", b, &nb)
}

/// A loss that is linear in the product `c`; `w` has the shape of `c`.
type Loss = fn(&Tensor, &Tensor) -> Result<Tensor>;

/// Losses that send the product a gradient as it is, transposed, broadcast, added up.
const LOSSES: [(&str, Loss); 5] = [
    ("weighted", |c, w| (c * w)?.sum_all()),
    ("sum", |c, _| c.sum_all()),
    ("transposed", |c, w| (c.t()? * w.t()?)?.sum_all()),
    ("row sums", |c, w| c.sum_keepdim(D::Minus1)?.broadcast_mul(w)?.sum_all()),
    ("expanded", |c, w| c.broadcast_left(2)?.broadcast_mul(w)?.sum_all()),
];

/// A name, the magnitude of the operands, and that of the upstream gradient by row and column.
type Scale = (&'static str, f64, fn(usize, usize) -> f64);

const UNIT: Scale = ("unit", 1.0, |_, _| 1.0);

/// Upstream gradients that f16 cannot hold, whose products with the operands it can.
const SCALES: [Scale; 6] = [
    ("tiny", 3e4, |_, _| 1e-9),
    ("huge", 1e-3, |_, _| 1e6),
    ("tiny rows", 3e4, |row, _| [1e-9, 1e-2][row % 2]),
    ("tiny columns", 3e4, |_, column| [1e-9, 1e-2][column % 2]),
    ("zero rows", 1.0, |row, _| [0.0, 1.0][row % 2]),
    ("infinite", 1.0, |row, column| if row + column == 3 { f64::INFINITY } else { 1.0 }),
];

/// The layouts that show each element of their storage once at most: candle adds up the gradients of
/// repeated ones in the operand's own dtype, which is not ours to judge.
const UNREPEATED: [Layout; 6] = [Plain, Transposed, Narrowed, Rows, Columns, Permuted];

pub fn gradients(device: &Device) {
    let mut tally = Tally::new("matmul gradients", device);
    for base in DTYPES.map(|dtype| Gradient::new(device, dtype)) {
        let mut check = |case: Gradient| case.check(&mut tally, Bound::PlainFormula);
        for ([m, k, n], layouts) in pairs(SIZES, pairs([Plain, Transposed], [Plain, Transposed])) {
            check(Gradient { dims: [&[m, k], &[k, n]], layouts: layouts.into(), ..base });
        }
        for dims in EMPTY {
            check(Gradient { dims, ..base });
        }
        for (dims, layouts) in pairs(BATCHES, pairs(UNREPEATED, UNREPEATED)) {
            check(Gradient { dims, layouts: layouts.into(), ..base });
        }
        for (dims, (repeated, other)) in pairs(BATCHES, pairs([Repeated, Expanded], [Plain, Rows]))
        {
            let (lhs, rhs) = ([false, true], [true, false]);
            check(Gradient { dims, layouts: [repeated, other], tracked: lhs, ..base });
            check(Gradient { dims, layouts: [other, repeated], tracked: rhs, ..base });
        }
        for (dims, loss) in pairs(BATCHES, LOSSES) {
            check(Gradient { dims, loss, ..base });
        }
        // A sum's gradient is 1 in every dtype of the result.
        for (dims, method) in pairs(BATCHES, METHODS) {
            check(Gradient { dims, method, loss: LOSSES[1], ..base });
        }
    }
    tally.finish();
}

/// Gradients that the operands' dtype can hold come out right whatever their upstream gradient was.
pub fn scaled_gradients(device: &Device) {
    let mut tally = Tally::new("matmul scaled gradients", device);
    for base in DTYPES.map(|dtype| Gradient::new(device, dtype)) {
        for (dims, scale) in pairs(BATCHES, SCALES) {
            Gradient { dims, scale, ..base }.check(&mut tally, Bound::Rounding);
        }
    }
    tally.finish();
}

/// What an error in a gradient is measured by.
#[derive(PartialEq)]
enum Bound {
    /// The largest error of the plain formula, whose upstream gradient is in the operands' dtype.
    PlainFormula,
    /// One rounding of each element of the upstream gradient to the operands' precision.
    Rounding,
}

/// One gradient problem.
#[derive(Clone, Copy)]
struct Gradient<'a> {
    device: &'a Device,
    dtype: DType,
    dims: [&'a [usize]; 2],
    layouts: [Layout; 2],
    tracked: [bool; 2],
    method: (&'static str, DType, Method),
    loss: (&'static str, Loss),
    scale: Scale,
}

impl<'a> Gradient<'a> {
    fn new(device: &'a Device, dtype: DType) -> Self {
        let (layouts, tracked) = ([Plain; 2], [true; 2]);
        let (method, loss, scale) = (METHODS[0], LOSSES[0], UNIT);
        Self { device, dtype, dims: [&[], &[]], layouts, tracked, method, loss, scale }
    }

    fn check(self, tally: &mut Tally, bound: Bound) {
        let Self { dtype, dims, layouts, tracked, .. } = self;
        let names = (self.method.0, self.loss.0, self.scale.0);
        let case = format!("{dtype:?} {dims:?} {layouts:?} {tracked:?} {names:?}");
        tally.case(&case, || self.run(&mut Source::new(&case, self.device), bound));
    }

    fn run(self, source: &mut Source, bound: Bound) -> Result<()> {
        let Self { dtype, method: (_, _, method), loss: (_, loss), .. } = self;
        let (_, magnitude, upstream) = self.scale;
        let mut leaf = |i: usize| {
            let base = self.layouts[i].base(self.dims[i]);
            source.tensor_of(dtype, &base, Plain, |s| s.unit() * magnitude)
        };
        let leaves = [leaf(0)?, leaf(1)?];
        let exact = [Nd::of(&leaves[0])?, Nd::of(&leaves[1])?];
        let c = self.product(&exact)?;
        let columns = c.dims[c.dims.len() - 1];
        let mut places = 0..;
        let weight = source.tensor_of(DType::F32, &c.dims, Plain, |s| {
            let place: usize = places.next().expect("endless");
            s.unit() * upstream(place / columns, place % columns)
        })?;

        let got = backward(&leaves, self.tracked, |leaves| {
            let [a, b] = self.operands(leaves)?;
            loss(&method(&a, &b)?.to_dtype(DType::F32)?, &weight)
        })?;

        // The loss is linear in c, so that c's own gradient does not depend on c.
        let dc = {
            let weight = Nd::of(&weight)?.tensor(DType::F64)?;
            let zero = Nd::full(&c.dims, 0.0).tensor(DType::F64)?;
            let [dc, _] =
                backward(&[zero.clone(), zero], [true, false], |[c, _]| loss(c, &weight))?;
            dc.expect("c is tracked")
        };
        let formula = |leaves: &[Tensor; 2], dc: &Tensor| {
            let [da, db] = backward(leaves, [true; 2], |leaves| {
                let [a, b] = self.operands(leaves)?;
                (plain_product(&a, &b)? * dc)?.sum_all()
            })?;
            Ok::<_, Error>([da.expect("tracked"), db.expect("tracked")])
        };
        let cast = |dtype| Ok::<_, Error>([exact[0].tensor(dtype)?, exact[1].tensor(dtype)?]);
        let want = formula(&cast(DType::F64)?, &dc)?;
        let measure = match bound {
            Bound::PlainFormula => {
                formula(&cast(DType::F32)?, &dc.to_dtype(dtype)?.to_dtype(DType::F32)?)?
            }
            Bound::Rounding => {
                let [a, b] = cast(DType::F64)?;
                formula(&[a.abs()?, b.abs()?], &dc.abs()?)?
            }
        };
        for (side, name) in ["lhs gradient", "rhs gradient"].into_iter().enumerate() {
            let want = Nd::of(&want[side])?;
            if bound == Bound::PlainFormula {
                self.check_slopes(source, &exact, side, &Nd::of(&dc)?, &want)?;
            }
            let allowed = match bound {
                Bound::PlainFormula => {
                    let error = want.max_error(&measure[side].to_dtype(dtype)?)?;
                    Nd::full(&want.dims, 2.0 * error)
                }
                Bound::Rounding => Nd::of(&measure[side])?.map(|sum| sum * ulp(dtype, 1.0)),
            };
            match &got[side] {
                Some(got) if got.dtype() != dtype => bail!("{name} is {:?}", got.dtype()),
                Some(got) => {
                    close(name, got, &want, |i| allowed.data[i] + ulp(dtype, want.data[i]))?
                }
                None if self.tracked[side] => bail!("no {name}"),
                None => {}
            }
        }
        Ok(())
    }

    fn operands(&self, [a, b]: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        Ok([self.layouts[0].view(a, self.dims[0])?, self.layouts[1].view(b, self.dims[1])?])
    }

    fn product(&self, [a, b]: &[Nd; 2]) -> Result<Nd> {
        let [a, b] = self.operands([&a.tensor(DType::F64)?, &b.tensor(DType::F64)?])?;
        Ok(product(&Nd::of(&a)?, &Nd::of(&b)?))
    }

    /// The reference against differences of the f64 loop, in two places. Its product is linear in
    /// each operand, so that a whole step is as good as a small one.
    fn check_slopes(
        &self,
        source: &mut Source,
        leaves: &[Nd; 2],
        side: usize,
        dc: &Nd,
        want: &Nd,
    ) -> Result<()> {
        let count = want.data.len() as u64;
        for _ in 0..count.min(2) {
            let i = (source.bits() % count) as usize;
            let at = |step: f64| {
                let mut leaves = leaves.clone();
                leaves[side].data[i] += step;
                let c = self.product(&leaves)?;
                Ok::<_, Error>(c.data.iter().zip(&dc.data).map(|(c, dc)| c * dc).sum::<f64>())
            };
            let (slope, want) = ((at(1.0)? - at(-1.0)?) / 2.0, want.data[i]);
            if (slope - want).abs() > 1e-9 * (1.0 + want.abs()) {
                bail!("the reference of operand {side} at {i} is {want}, its slope {slope}");
            }
        }
        Ok(())
    }
}

/// The gradients of a scalar in its tracked leaves.
fn backward(
    leaves: &[Tensor; 2],
    tracked: [bool; 2],
    loss: impl FnOnce([&Tensor; 2]) -> Result<Tensor>,
) -> Result<[Option<Tensor>; 2]> {
    let vars = [Var::from_tensor(&leaves[0])?, Var::from_tensor(&leaves[1])?];
    let inputs = [0, 1].map(|i| match tracked[i] {
        true => vars[i].as_tensor().clone(),
        false => vars[i].as_detached_tensor(),
    });
    let grads = loss([&inputs[0], &inputs[1]])?.backward()?;
    Ok([0, 1].map(|i| grads.get(&vars[i]).cloned()))
}

/// Two layers with f32 master weights under AdamW learn as they do on candle's own product.
pub fn training(device: &Device) {
    let mut tally = Tally::new("matmul training", device);
    for dtype in DTYPES {
        let case = format!("{dtype:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let mut input = |dims: &[usize]| source.tensor(DType::F32, dims, Plain);
            let (x, y) = (input(&[4, 8, 12])?, input(&[4, 8, 3])?);
            let weights = [input(&[12, 32])?, input(&[32, 3])?];
            let losses = |product: Method| {
                let vars = [Var::from_tensor(&weights[0])?, Var::from_tensor(&weights[1])?];
                let mut adam = AdamW::new_lr(vars.to_vec(), 0.01)?;
                let step = |_| {
                    let layer =
                        |x: &Tensor, w: &Var| product(&x.to_dtype(dtype)?, &w.to_dtype(dtype)?);
                    let out = layer(&layer(&x, &vars[0])?.relu()?, &vars[1])?;
                    let loss = (out - &y)?.sqr()?.mean_all()?;
                    adam.backward_step(&loss)?;
                    loss.to_scalar::<f32>()
                };
                (0..40).map(step).collect::<Result<Vec<_>>>()
            };
            let ours = losses(|a, b| a.kaio_matmul_tc(b))?;
            let plain =
                losses(|a, b| plain_product(&a.to_dtype(DType::F32)?, &b.to_dtype(DType::F32)?))?;
            let apart = ours.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 0.02 * b);
            if apart || ours[39] > ours[0] / 2.0 {
                bail!("losses {ours:?}, with candle's product {plain:?}");
            }
            Ok(())
        });
    }
    tally.finish();
}
