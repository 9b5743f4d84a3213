//! Loops compiled for the processor's vector instructions, whichever it has.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod x86;

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::check::INT4_GROUP;

/// Words of a group of an int4 weight.
const GROUP_WORDS: usize = INT4_GROUP / 8;

/// Defines functions that run an `#[inline(always)]` loop compiled for AVX2 where the processor has it.
/// Both the loop for that case and the one for all others are named.
macro_rules! vectorised {
    ($(
        $(#[$doc:meta])*
        fn $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $any:expr, $avx2:expr;
    )*) => {$(
        $(#[$doc])*
        pub(super) fn $name($($arg: $ty),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                #[target_feature(enable = "avx2,f16c")]
                fn wide($($arg: $ty),*) $(-> $out)? {
                    $avx2
                }
                // SAFETY: the processor has the instructions that `wide` is compiled to.
                return unsafe { wide($($arg),*) };
            }
            $any
        }
    )*};
}

vectorised! {
    fn widen_f16(src: &[f16], dst: &mut [f32]) =
        src.convert_to_f32_slice(dst),
        convert(src, dst, |x| x86::f16x8(x));
    fn widen_bf16(src: &[bf16], dst: &mut [f32]) =
        convert(src, dst, eight(bf16_to_f32)),
        convert(src, dst, |x| x86::bf16x8(x));
    /// Bytes read as int8.
    fn widen_int8(src: &[u8], dst: &mut [f32]) =
        convert(src, dst, eight(int8_to_f32)),
        convert(src, dst, |x| x86::int8x8(x));
    /// The eight values of each word, one after another, by the step of their group.
    fn widen_int4(words: &[u32], steps: &[f32], dst: &mut [f32]) =
        int4_to_f32(words, steps, dst, nibbles),
        int4_to_f32(words, steps, dst, |word| x86::nibbles(word));
    /// Value `i` of each word, by the word's own step.
    fn widen_nibbles(words: &[u32], i: u32, steps: &[f32], dst: &mut [f32]) =
        nibbles_to_f32(words, i, steps, dst),
        nibbles_to_f32(words, i, steps, dst);

    /// Code `i` of each word, of four bits, by a table, times the word's own step.
    fn widen_by_table(words: &[u32], i: u32, table: &[f32; 16], steps: &[f32], dst: &mut [f32]) =
        codes_to_f32(words, i, steps, dst, |_| (), |codes, ()| codes.map(|code| table[code as usize])),
        codes_to_f32(words, i, steps, dst, |_| (), |codes, ()| x86::lookup(table, codes));
    /// Code `i` of each word, less the word's own zero point, times its step.
    fn widen_from_zeros(words: &[u32], i: u32, zeros: &[f32], steps: &[f32], dst: &mut [f32]) =
        codes_to_f32(words, i, steps, dst, |chunk| eighth(zeros, chunk), from_zeros),
        codes_to_f32(words, i, steps, dst, |chunk| eighth(zeros, chunk), from_zeros);
    /// Bytes read as e4m3.
    fn widen_e4m3(src: &[u8], dst: &mut [f32]) =
        convert(src, dst, eight(e4m3_to_f32)),
        convert(src, dst, |x| x86::e4m3x8(x));

    /// `w·x`.
    fn dot_f32(w: &[f32], x: &[f32]) -> f32 =
        dot(w, x, |w| *w),
        dot(w, x, |w| *w);
    fn dot_f16(w: &[f16], x: &[f32]) -> f32 =
        dot(w, x, eight(f16::to_f32)),
        dot(w, x, |x| x86::f16x8(x));
    fn dot_bf16(w: &[bf16], x: &[f32]) -> f32 =
        dot(w, x, eight(bf16_to_f32)),
        dot(w, x, |x| x86::bf16x8(x));
    fn dot_int8(w: &[u8], x: &[f32]) -> f32 =
        dot(w, x, eight(int8_to_f32)),
        dot(w, x, |x| x86::int8x8(x));
    fn dot_e4m3(w: &[u8], x: &[f32]) -> f32 =
        dot(w, x, eight(e4m3_to_f32)),
        dot(w, x, |x| x86::e4m3x8(x));
    /// `w·x` of words and the steps of their groups.
    fn dot_int4(words: &[u32], steps: &[f32], x: &[f32]) -> f32 =
        int4_dot(words, steps, x),
        x86::int4_dot(words, steps, x);

    /// `out += Σ x·w` over four rows.
    fn add_rows_f32(w: [&[f32]; 4], x: [f32; 4], out: &mut [f32]) =
        add_rows(w, x, out, |w| *w),
        add_rows(w, x, out, |w| *w);
    fn add_rows_f16(w: [&[f16]; 4], x: [f32; 4], out: &mut [f32]) =
        add_rows(w, x, out, eight(f16::to_f32)),
        add_rows(w, x, out, |x| x86::f16x8(x));
    fn add_rows_bf16(w: [&[bf16]; 4], x: [f32; 4], out: &mut [f32]) =
        add_rows(w, x, out, eight(bf16_to_f32)),
        add_rows(w, x, out, |x| x86::bf16x8(x));
    fn add_rows_int8(w: [&[u8]; 4], x: [f32; 4], out: &mut [f32]) =
        add_rows(w, x, out, eight(int8_to_f32)),
        add_rows(w, x, out, |x| x86::int8x8(x));
    fn add_rows_e4m3(w: [&[u8]; 4], x: [f32; 4], out: &mut [f32]) =
        add_rows(w, x, out, eight(e4m3_to_f32)),
        add_rows(w, x, out, |x| x86::e4m3x8(x));
    /// `out += Σ x·w` over the eight rows of a line of words, whose codes stand for what a table says.
    fn add_by_table(words: &[u32], x: &[f32; 8], table: &[f32; 16], out: &mut [f32]) =
        add_codes(words, x, out, |_| (), |codes, ()| codes.map(|code| table[code as usize])),
        add_codes(words, x, out, |_| (), |codes, ()| x86::lookup(table, codes));
    /// The same of codes less their columns' zero points.
    fn add_from_zeros(words: &[u32], x: &[f32; 8], zeros: &[f32], out: &mut [f32]) =
        add_codes(words, x, out, |chunk| eighth(zeros, chunk), from_zeros),
        add_codes(words, x, out, |chunk| eighth(zeros, chunk), from_zeros);
}

/// The bytes of codes that candle's type for them hides.
pub(super) fn bytes<T: WithDType>(codes: &[T]) -> &[u8] {
    const { assert!(size_of::<T>() == 1) };
    // SAFETY: candle's elements of one byte, u8 and e4m3, have no bits that may be uninitialised; a slice of them is as
    // long in bytes, aligned like bytes, and lives as long.
    unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), codes.len()) }
}

