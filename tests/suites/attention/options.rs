//! The options of attention as a table writes them, and what they make of one score.

use candle_core::DType::{self, F32};
use candle_core::{Device, Result, Tensor};
use kaio_candle::prelude::*;

use crate::suites::Layout::{self, Plain};
use crate::suites::Nd;

#[derive(Clone, Debug, Default)]
pub struct Options {
    pub causal: bool,
    pub scale: Option<f32>,
    pub bshd: bool,
    pub left: Option<usize>,
    pub right: Option<usize>,
    pub softcap: Option<f32>,
    pub slopes: Option<Slopes>,
    pub bias: Option<Bias>,
    pub lengths: Lengths,
    /// An f32 result, whatever the inputs are.
    pub wide: bool,
    /// Gradients that are the same bits on each run.
    pub deterministic: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slopes {
    ByHead,
    ByBatch,
}

/// The dimensions of `[B, Hq, Sq, Sk]` that a bias has, and how it lies.
#[derive(Clone, Debug)]
pub struct Bias {
    /// Whether it has its own B, Hq and Sq, where others have 1.
    pub own: [bool; 3],
    /// Leading ones are left out down to this rank.
    pub rank: usize,
    /// The inputs' dtype, if not f32.
    pub narrow: bool,
    pub layout: Layout,
    /// Some elements, and whole rows, are −∞.
    pub hides: bool,
    pub tracked: bool,
}

impl Default for Bias {
    fn default() -> Self {
        let (own, rank, layout) = ([true; 3], 4, Plain);
        Self { own, rank, narrow: false, layout, hides: false, tracked: true }
    }
}

impl Bias {
    pub fn dims(&self, full: [usize; 4]) -> Vec<usize> {
        let [b, h, sq] = [0, 1, 2].map(|i| if self.own[i] { full[i] } else { 1 });
        let dims = [b, h, sq, full[3]];
        let ones = dims[..4 - self.rank].iter().take_while(|&&len| len == 1).count();
        dims[ones..].to_vec()
    }

    pub fn dtype(&self, dtype: DType) -> DType {
        if self.narrow { dtype } else { F32 }
    }
}

/// Which rows count.
#[derive(Clone, Debug, Default)]
pub enum Lengths {
    #[default]
    Whole,
    /// The first of each batch, of q and of k.
    Padded([Option<Vec<u32>>; 2]),
    /// Packed sequences, of q and of k.
    Packed([Vec<u32>; 2]),
}

impl Options {
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }

    /// Whether `kaio_flash_attn` can say them.
    pub fn is_plain(&self) -> bool {
        format!("{self:?}") == format!("{:?}", Self { causal: self.causal, ..Self::default() })
    }

    pub fn out_dtype(&self, dtype: DType) -> DType {
        if self.wide { F32 } else { dtype }
    }

    /// As the method takes them, for q of `[B, Hq, ..]`.
    pub fn build(
        &self,
        [batch, heads]: [usize; 2],
        bias: Option<&Tensor>,
        device: &Device,
    ) -> Result<FlashAttnOptions> {
        let u32s = |values: &Vec<u32>| Tensor::new(values.as_slice(), device);
        let mut opts = FlashAttnOptions::default().causal(self.causal);
        opts.layout = if self.bshd { AttnLayout::Bshd } else { AttnLayout::Bhsd };
        opts.softmax_scale = self.scale;
        opts.window_size_left = self.left;
        opts.window_size_right = self.right;
        opts.softcap = self.softcap;
        opts.bias = bias.cloned();
        opts.out_dtype = self.wide.then_some(F32);
        opts.deterministic = self.deterministic;
        if let Some(slopes) = self.slopes {
            let slopes = self.slopes(slopes, [batch, heads]).tensor(F32)?.to_device(device)?;
            // Every second element of a larger tensor.
            let apart = Tensor::stack(&[&slopes.zeros_like()?, &slopes], slopes.rank())?;
            opts.alibi_slopes = Some(apart.narrow(slopes.rank(), 1, 1)?.squeeze(slopes.rank())?);
        }
        match &self.lengths {
            Lengths::Whole => {}
            Lengths::Padded([q, k]) => {
                opts.seqlens_q = q.as_ref().map(u32s).transpose()?;
                opts.seqlens_k = k.as_ref().map(u32s).transpose()?;
            }
            Lengths::Packed([q, k]) => {
                // At an offset.
                let shifted = |ends: &Vec<u32>| {
                    u32s(&[&[77], ends.as_slice()].concat())?.narrow(0, 1, ends.len())
                };
                opts = opts.cu_seqlens_q(shifted(q)?).cu_seqlens_k(shifted(k)?);
            }
        }
        Ok(opts)
    }

