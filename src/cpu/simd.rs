//! Loops compiled for the processor's vector instructions, whichever it has.
#![allow(unsafe_code)]

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Defines `$name`, which runs an `#[inline(always)]` loop compiled for AVX2 where the processor has it.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) = $scalar:ident, $wide:ident;) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                #[target_feature(enable = "avx2,f16c")]
                fn wide($($arg: $ty),*) {
                    $wide($($arg),*)
                }
                // SAFETY: the processor has the instructions that `wide` is compiled to.
                return unsafe { wide($($arg),*) };
            }
            $scalar($($arg),*)
        }
    };
}

vectorised! {
    /// f16 to f32.
    fn widen_f16(src: &[f16], dst: &mut [f32]) = f16_to_f32, f16_to_f32_x86;
}
vectorised! {
    /// bf16 to f32.
    fn widen_bf16(src: &[bf16], dst: &mut [f32]) = bf16_to_f32, bf16_to_f32;
}
vectorised! {
    /// Bytes read as int8.
    fn widen_int8(src: &[u8], dst: &mut [f32]) = int8_to_f32, int8_to_f32;
}
vectorised! {
    /// The eight values of each word, one after another, by `step`.
    fn widen_int4(words: &[u32], step: f32, dst: &mut [f32]) = int4_to_f32, int4_to_f32;
}
vectorised! {
    /// Value `i` of each word, by the word's own step.
    fn widen_nibbles(words: &[u32], i: u32, steps: &[f32], dst: &mut [f32]) = nibbles_to_f32, nibbles_to_f32;
}

#[inline(always)]
fn f16_to_f32(src: &[f16], dst: &mut [f32]) {
    src.convert_to_f32_slice(dst);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn f16_to_f32_x86(src: &[f16], dst: &mut [f32]) {
    use std::arch::x86_64::{__m128i, __m256, _mm256_cvtph_ps};
    use std::mem::transmute;
    let (body, tail) = src.as_chunks::<8>();
    let (out, out_tail) = dst.as_chunks_mut::<8>();
    for (src, dst) in body.iter().zip(out) {
        // SAFETY: an f16 is 16 bits, an f32 32, of which all are valid.
        *dst = unsafe {
            let bits = transmute::<[f16; 8], __m128i>(*src);
            transmute::<__m256, [f32; 8]>(_mm256_cvtph_ps(bits))
        };
    }
    for (src, dst) in tail.iter().zip(out_tail) {
        *dst = src.to_f32();
    }
}

#[inline(always)]
fn bf16_to_f32(src: &[bf16], dst: &mut [f32]) {
    for (src, dst) in src.iter().zip(dst) {
        *dst = f32::from_bits(u32::from(src.to_bits()) << 16);
    }
}

#[inline(always)]
fn int8_to_f32(src: &[u8], dst: &mut [f32]) {
    for (src, dst) in src.iter().zip(dst) {
        *dst = f32::from(*src as i8);
    }
}

#[inline(always)]
fn int4_to_f32(words: &[u32], step: f32, dst: &mut [f32]) {
    for (word, dst) in words.iter().zip(dst.as_chunks_mut::<8>().0) {
        for (i, x) in (0..).zip(dst) {
            *x = nibble(*word, i) * step;
        }
    }
}

#[inline(always)]
fn nibbles_to_f32(words: &[u32], i: u32, steps: &[f32], dst: &mut [f32]) {
    for ((word, step), x) in words.iter().zip(steps).zip(dst) {
        *x = nibble(*word, i) * step;
    }
}

/// Value `i` of a word: shifted to the top, then arithmetically down, which extends its sign.
#[inline(always)]
fn nibble(word: u32, i: u32) -> f32 {
    ((word << (28 - 4 * i)) as i32 >> 28) as f32
}