#[inline(always)]
fn eight<T: Copy>(one: impl Fn(T) -> f32) -> impl Fn(&[T; 8]) -> [f32; 8] {
    move |src| src.map(&one)
}

#[inline(always)]
fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

#[inline(always)]
fn int8_to_f32(x: u8) -> f32 {
    f32::from(x as i8)
}

/// Value `i` of a word: shifted to the top, then arithmetically down, which extends its sign.
#[inline(always)]
fn nibble(word: u32, i: u32) -> f32 {
    ((word << (28 - 4 * i)) as i32 >> 28) as f32
}

#[inline(always)]
fn nibbles(word: u32) -> [f32; 8] {
    [0, 1, 2, 3, 4, 5, 6, 7].map(|i| nibble(word, i))
}

/// Four bits of exponent from 2⁻⁶ on, three of mantissa, NaN where all are set, and no infinity.
#[inline(always)]
fn e4m3_to_f32(x: u8) -> f32 {
    const SUBNORMAL: f32 = 1.0 / 512.0;
    let magnitude = u32::from(x & 0x7f);
    let normal = f32::from_bits((magnitude + (120 << 3)) << 20);
    let finite = if magnitude < 8 { magnitude as i32 as f32 * SUBNORMAL } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { finite };
    f32::from_bits(value.to_bits() | u32::from(x & 0x80) << 24)
}

/// The `chunk`th eight elements.
#[inline(always)]
fn eighth(x: &[f32], chunk: usize) -> [f32; 8] {
    let x = &x[8 * chunk..];
    x.first_chunk().copied().unwrap_or_else(|| padded(x))
}

/// Codes less the zero points of their columns. Signed numbers are converted by one instruction.
#[inline(always)]
fn from_zeros(codes: &[u32; 8], zeros: [f32; 8]) -> [f32; 8] {
    std::array::from_fn(|i| codes[i] as i32 as f32 - zeros[i])
}

#[inline(always)]
fn codes(words: &[u32; 8], i: u32) -> [u32; 8] {
    words.map(|word| word >> (4 * i) & 15)
}

