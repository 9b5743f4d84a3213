//! What an instruction makes of the values of one lane.

use std::array;

use half::{bf16, f16};

use crate::program::e4m3;
use crate::warp::LANES;

/// Of up to four operands, in 64 bits each.
#[derive(Clone, Copy)]
pub struct Function {
    /// Of one lane.
    pub one: fn([u64; 4]) -> u64,
    /// The same of all lanes at once.
    pub all: fn(&[&[u64; LANES]; 4]) -> [u64; LANES],
}

/// Both of a [`Function`]: what is called for each lane is known to the compiler there, and becomes vectors.
macro_rules! each {
    ($one:expr) => {
        Function {
            one: $one,
            all: |values| {
                let one: fn([u64; 4]) -> u64 = $one;
                array::from_fn(|lane| one(values.map(|value| value[lane])))
            },
        }
    };
}

fn f(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

fn bits(x: f32) -> u64 {
    u64::from(x.to_bits())
}

fn s(x: u64) -> i32 {
    x as u32 as i32
}

fn u(x: u64) -> u32 {
    x as u32
}

/// `.ftz`: what is below the normal numbers is 0.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
}

fn pair(high: u16, low: u16) -> u64 {
    u64::from(high) << 16 | u64::from(low)
}

/// The nearest 8-bit float, the even one of two; what is too large becomes the largest.
fn to_e4m3(x: f32) -> u8 {
    const NAN: u8 = 0x7f;
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | NAN;
    }
    let far = |code: &u8| (e4m3(*code) - x.abs()).abs();
    let nearest = (0..NAN).min_by(|a, b| far(a).total_cmp(&far(b)).then((a & 1).cmp(&(b & 1))));
    sign | nearest.expect("there are codes")
}

/// `a·b + c` of the low halves and of the high ones. In f64 it is exact but for what is far below the last bit.
fn halves(operands: [u64; 3], widen: fn(u16) -> f64, round: fn(f64) -> u16) -> u64 {
    let of = |shift: u32| {
        let [a, b, c] = operands.map(|x| widen((x >> shift) as u16));
        round(a.mul_add(b, c))
    };
    pair(of(16), of(0))
}

/// Bit by bit, what the table has for the three bits, the first operand's the highest.
fn lop3(operands: [u32; 3], table: u64) -> u32 {
    let bit = |i: u32| {
        let row = operands.iter().fold(0, |row, x| row << 1 | x >> i & 1);
        (table >> row & 1) as u32
    };
    (0..32).fold(0, |all, i| all | bit(i) << i)
}

/// Bytes of `b` and `a`, without the mode that copies signs.
fn prmt(a: u64, b: u64, which: u64) -> u64 {
    let both = u64::from(u(a)) | u64::from(u(b)) << 32;
    let byte = |i: u32| {
        let place = which >> (4 * i) & 0xf;
        assert!(place < 8, "a sign that is copied: prmt by {which:#x}");
        (both >> (8 * place) & 0xff) << (8 * i)
    };
    (0..4).fold(0, |all, i| all | byte(i))
}

