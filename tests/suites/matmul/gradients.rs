//! Gradients of products, whatever upstream gradient comes.

use candle_core::{D, DType, Device, Error, Result, Tensor, Var, bail};

use super::{BATCHES, DTYPES, EMPTY, METHODS, Method, SIZES};
use crate::suites::Layout::{self, *};
use crate::suites::{Nd, Source, Tally, close, pairs, plain_product, product, ulp};

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
        for (dims, loss) in pairs(EMPTY, [LOSSES[0], LOSSES[1]]) {
            check(Gradient { dims, loss, ..base });
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
