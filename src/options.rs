//! Engines and the options of the `_with` methods.

use candle_core::{DType, Tensor};

mod loss;
pub use loss::{CrossEntropyOptions, Reduction};

/// Who computes on the GPU.
///
/// A CPU tensor is computed by the CPU path under every engine: code written for a GPU
/// runs unchanged on a laptop.
///
/// On a GPU kaio-ops has no backward pass of attention: with [`KaioOps`](Self::KaioOps) an input that tracks a
/// gradient is an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// The fastest engine that supports the problem: native, and kaio-ops for attention on GPUs before compute capability
    /// 8.0.
    #[default]
    Auto,
    /// The kernels of the [`kaio-ops`](https://github.com/dmriding/kaio) crate, for compute capability
    /// 8.0 or later (those of attention for older GPUs, too).
    KaioOps,
    /// This crate's own kernels, for matmul and attention, on compute capability 8.0 or later:
    /// [`docs/kernels.md`] says how they work.
    ///
    /// [`docs/kernels.md`]: https://docs.rs/crate/kaio-candle/latest/source/docs/kernels.md
    Native,
}

/// What the gate of a gated linear unit goes through. No option of a method: each has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `x · σ(x)`.
    Silu,
    /// GELU by its tanh: `½ · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`.
    GeluTanh,
}

/// Which elements of a row [`kaio_rope`](crate::KaioTensorExt::kaio_rope) turns together, of those that it turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// One of the first half with one of the second: GPT-NeoX, Llama of the transformers library; `candle_nn::rotary_emb::rope`.
    Halves,
    /// Neighbours: GPT-J, Llama as it was published; `candle_nn::rotary_emb::rope_i`.
    Interleaved,
}

/// A function of each element of a product, computed in f32.
///
/// An infinity or NaN gives what the formula gives: NaN stays NaN, and −∞ is NaN under all but
/// `Relu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks and Gimpel, 2016): candle's `gelu`.
    GeluTanh,
    /// `x/2 · (1 + erf(x/√2))` (Hendrycks and Gimpel, 2016): candle's `gelu_erf`.
    GeluErf,
    /// `x / (1 + e⁻ˣ)` (Elfwing, Uchibe and Doya, 2017), also called swish: candle's `silu`.
    Silu,
}

/// What a product with a quantised weight makes of its activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activations {
    /// They stay f16 or bf16.
    #[default]
    Float,
    /// Each row is rounded to int8, by a scale that takes its largest magnitude to 127, and multiplied with an int8 weight
    /// in exact integers. A row with an infinite or NaN element gives NaN.
    Int8,
    /// Each row, or each group of 128 elements of a row if the weight has scales of blocks, is rounded to e4m3, by a
    /// scale that takes its largest magnitude to 448, and multiplied with an e4m3 weight.
    Fp8,
}

/// Options of [`kaio_matmul_with`](crate::KaioTensorExt::kaio_matmul_with), which computes
/// `act(A·B + bias)`: sum, bias and activation in f32, rounded to `out_dtype` once at the end; and of
/// [`kaio_matmul_quant_with`](crate::KaioTensorExt::kaio_matmul_quant_with).
///
/// ```
/// use candle_core::DType;
/// use kaio_candle::prelude::*;
///
/// let opts = MatmulOptions::default().out_dtype(DType::BF16).activation(Activation::Silu);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MatmulOptions {
    /// The result's dtype: f32, f16 or bf16. `None` is f32, or with a quantised weight that of the activations. The sum is in f32
    /// in any case.
    pub out_dtype: Option<DType>,
    /// What a quantised weight is multiplied with.
    pub activations: Activations,
    /// `[N]`, added to each row; f32 or the operands' dtype, of any stride, on their device.
    ///
    /// It is an input: its gradient is the upstream gradient summed in f32 over all rows of all
    /// batches, in its own dtype.
    pub bias: Option<Tensor>,
    /// Applied to each element after the bias.
    ///
    /// Where no input tracks a gradient it is part of the product's kernel. Where one does, the
    /// product with its bias is rounded to the result's dtype and kept until the backward pass, and the
    /// activation is that of what was rounded, as it is where a product and an activation are two ops. The slope
    /// of `Relu` is 0 at 0.
    pub activation: Option<Activation>,
    /// f16 or bf16: what both operands, f32, f16 or bf16 each, are cast to before they are multiplied. `None`
    /// takes operands of one dtype, f16 or bf16, as they are.
    ///
    /// Gradients come back in the dtype of each operand, summed in f32: those of f32 weights are f32, and were not rounded
    /// on their way. What was cast is kept for the backward pass. A weight is cast at each use, or once within
    /// [`train::cast_once`](crate::train::cast_once).
    pub compute_dtype: Option<DType>,
    /// Who computes on the GPU.
    pub engine: Engine,
}

