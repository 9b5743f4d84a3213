//! Rotary position embeddings and their gradient.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::Layout::{self, Plain};
use super::{Nd, Source, Tally, close, identical, pairs, results_alone, ulp};

#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    angles: DType,
    /// `[.., positions, D]`.
    dims: Vec<usize>,
    /// Elements that are turned.
    turned: usize,
    /// Positions that have angles, over those of x; and whether each batch has its own.
    more: usize,
    batched: bool,
    layout: RopeLayout,
    /// Of x, the angles and the upstream gradient.
    layouts: [Layout; 3],
}

impl Case {
    fn new(dtype: DType, dims: &[usize], turned: usize, layout: RopeLayout) -> Self {
        let (dims, layouts) = (dims.to_vec(), [Plain; 3]);
        Self { dtype, angles: dtype, dims, turned, more: 0, batched: false, layout, layouts }
    }

    fn check(&self, device: &Device) -> Result<()> {
        let Self { dtype, angles, ref dims, turned, more, batched, layout, layouts } = *self;
        let source = &mut Source::new(&format!("{self:?}"), device);
        let rank = dims.len();
        let base = layouts[0].base(dims);
        let var = Var::from_tensor(&source.tensor(dtype, &base, Plain)?)?;
        let x = layouts[0].view(var.as_tensor(), dims)?;
        let batches: usize = dims[..rank.saturating_sub(3)].iter().product();
        let mut of_angles = vec![dims[rank - 2] + more, turned / 2];
        if batched {
            of_angles.insert(0, batches);
        }
        let [cos, sin] = [0, 1].map(|_| source.tensor(angles, &of_angles, layouts[1]));
        let (cos, sin) = (cos?, sin?);
        let upstream = source.tensor(dtype, dims, layouts[2])?;
        let mut out = None;
        let backward = Backward::of(|| {
            out = Some(x.kaio_rope(&cos, &sin, layout)?);
            Ok(())
        })?;
        let out = out.expect("it was computed");
        if !out.is_contiguous() || out.dtype() != dtype || out.dims() != dims.as_slice() {
            bail!("the result is {:?} {:?}", out.dtype(), out.layout());
        }
        let grads = backward.run(&[Some(upstream.clone())])?;
        let Some(Some(grad)) = grads.into_iter().next() else { bail!("no gradient") };
        let exact = Nd::of(&x)?;
        let table = [Nd::of(&cos)?, Nd::of(&sin)?];
        for (name, got, from, sign) in
            [("out", &out, &exact, 1.0), ("dx", &grad, &Nd::of(&upstream)?, -1.0)]
        {
            let want = self.turn(from, &table, sign);
            // Two products and a sum, each rounded in f32, and the result.
            close(name, got, &want, |i| ulp(dtype, want.data[i]) + 2.0 * ulp(F32, 1.0))?;
        }
        if !results_alone() {
            let store = (out * &upstream)?.sum_all()?.backward()?;
            if store.get(&var).is_none() {
                bail!("no gradient through candle");
            }
        }
        identical("x", &x, &exact)
    }

    /// By a matrix for each pair.
    fn turn(&self, x: &Nd, [cos, sin]: &[Nd; 2], sign: f64) -> Nd {
        let rank = self.dims.len();
        let (d, positions) = (self.dims[rank - 1], self.dims[rank - 2]);
        let heads = if rank > 2 { self.dims[rank - 3] } else { 1 };
        let half = self.turned / 2;
        let mut out = x.clone();
        for (row, (out, x)) in out.data.chunks_exact_mut(d).zip(x.data.chunks_exact(d)).enumerate()
        {
            let (position, batch) = (row % positions, row / positions / heads);
            let batch = if self.batched { batch } else { 0 };
            for pair in 0..half {
                let at = (batch * (positions + self.more) + position) * half + pair;
                let (cos, sin) = (cos.data[at], sign * sin.data[at]);
                let [i, j] = match self.layout {
                    RopeLayout::Halves => [pair, half + pair],
                    RopeLayout::Interleaved => [2 * pair, 2 * pair + 1],
                };
                out[i] = cos * x[i] - sin * x[j];
                out[j] = sin * x[i] + cos * x[j];
            }
        }
        out
    }
}

