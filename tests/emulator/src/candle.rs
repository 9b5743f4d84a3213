//! The kernels of candle that this crate's host code calls: filling, copying, casting, picking, adding, multiplying.

use std::ffi::c_void;

use half::{bf16, f16};

use crate::memory::Memory;

/// A launch of a kernel of candle's, which is one in Rust here.
pub struct Call<'a> {
    pub name: &'a str,
    /// Where the arguments are.
    pub params: *const *const c_void,
    pub memory: Memory,
}

impl Call<'_> {
    /// Whether it is known.
    pub fn run(&self) -> bool {
        let (what, kind) = self.name.split_once('_').unwrap_or((self.name, ""));
        match what {
            "fill" => self.fill(bytes(kind)),
            "const" => self.const_set(bytes(kind.trim_start_matches("set_"))),
            "ucopy" => self.ucopy(bytes(kind)),
            "copy2d" => self.copy2d(bytes(kind)),
            "badd" => self.binary(kind, |a, b| a + b),
            "bmul" => self.binary(kind, |a, b| a * b),
            "is" => {
                let (ids, kind) = kind.split_once('_').expect("two types");
                self.index_select(bytes(ids), bytes(kind));
            }
            "cast" => {
                let (from, to) = kind.split_once('_').expect("two types");
                self.cast(from, to);
            }
            _ => return false,
        }
        true
    }

    fn arg<T: Copy>(&self, i: usize) -> T {
        // SAFETY: candle passes as many as the kernel has, each of its type, which the methods below have
        // from candle-kernels' sources.
        unsafe { (*self.params.add(i)).cast::<T>().read_unaligned() }
    }

    /// The element `i` of a view whose lengths and strides are at `info`, or of all that lies in a row.
    fn place(&self, i: usize, info: u64, dims: usize) -> usize {
        self.place_of(0, i, info, dims)
    }

    /// The same of operand `operand`, whose strides are after those before it.
    fn place_of(&self, operand: usize, i: usize, info: u64, dims: usize) -> usize {
        if info == 0 {
            return i;
        }
        let number = |at: usize| self.memory.get(info + 8 * at as u64, 8) as usize;
        let (mut rest, mut place) = (i, 0);
        for dim in (0..dims).rev() {
            place += rest % number(dim) * number((1 + operand) * dims + dim);
            rest /= number(dim);
        }
        place
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) {
        self.memory.set(to, bytes, self.memory.get(from, bytes));
    }

    /// `(buf, value, numel)`.
    fn fill(&self, bytes: usize) {
        let (to, value, count) = (self.arg::<u64>(0), self.number(1, bytes), self.arg::<u64>(2));
        (0..count).for_each(|i| self.memory.set(to + i * bytes as u64, bytes, value));
    }

    /// `(numel, num_dims, info, value, out)`.
    fn const_set(&self, bytes: usize) {
        let (count, dims, info) = (self.arg(0), self.arg(1), self.arg(2));
        let (value, to) = (self.number(3, bytes), self.arg::<u64>(4));
        for i in 0..count {
            let at = to + (self.place(i, info, dims) * bytes) as u64;
            self.memory.set(at, bytes, value);
        }
    }

    /// `(numel, num_dims, info, inp, out)`.
    fn ucopy(&self, bytes: usize) {
        let (count, dims, info) = (self.arg::<usize>(0), self.arg(1), self.arg(2));
        let (from, to) = (self.arg::<u64>(3), self.arg::<u64>(4));
        for i in 0..count {
            let at = from + (self.place(i, info, dims) * bytes) as u64;
            self.copy(at, to + (i * bytes) as u64, bytes);
        }
    }

    /// `(numel, num_dims, info, lhs, rhs, out)`, rounded once.
    fn binary(&self, kind: &str, of: fn(f64, f64) -> f64) {
        let (count, dims, info) = (self.arg::<usize>(0), self.arg(1), self.arg(2));
        let (operands, to) = ([3, 4].map(|i| self.arg::<u64>(i)), self.arg::<u64>(5));
        let size = bytes(kind);
        for i in 0..count {
            let [a, b] = [0, 1].map(|operand| {
                let place = self.place_of(operand, i, info, dims) * size;
                number(kind, self.memory.get(operands[operand] + place as u64, size))
            });
            self.memory.set(to + (i * size) as u64, size, bits(kind, of(a, b)));
        }
    }

    /// `(src, dst, d1, d2, src_s, dst_s)`.
    fn copy2d(&self, bytes: usize) {
        let (from, to) = (self.arg::<u64>(0), self.arg::<u64>(1));
        let [rows, cols, from_row, to_row] = [2, 3, 4, 5].map(|i| u64::from(self.arg::<u32>(i)));
        for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
            let [from_at, to_at] =
                [from_row, to_row].map(|stride| (row * stride + col) * bytes as u64);
            self.copy(from + from_at, to + to_at, bytes);
        }
    }

    /// `(numel, num_dims, info, ids, inp, out, left_size, src_dim_size, ids_dim_size, right_size)`, of which candle makes
    /// all contiguous.
    fn index_select(&self, id_bytes: usize, bytes: usize) {
        let count = self.arg::<usize>(0);
        let [ids, from, to] = [3, 4, 5].map(|i| self.arg::<u64>(i));
        let [dim, many, right] = [7, 8, 9].map(|i| self.arg::<usize>(i));
        for i in 0..count {
            let id = self.memory.get(ids + (i / right % many * id_bytes) as u64, id_bytes) as usize;
            assert!(id < dim, "index {id} of {dim}");
            let source = (i / right / many * dim + id) * right + i % right;
            self.copy(from + (source * bytes) as u64, to + (i * bytes) as u64, bytes);
        }
    }

    /// `(numel, num_dims, info, inp, out)`.
    fn cast(&self, from_kind: &str, to_kind: &str) {
        let (count, dims, info) = (self.arg::<usize>(0), self.arg(1), self.arg(2));
        let (from, to) = (self.arg::<u64>(3), self.arg::<u64>(4));
        let [from_bytes, to_bytes] = [from_kind, to_kind].map(bytes);
        for i in 0..count {
            let at = from + (self.place(i, info, dims) * from_bytes) as u64;
            let value = number(from_kind, self.memory.get(at, from_bytes));
            self.memory.set(to + (i * to_bytes) as u64, to_bytes, bits(to_kind, value));
        }
    }

    /// An argument of so many bytes.
    fn number(&self, i: usize, bytes: usize) -> u64 {
        match bytes {
            1 => self.arg::<u8>(i).into(),
            2 => self.arg::<u16>(i).into(),
            4 => self.arg::<u32>(i).into(),
            _ => self.arg(i),
        }
    }
}

/// Bytes of an element.
fn bytes(kind: &str) -> usize {
    match kind {
        // candle (0.11.1) asks for `ucopy_f8e4m3`, too, which no kernel is called.
        "u8" | "f8_e4m3" => 1,
        "f16" | "bf16" | "i16" => 2,
        "f32" | "u32" | "i32" => 4,
        "f64" | "i64" => 8,
        _ => panic!("elements of {kind}"),
    }
}

fn number(kind: &str, bits: u64) -> f64 {
    match kind {
        "u8" => (bits as u8).into(),
        "f16" => f16::from_bits(bits as u16).to_f64(),
        "bf16" => bf16::from_bits(bits as u16).to_f64(),
        "f32" => f32::from_bits(bits as u32).into(),
        "f64" => f64::from_bits(bits),
        _ => panic!("a cast from {kind}"),
    }
}

fn bits(kind: &str, number: f64) -> u64 {
    match kind {
        "f16" => f16::from_f64(number).to_bits().into(),
        "bf16" => bf16::from_f64(number).to_bits().into(),
        "f32" => (number as f32).to_bits().into(),
        "f64" => number.to_bits(),
        _ => panic!("a cast to {kind}"),
    }
}