/// The function of an instruction with one result that looks at nothing but its operands.
pub fn function(name: &str) -> Option<Function> {
    Some(match name {
        "add.f32" => each!(|[a, b, ..]| bits(f(a) + f(b))),
        "sub.f32" => each!(|[a, b, ..]| bits(f(a) - f(b))),
        "mul.f32" | "mul.rn.f32" => each!(|[a, b, ..]| bits(f(a) * f(b))),
        "div.rn.f32" => each!(|[a, b, ..]| bits(f(a) / f(b))),
        "sqrt.rn.f32" => each!(|[a, ..]| bits(f(a).sqrt())),
        "fma.rn.f32" => each!(|[a, b, c, _]| bits(f(a).mul_add(f(b), f(c)))),
        "fma.rn.f16x2" => each!(|[a, b, c, _]| halves(
            [a, b, c],
            |x| f16::from_bits(x).to_f64(),
            |x| f16::from_f64(x).to_bits()
        )),
        "fma.rn.bf16x2" => each!(|[a, b, c, _]| halves(
            [a, b, c],
            |x| bf16::from_bits(x).to_f64(),
            |x| bf16::from_f64(x).to_bits()
        )),
        "min.f32" => each!(|[a, b, ..]| bits(f(a).min(f(b)))),
        "max.f32" => each!(|[a, b, ..]| bits(f(a).max(f(b)))),
        "neg.f32" => each!(|[a, ..]| bits(-f(a))),
        "abs.f32" => each!(|[a, ..]| bits(f(a).abs())),
        "copysign.f32" => each!(|[a, b, ..]| bits(f(b).copysign(f(a)))),
        "ex2.approx.f32" => each!(|[a, ..]| bits(f(a).exp2())),
        "ex2.approx.ftz.f32" => each!(|[a, ..]| bits(flush(flush(f(a)).exp2()))),
        "lg2.approx.f32" => each!(|[a, ..]| bits(f(a).log2())),
        "rcp.approx.ftz.f32" => each!(|[a, ..]| bits(flush(1.0 / flush(f(a))))),
        "rsqrt.approx.f32" => each!(|[a, ..]| bits(1.0 / f(a).sqrt())),
        "tanh.approx.f32" => each!(|[a, ..]| bits(f(a).tanh())),

        "add.u32" | "add.s32" => each!(|[a, b, ..]| u(a).wrapping_add(u(b)).into()),
        "sub.u32" | "sub.s32" => each!(|[a, b, ..]| u(a).wrapping_sub(u(b)).into()),
        "mul.lo.u32" | "mul.lo.s32" => each!(|[a, b, ..]| u(a).wrapping_mul(u(b)).into()),
        "mul.wide.u32" => each!(|[a, b, ..]| u64::from(u(a)) * u64::from(u(b))),
        "mad.wide.u32" => each!(|[a, b, c, _]| (u64::from(u(a)) * u64::from(u(b))).wrapping_add(c)),
        "div.u32" => each!(|[a, b, ..]| (u(a) / u(b)).into()),
        "div.s32" => each!(|[a, b, ..]| ((s(a) / s(b)) as u32).into()),
        "rem.u32" => each!(|[a, b, ..]| (u(a) % u(b)).into()),
        "rem.s32" => each!(|[a, b, ..]| ((s(a) % s(b)) as u32).into()),
        "min.u32" => each!(|[a, b, ..]| u(a).min(u(b)).into()),
        "max.u32" => each!(|[a, b, ..]| u(a).max(u(b)).into()),
        "min.s32" => each!(|[a, b, ..]| (s(a).min(s(b)) as u32).into()),
        "max.s32" => each!(|[a, b, ..]| (s(a).max(s(b)) as u32).into()),
        "shl.b32" => each!(|[a, b, ..]| u(a).checked_shl(u(b)).unwrap_or(0).into()),
        "shr.u32" => each!(|[a, b, ..]| u(a).checked_shr(u(b)).unwrap_or(0).into()),
        "shr.s32" => each!(|[a, b, ..]| ((s(a) >> u(b).min(31)) as u32).into()),
        "bfe.u32" => each!(|[a, b, c, _]| (a >> u(b)) & ((1 << u(c)) - 1)),
        "popc.b32" => each!(|[a, ..]| u(a).count_ones().into()),
        "brev.b32" => each!(|[a, ..]| u(a).reverse_bits().into()),
        "lop3.b32" => each!(|[a, b, c, table]| lop3([u(a), u(b), u(c)], table).into()),
        "prmt.b32" => each!(|[a, b, which, _]| prmt(a, b, which)),
        "add.u64" => each!(|[a, b, ..]| a.wrapping_add(b)),
        "sub.u64" => each!(|[a, b, ..]| a.wrapping_sub(b)),
        "mul.lo.u64" => each!(|[a, b, ..]| a.wrapping_mul(b)),
        "min.u64" => each!(|[a, b, ..]| a.min(b)),
        "max.u64" => each!(|[a, b, ..]| a.max(b)),
        "div.u64" => each!(|[a, b, ..]| a / b),
        "shl.b64" => each!(|[a, b, ..]| a.checked_shl(u(b)).unwrap_or(0)),
        "shr.u64" => each!(|[a, b, ..]| a.checked_shr(u(b)).unwrap_or(0)),
        "and.b32" | "and.b64" | "and.pred" => each!(|[a, b, ..]| a & b),
        "or.b32" | "or.b64" | "or.pred" => each!(|[a, b, ..]| a | b),
        "xor.b32" | "xor.b64" | "xor.pred" => each!(|[a, b, ..]| a ^ b),
        "not.pred" => each!(|[a, ..]| a ^ 1),

        "cvt.u64.u32" | "cvt.u32.u64" | "cvta.param.u64" | "cvta.to.global.u64" => {
            each!(|[a, ..]| a)
        }
        "cvt.rni.s32.f32" => each!(|[a, ..]| (f(a).round_ties_even() as i32 as u32).into()),
        "cvt.pack.sat.s8.s32.b32" => each!(|[a, b, c, _]| {
            let byte = |x: u64| u64::from(s(x).clamp(-128, 127) as u8);
            byte(b) | byte(a) << 8 | (c & 0xffff) << 16
        }),
        "cvt.rn.satfinite.e4m3x2.f32" => {
            each!(|[a, b, ..]| u64::from(to_e4m3(f(b))) | u64::from(to_e4m3(f(a))) << 8)
        }
        "cvt.rn.f16x2.e4m3x2" => each!(|[a, ..]| {
            let float = |code: u64| f16::from_f32(e4m3(code as u8)).to_bits();
            pair(float(a >> 8), float(a))
        }),
        "cvt.rn.f32.s32" => each!(|[a, ..]| bits(s(a) as f32)),
        "cvt.rn.f32.u32" => each!(|[a, ..]| bits(u(a) as f32)),
        "cvt.f32.f16" => each!(|[a, ..]| bits(f16::from_bits(a as u16).to_f32())),
        "cvt.f32.bf16" => each!(|[a, ..]| bits(bf16::from_bits(a as u16).to_f32())),
        "cvt.rn.f16.f32" => each!(|[a, ..]| f16::from_f32(f(a)).to_bits().into()),
        "cvt.rn.bf16.f32" => each!(|[a, ..]| bf16::from_f32(f(a)).to_bits().into()),
        "cvt.rn.f16x2.f32" => {
            each!(|[a, b, ..]| pair(f16::from_f32(f(a)).to_bits(), f16::from_f32(f(b)).to_bits()))
        }
        "cvt.rn.bf16x2.f32" => {
            each!(|[a, b, ..]| pair(bf16::from_f32(f(a)).to_bits(), bf16::from_f32(f(b)).to_bits()))
        }

        "selp.f32" | "selp.b16" | "selp.b32" | "selp.b64" => {
            each!(|[a, b, p, _]| if p != 0 { a } else { b })
        }
        // Of a NaN every comparison is false, also `ne`.
        "setp.eq.f32" => each!(|[a, b, ..]| (f(a) == f(b)).into()),
        "setp.ne.f32" => each!(|[a, b, ..]| (f(a) < f(b) || f(a) > f(b)).into()),
        "setp.lt.f32" => each!(|[a, b, ..]| (f(a) < f(b)).into()),
        "setp.le.f32" => each!(|[a, b, ..]| (f(a) <= f(b)).into()),
        "setp.gt.f32" => each!(|[a, b, ..]| (f(a) > f(b)).into()),
        "setp.ge.f32" => each!(|[a, b, ..]| (f(a) >= f(b)).into()),
        "setp.eq.u32" | "setp.eq.s32" | "setp.eq.b32" => each!(|[a, b, ..]| (u(a) == u(b)).into()),
        "setp.ne.u32" | "setp.ne.s32" | "setp.ne.b32" => each!(|[a, b, ..]| (u(a) != u(b)).into()),
        "setp.ne.u64" => each!(|[a, b, ..]| (a != b).into()),
        "setp.lt.u32" => each!(|[a, b, ..]| (u(a) < u(b)).into()),
        "setp.le.u32" => each!(|[a, b, ..]| (u(a) <= u(b)).into()),
        "setp.gt.u32" => each!(|[a, b, ..]| (u(a) > u(b)).into()),
        "setp.ge.u32" => each!(|[a, b, ..]| (u(a) >= u(b)).into()),
        "setp.lt.s32" => each!(|[a, b, ..]| (s(a) < s(b)).into()),
        "setp.le.s32" => each!(|[a, b, ..]| (s(a) <= s(b)).into()),
        "setp.gt.s32" => each!(|[a, b, ..]| (s(a) > s(b)).into()),
        "setp.ge.s32" => each!(|[a, b, ..]| (s(a) >= s(b)).into()),
        _ => return None,
    })
}