pub fn rope(device: &Device) {
    const KINDS: [RopeLayout; 2] = [RopeLayout::Halves, RopeLayout::Interleaved];
    let mut tally = Tally::new("rope", device);
    let mut cases = vec![];
    let sizes: [(&[usize], usize); 10] = [
        (&[3, 2], 2),
        (&[5, 16], 16),
        (&[3, 5, 32], 32),
        (&[2, 5, 7, 64], 64),
        (&[2, 3, 4, 80], 32),
        (&[1, 6, 9, 7], 4),
        (&[1, 1, 300, 128], 128),
        (&[2, 1, 2, 4, 16], 16),
        (&[2, 3, 5], 0),
        (&[1, 9, 2, 24], 16),
    ];
    for (dtype, ((dims, turned), layout)) in pairs([F32, F16, BF16], pairs(sizes, KINDS)) {
        let case = Case::new(dtype, dims, turned, layout);
        cases.push(Case { angles: F32, more: 3, ..case.clone() });
        if dims.len() >= 4 {
            cases.push(Case { batched: true, ..case.clone() });
        }
        cases.push(case);
    }
    for (dtype, (of_x, of_grad)) in pairs([F32, BF16], pairs(Layout::ALL, Layout::ALL)) {
        let layouts = [of_x, Plain, of_grad];
        cases.push(Case { layouts, ..Case::new(dtype, &[2, 3, 6, 16], 16, RopeLayout::Halves) });
    }
    for (layout, of_angles) in pairs(KINDS, Layout::ALL) {
        let layouts = [Plain, of_angles, Plain];
        let case = Case::new(BF16, &[2, 3, 6, 32], 32, layout);
        cases.push(Case { layouts, batched: true, ..case });
    }
    for case in cases {
        tally.case(format!("{case:?}"), || case.check(device));
    }
    tally.case("candle's", || candles(device));
    tally.case("tables of more positions than memory holds", || {
        let mut source = Source::new("tables", device);
        let [x, cos, sin] = [[3, 8], [1, 4], [1, 4]].map(|dims| source.tensor(F32, &dims, Plain));
        let (x, cos, sin) = (x?, cos?, sin?);
        let turned = |positions: usize| {
            let table = |t: &Tensor| t.broadcast_as((positions, 4));
            x.kaio_rope(&table(&cos)?, &table(&sin)?, RopeLayout::Halves)
        };
        identical("out", &turned(1 << 40)?, &Nd::of(&turned(3)?)?)
    });
    for dims in [&[0, 8][..], &[3, 0], &[2, 0, 4, 8], &[0, 2, 4, 8]] {
        tally.case(format!("{dims:?}"), || {
            let angles =
                Tensor::zeros((dims[dims.len() - 2], dims[dims.len() - 1] / 2), F32, device)?;
            let x = Tensor::zeros(dims, F16, device)?;
            let out = x.kaio_rope(&angles, &angles, RopeLayout::Halves)?;
            close("out", &out, &Nd::full(dims, 0.0), |_| 0.0)
        });
    }
    tally.finish();
}

/// The functions of candle-nn whose place it takes.
fn candles(device: &Device) -> Result<()> {
    let mut source = Source::new("candle's", device);
    let x = source.tensor(F32, &[2, 3, 5, 16], Plain)?;
    let [cos, sin] = [0, 1].map(|_| source.tensor(F32, &[5, 8], Plain));
    let (cos, sin) = (cos?, sin?);
    let [x_host, cos_host, sin_host] = [&x, &cos, &sin].map(|t| t.to_device(&Device::Cpu));
    let (x_host, cos_host, sin_host) = (x_host?, cos_host?, sin_host?);
    for (layout, theirs) in [
        (RopeLayout::Halves, candle_nn::rotary_emb::rope(&x_host, &cos_host, &sin_host)?),
        (RopeLayout::Interleaved, candle_nn::rotary_emb::rope_i(&x_host, &cos_host, &sin_host)?),
    ] {
        let want = Nd::of(&theirs)?;
        close("out", &x.kaio_rope(&cos, &sin, layout)?, &want, |_| 2.0 * ulp(F32, 1.0))?;
    }
    Ok(())
}