impl MatmulOptions {
    /// Sets the result's dtype.
    pub fn out_dtype(mut self, dtype: DType) -> Self {
        self.out_dtype = Some(dtype);
        self
    }

    /// Sets what a quantised weight is multiplied with.
    pub fn activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }

    /// Sets what is added to each row.
    pub fn bias(mut self, bias: Tensor) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Sets what is applied to each element after the bias.
    pub fn activation(mut self, activation: Activation) -> Self {
        self.activation = Some(activation);
        self
    }

    /// Sets what operands are cast to before they are multiplied.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use kaio_candle::prelude::*;
    ///
    /// let x = Tensor::randn(0f32, 1., (10, 64), &Device::Cpu)?;
    /// let weight = Var::randn(0f32, 0.1, (64, 32), &Device::Cpu)?;
    /// let opts = MatmulOptions::default().compute_dtype(DType::BF16);
    /// let grads = x.kaio_matmul_with(&weight, &opts)?.sqr()?.mean_all()?.backward()?;
    /// assert_eq!(grads.get(&weight).map(|grad| grad.dtype()), Some(DType::F32));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn compute_dtype(mut self, dtype: DType) -> Self {
        self.compute_dtype = Some(dtype);
        self
    }

    /// Sets who computes on the GPU.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }
}

/// Options of [`kaio_matmul_int8_with`](crate::KaioTensorExt::kaio_matmul_int8_with), which computes
/// `act(scale · lhs_scales · rhs_scales · Σ (a − zero_point)·b + bias)`: the sum in exact integers, the rest in f32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kaio_candle::prelude::*;
///
/// let per_row = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;
/// let opts = Int8Options::default().scale(0.01).lhs_scales(per_row).zero_point(-3);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Int8Options {
    /// A factor on all results: 1.
    pub scale: f32,
    /// A factor on each row, f32 `[.., M]` or `[.., M, 1]`.
    pub lhs_scales: Option<Tensor>,
    /// A factor on each column, f32, f16 or bf16 `[N]` or `[1, N]`.
    pub rhs_scales: Option<Tensor>,
    /// What stands for 0 in the activations, −128 to 127: 0.
    pub zero_point: i32,
    /// As in [`MatmulOptions`], f32.
    pub bias: Option<Tensor>,
    /// Applied to each element after the bias.
    pub activation: Option<Activation>,
    /// The result's dtype: f32 (`None`), f16 or bf16.
    pub out_dtype: Option<DType>,
}

impl Default for Int8Options {
    fn default() -> Self {
        Self {
            scale: 1.0,
            lhs_scales: None,
            rhs_scales: None,
            zero_point: 0,
            bias: None,
            activation: None,
            out_dtype: None,
        }
    }
}

impl Int8Options {
    /// Sets a factor on all results.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = scale;
        self
    }

    /// Sets a factor on each row.
    pub fn lhs_scales(mut self, scales: Tensor) -> Self {
        self.lhs_scales = Some(scales);
        self
    }

    /// Sets a factor on each column.
    pub fn rhs_scales(mut self, scales: Tensor) -> Self {
        self.rhs_scales = Some(scales);
        self
    }

    /// Sets what stands for 0 in the activations.
    pub fn zero_point(mut self, zero_point: i32) -> Self {
        self.zero_point = zero_point;
        self
    }

    /// Sets what is added to each row.
    pub fn bias(mut self, bias: Tensor) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Sets what is applied to each element after the bias.
    pub fn activation(mut self, activation: Activation) -> Self {
        self.activation = Some(activation);
        self
    }

    /// Sets the result's dtype.
    pub fn out_dtype(mut self, dtype: DType) -> Self {
        self.out_dtype = Some(dtype);
        self
    }
}

