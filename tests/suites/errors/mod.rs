//! What a user reads after each kind of mistake: the whole text, and the variant behind it.

use candle_core::DType::{self, F16, F32, U8, U32};
use candle_core::{Context, Device, DeviceLocation, Result, Tensor, Var, bail};
use kaio_candle::quant::QuantWeight;
use kaio_candle::{Error, prelude::*, quant};

use super::Tally;

/// Runs `call => Variant, "text"` rows.
macro_rules! refused {
    ($tally:expr; $($call:expr => $variant:ident, $($text:expr),+;)+) => {$({
        let text = format!($($text),+);
        $tally.case(&text, || match $call {
            Ok(_) => bail!("accepted {}", stringify!($call)),
            Err(error) => match Error::of(&error) {
                Some(Error::$variant { .. }) if error.to_string() == text => Ok(()),
                found => bail!("got {error}, {found:?}"),
            },
        });
    })+};
}

// Behind the macro, which it uses.
mod attention;
mod loaders;
mod losses;
mod sizes;
mod train;
mod weights;

pub use attention::{attention_tc, flash_attn, flash_options};
pub use loaders::{awq, checkpoints, compressed_tensors, gptq, nf4};
pub use losses::losses;
pub use sizes::sizes;
pub use train::train;
pub use weights::weights;

/// Zeros on one device.
#[derive(Clone, Copy)]
struct On<'a>(&'a Device);

impl On<'_> {
    fn zeros<const R: usize>(self, dtype: DType, dims: [usize; R]) -> Tensor {
        Tensor::zeros(dims.as_slice(), dtype, self.0).expect("zeros")
    }

    fn f16<const R: usize>(self, dims: [usize; R]) -> Tensor {
        self.zeros(DType::F16, dims)
    }

    fn bf16<const R: usize>(self, dims: [usize; R]) -> Tensor {
        self.zeros(DType::BF16, dims)
    }

    fn f32<const R: usize>(self, dims: [usize; R]) -> Tensor {
        self.zeros(DType::F32, dims)
    }

    fn u8<const R: usize>(self, dims: [usize; R]) -> Tensor {
        self.zeros(DType::U8, dims)
    }

    fn u32<const R: usize>(self, dims: [usize; R]) -> Tensor {
        self.zeros(DType::U32, dims)
    }
}

const ADD: &str = "add a dimension with `.unsqueeze(0)?`";
const HALF: &str = "cast it with `.to_dtype(DType::BF16)?`, which keeps the range of f32, or \
                    `.to_dtype(DType::F16)?`, which keeps three more bits but ends at 65504";
const WORDS: &str = "a cast does not convert GPTQ's words (unsigned nibbles with zero points) nor \
                     AWQ's (packed along N): here nibbles are two's complement, along K, the lowest \
                     first, with no zero points; `QuantWeight::from_gptq` and `from_awq` take those";
const EACH: &str = "one scale for each group of 128 rows and each column";

