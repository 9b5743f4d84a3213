//! QLoRA (Dettmers et al. 2023): a model whose weights are frozen in four bits learns by low-rank matrices beside them.
//!
//! A small model of characters first learns English, in full precision. Then it is taught Rust, twice: over its weights in
//! bf16, and over the same in nf4, by the same low-rank matrices on all products.
//!
//! ```text
//! cargo run --release --example qlora
//! cargo run --release --features cuda --example qlora
//! ```

use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, loss::cross_entropy};
use kaio_candle::prelude::*;

/// What is known, and what is to be learnt.
const ENGLISH: &str =
    concat!(include_str!("../docs/kernels.md"), include_str!("../docs/notebook.md"));
const RUST: &str = concat!(
    include_str!("../src/ext.rs"),
    include_str!("../src/kernel/glu.rs"),
    include_str!("../src/stack.rs")
);

/// Characters that the next one is guessed from.
const CONTEXT: usize = 12;
/// Bytes of ASCII, and 0 for what is not.
const VOCABULARY: usize = 128;
/// Numbers of a character.
const EMBEDDING: usize = 32;
const HIDDEN: usize = 256;
const BATCH: usize = 128;
const STEPS: usize = 160;
const RANK: usize = 8;

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let (english, rust) = (Text::new(ENGLISH), Text::new(RUST));
    let begin = Instant::now();

    let sizes = [[CONTEXT * EMBEDDING, HIDDEN], [HIDDEN, HIDDEN], [HIDDEN, VOCABULARY]];
    let embedding = Var::randn(0f32, 1.0, (VOCABULARY, EMBEDDING), &device)?;
    let weights = sizes.map(|[k, n]| Var::randn(0f32, (k as f32).powf(-0.5), (k, n), &device));
    let weights = weights.into_iter().collect::<Result<Vec<_>>>()?;
    let all = [vec![embedding.clone()], weights.clone()].concat();
    let full = |embedding: &Var| -> Result<Model> {
        let weights = weights.iter().map(|w| Ok(Weight::Full(w.to_dtype(DType::BF16)?)));
        Ok(Model::new(embedding.as_tensor(), weights.collect::<Result<_>>()?))
    };
    println!("English, all weights in full precision");
    train(&english, all, 2e-3, &device, |text| full(&embedding)?.loss(text))?;

    let frozen = |w: &Var| w.as_detached_tensor().to_dtype(DType::BF16);
    let bf16: Vec<_> =
        weights.iter().map(|w| Ok(Weight::Full(frozen(w)?))).collect::<Result<_>>()?;
    let scheme = QuantScheme::Nf4 { block: 64 };
    let nf4 =
        weights.iter().map(|w| Ok(Weight::Quant(QuantWeight::quantize(&frozen(w)?, &scheme)?)));
    let nf4: Vec<_> = nf4.collect::<Result<_>>()?;
    let mut last = Vec::new();
    for (name, base) in [("bf16", bf16), ("nf4", nf4)] {
        let bytes: usize = base.iter().map(Weight::bytes).sum();
        println!("Rust, over frozen weights in {name}: {bytes} bytes");
        let mut model = Model::new(&embedding.as_detached_tensor(), base);
        model.adapters =
            sizes.iter().map(|&[k, n]| Adapter::new(k, n, &device)).collect::<Result<_>>()?;
        let learnt = model.adapters.iter().flat_map(|lora| [lora.down.clone(), lora.up.clone()]);
        last.push(train(&rust, learnt.collect(), 2e-3, &device, |text| model.loss(text))?);
    }
    println!("on text that neither has seen: {:.3} over bf16, {:.3} over nf4", last[0], last[1]);
    println!("in {:.0} s", begin.elapsed().as_secs_f32());
    Ok(())
}

/// A frozen weight `[K, N]`, or one that is learnt.
enum Weight {
    Full(Tensor),
    Quant(QuantWeight),
}

impl Weight {
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Full(w) => {
                x.kaio_matmul_with(w, &MatmulOptions::default().out_dtype(DType::BF16))
            }
            Self::Quant(w) => x.kaio_matmul_quant(w),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Full(w) => w.elem_count() * w.dtype().size_in_bytes(),
            Self::Quant(w) => w.bytes(),
        }
    }
}