#[inline(always)]
fn codes_to_f32<Z>(
    words: &[u32],
    i: u32,
    steps: &[f32],
    dst: &mut [f32],
    zeros: impl Fn(usize) -> Z,
    decode: impl Fn(&[u32; 8], Z) -> [f32; 8],
) {
    let ((words, last), (out, out_tail)) = (words.as_chunks(), dst.as_chunks_mut::<8>());
    let (steps, last_steps) = steps.as_chunks::<8>();
    for (chunk, ((words, steps), out)) in words.iter().zip(steps).zip(out).enumerate() {
        let values = decode(&codes(words, i), zeros(chunk));
        *out = std::array::from_fn(|i| values[i] * steps[i]);
    }
    if !last.is_empty() {
        let values = decode(&codes(&padded(last), i), zeros(words.len()));
        for ((out, step), value) in out_tail.iter_mut().zip(last_steps).zip(values) {
            *out = value * step;
        }
    }
}

#[inline(always)]
fn add_codes<Z: Copy>(
    words: &[u32],
    x: &[f32; 8],
    out: &mut [f32],
    zeros: impl Fn(usize) -> Z,
    decode: impl Fn(&[u32; 8], Z) -> [f32; 8],
) {
    let add = |words: &[u32; 8], chunk: usize, out: &mut [f32; 8]| {
        let zeros = zeros(chunk);
        for (i, x) in (0..).zip(x) {
            let values = decode(&codes(words, i), zeros);
            for j in 0..8 {
                out[j] += values[j] * x;
            }
        }
    };
    let ((words, last), (out, out_tail)) = (words.as_chunks(), out.as_chunks_mut());
    for (chunk, (words, out)) in words.iter().zip(out).enumerate() {
        add(words, chunk, out);
    }
    if !last.is_empty() {
        let mut sums = padded(out_tail);
        add(&padded(last), words.len(), &mut sums);
        out_tail.copy_from_slice(&sums[..out_tail.len()]);
    }
}

/// The last elements of a slice, fewer than eight, with what follows them.
#[inline(always)]
fn padded<T: Copy + Default>(tail: &[T]) -> [T; 8] {
    std::array::from_fn(|i| tail.get(i).copied().unwrap_or_default())
}

#[inline(always)]
fn convert<T: Copy + Default>(src: &[T], dst: &mut [f32], eight: impl Fn(&[T; 8]) -> [f32; 8]) {
    let ((body, tail), (out, out_tail)) = (src.as_chunks(), dst.as_chunks_mut());
    for (src, dst) in body.iter().zip(out) {
        *dst = eight(src);
    }
    let last = eight(&padded(tail));
    out_tail.iter_mut().zip(last).for_each(|(dst, x)| *dst = x);
}

#[inline(always)]
fn int4_to_f32(words: &[u32], steps: &[f32], dst: &mut [f32], nibbles: impl Fn(u32) -> [f32; 8]) {
    let (dst, _) = dst.as_chunks_mut::<8>();
    let groups = words.chunks(GROUP_WORDS).zip(dst.chunks_mut(GROUP_WORDS));
    for ((words, dst), step) in groups.zip(steps) {
        for (word, dst) in words.iter().zip(dst) {
            let values = nibbles(*word);
            for i in 0..8 {
                dst[i] = values[i] * step;
            }
        }
    }
}

#[inline(always)]
fn nibbles_to_f32(words: &[u32], i: u32, steps: &[f32], dst: &mut [f32]) {
    for ((word, step), x) in words.iter().zip(steps).zip(dst) {
        *x = nibble(*word, i) * step;
    }
}

/// Sums side by side: as many as keep the adders busy.
type Sums = [[f32; 8]; 4];

#[inline(always)]
fn add_products(sum: &mut [f32; 8], w: [f32; 8], x: &[f32; 8]) {
    for i in 0..8 {
        sum[i] += w[i] * x[i];
    }
}

#[inline(always)]
fn total(sums: Sums) -> f32 {
    let [a, b, c, d] = sums;
    let each: [f32; 8] = std::array::from_fn(|i| (a[i] + b[i]) + (c[i] + d[i]));
    each.iter().sum()
}

