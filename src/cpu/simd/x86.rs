//! Eight elements to f32 by instructions that no plain loop is compiled to.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::{bf16, f16};

use super::GROUP_WORDS;

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn floats(x: __m256) -> [f32; 8] {
    // SAFETY: eight f32, of which all bits are valid.
    unsafe { transmute::<__m256, [f32; 8]>(x) }
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub fn f16x8(src: &[f16; 8]) -> [f32; 8] {
    // SAFETY: eight f16 are 128 bits, of which all are valid.
    floats(_mm256_cvtph_ps(unsafe { transmute::<[f16; 8], __m128i>(*src) }))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub fn bf16x8(src: &[bf16; 8]) -> [f32; 8] {
    // SAFETY: eight bf16 are 128 bits, of which all are valid.
    let bits = _mm256_cvtepu16_epi32(unsafe { transmute::<[bf16; 8], __m128i>(*src) });
    floats(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
}

/// Bytes read as int8.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub fn int8x8(src: &[u8; 8]) -> [f32; 8] {
    let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*src));
    floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
}

/// Bytes read as e4m3: [`e4m3_to_f32`](super::e4m3_to_f32) of each.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub fn e4m3x8(src: &[u8; 8]) -> [f32; 8] {
    let bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*src)));
    let magnitude = _mm256_and_si256(bytes, _mm256_set1_epi32(0x7f));
    let normal = _mm256_slli_epi32::<20>(_mm256_add_epi32(magnitude, _mm256_set1_epi32(120 << 3)));
    let subnormal = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(1.0 / 512.0));
    let small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
    let normal = _mm256_castsi256_ps(normal);
    let finite = _mm256_blendv_ps(normal, subnormal, _mm256_castsi256_ps(small));
    let nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
    let quiet = _mm256_and_si256(nan, _mm256_set1_epi32(f32::NAN.to_bits() as i32));
    let sign = _mm256_slli_epi32::<24>(_mm256_xor_si256(bytes, magnitude));
    let bits = _mm256_or_si256(quiet, sign);
    floats(_mm256_or_ps(finite, _mm256_castsi256_ps(bits)))
}

/// The values of a word: each nibble is shifted to the top, then arithmetically down, which extends
/// its sign.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn values(word: u32) -> __m256 {
    let up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    let top = _mm256_sllv_epi32(_mm256_set1_epi32(word.cast_signed()), up);
    _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(top))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
pub fn nibbles(word: u32) -> [f32; 8] {
    floats(values(word))
}

/// Elements of a table of sixteen, by the low four bits of each index.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub fn lookup(table: &[f32; 16], at: &[u32; 8]) -> [f32; 8] {
    // SAFETY: eight u32 are 256 bits, of which all are valid.
    let at = unsafe { transmute::<[u32; 8], __m256i>(*at) };
    let ([low, high], _) = table.as_chunks::<8>() else { unreachable!("two eights") };
    // A permutation reads three bits of an index; the fourth, moved to the sign, says which half is meant.
    let low = _mm256_permutevar8x32_ps(load(low), at);
    let high = _mm256_permutevar8x32_ps(load(high), at);
    floats(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(at))))
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load(x: &[f32; 8]) -> __m256 {
    // SAFETY: eight f32 are 256 bits.
    unsafe { transmute::<[f32; 8], __m256>(*x) }
}

/// `w·x` of words and the steps of their groups. In vectors from end to end: from arrays of eight the
/// compiler makes shuffles here.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub fn int4_dot(words: &[u32], steps: &[f32], x: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); 4];
    let words = words.as_chunks::<GROUP_WORDS>().0;
    let x = x.as_chunks::<8>().0.as_chunks::<GROUP_WORDS>().0;
    for ((words, x), step) in words.iter().zip(x).zip(steps) {
        let mut group = [_mm256_setzero_ps(); 4];
        for i in 0..GROUP_WORDS {
            let products = _mm256_mul_ps(values(words[i]), load(&x[i]));
            group[i % 4] = _mm256_add_ps(group[i % 4], products);
        }
        for i in 0..4 {
            let scaled = _mm256_mul_ps(group[i], _mm256_set1_ps(*step));
            sums[i] = _mm256_add_ps(sums[i], scaled);
        }
    }
    let [a, b, c, d] = sums;
    let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
    floats(sum).iter().sum()
}
