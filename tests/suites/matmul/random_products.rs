//! Random products, and their check against sums in f64 that the device computes (cuBLAS on a GPU).

use candle_core::{DType, Device, Result, Tensor, WithDType};
use half::{bf16, f16};
use kaio_candle::prelude::*;

use crate::suites::{
    Layout, Nd, Source, Tally, close, plain_on, plain_product, poison, random_cases, ulp,
};

pub fn random_products(device: &Device) {
    let most = if device.is_cpu() { 90 } else { 700 };
    some_random_products(device, random_cases(device, 60, 3000), most);
}

/// So many, of sizes up to `most`.
pub fn some_random_products(device: &Device, cases: usize, most: usize) {
    candle_core::cuda::set_gemm_reduced_precision_f32(false);
    let mut tally = Tally::new("matmul random products", device);
    for i in 0..cases {
        let case = Case::random("random", i, most, most);
        tally.case(format!("{case:?}"), || case.check(device, &[Engine::Native]));
    }
    tally.finish();
}

/// How an operand lies in memory.
#[derive(Clone, Copy, Debug)]
enum View {
    /// As in the tables.
    Table(Layout),
    /// Inside a larger tensor, but so that lines begin at multiples of 16 bytes.
    Aligned { transposed: bool },
}

/// A product of matrices.
#[derive(Clone, Debug)]
pub struct Case {
    name: String,
    dtype: DType,
    dims: [Vec<usize>; 2],
    views: [View; 2],
    out: DType,
    /// Its dtype, and whether its elements lie side by side.
    bias: Option<(DType, bool)>,
    activation: Option<Activation>,
}

/// A case's tensors.
pub struct Inputs {
    a: Tensor,
    b: Tensor,
    opts: MatmulOptions,
}

impl Inputs {
    pub fn product(&self, engine: Engine) -> Result<Tensor> {
        self.a.kaio_matmul_with(&self.b, &self.opts.clone().engine(engine))
    }
}

impl Case {
    /// The `i`-th of a series, the same on every run. M is at most `m`, N and K at most `nk`.
    pub fn random(series: &str, i: usize, m: usize, nk: usize) -> Self {
        let name = format!("{series} {i}");
        let mut source = Source::new(&name, &Device::Cpu);
        let mut pick = |count: usize| (source.bits() % count as u64) as usize;
        let batch: Vec<_> =
            (0..[0, 0, 0, 1, 1, 2][pick(6)]).map(|_| (1 + pick(3), pick(4))).collect();
        // Small ones, whole units, tiles and their neighbours, anything.
        let mut size = |most: usize| match pick(4) {
            0 => 1 + pick(8.min(most)),
            1 => 8 * (1 + pick((most / 8).max(1))),
            2 => 64 * (1 + pick((most / 64).max(1))) + pick(3) - 1,
            _ => 1 + pick(most),
        };
        let [m, n, k] = [m, nk, nk].map(|most| size(most).min(most));
        let dtypes = [DType::F16, DType::BF16];
        let (dtype, out) = (dtypes[pick(2)], [DType::F32, DType::F16, DType::BF16][pick(3)]);
        // Each batch dimension is whole on both sides, or 1 on one of them.
        let side = |one: usize, matrix: [usize; 2]| {
            let batch = batch.iter().map(|&(len, who)| if who == one { 1 } else { len });
            batch.chain(matrix).collect()
        };
        let dims = [side(1, [m, k]), side(2, [k, n])];
        let views = [0; 2].map(|_| match pick(16) {
            i @ 0..8 => View::Table(Layout::ALL[i]),
            i => View::Aligned { transposed: i % 2 == 0 },
        });
        let bias = (pick(2) == 0).then(|| ([dtype, DType::F32][pick(2)], pick(2) == 0));
        let activation = [
            None,
            None,
            Some(Activation::Relu),
            Some(Activation::GeluTanh),
            Some(Activation::GeluErf),
            Some(Activation::Silu),
        ][pick(6)];
        Self { name, dtype, dims, views, out, bias, activation }
    }