#[inline(always)]
fn dot<T: Copy + Default>(w: &[T], x: &[f32], eight: impl Fn(&[T; 8]) -> [f32; 8]) -> f32 {
    let mut sums = Sums::default();
    let ((w, w_tail), (x, x_tail)) = (w.as_chunks(), x.as_chunks());
    let ((w, w_rest), (x, x_rest)) = (w.as_chunks::<4>(), x.as_chunks::<4>());
    for (w, x) in w.iter().zip(x) {
        for i in 0..4 {
            add_products(&mut sums[i], eight(&w[i]), &x[i]);
        }
    }
    for (sum, (w, x)) in sums.iter_mut().zip(w_rest.iter().zip(x_rest)) {
        add_products(sum, eight(w), x);
    }
    if !w_tail.is_empty() {
        add_products(&mut sums[3], eight(&padded(w_tail)), &padded(x_tail));
    }
    total(sums)
}

#[inline(always)]
fn int4_dot(words: &[u32], steps: &[f32], x: &[f32]) -> f32 {
    let groups = words.chunks(GROUP_WORDS).zip(x.chunks(INT4_GROUP)).zip(steps);
    let sums = groups.map(|((words, x), step)| {
        let mut values = [0.0; INT4_GROUP];
        int4_to_f32(words, &[*step], &mut values, nibbles);
        dot(&values, x, |w| *w)
    });
    sums.sum()
}

