//! References in f64, and how results are compared with them.

use candle_core::{DType, Device, Result, Tensor, bail};
use half::{bf16, f16};

/// A tensor's elements in f64, row-major, on the host: what references compute on.
#[derive(Clone, Debug)]
pub struct Nd {
    pub dims: Vec<usize>,
    pub data: Vec<f64>,
}

impl Nd {
    pub fn of(t: &Tensor) -> Result<Self> {
        let dims = t.dims().to_vec();
        if t.elem_count() == 0 {
            // candle reads an empty view at its offset, which may lie past its storage.
            return Ok(Self { dims, data: Vec::new() });
        }
        let mut t = t.to_device(&Device::Cpu)?;
        if t.dtype() == DType::F8E4M3 {
            // candle 0.11's cast from it to f64 calls itself without end.
            t = t.to_dtype(DType::F32)?;
        }
        let flat = t.to_dtype(DType::F64)?.flatten_all()?;
        Ok(Self { dims, data: flat.to_vec1()? })
    }

    pub fn full(dims: &[usize], value: f64) -> Self {
        Self { dims: dims.to_vec(), data: vec![value; dims.iter().product()] }
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { dims: self.dims.clone(), data: self.data.iter().map(|&x| f(x)).collect() }
    }

    /// On the CPU.
    pub fn tensor(&self, dtype: DType) -> Result<Tensor> {
        Tensor::from_slice(&self.data, self.dims.as_slice(), &Device::Cpu)?.to_dtype(dtype)
    }

    /// The largest finite magnitude, 0 if there is none.
    pub fn peak(&self) -> f64 {
        self.data.iter().filter(|x| x.is_finite()).fold(0.0, |peak, x| peak.max(x.abs()))
    }

    /// The largest error of `got` where both are finite: what the plain formula is allowed.
    pub fn max_error(&self, got: &Tensor) -> Result<f64> {
        let got = Self::of(got)?;
        assert_eq!(got.dims, self.dims);
        let errors = got.data.iter().zip(&self.data).map(|(got, want)| got - want);
        Ok(errors.filter(|e| e.is_finite()).fold(0.0, |peak, e| peak.max(e.abs())))
    }

    /// The row-major offset of every matrix of `[.., rows, columns]` after its batch dimensions were
    /// broadcast to `batch`.
    pub fn matrices(&self, batch: &[usize]) -> Vec<usize> {
        let (own, matrix) = self.dims.split_at(self.dims.len() - 2);
        let size: usize = matrix.iter().product();
        let count: usize = batch.iter().product();
        let offset = |mut i: usize| {
            let (mut at, mut stride) = (0, size);
            for (axis, len) in batch.iter().enumerate().rev() {
                if let Some(&own) = (axis + own.len()).checked_sub(batch.len()).map(|j| &own[j]) {
                    at += i % len % own * stride;
                    stride *= own;
                }
                i /= len;
            }
            at
        };
        (0..count).map(offset).collect()
    }
}

/// The batch dimensions that two stacks of matrices broadcast to, and M, K, N.
fn sizes(a: &[usize], b: &[usize]) -> (Vec<usize>, [usize; 3]) {
    let ((a_batch, a), (b_batch, b)) = (a.split_at(a.len() - 2), b.split_at(b.len() - 2));
    let rank = a_batch.len().max(b_batch.len());
    let size = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |j| dims[j]);
    let wider = |i| if size(a_batch, i) == 1 { size(b_batch, i) } else { size(a_batch, i) };
    ((0..rank).map(wider).collect(), [a[0], a[1], b[1]])
}

/// candle's own product; candle takes any strides only in one batch dimension.
pub fn plain_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (batch, [m, k, n]) = sizes(a.dims(), b.dims());
    let full = |matrix: [usize; 2]| [batch.as_slice(), &matrix].concat();
    let count: usize = batch.iter().product();
    let a = a.broadcast_as(full([m, k]))?.reshape((count, m, k))?;
    let b = b.broadcast_as(full([k, n]))?.reshape((count, k, n))?;
    a.matmul(&b)?.reshape(full([m, n]))
}