    /// `[Hq]` or `[B, Hq]`; for packed batches with B sequences.
    fn slopes(&self, slopes: Slopes, [batch, heads]: [usize; 2]) -> Nd {
        let batch = match &self.lengths {
            Lengths::Packed([q, _]) => q.len() - 1,
            _ => batch,
        };
        let row = |b: usize| (0..heads).map(move |h| 0.5f64.powi(h as i32 + 1) + b as f64 / 8.0);
        match slopes {
            Slopes::ByHead => Nd { dims: vec![heads], data: row(0).collect() },
            Slopes::ByBatch => {
                Nd { dims: vec![batch, heads], data: (0..batch).flat_map(row).collect() }
            }
        }
    }
}

/// Options over tensors of some size, in f64.
pub struct Rules {
    options: Options,
    pub scale: f64,
    /// B, Hq, Sq, Sk.
    sizes: [usize; 4],
    slopes: Option<Nd>,
    pub bias: Option<Nd>,
}

/// A key that a query sees.
pub struct Key {
    /// Counted in its head.
    pub j: usize,
    /// What ALiBi takes from the score.
    pub penalty: f64,
    pub bias: f64,
    /// Where in the bias that stands.
    pub at: usize,
}

impl Rules {
    pub fn new(options: &Options, sizes: [usize; 4], d: usize, bias: Option<Nd>) -> Self {
        let slopes = options.slopes.map(|by| {
            // As the op gets them.
            options.slopes(by, [sizes[0], sizes[1]]).map(|x| f64::from(x as f32))
        });
        let scale = options.scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
        Self { options: options.clone(), scale, sizes, slopes, bias }
    }

    pub fn heads_of_batch(&self) -> usize {
        self.sizes[1]
    }

    pub fn softcap(&self) -> Option<f64> {
        self.options.softcap.map(f64::from)
    }

    /// The keys that row `i` of all rows of q sees; none if its bias leaves it none.
    pub fn keys(&self, i: usize) -> Vec<Key> {
        let [_, heads, sq, sk] = self.sizes;
        let (b, h, row) = (i / sq / heads, i / sq % heads, i % sq);
        let first = |of: &Option<Vec<u32>>, all| 0..of.as_ref().map_or(all, |of| of[b] as usize);
        let (sequence, rows, keys) = match &self.options.lengths {
            Lengths::Whole => (b, 0..sq, 0..sk),
            Lengths::Padded([q, k]) => (b, first(q, sq), first(k, sk)),
            Lengths::Packed([q, k]) => {
                let range = |ends: &[u32], s: usize| ends[s] as usize..ends[s + 1] as usize;
                match (0..q.len() - 1).find(|&s| range(q, s).contains(&row)) {
                    Some(s) => (s, range(q, s), range(k, s)),
                    None => (0, 0..0, 0..0),
                }
            }
        };
        if !rows.contains(&row) {
            return vec![];
        }
        let Options { causal, left, right, .. } = self.options;
        let right = if causal { Some(0) } else { right };
        let within = |distance: i64, bound: Option<usize>| {
            bound.is_none_or(|bound| distance <= i64::try_from(bound).unwrap_or(i64::MAX))
        };
        let slope = self.slopes.as_ref().map_or(0.0, |slopes| match slopes.dims.len() {
            1 => slopes.data[h],
            _ => slopes.data[sequence * heads + h],
        });
        let seen = keys.clone().filter_map(|j| {
            let (place, key) = (row - rows.start + keys.len(), j - keys.start + rows.len());
            let ahead = key as i64 - place as i64;
            let (bias, at) = self.bias.as_ref().map_or((0.0, 0), |nd| at(nd, [b, h, row, j]));
            let penalty = slope * ahead.abs() as f64;
            (within(ahead, right) && within(-ahead, left)).then_some(Key { j, penalty, bias, at })
        });
        let seen: Vec<_> = seen.collect();
        let open = seen.iter().any(|key| key.bias != f64::NEG_INFINITY);
        if open { seen } else { vec![] }
    }
}

/// An element of a tensor that is broadcast from the right, and where it is.
fn at(nd: &Nd, index: [usize; 4]) -> (f64, usize) {
    let own = nd.dims.iter().zip(&index[4 - nd.dims.len()..]);
    let at = own.fold(0, |at, (&len, &i)| at * len + if len == 1 { 0 } else { i });
    (nd.data[at], at)
}