/// Options of [`kaio_matmul_fp8`](crate::KaioTensorExt::kaio_matmul_fp8).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Fp8Options {
    /// Of the activations, f32: one element, one for each row (`[.., M]` or `[.., M, 1]`), or one for each 128
    /// elements of a row (`[.., M, ⌈K/128⌉]`). `None` is 1.
    pub lhs_scales: Option<Tensor>,
    /// Of the weight, f32, f16 or bf16: one element, one for each column (`[N]` or `[1, N]`), or one for each 128 × 128 elements
    /// (`[⌈K/128⌉, ⌈N/128⌉]`). `None` is 1.
    pub rhs_scales: Option<Tensor>,
    /// As in [`MatmulOptions`], f32.
    pub bias: Option<Tensor>,
    /// Applied to each element after the bias.
    pub activation: Option<Activation>,
    /// The result's dtype: f32 (`None`), f16 or bf16.
    pub out_dtype: Option<DType>,
}

impl Fp8Options {
    /// Sets the scales of the activations.
    pub fn lhs_scales(mut self, scales: Tensor) -> Self {
        self.lhs_scales = Some(scales);
        self
    }

    /// Sets the scales of the weight.
    pub fn rhs_scales(mut self, scales: Tensor) -> Self {
        self.rhs_scales = Some(scales);
        self
    }

    /// Sets what is added to each row.
    pub fn bias(mut self, bias: Tensor) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Sets what is applied to each element after the bias.
    pub fn activation(mut self, activation: Activation) -> Self {
        self.activation = Some(activation);
        self
    }

    /// Sets the result's dtype.
    pub fn out_dtype(mut self, dtype: DType) -> Self {
        self.out_dtype = Some(dtype);
        self
    }
}

/// How heads and rows lie in the tensors of attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttnLayout {
    /// `[B, H, S, D]`, `[H, S, D]` or `[S, D]`.
    #[default]
    Bhsd,
    /// `[B, S, H, D]`, `[S, H, D]` or `[S, D]`: what a projection followed by a reshape gives.
    Bshd,
}

/// Options of [`kaio_flash_attn_with`](crate::KaioTensorExt::kaio_flash_attn_with) and
/// [`kaio_flash_attn_with_lse`](crate::KaioTensorExt::kaio_flash_attn_with_lse).
///
/// With o = Sk − Sq, the score of query `i` and key `j` is, in f32,
///
/// `softcap · tanh(softmax_scale · q·k / softcap) + bias − slope · |i + o − j|`,
///
/// and the softmax is over the keys that the masks leave. All masks are aligned bottom-right: the last
/// query stands at the last key. A query that sees no key, or only keys with a bias of −∞, gives 0; its
/// log-sum-exp is −∞, and no gradient comes from it.
///
/// A key that `causal`, a window or a length hides never reaches a result, whatever it holds. A bias of −∞
/// is added like any other: it hides a key as long as its score and value are finite, but NaN − ∞ and
/// 0 · NaN are NaN.
///
/// ```
/// use kaio_candle::prelude::*;
///
/// // Each query sees its own key and the 255 before it.
/// let opts = FlashAttnOptions::default().causal(true).window_size_left(255).softmax_scale(0.1);
/// ```
///
/// # Lengths
///
/// Batches of sequences of several lengths come in two forms, which exclude each other:
///
/// - padded, rank 4: `seqlens_q` and `seqlens_k` (or one of them) say how many rows of each batch
///   count. Rows after them have no part in anything, and are 0 in the result;
/// - packed, rank 3: all sequences end to end, `[Tq, Hq, D]` or, by `layout`, `[Hq, Tq, D]`;
///   `cu_seqlens_q` and `cu_seqlens_k` (both) say where each begins and the last ends. Sequence `b`
///   is the rows from entry `b` to before entry `b + 1`; rows of no sequence give 0.
///
/// Sq, Sk and o are then each sequence's own. On the CPU a length that does not fit is an error that
/// names its entry. On a GPU the lengths are not read back, which would make the host wait: the
/// kernels clamp them to the tensor.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct FlashAttnOptions {
    /// Query `i` sees the keys `j <= i + o`. The same as `window_size_right` 0; with another one an error.
    pub causal: bool,
    /// The factor on `q·kᵀ`. `None` is `1/√D`.
    pub softmax_scale: Option<f32>,
    /// Which dimension is heads, and which is rows. The result has the layout of `q`, contiguous.
    pub layout: AttnLayout,
    /// Query `i` sees the keys `j >= i + o − window_size_left`. `None` is no bound.
    pub window_size_left: Option<usize>,
    /// Query `i` sees the keys `j <= i + o + window_size_right`. `None` is no bound.
    pub window_size_right: Option<usize>,
    /// Keeps the magnitude of scores under it, smoothly (Gemma 2): above 0. On a GPU the scores of
    /// f16 and bf16 operands are then good to `softcap` · 2⁻²².
    pub softcap: Option<f32>,
    /// ALiBi (Press, Smith and Lewis, 2021): f32 `[Hq]` or `[B, Hq]`, for packed batches with B the
    /// number of sequences. It has no gradient.
    pub alibi_slopes: Option<Tensor>,
    /// Added to the scores: f32 or the dtype of `q`, `[B, Hq, Sq, Sk]` in this order under each
    /// `layout`, where each but Sk may be 1 and leading ones may be left out. It is read by its
    /// strides and never expanded. Not with packed batches.
    ///
    /// A mask of 0 and 1 is no bias: cast, it would add 1 to the scores of visible keys. It becomes one
    /// by 0 and −∞:
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let visible = Tensor::new(&[[1u8, 1, 0], [1, 1, 1]], &Device::Cpu)?;
    /// let zeros = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu)?;
    /// let hidden = Tensor::full(f32::NEG_INFINITY, (2, 3), &Device::Cpu)?;
    /// let opts = FlashAttnOptions::default().bias(visible.where_cond(&zeros, &hidden)?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// It is an input: its gradient is that of the scores, summed in f32 over what was broadcast, in
    /// its own shape and dtype.
    pub bias: Option<Tensor>,
    /// The result's dtype: that of `q` (`None`) or f32.
    pub out_dtype: Option<DType>,
    /// Packed batches: u32 `[B + 1]` from 0 on, nowhere decreasing, to at most Tq.
    pub cu_seqlens_q: Option<Tensor>,
    /// The same of `k` and `v`.
    pub cu_seqlens_k: Option<Tensor>,
    /// How many rows of each batch of `q` count: u32 `[B]`, at most Sq.
    pub seqlens_q: Option<Tensor>,
    /// How many rows of each batch of `k` and `v` count: u32 `[B]`, at most Sk.
    pub seqlens_k: Option<Tensor>,
    /// Whether gradients have to be the same from run to run, to the last bit.
    ///
    /// Without it they may differ by rounding on GPUs where sums are made by atomic additions, in whichever order
    /// these come: with it they are made in one order, which takes longer there. The result, and everything on the
    /// CPU, is the same in each run in any case.
    pub deterministic: bool,
    /// Who computes on the GPU.
    pub engine: Engine,
}