/// What is added to a weight: a product of two thin matrices, of which the second begins as zero.
struct Adapter {
    down: Var,
    up: Var,
}

impl Adapter {
    fn new(k: usize, n: usize, device: &Device) -> Result<Self> {
        let down = Var::randn(0f32, (k as f32).powf(-0.5), (k, RANK), device)?;
        Ok(Self { down, up: Var::zeros((RANK, n), DType::F32, device)? })
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let opts = MatmulOptions::default().out_dtype(DType::BF16);
        let half = |w: &Var| w.to_dtype(DType::BF16);
        x.kaio_matmul_with(&half(&self.down)?, &opts)?.kaio_matmul_with(&half(&self.up)?, &opts)
    }
}

/// Three layers over the characters before.
struct Model {
    embedding: Tensor,
    weights: Vec<Weight>,
    adapters: Vec<Adapter>,
}

impl Model {
    fn new(embedding: &Tensor, weights: Vec<Weight>) -> Self {
        Self { embedding: embedding.clone(), weights, adapters: Vec::new() }
    }

    /// The loss of guesses of the last character of each row of ids.
    fn loss(&self, ids: &Tensor) -> Result<Tensor> {
        let rows = ids.dims()[0];
        let (context, next) = (ids.narrow(1, 0, CONTEXT)?, ids.narrow(1, CONTEXT, 1)?);
        let context = context.contiguous()?.flatten_all()?;
        let embedded = self.embedding.to_dtype(DType::BF16)?.index_select(&context, 0)?;
        let mut x = embedded.reshape((rows, CONTEXT * EMBEDDING))?;
        for (i, weight) in self.weights.iter().enumerate() {
            let mut y = weight.product(&x)?;
            if let Some(adapter) = self.adapters.get(i) {
                y = (y + adapter.product(&x)?)?;
            }
            x = if i + 1 < self.weights.len() { y.silu()? } else { y };
        }
        cross_entropy(&x.to_dtype(DType::F32)?, &next.squeeze(D::Minus1)?.contiguous()?)
    }
}

/// Minimises a loss, prints it, and gives that of the part of the text that was not trained on.
fn train(
    text: &Text,
    vars: Vec<Var>,
    rate: f64,
    device: &Device,
    loss: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<f32> {
    let params = ParamsAdamW { lr: rate, weight_decay: 0.0, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(vars, params)?;
    let unseen = text.batch(text.unseen(), 0, 4 * BATCH, device)?;
    for step in 0..=STEPS {
        if step % (STEPS / 4) == 0 {
            let held_out = loss(&unseen)?.to_scalar::<f32>()?;
            println!("  step {step:4}: loss on unseen text {held_out:.3}");
        }
        if step < STEPS {
            optimizer.backward_step(&loss(&text.batch(text.seen(), step, BATCH, device)?)?)?;
        }
    }
    loss(&unseen)?.to_scalar()
}

/// Characters as numbers.
struct Text(Vec<u32>);

impl Text {
    fn new(text: &str) -> Self {
        Self(text.bytes().map(|byte| if byte.is_ascii() { byte.into() } else { 0 }).collect())
    }

    fn seen(&self) -> &[u32] {
        &self.0[..self.0.len() * 9 / 10]
    }

    fn unseen(&self) -> &[u32] {
        &self.0[self.0.len() * 9 / 10..]
    }

    /// Rows of characters one after another, from places that look random and are the same in each run.
    fn batch(&self, of: &[u32], step: usize, rows: usize, device: &Device) -> Result<Tensor> {
        let places = of.len() - CONTEXT;
        let place =
            |row: usize| ((step * rows + row) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        let row = |row: usize| &of[place(row) as usize % places..][..CONTEXT + 1];
        let ids: Vec<u32> = (0..rows).flat_map(|i| row(i).iter().copied()).collect();
        Tensor::from_vec(ids, (rows, CONTEXT + 1), device)
    }
}