pub fn matmul(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of matmul", device);
    let with = |a: &Tensor, b: &Tensor| a.kaio_matmul_with(b, &MatmulOptions::default());
    type Named<'a> = (&'a str, &'a dyn Fn(&Tensor, &Tensor) -> Result<Tensor>);
    let methods: [Named; 3] = [
        ("kaio_matmul_tc", &Tensor::kaio_matmul_tc),
        ("kaio_matmul_tc_async", &Tensor::kaio_matmul_tc_async),
        ("kaio_matmul_with", &with),
    ];
    let (a, b) = (on.f16([4, 8]), on.f16([8, 6]));
    for (op, mul) in methods {
        refused! { tally;
            mul(&on.f16([8]), &b) => Rank, "{op}: `lhs` has shape [8] (rank 1), wanted [.., M, K]; {ADD}";
            mul(&a, &on.f16([])) => Rank, "{op}: `rhs` has shape [] (rank 0), wanted [.., K, N]; {ADD}";
            mul(&on.f32([4, 8]), &b) => DType, "{op}: `lhs` is f32, wanted f16 or bf16; {HALF}";
            mul(&on.u8([4, 8]), &b) => DType, "{op}: `lhs` is u8, wanted f16 or bf16; {HALF}";
            mul(&a, &on.bf16([8, 6])) => DType, "{op}: `rhs` is bf16, wanted f16, the dtype of `lhs`; cast it with `.to_dtype(DType::F16)?`";
            mul(&on.bf16([4, 8]), &b) => DType, "{op}: `rhs` is f16, wanted bf16, the dtype of `lhs`; cast it with `.to_dtype(DType::BF16)?`";
            mul(&a, &a) => Dimension, "{op}: `rhs` has K = 4, wanted 8, the K of `lhs` [4, 8]; transpose one with `.t()?` or swap the operands";
            mul(&on.f16([2, 4, 8]), &on.f16([3, 8, 6])) => Batch, "{op}: batch dimensions [3] of `rhs` do not broadcast with [2] of `lhs`; make them equal or 1";
            mul(&on.f16([5, 1, 4, 8]), &on.f16([0, 2, 8, 6])) => Batch, "{op}: batch dimensions [0, 2] of `rhs` do not broadcast with [5, 1] of `lhs`; make them equal or 1";
        }
    }
    let out = |dtype| a.kaio_matmul_with(&b, &MatmulOptions::default().out_dtype(dtype));
    let compute =
        |a: &Tensor, dtype| a.kaio_matmul_with(&b, &MatmulOptions::default().compute_dtype(dtype));
    let biased = |a: &Tensor, bias: Tensor| {
        let b = b.to_dtype(a.dtype())?;
        a.kaio_matmul_with(&b, &MatmulOptions::default().bias(bias))
    };
    let (flatten, each) =
        ("flatten it with `.flatten_all()?`", "give it one element for each column");
    refused! { tally;
        out(DType::U8) => Value, "kaio_matmul_with: `out_dtype` is u8, wanted f32, f16 or bf16; leave it out for f32";
        out(DType::F64) => Value, "kaio_matmul_with: `out_dtype` is f64, wanted f32, f16 or bf16; leave it out for f32";
        compute(&on.f32([4, 8]), DType::F32) => Value, "kaio_matmul_with: `compute_dtype` is f32, wanted f16 or bf16; leave it out for the operands' dtype";
        compute(&on.u8([4, 8]), DType::BF16) => DType, "kaio_matmul_with: `lhs` is u8, wanted f32, f16 or bf16; cast it with `.to_dtype(DType::F32)?`";
        biased(&a, on.f16([])) => Rank, "kaio_matmul_with: `bias` has shape [] (rank 0), wanted [N]; {flatten}";
        biased(&a, on.f16([1, 6])) => Rank, "kaio_matmul_with: `bias` has shape [1, 6] (rank 2), wanted [N]; {flatten}";
        biased(&a, on.bf16([6])) => DType, "kaio_matmul_with: `bias` is bf16, wanted f32 or f16; cast it with `.to_dtype(DType::F32)?`";
        biased(&on.bf16([4, 8]), on.f16([6])) => DType, "kaio_matmul_with: `bias` is f16, wanted f32 or bf16; cast it with `.to_dtype(DType::F32)?`";
        biased(&a, on.zeros(DType::F64, [6])) => DType, "kaio_matmul_with: `bias` is f64, wanted f32 or f16; cast it with `.to_dtype(DType::F32)?`";
        biased(&a, on.u8([6])) => DType, "kaio_matmul_with: `bias` is u8, wanted f32 or f16; cast it with `.to_dtype(DType::F32)?`";
        biased(&a, on.f32([1])) => Dimension, "kaio_matmul_with: `bias` has N = 1, wanted 6, the N of `rhs` [8, 6]; {each}";
        biased(&a, on.f32([0])) => Dimension, "kaio_matmul_with: `bias` has N = 0, wanted 6, the N of `rhs` [8, 6]; {each}";
        biased(&a, on.f32([8])) => Dimension, "kaio_matmul_with: `bias` has N = 8, wanted 6, the N of `rhs` [8, 6]; {each}";
    }
    if device.is_cpu() {
        for engine in [Engine::Auto, Engine::KaioOps, Engine::Native] {
            let opts = MatmulOptions::default().engine(engine);
            tally
                .case(format!("{engine:?} on the CPU"), || a.kaio_matmul_with(&b, &opts).map(drop));
        }
    }
    tally.finish();
}

pub fn add(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of add", device);
    let x = on.f16([4, 8]);
    let expand = "expand one with `.broadcast_as(..)?`";
    refused! { tally;
        on.u8([4, 8]).kaio_add(&on.u8([4, 8])) => DType, "kaio_add: `lhs` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        x.kaio_add(&on.f32([4, 8])) => DType, "kaio_add: `rhs` is f32, wanted f16, the dtype of `lhs`; cast it with `.to_dtype(DType::F16)?`";
        x.kaio_add(&on.f16([8])) => Dimension, "kaio_add: `rhs` has rank = 1, wanted 2, the rank of `lhs` [4, 8]; {expand}";
        x.kaio_add(&on.f16([4, 1])) => Dimension, "kaio_add: `rhs` has a dimension = 1, wanted 8, in [4, 1], as `lhs` [4, 8]; {expand}";
    }
    tally.finish();
}