    /// Its tensors, the same on every call, on `device` and on the calling thread's stream.
    pub fn inputs(&self, device: &Device) -> Result<Inputs> {
        let source = &mut Source::new(&format!("{} data", self.name), device);
        let [a, b] = [0, 1].map(|i| match self.views[i] {
            View::Table(layout) => {
                operand(source, self.dtype, &layout.base(&self.dims[i]), device, |base| {
                    layout.view(base, &self.dims[i])
                })
            }
            View::Aligned { transposed } => {
                let (mut base, r) = (self.dims[i].clone(), self.dims[i].len());
                if transposed {
                    base.swap(r - 2, r - 1);
                }
                let (rows, cols) = (base[r - 2], base[r - 1]);
                (base[r - 2], base[r - 1]) = (rows + 8, cols.next_multiple_of(8) + 16);
                operand(source, self.dtype, &base, device, |base| {
                    let inner = base.narrow(r - 2, 3, rows)?.narrow(r - 1, 8, cols)?;
                    if transposed { inner.t() } else { Ok(inner) }
                })
            }
        });
        let mut opts = MatmulOptions::default().out_dtype(self.out);
        opts.activation = self.activation;
        if let Some((dtype, plain)) = self.bias {
            let (row, layout) =
                ([1, self.n()], if plain { Layout::Plain } else { Layout::Columns });
            let bias = operand(source, dtype, &layout.base(&row), device, |base| {
                layout.view(base, &row)?.squeeze(0)
            });
            opts.bias = Some(bias?);
        }
        Ok(Inputs { a: a?, b: b?, opts })
    }

    fn n(&self) -> usize {
        self.dims[1][self.dims[1].len() - 1]
    }

    /// Each engine's product against the sums in f64: its error is at most twice that of cuBLAS in
    /// f32, and what the order of a sum and the last rounding can change.
    pub fn check(&self, device: &Device, engines: &[Engine]) -> Result<()> {
        let inputs = self.inputs(device)?;
        let plain_on = plain_on(device);
        let product = |dtype: DType| {
            // candle has no cast of every pair of types: by way of f32.
            let cast = |t: &Tensor| t.to_device(&plain_on)?.to_dtype(DType::F32)?.to_dtype(dtype);
            let sums = plain_product(&cast(&inputs.a)?, &cast(&inputs.b)?)?;
            let before = match &inputs.opts.bias {
                Some(bias) => sums.broadcast_add(&cast(bias)?)?,
                None => sums.clone(),
            };
            let after = match self.activation {
                Some(Activation::Relu) => before.relu()?,
                Some(Activation::GeluTanh) => before.gelu()?,
                Some(Activation::GeluErf) => before.gelu_erf()?,
                Some(Activation::Silu) => before.silu()?,
                _ => before.clone(),
            };
            Ok::<_, candle_core::Error>([sums, before, after])
        };
        let (exact, plain) = (product(DType::F64)?, product(DType::F32)?);
        let error = |step: usize| {
            let difference = (plain[step].to_dtype(DType::F64)? - &exact[step])?;
            difference.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()
        };
        // The operands are in -1..1.
        let k = self.dims[0][self.dims[0].len() - 1] as f64;
        let order = ulp(DType::F32, 1.0) / 2.0 * k;
        // No activation is steeper than 1.13.
        let allowed = 1.13 * (2.0 * error(0)? + order) + 2.0 * error(2)?;
        let [sums, before, want] = exact.each_ref().map(Nd::of);
        let (sums, before, want) = (sums?, before?, want?);
        let elements = want.data.len() * self.out.size_in_bytes();
        for &engine in engines {
            poison(device, elements.div_ceil(4));
            let got = inputs.product(engine)?;
            close(&format!("{engine:?}"), &got, &want, |i| {
                let argument = ulp(DType::F32, before.data[i]) + ulp(DType::F32, sums.data[i]);
                allowed + argument + ulp(self.out, want.data[i])
            })?;
        }
        Ok(())
    }
}

/// Random numbers in -1..1 in the view of a tensor of shape `base`, NaN outside of it.
fn operand(
    source: &mut Source,
    dtype: DType,
    base: &[usize],
    device: &Device,
    view: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let places = view(&Tensor::zeros(base, DType::U8, &Device::Cpu)?)?;
    let base = match dtype {
        DType::F16 => filled::<f16>(source, base, &places, device),
        DType::BF16 => filled::<bf16>(source, base, &places, device),
        _ => filled::<f32>(source, base, &places, device),
    }?;
    view(&base)
}

fn filled<T: WithDType>(
    source: &mut Source,
    base: &[usize],
    places: &Tensor,
    device: &Device,
) -> Result<Tensor> {
    let mut data = vec![T::from_f64(f64::NAN); base.iter().product()];
    let layout = places.layout();
    let mut offsets = vec![layout.start_offset()];
    for (&len, &stride) in layout.dims().iter().zip(layout.stride()) {
        offsets = offsets.iter().flat_map(|&at| (0..len).map(move |i| at + i * stride)).collect();
    }
    for at in offsets {
        data[at] = T::from_f64(source.unit());
    }
    Tensor::from_vec(data, base, device)
}
