//! Tables of the f16 and bf16 products and their gradients: a file for each topic.

mod computed;
mod epilogue;
mod gradients;
mod kinds;
mod random_products;
mod training;

pub use {computed::*, epilogue::*, gradients::*, kinds::*, random_products::*, training::*};

use candle_core::{DType, Device, Result, Tensor, bail};
use kaio_candle::prelude::*;
use proptest::prelude::*;

use super::Layout::{self, *};
use super::{Nd, Source, Tally, close, identical, pairs, product_within, property, ulp};

const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

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
const EMPTY: [[&[usize]; 2]; 14] = [
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
    [&[1, 0, 5], &[3, 1, 5, 25]],
    [&[3, 1, 4, 5], &[1, 5, 0]],
];

/// Batch dimensions: none, equal, missing and broadcast on either side.
const BATCHES: [[&[usize]; 2]; 14] = [
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
    property(&mut tally, 128, strategy, |(dtype, batch, (m, k, n), layouts)| {
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