#[inline(always)]
fn add_rows<T: Copy + Default>(
    w: [&[T]; 4],
    x: [f32; 4],
    out: &mut [f32],
    eight: impl Fn(&[T; 8]) -> [f32; 8],
) {
    let (out, out_tail) = out.as_chunks_mut::<8>();
    let [(a, a_tail), (b, b_tail), (c, c_tail), (d, d_tail)] = w.map(|w| w.as_chunks::<8>());
    for ((((out, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        add_four(out, [eight(a), eight(b), eight(c), eight(d)], x);
    }
    if !out_tail.is_empty() {
        let tails = [a_tail, b_tail, c_tail, d_tail];
        let [a, b, c, d] = [padded(tails[0]), padded(tails[1]), padded(tails[2]), padded(tails[3])];
        let mut last = padded(out_tail);
        add_four(&mut last, [eight(&a), eight(&b), eight(&c), eight(&d)], x);
        out_tail.copy_from_slice(&last[..out_tail.len()]);
    }
}

#[inline(always)]
fn add_four(out: &mut [f32; 8], [a, b, c, d]: [[f32; 8]; 4], x: [f32; 4]) {
    for i in 0..8 {
        out[i] += (a[i] * x[0] + b[i] * x[1]) + (c[i] * x[2] + d[i] * x[3]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the plain loops give, bit by bit but for a NaN's.
    fn same(got: f32, want: f32) -> bool {
        got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan()
    }

    #[test]
    fn every_half_widens() {
        let bits = 0..=u16::MAX;
        let mut out = vec![0.0; 1 << 16];
        widen_f16(&bits.clone().map(f16::from_bits).collect::<Vec<_>>(), &mut out);
        for (bits, &got) in bits.clone().zip(&out) {
            assert!(same(got, f16::from_bits(bits).to_f32()), "f16 {bits:#06x} is {got}");
        }
        widen_bf16(&bits.clone().map(bf16::from_bits).collect::<Vec<_>>(), &mut out);
        for (bits, &got) in bits.zip(&out) {
            assert!(same(got, bf16::from_bits(bits).to_f32()), "bf16 {bits:#06x} is {got}");
        }
    }

    #[test]
    fn every_byte_widens() {
        let bytes: Vec<_> = (0..=u8::MAX).collect();
        let mut out = [0.0; 256];
        widen_int8(&bytes, &mut out);
        for (byte, got) in bytes.into_iter().zip(out) {
            assert_eq!(got, f32::from(byte as i8));
        }
    }

    #[test]
    fn every_e4m3_widens() {
        let bytes: Vec<_> = (0..=u8::MAX).collect();
        let mut out = [0.0; 256];
        widen_e4m3(&bytes, &mut out);
        for (byte, got) in bytes.into_iter().zip(out) {
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
            let magnitude = match (exponent, byte & 7) {
                (15, 7) => f32::NAN,
                (0, _) => mantissa * 2f32.powi(-6),
                _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
            };
            let want = if byte < 128 { magnitude } else { -magnitude };
            assert!(same(got, want), "{byte:#04x} is {got}, not {want}");
        }
    }

    /// All codes in all places, of lengths around those of vectors.
    #[test]
    fn codes_of_four_bits() {
        let table = std::array::from_fn(|i| (i * i) as f32 - 20.0);
        for len in [0, 1, 7, 8, 9, 16, 29, 64] {
            let words: Vec<u32> =
                (0..len as u32).map(|i| i.wrapping_mul(0x9e37_79b9) ^ 0x1234_5678).collect();
            let steps: Vec<f32> = (0..len).map(|i| (i % 3) as f32 - 1.0).collect();
            let zeros: Vec<f32> = (0..len).map(|i| (i % 17) as f32).collect();
            let code = |i: u32, j: usize| (words[j] >> (4 * i) & 15) as usize;
            let x = [1.0, -2.0, 3.0, 0.0, 5.0, -6.0, 7.0, 0.5];
            let want = |value: &dyn Fn(u32, usize) -> f32, j| -> f32 {
                100.0 + (0..8).map(|i| x[i as usize] * value(i, j)).sum::<f32>()
            };
            let by_table = |i: u32, j: usize| table[code(i, j)];
            let from_zero = |i: u32, j: usize| code(i, j) as f32 - zeros[j];
            let mut out = vec![0.0; len + 1];
            for i in 0..8 {
                widen_by_table(&words, i, &table, &steps, &mut out[..len]);
                assert!((0..len).all(|j| out[j] == by_table(i, j) * steps[j]), "{len} {i}");
                widen_from_zeros(&words, i, &zeros, &steps, &mut out[..len]);
                assert!((0..len).all(|j| out[j] == from_zero(i, j) * steps[j]), "{len} {i}");
            }
            out.fill(100.0);
            add_by_table(&words, &x, &table, &mut out[..len]);
            assert!((0..len).all(|j| out[j] == want(&by_table, j)), "{len}");
            out.fill(100.0);
            add_from_zeros(&words, &x, &zeros, &mut out[..len]);
            assert!((0..len).all(|j| out[j] == want(&from_zero, j)), "{len}");
            assert_eq!(out[len], 100.0);
        }
    }

    /// Lengths around those of vectors, nothing past which may be touched.
    #[test]
    fn runs_of_every_length() {
        for len in 0..70 {
            let integers = || (0..len).map(|i| (i * 7 % 16) as f32 - 8.0);
            let x: Vec<f32> = (0..len).map(|i| (i % 5) as f32 - 2.0).collect();
            let w = [0, 1, 2, 3].map(|row| -> Vec<f16> {
                integers().map(|w| f16::from_f32(w + row as f32)).collect()
            });
            let want: f32 = integers().zip(&x).map(|(w, x)| w * x).sum();
            assert_eq!(dot_f16(&w[0], &x), want);
            assert_eq!(dot_bf16(&integers().map(bf16::from_f32).collect::<Vec<_>>(), &x), want);
            assert_eq!(dot_int8(&integers().map(|w| w as i8 as u8).collect::<Vec<_>>(), &x), want);

            let mut out = vec![100.0; len + 1];
            let rows = w.each_ref().map(Vec::as_slice);
            add_rows_f16(rows, [1.0, 2.0, 3.0, 4.0], &mut out[..len]);
            for (i, w) in integers().enumerate() {
                assert_eq!(out[i], 100.0 + 10.0 * w + 20.0);
            }
            assert_eq!(out[len], 100.0);
            widen_f16(&w[0], &mut out[..len]);
            assert_eq!((out[..len].to_vec(), out[len]), (integers().collect(), 100.0));
        }
    }

    #[test]
    fn int4_by_groups() {
        let words: Vec<u32> =
            (0..5 * GROUP_WORDS as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        let steps = [1.0, -2.0, 0.5, 3.0, 0.0];
        let x: Vec<f32> = (0..5 * INT4_GROUP).map(|i| (i % 5) as f32 - 2.0).collect();
        let value = |i: usize| nibble(words[i / 8], (i % 8) as u32) * steps[i / INT4_GROUP];
        let mut out = vec![0.0; x.len()];
        widen_int4(&words, &steps, &mut out);
        assert_eq!(out, (0..x.len()).map(value).collect::<Vec<_>>());
        let want: f32 = x.iter().enumerate().map(|(i, x)| value(i) * x).sum();
        assert_eq!(dot_int4(&words, &steps, &x), want);
        assert_eq!(int4_dot(&words, &steps, &x), want);
        assert_eq!([0x8u32, 0x7, 0xf, 0x0].map(|word| nibble(word, 0)), [-8.0, 7.0, -1.0, 0.0]);
    }
}