impl FlashAttnOptions {
    /// Sets whether later keys are hidden from earlier queries.
    pub fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// Sets the factor on `q·kᵀ`; it must be finite.
    pub fn softmax_scale(mut self, scale: f32) -> Self {
        self.softmax_scale = Some(scale);
        self
    }

    /// Sets how heads and rows lie.
    pub fn layout(mut self, layout: AttnLayout) -> Self {
        self.layout = layout;
        self
    }

    /// Sets how many keys before its own a query sees.
    pub fn window_size_left(mut self, keys: usize) -> Self {
        self.window_size_left = Some(keys);
        self
    }

    /// Sets how many keys after its own a query sees.
    pub fn window_size_right(mut self, keys: usize) -> Self {
        self.window_size_right = Some(keys);
        self
    }

    /// Sets under which magnitude scores stay; it must be finite and above 0.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.softcap = Some(cap);
        self
    }

    /// Sets what each head takes from a score for each key of distance.
    pub fn alibi_slopes(mut self, slopes: Tensor) -> Self {
        self.alibi_slopes = Some(slopes);
        self
    }

    /// Sets what is added to the scores.
    pub fn bias(mut self, bias: Tensor) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Sets the result's dtype.
    pub fn out_dtype(mut self, dtype: DType) -> Self {
        self.out_dtype = Some(dtype);
        self
    }

    /// Sets where the sequences of a packed `q` begin, and the last ends.
    pub fn cu_seqlens_q(mut self, ends: Tensor) -> Self {
        self.cu_seqlens_q = Some(ends);
        self
    }

    /// Sets where the sequences of a packed `k` and `v` begin, and the last ends.
    pub fn cu_seqlens_k(mut self, ends: Tensor) -> Self {
        self.cu_seqlens_k = Some(ends);
        self
    }

    /// Sets how many rows of each batch of `q` count.
    pub fn seqlens_q(mut self, lengths: Tensor) -> Self {
        self.seqlens_q = Some(lengths);
        self
    }

    /// Sets how many rows of each batch of `k` and `v` count.
    pub fn seqlens_k(mut self, lengths: Tensor) -> Self {
        self.seqlens_k = Some(lengths);
        self
    }

    /// Sets whether gradients have to be the same from run to run, to the last bit.
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// Sets who computes on the GPU.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }
}