pub fn glu(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of glu", device);
    type Named = (&'static str, fn(&Tensor, &Tensor) -> Result<Tensor>);
    let methods: [Named; 2] =
        [("kaio_swiglu", Tensor::kaio_swiglu), ("kaio_geglu", Tensor::kaio_geglu)];
    let expand = "expand one with `.broadcast_as(..)?`";
    for (op, glu) in methods {
        refused! { tally;
            glu(&on.u8([4, 8]), &on.u8([4, 8])) => DType, "{op}: `gate` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
            glu(&on.f16([4, 8]), &on.f32([4, 8])) => DType, "{op}: `up` is f32, wanted f16, the dtype of `gate`; cast it with `.to_dtype(DType::F16)?`";
            glu(&on.f16([4, 8]), &on.f16([8])) => Dimension, "{op}: `up` has rank = 1, wanted 2, the rank of `gate` [4, 8]; {expand}";
            glu(&on.f16([4, 8]), &on.f16([4, 1])) => Dimension, "{op}: `up` has a dimension = 1, wanted 8, in [4, 1], as `gate` [4, 8]; {expand}";
        }
    }
    tally.finish();
}

pub fn norm(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of norm", device);
    let (x, weight) = (on.f16([4, 8]), on.f16([8]));
    let each = "give it one element for each column";
    refused! { tally;
        on.f16([]).kaio_rms_norm(&weight, 1e-5) => Rank, "kaio_rms_norm: `x` has shape [] (rank 0), wanted [.., width]; {ADD}";
        on.u8([4, 8]).kaio_rms_norm(&weight, 1e-5) => DType, "kaio_rms_norm: `x` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        x.kaio_rms_norm(&x, 1e-5) => Rank, "kaio_rms_norm: `weight` has shape [4, 8] (rank 2), wanted [width]; flatten it with `.flatten_all()?`";
        x.kaio_rms_norm(&on.f16([4]), 1e-5) => Dimension, "kaio_rms_norm: `weight` has width = 4, wanted 8, the last dimension of `x` [4, 8]; {each}";
        x.kaio_rms_norm(&on.bf16([8]), 1e-5) => DType, "kaio_rms_norm: `weight` is bf16, wanted f32 or f16; cast it with `.to_dtype(DType::F32)?`";
        on.f32([4, 8]).kaio_rms_norm(&weight, 1e-5) => DType, "kaio_rms_norm: `weight` is f16, wanted f32; cast it with `.to_dtype(DType::F32)?`";
        x.kaio_rms_norm(&weight, f32::NAN) => Value, "kaio_rms_norm: `eps` is NaN, wanted a finite number; check how it was computed";
        x.kaio_rms_norm(&weight, -1.0) => Value, "kaio_rms_norm: `eps` is -1, wanted at least 0; use 1e-5 or 1e-6";
        x.kaio_layer_norm(&weight, Some(&on.f32([8])), 1e-5) => DType, "kaio_layer_norm: `bias` is f32, wanted f16, the dtype of `weight`; cast it with `.to_dtype(DType::F16)?`";
        x.kaio_layer_norm(&weight, Some(&on.f16([1])), 1e-5) => Dimension, "kaio_layer_norm: `bias` has width = 1, wanted 8, the last dimension of `x` [4, 8]; {each}";
        x.kaio_add_rms_norm(&on.bf16([4, 8]), &weight, 1e-5) => DType, "kaio_add_rms_norm: `residual` is bf16, wanted f16, the dtype of `x`; cast it with `.to_dtype(DType::F16)?`";
        x.kaio_add_rms_norm(&weight, &weight, 1e-5) => Dimension, "kaio_add_rms_norm: `residual` has rank = 1, wanted 2, the rank of `x` [4, 8]; expand one with `.broadcast_as(..)?`";
    }
    tally.finish();
}

pub fn rope(device: &Device) {
    const HALVES: RopeLayout = RopeLayout::Halves;
    let on = On(device);
    let mut tally = Tally::new("errors of rope and softmax", device);
    let (x, angles) = (on.f16([2, 3, 4, 8]), on.f16([4, 4]));
    let rope = |cos: &Tensor, sin: &Tensor| x.kaio_rope(cos, sin, HALVES);
    let var = Var::from_tensor(&angles).expect("a variable");
    let batches = "give each batch its angles, or leave that dimension out";
    refused! { tally;
        on.f16([8]).kaio_rope(&angles, &angles, HALVES) => Rank, "kaio_rope: `x` has shape [8] (rank 1), wanted [.., heads, positions, D]; {ADD}";
        on.u8([4, 8]).kaio_rope(&angles, &angles, HALVES) => DType, "kaio_rope: `x` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        rope(&on.bf16([4, 4]), &angles) => DType, "kaio_rope: `cos` is bf16, wanted f32 or f16; cast it with `.to_dtype(DType::F32)?`";
        rope(&angles, &on.f32([4, 4])) => DType, "kaio_rope: `sin` is f32, wanted f16, the dtype of `cos`; cast it with `.to_dtype(DType::F16)?`";
        rope(&angles, &on.f16([4, 3])) => Dimension, "kaio_rope: `sin` has a dimension = 3, wanted 4, in [4, 3], as `cos` [4, 4]; expand one with `.broadcast_as(..)?`";
        rope(&on.f16([4]), &on.f16([4])) => Rank, "kaio_rope: `cos` has shape [4] (rank 1), wanted [positions, R/2] or [batch, positions, R/2]; narrow it to the positions of `x`";
        rope(&on.f16([3, 4]), &on.f16([3, 4])) => Dimension, "kaio_rope: `cos` has positions = 3, wanted 4, or more, the positions of `x` [2, 3, 4, 8]; compute the angles of all positions";
        rope(&on.f16([4, 5]), &on.f16([4, 5])) => Dimension, "kaio_rope: `cos` has R/2 = 5, wanted 4, or fewer, half of the last dimension of `x` [2, 3, 4, 8]; give each pair of elements one angle";
        rope(&on.f16([3, 4, 4]), &on.f16([3, 4, 4])) => Dimension, "kaio_rope: `cos` has batch = 3, wanted 2, the batches of `x` [2, 3, 4, 8]; {batches}";
        rope(&angles, &var) => Tracked, "kaio_rope: `sin` tracks a gradient, but this op has none for it; `.detach()` makes it a constant, and what it was computed from (the layers below) then gets no gradient through it";
        on.f16([]).kaio_softmax() => Rank, "kaio_softmax: `x` has shape [] (rank 0), wanted [.., width]; {ADD}";
        on.u8([4]).kaio_softmax() => DType, "kaio_softmax: `x` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
    }
    tally.finish();
}

pub fn int8(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of int8", device);
    let (a, b) = (on.u8([4, 8]), on.u8([8, 6]));
    let long = (on.u8([1, 131_072]), on.u8([131_072, 1]));
    refused! { tally;
        on.u8([8]).kaio_matmul_int8(&b, 1.0) => Rank, "kaio_matmul_int8: `lhs` has shape [8] (rank 1), wanted [.., M, K]; {ADD}";
        a.kaio_matmul_int8(&on.u8([2, 8, 6]), 1.0) => Rank, "kaio_matmul_int8: `rhs` has shape [2, 8, 6] (rank 3), wanted [K, N]; a weight is one matrix";
        on.f16([4, 8]).kaio_matmul_int8(&b, 1.0) => DType, "kaio_matmul_int8: `lhs` is f16, wanted u8; quantise it with `quant::quantize_int8`";
        a.kaio_matmul_int8(&on.u32([8, 6]), 1.0) => DType, "kaio_matmul_int8: `rhs` is u32, wanted u8; quantise it with `quant::quantize_int8`";
        a.kaio_matmul_int8(&a, 1.0) => Dimension, "kaio_matmul_int8: `rhs` has K = 4, wanted 8, the K of `lhs` [4, 8]; transpose the weight with `.t()?`";
        long.0.kaio_matmul_int8(&long.1, 1.0) => Dimension, "kaio_matmul_int8: `lhs` has K = 131072, wanted at most 131071, so that the i32 sum cannot overflow; split K and add the products";
        long.0.kaio_matmul_int8_with(&long.1, &Int8Options::default().zero_point(1)) => Dimension, "kaio_matmul_int8_with: `lhs` has K = 131072, wanted at most 65793, so that the i32 sum cannot overflow; split K and add the products";
        a.kaio_matmul_int8(&b, f32::NAN) => Value, "kaio_matmul_int8: `scale` is NaN, wanted a finite number; check how it was computed";
        a.kaio_matmul_int8(&b, f32::NEG_INFINITY) => Value, "kaio_matmul_int8: `scale` is -inf, wanted a finite number; check how it was computed";
    }
    let nan = Tensor::full(f32::NAN, (1, 2), device).expect("full");
    refused! { tally;
        quant::quantize_int8(&b) => DType, "quantize_int8: `t` is u8, wanted f32, f16 or bf16; cast it with `.to_dtype(DType::F32)?`";
        quant::quantize_int8(&nan) => Value, "quantize_int8: `t` is a tensor with an infinite or NaN element, wanted finite elements; check how it was computed";
        quant::dequantize_int8(&nan, 1.0) => DType, "dequantize_int8: `q` is f32, wanted u8; quantise it with `quant::quantize_int8`";
    }
    tally.case("kaio_matmul_int8_with: K = 65793 with a zero point", || {
        let opts = Int8Options::default().zero_point(-128);
        on.u8([1, 65_793]).kaio_matmul_int8_with(&on.u8([65_793, 1]), &opts).map(drop)
    });
    tally.case("kaio_matmul_int8: K = 131071", || {
        on.u8([1, 131_071]).kaio_matmul_int8(&on.u8([131_071, 1]), 1.0).map(drop)
    });
    tally.finish();
}

pub fn int4(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of int4", device);
    let (a, w, s) = (on.f16([4, 256]), on.u32([32, 6]), on.f16([2, 6]));
    let see = "eight nibbles along K make a u32; see `quant::quantize_int4`";
    refused! { tally;
        on.f16([256]).kaio_matmul_int4(&w, &s) => Rank, "kaio_matmul_int4: `lhs` has shape [256] (rank 1), wanted [.., M, K]; {ADD}";
        a.kaio_matmul_int4(&on.u32([1, 32, 6]), &s) => Rank, "kaio_matmul_int4: `packed` has shape [1, 32, 6] (rank 3), wanted [K/8, N]; a weight is one matrix";
        a.kaio_matmul_int4(&w, &on.f16([6])) => Rank, "kaio_matmul_int4: `scales` has shape [6] (rank 1), wanted [K/128, N]; {EACH}";
        on.bf16([4, 256]).kaio_matmul_int4(&w, &s) => DType, "kaio_matmul_int4: `lhs` is bf16, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        a.kaio_matmul_int4(&on.zeros(DType::I32, [32, 6]), &s) => DType, "kaio_matmul_int4: `packed` is i32, wanted u32; {WORDS}";
        a.kaio_matmul_int4(&on.f32([256, 6]), &s) => DType, "kaio_matmul_int4: `packed` is f32, wanted u32; quantise it with `quant::quantize_int4`";
        a.kaio_matmul_int4(&w, &on.f32([2, 6])) => DType, "kaio_matmul_int4: `scales` is f32, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        on.f16([4, 200]).kaio_matmul_int4(&w, &s) => Dimension, "kaio_matmul_int4: `lhs` has K = 200, wanted a multiple of 128, the rows that share a scale; pad it with zeros, and the weight too before it is quantised";
        a.kaio_matmul_int4(&on.u32([256, 6]), &s) => Dimension, "kaio_matmul_int4: `packed` has rows = 256, wanted 32, K/8 for the K = 256 of `lhs`; {see}";
        a.kaio_matmul_int4(&w, &on.f16([1, 6])) => Dimension, "kaio_matmul_int4: `scales` has rows = 1, wanted 2, K/128 for the K = 256 of `lhs`; {EACH}; see `quant::quantize_int4`";
        a.kaio_matmul_int4(&w, &on.f16([2, 5])) => Dimension, "kaio_matmul_int4: `scales` has N = 5, wanted 6, the N of `packed`; {EACH}; see `quant::quantize_int4`";
    }
    let nan = Tensor::full(f32::NAN, (128, 2), device).expect("full");
    refused! { tally;
        quant::quantize_int4(&w) => DType, "quantize_int4: `weight` is u32, wanted f32, f16 or bf16; cast it with `.to_dtype(DType::F32)?`";
        quant::quantize_int4(&on.f32([1, 128, 2])) => Rank, "quantize_int4: `weight` has shape [1, 128, 2] (rank 3), wanted [K, N]; quantise one matrix at a time";
        quant::quantize_int4(&on.f32([100, 2])) => Dimension, "quantize_int4: `weight` has K = 100, wanted a multiple of 128, the rows that share a scale; pad K with zeros";
        quant::quantize_int4(&nan) => Value, "quantize_int4: `weight` is a tensor with an element that is NaN or over 458528 in magnitude, wanted at most 458528, a seventh of which f16 can hold as the scale; check how it was computed, or scale it down and the products up";
        quant::pack_int4(&nan) => DType, "pack_int4: `values` is f32, wanted u8; cast integers with `.to_dtype(DType::U8)?`; `quant::quantize_int4` takes floats";
        quant::pack_int4(&on.u8([8])) => Rank, "pack_int4: `values` has shape [8] (rank 1), wanted [K, N]; pack one matrix at a time";
        quant::pack_int4(&on.u8([9, 2])) => Dimension, "pack_int4: `values` has K = 9, wanted a multiple of 8, the values in a u32; pad K with zeros";
        quant::unpack_int4(&on.u32([8])) => Rank, "unpack_int4: `packed` has shape [8] (rank 1), wanted [K/8, N]; unpack one matrix at a time";
        quant::unpack_int4(&on.zeros(DType::I32, [16, 6])) => DType, "unpack_int4: `packed` is i32, wanted u32; {WORDS}";
        quant::dequantize_int4(&on.zeros(DType::I32, [16, 6]), &s) => DType, "dequantize_int4: `packed` is i32, wanted u32; {WORDS}";
        quant::unpack_int4(&nan) => DType, "unpack_int4: `packed` is f32, wanted u32; quantise it with `quant::quantize_int4`";
        quant::dequantize_int4(&on.u32([3, 6]), &s) => Dimension, "dequantize_int4: `packed` has rows = 3, wanted a multiple of 16, the words of 128 values that share a scale; pad K with zeros before packing";
        quant::dequantize_int4(&w, &on.f16([1, 6])) => Dimension, "dequantize_int4: `scales` has rows = 1, wanted 2, K/128 for the K = 256 of `packed`; {EACH}; see `quant::quantize_int4`";
    }
    tally.finish();
}

pub fn qkv(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of qkv", device);

    let op = "kaio_qkv_project_int8";
    let (x, w) = (&on.f16([4, 8]), &on.u8([8, 6]));
    let int8 = |x: &Tensor, w: [&Tensor; 3]| x.kaio_qkv_project_int8(w, [1.0; 3]);
    let scales = |s| x.kaio_qkv_project_int8([w; 3], s);
    refused! { tally;
        int8(&on.f16([8]), [w; 3]) => Rank, "{op}: `x` has shape [8] (rank 1), wanted [.., M, K]; {ADD}";
        int8(x, [w, w, &on.u8([8])]) => Rank, "{op}: `weights[2]` has shape [8] (rank 1), wanted [K, N]; a weight is one matrix";
        int8(&on.u8([4, 8]), [w; 3]) => DType, "{op}: `x` is u8, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        int8(x, [w, &on.u32([8, 6]), w]) => DType, "{op}: `weights[1]` is u32, wanted u8; quantise it with `quant::quantize_int8`";
        int8(x, [w, w, &on.u8([6, 8])]) => Dimension, "{op}: `weights[2]` has K = 6, wanted 8, the K of `x` [4, 8]; transpose the weight with `.t()?`";
        scales([1.0, f32::INFINITY, 1.0]) => Value, "{op}: `scales[1]` is inf, wanted a finite number; check how it was computed";
        scales([1.0, 1.0, f32::NAN]) => Value, "{op}: `scales[2]` is NaN, wanted a finite number; check how it was computed";
    }

    let op = "kaio_qkv_project_int4";
    let see = "eight nibbles along K make a u32; see `quant::quantize_int4`";
    let (x, w, s) = (&on.f16([4, 256]), &on.u32([32, 6]), &on.f16([2, 6]));
    let int4 = |x: &Tensor, w: [&Tensor; 3], s: [&Tensor; 3]| x.kaio_qkv_project_int4(w, s);
    let narrow = &on.f16([2, 2]);
    refused! { tally;
        int4(&on.f16([256]), [w; 3], [s; 3]) => Rank, "{op}: `x` has shape [256] (rank 1), wanted [.., M, K]; {ADD}";
        int4(x, [w, &on.u32([32]), w], [s; 3]) => Rank, "{op}: `weights[1]` has shape [32] (rank 1), wanted [K/8, N]; a weight is one matrix";
        int4(x, [w; 3], [s, s, &on.f16([1, 2, 6])]) => Rank, "{op}: `scales[2]` has shape [1, 2, 6] (rank 3), wanted [K/128, N]; {EACH}";
        int4(&on.f32([4, 256]), [w; 3], [s; 3]) => DType, "{op}: `x` is f32, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        int4(x, [w, &on.zeros(DType::I32, [32, 6]), w], [s; 3]) => DType, "{op}: `weights[1]` is i32, wanted u32; {WORDS}";
        int4(x, [w, w, &on.u8([32, 6])], [s; 3]) => DType, "{op}: `weights[2]` is u8, wanted u32; quantise it with `quant::quantize_int4`";
        int4(x, [w; 3], [s, &on.bf16([2, 6]), s]) => DType, "{op}: `scales[1]` is bf16, wanted f16; cast it with `.to_dtype(DType::F16)?`";
        int4(&on.f16([4, 64]), [w; 3], [s; 3]) => Dimension, "{op}: `x` has K = 64, wanted a multiple of 128, the rows that share a scale; pad it with zeros, and the weight too before it is quantised";
        int4(x, [w, w, &on.u32([16, 6])], [s; 3]) => Dimension, "{op}: `weights[2]` has rows = 16, wanted 32, K/8 for the K = 256 of `x`; {see}";
        int4(x, [w; 3], [s, &on.f16([4, 6]), s]) => Dimension, "{op}: `scales[1]` has rows = 4, wanted 2, K/128 for the K = 256 of `x`; {EACH}; see `quant::quantize_int4`";
        int4(x, [w; 3], [s, narrow, s]) => Dimension, "{op}: `scales[1]` has N = 2, wanted 6, the N of `weights[1]`; {EACH}; see `quant::quantize_int4`";
    }
    tally.finish();
}

/// A method, its arguments, and a call with one tensor for each.
type Method = (&'static str, &'static [Arg], fn(&[Tensor]) -> Result<()>);
type Arg = (&'static str, DType, [usize; 2]);

const MATMUL: &[Arg] = &[("lhs", F16, [4, 128]), ("rhs", F16, [128, 6])];
const BIASED: &[Arg] = &[("lhs", F16, [4, 128]), ("rhs", F16, [128, 6]), ("bias", F32, [1, 6])];
const ATTENTION: &[Arg] = &[("q", F16, [4, 8]), ("k", F16, [5, 8]), ("v", F16, [5, 6])];

const BIASED_SCORES: &[Arg] =
    &[("q", F16, [4, 8]), ("k", F16, [5, 8]), ("v", F16, [5, 6]), ("bias", F32, [4, 5])];
const ALIBI: &[Arg] =
    &[("q", F16, [4, 8]), ("k", F16, [5, 8]), ("v", F16, [5, 6]), ("alibi_slopes", F32, [1, 1])];
const PACKED: &[Arg] = &[
    ("q", F16, [4, 8]),
    ("k", F16, [5, 8]),
    ("v", F16, [5, 6]),
    ("cu_seqlens_q", U32, [1, 2]),
    ("cu_seqlens_k", U32, [1, 2]),
];
const PADDED: &[Arg] = &[
    ("q", F16, [4, 8]),
    ("k", F16, [5, 8]),
    ("v", F16, [5, 6]),
    ("seqlens_q", U32, [1, 1]),
    ("seqlens_k", U32, [1, 1]),
];

/// q, k and v with dimensions of 1 before them.
fn attend(t: &[Tensor], ones: usize, opts: FlashAttnOptions) -> Result<()> {
    let wide = |t: &Tensor| (0..ones).try_fold(t.clone(), |t, _| t.unsqueeze(0));
    wide(&t[0])?.kaio_flash_attn_with(&wide(&t[1])?, &wide(&t[2])?, &opts).map(drop)
}

const WITH_GRADIENT: [Method; 11] = [
    ("kaio_matmul_tc", MATMUL, |t| t[0].kaio_matmul_tc(&t[1]).map(drop)),
    ("kaio_matmul_tc_async", MATMUL, |t| t[0].kaio_matmul_tc_async(&t[1]).map(drop)),
    ("kaio_matmul_with", MATMUL, |t| {
        t[0].kaio_matmul_with(&t[1], &MatmulOptions::default()).map(drop)
    }),
    ("kaio_matmul_with", BIASED, |t| {
        let opts = MatmulOptions::default().bias(t[2].squeeze(0)?);
        t[0].kaio_matmul_with(&t[1], &opts).map(drop)
    }),
    ("kaio_attention_tc", ATTENTION, |t| t[0].kaio_attention_tc(&t[1], &t[2], false).map(drop)),
    ("kaio_flash_attn", ATTENTION, |t| t[0].kaio_flash_attn(&t[1], &t[2], false).map(drop)),
    ("kaio_flash_attn_with", ATTENTION, |t| attend(t, 0, FlashAttnOptions::default())),
    ("kaio_flash_attn_with", BIASED_SCORES, |t| {
        attend(t, 0, FlashAttnOptions::default().bias(t[3].clone()))
    }),
    ("kaio_flash_attn_with", ALIBI, |t| {
        attend(t, 0, FlashAttnOptions::default().alibi_slopes(t[3].clone()))
    }),
    ("kaio_flash_attn_with", PACKED, |t| {
        let opts = FlashAttnOptions::default().cu_seqlens_q(t[3].squeeze(0)?);
        attend(t, 1, opts.cu_seqlens_k(t[4].squeeze(0)?))
    }),
    ("kaio_flash_attn_with", PADDED, |t| {
        let opts = FlashAttnOptions::default().seqlens_q(t[3].squeeze(0)?);
        attend(t, 2, opts.seqlens_k(t[4].squeeze(0)?))
    }),
];

const WITHOUT_GRADIENT: [Method; 9] = [
    ("kaio_matmul_int8", &[("lhs", U8, [4, 128]), ("rhs", U8, [128, 6])], |t| {
        t[0].kaio_matmul_int8(&t[1], 1.0).map(drop)
    }),
    (
        "kaio_matmul_int4",
        &[("lhs", F16, [4, 128]), ("packed", U32, [16, 6]), ("scales", F16, [1, 6])],
        |t| t[0].kaio_matmul_int4(&t[1], &t[2]).map(drop),
    ),
    (
        "kaio_qkv_project_int8",
        &[
            ("x", F16, [4, 128]),
            ("weights[0]", U8, [128, 6]),
            ("weights[1]", U8, [128, 6]),
            ("weights[2]", U8, [128, 6]),
        ],
        |t| t[0].kaio_qkv_project_int8([&t[1], &t[2], &t[3]], [1.0; 3]).map(drop),
    ),
    (
        "kaio_qkv_project_int4",
        &[
            ("x", F16, [4, 128]),
            ("weights[0]", U32, [16, 6]),
            ("weights[1]", U32, [16, 6]),
            ("weights[2]", U32, [16, 6]),
            ("scales[0]", F16, [1, 6]),
            ("scales[1]", F16, [1, 6]),
            ("scales[2]", F16, [1, 6]),
        ],
        |t| t[0].kaio_qkv_project_int4([&t[1], &t[2], &t[3]], [&t[4], &t[5], &t[6]]).map(drop),
    ),
    (
        "QuantWeight::from_gptq",
        &[("qweight", U32, [16, 24]), ("qzeros", U32, [2, 3]), ("scales", F16, [2, 24])],
        |t| QuantWeight::from_gptq(&t[0], &t[1], &t[2], None).map(drop),
    ),
    (
        "QuantWeight::from_awq",
        &[("qweight", U32, [128, 3]), ("qzeros", U32, [2, 3]), ("scales", F16, [2, 24])],
        |t| QuantWeight::from_awq(&t[0], &t[1], &t[2]).map(drop),
    ),
    ("QuantWeight::from_int4", &[("packed", U32, [16, 6]), ("scales", F32, [1, 6])], |t| {
        QuantWeight::from_int4(&t[0], &t[1]).map(drop)
    }),
    ("QuantWeight::from_int8", &[("codes", U8, [128, 6]), ("scales", F32, [1, 6])], |t| {
        QuantWeight::from_int8(&t[0], &t[1]).map(drop)
    }),
    (
        "kaio_matmul_int8_with",
        &[
            ("lhs", U8, [4, 128]),
            ("rhs", U8, [128, 6]),
            ("lhs_scales", F32, [4, 1]),
            ("rhs_scales", F32, [1, 6]),
        ],
        |t| {
            let opts = Int8Options::default().lhs_scales(t[2].clone()).rhs_scales(t[3].clone());
            t[0].kaio_matmul_int8_with(&t[1], &opts).map(drop)
        },
    ),
];

fn zeros(args: &[Arg], device: &Device) -> Result<Vec<Tensor>> {
    args.iter().map(|&(_, dtype, dims)| Tensor::zeros(&dims, dtype, device)).collect()
}

/// The activations of the ops above, which have one.
const DIFFERENTIABLE: [(&str, &str); 3] =
    [("kaio_matmul_int4", "lhs"), ("kaio_qkv_project_int8", "x"), ("kaio_qkv_project_int4", "x")];

/// An input that tracks a gradient, as a `Var` and as what was computed from one.
pub fn tracked(device: &Device) {
    let mut tally = Tally::new("errors of tracked inputs", device);
    for (op, args, call) in WITHOUT_GRADIENT {
        for (i, (arg, ..)) in args.iter().enumerate() {
            if DIFFERENTIABLE.contains(&(op, arg)) {
                continue;
            }
            let text = format!(
                "{op}: `{arg}` tracks a gradient, but this op has none for it; `.detach()` makes it a constant, and what it was computed from (the layers below) then gets no gradient through it"
            );
            let run = |change: fn(&Tensor) -> Result<Tensor>| {
                let mut inputs = zeros(args, device)?;
                inputs[i] = change(&inputs[i])?;
                call(&inputs)
            };
            refused! { tally;
                run(|t| Ok(Var::from_tensor(t)?.into_inner())) => Tracked, "{text}";
                run(|t| Var::from_tensor(t)?.t()?.t()) => Tracked, "{text}";
            }
            tally.case(format!("{op}: detached `{arg}`"), || {
                run(|t| Ok(Var::from_tensor(t)?.t()?.t()?.detach()))
            });
        }
    }
    tally.finish();
}

/// Each argument in turn on each other device: the CPU or another ordinal.
pub fn devices(device: &Device) {
    let others = crate::other_devices();
    let mut tally = Tally::new("errors of mixed devices", device);
    for (op, args, call) in WITH_GRADIENT.iter().chain(&WITHOUT_GRADIENT) {
        tally.case(format!("{op}: one device"), || call(&zeros(args, device)?));
        for other in &others {
            for i in 0..args.len() {
                // Every argument is held against the first.
                let (arg, got, want) = match i {
                    0 => (args[1].0, device, other),
                    _ => (args[i].0, other, device),
                };
                let (with, got, want) = (args[0].0, place(got), place(want));
                let run = || {
                    let mut inputs = zeros(args, device)?;
                    inputs[i] = inputs[i].to_device(other)?;
                    call(&inputs)
                };
                refused! { tally;
                    run() => Device, "{op}: `{arg}` is on {got}, but `{with}` is on {want}; move one with `.to_device(..)?`";
                }
            }
        }
    }
    if others.is_empty() {
        tally.say("does not apply: mixed devices, there is one");
    }
    tally.finish();
}

fn place(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "the CPU".into(),
        DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
    }
}

/// What candle's own type says of an error: nothing of CUDA where it has no part.
pub fn variants(device: &Device) {
    use std::io::ErrorKind;
    let on = On(device);
    let mut tally = Tally::new("variants of candle errors", device);
    let one = on.f16([1, 1]);
    let wide = one.broadcast_as((1, 1usize << 60)).expect("a view");
    let weight = on.u8([8, 1]);
    let refused = |x: Tensor| x.kaio_matmul_int8(&weight, 1.0).map(drop);
    for (name, result, kind) in [
        ("a dtype", on.f32([1, 1]).kaio_matmul_tc(&one).map(drop), ErrorKind::InvalidInput),
        ("a shape", one.kaio_matmul_tc(&on.f16([2, 1])).map(drop), ErrorKind::InvalidInput),
        (
            "tracked",
            refused(Var::zeros((1, 8), U8, device).expect("zeros").into_inner()),
            ErrorKind::InvalidInput,
        ),
        ("a size", one.kaio_matmul_tc(&wide).map(drop), ErrorKind::OutOfMemory),
    ] {
        tally.case(name, || match result {
            Err(candle_core::Error::Io(error)) if error.kind() == kind => Ok(()),
            other => bail!("{other:?}"),
        });
    }
    tally.finish();
}

/// The error is found under every layer that candle puts around one.
pub fn layers(device: &Device) {
    let mut tally = Tally::new("errors under layers", device);
    let call = || {
        let a = Tensor::zeros((4, 8), F32, device)?;
        a.kaio_matmul_tc(&a)
    };
    type Wrap = fn(Result<Tensor>) -> Result<Tensor>;
    let layers: [(&str, Wrap); 6] = [
        ("bare", |r| r),
        ("bt", |r| r.map_err(candle_core::Error::bt)),
        ("Error::context", |r| r.map_err(|e| e.context("block 3"))),
        ("Context::context", |r| r.context("block 3")),
        ("with_path", |r| r.map_err(|e| e.with_path("model.safetensors"))),
        ("all", |r| r.map_err(|e| e.bt().context("a").with_path("b")).with_context(|| "c")),
    ];
    for (name, wrap) in layers {
        tally.case(name, || match Error::of(&wrap(call()).expect_err("f32 is refused")) {
            Some(Error::DType { op: "kaio_matmul_tc", arg: "lhs", got: F32, .. }) => Ok(()),
            other => bail!("found {other:?}"),
        });
    }
    tally.case("an error of candle's own", || {
        match Error::of(&Tensor::zeros(2, F32, device)?.dims2().expect_err("rank 1")) {
            None => Ok(()),
            Some(other) => bail!("found {other:?}"),
        }
    });
    tally.finish();
}