/// `a·b` over `[.., M, K]` and `[.., K, N]`, batch dimensions broadcast.
pub fn product(a: &Nd, b: &Nd) -> Nd {
    let (batch, [m, k, n]) = sizes(&a.dims, &b.dims);
    let mut c = Nd::full(&[batch.as_slice(), &[m, n]].concat(), 0.0);
    for (i, (a0, b0)) in a.matrices(&batch).into_iter().zip(b.matrices(&batch)).enumerate() {
        for row in 0..m {
            let out = &mut c.data[(i * m + row) * n..][..n];
            for p in 0..k {
                let x = a.data[a0 + row * k + p];
                out.iter_mut().zip(&b.data[b0 + p * n..][..n]).for_each(|(sum, y)| *sum += x * y);
            }
        }
    }
    c
}

/// [`product`], and what the largest error of a result in f32 may be: twice that of candle's f32
/// product of `a` and `plain`, and what the order of a sum in f32 can change. `plain` is `b` in the
/// dtype in which the plain formula multiplies it.
pub fn product_within(a: &Nd, b: &Nd, plain: &Nd) -> Result<(Nd, f64)> {
    let want = product(a, b);
    let formula = plain_product(&a.tensor(DType::F32)?, &plain.tensor(DType::F32)?)?;
    let k = b.dims[b.dims.len() - 2] as f64;
    let order = ulp(DType::F32, 1.0) / 2.0 * k * a.peak() * b.peak();
    let allowed = 2.0 * want.max_error(&formula)? + order;
    Ok((want, allowed))
}

/// The distance from |x| to the next larger number of a float dtype.
pub fn ulp(dtype: DType, x: f64) -> f64 {
    let (digits, least) = match dtype {
        DType::F16 => (10, -14),
        DType::BF16 => (7, -126),
        _ => (23, -126),
    };
    // The exponent as it stands in the number.
    let exponent = (x.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    2f64.powi(exponent.clamp(least, 127) - digits)
}

/// Rounds to a float dtype.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        DType::F32 => f64::from(x as f32),
        _ => x,
    }
}

/// Fails with the first element of `got` further than `tol(index)` from the reference. NaN wants
/// NaN; what the dtype of `got` can only hold as an infinity wants that infinity.
pub fn close(what: &str, got: &Tensor, want: &Nd, tol: impl Fn(usize) -> f64) -> Result<()> {
    if got.dims() != want.dims {
        bail!("{what} has shape {:?}, wanted {:?}", got.dims(), want.dims);
    }
    for (i, (got_i, &want_i)) in Nd::of(got)?.data.into_iter().zip(&want.data).enumerate() {
        let rounded = round(got.dtype(), want_i);
        let same = got_i == rounded || (got_i.is_nan() && want_i.is_nan());
        let near = want_i.is_finite() && (got_i - want_i).abs() <= tol(i);
        if !same && !near {
            let at = coordinate(i, &want.dims);
            bail!("{what}{at:?} is {got_i:e}, wanted {want_i:e} to within {:e}", tol(i));
        }
    }
    Ok(())
}

/// Fails unless both tensors hold the same bits.
pub fn identical(what: &str, got: &Tensor, want: &Nd) -> Result<()> {
    let got = Nd::of(got)?;
    let differs = |(a, b): (&f64, &f64)| a.to_bits() != b.to_bits();
    if let Some(i) = got.data.iter().zip(&want.data).position(differs) {
        bail!("{what}{:?} is {}, was {}", coordinate(i, &want.dims), got.data[i], want.data[i]);
    }
    Ok(())
}

fn coordinate(mut i: usize, dims: &[usize]) -> Vec<usize> {
    let mut at = vec![0; dims.len()];
    for (at, len) in at.iter_mut().zip(dims).rev() {
        *at = i % len;
        i /= len;
    }
    at
}

/// What the codes of nf4 stand for (QLoRA, appendix E), as bitsandbytes writes them.
pub const NF4: [f64; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];
