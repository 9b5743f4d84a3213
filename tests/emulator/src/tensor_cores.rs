//! `mma`, `wgmma`, and the loads and stores of their fragments.

use crate::copies::swizzled;
use crate::grid::{Block, Shared};
use crate::program::{Factor, Instruction, Op, Operand};
use crate::warp::{LANES, Warp};

/// The elements of a register, the lowest first.
fn elements(factor: Factor, register: u64) -> impl Iterator<Item = f32> {
    let bits = 8 * factor.size;
    (0..4 / factor.size).map(move |i| (factor.widen)((register >> (bits * i)) as u16))
}

pub fn list(operand: &Operand) -> &[Operand] {
    match operand {
        Operand::List(all) => all,
        one => std::slice::from_ref(one),
    }
}

impl Warp {
    /// 16 rows that the lanes hold as a left operand: `K` elements of each, 32 bytes.
    fn left<const K: usize>(
        &self,
        block: &Block,
        registers: &[Operand],
        factor: Factor,
    ) -> [[f32; K]; 16] {
        let mut rows = [[0.0; K]; 16];
        for lane in 0..LANES {
            for (i, register) in registers.iter().enumerate() {
                let (row, k) = (lane / 4 + 8 * (i % 2), K / 8 * (lane % 4) + K / 2 * (i / 2));
                let values = elements(factor, self.get(block, register, lane));
                rows[row][k..].iter_mut().zip(values).for_each(|(to, value)| *to = value);
            }
        }
        rows
    }

    /// `sums += left·rightᵀ`, where sums `4j + 2h + c` of a lane are of row `lane/4 + 8h`, column
    /// `8j + 2(lane%4) + c`.
    fn multiply<const K: usize>(
        &mut self,
        block: &Block,
        sums: &[Operand],
        (keeps, integers): (bool, bool),
        left: &[[f32; K]; 16],
        right: &[[f32; K]],
    ) {
        for lane in 0..LANES {
            for (i, register) in sums.iter().enumerate() {
                let (row, col) = (lane / 4 + 8 * (i / 2 % 2), i / 4 * 8 + 2 * (lane % 4) + i % 2);
                let before = if keeps { self.get(block, register, lane) as u32 } else { 0 };
                let products = left[row].iter().zip(&right[col]).map(|(a, b)| a * b);
                let sum = match integers {
                    false => products.fold(f32::from_bits(before), |sum, x| sum + x).to_bits(),
                    // Products of bytes are exact.
                    true => products.fold(before, |sum, x| sum.wrapping_add_signed(x as i32)),
                };
                self.set(register, lane, sum.into());
            }
        }
    }

    /// `mma.sync.m16n8k16`, or `.m16n8k32` of bytes.
    pub fn mma(&mut self, block: &Block, i: &Instruction, factor: Factor) {
        match factor.depth() {
            16 => self.mma_of::<16>(block, i, factor),
            _ => self.mma_of::<32>(block, i, factor),
        }
    }

    fn mma_of<const K: usize>(&mut self, block: &Block, i: &Instruction, factor: Factor) {
        let (sums, left, right) = mma_operands(i);
        let left = self.left::<K>(block, left, factor);
        let mut columns = [[0.0; K]; 8];
        for lane in 0..LANES {
            for (half, register) in right.iter().enumerate() {
                let k = K / 8 * (lane % 4) + K / 2 * half;
                let values = elements(factor, self.get(block, register, lane));
                columns[lane / 4][k..].iter_mut().zip(values).for_each(|(to, value)| *to = value);
            }
        }
        self.multiply(block, sums, (true, factor.integers), &left, &columns);
    }

    /// `mma.sync.m16n8k8` of tf32: two sums of four products each, rounded towards zero as tensor cores do.
    /// Of a float 11 bits count.
    pub fn mma_tf32(&mut self, block: &Block, i: &Instruction) {
        let (sums, left, right) = mma_operands(i);
        let cut = |value: u64| f64::from(f32::from_bits(value as u32 & 0xffff_e000));
        let (mut rows, mut columns) = ([[0.0; 8]; 16], [[0.0; 8]; 8]);
        for lane in 0..LANES {
            for (i, register) in left.iter().enumerate() {
                let (row, k) = (lane / 4 + 8 * (i % 2), lane % 4 + 4 * (i / 2));
                rows[row][k] = cut(self.get(block, register, lane));
            }
            for (i, register) in right.iter().enumerate() {
                columns[lane / 4][lane % 4 + 4 * i] = cut(self.get(block, register, lane));
            }
        }
        for lane in 0..LANES {
            for (i, register) in sums.iter().enumerate() {
                let (row, col) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                let mut sum = f32::from_bits(self.get(block, register, lane) as u32);
                for four in [0..4, 4..8] {
                    let exact =
                        four.fold(f64::from(sum), |x, k| x + rows[row][k] * columns[col][k]);
                    let near = exact as f32;
                    let over = near.is_finite() && f64::from(near).abs() > exact.abs();
                    sum = if over { f32::from_bits(near.to_bits() - 1) } else { near };
                }
                self.set(register, lane, sum.to_bits().into());
            }
        }
    }

    /// What `wgmma` knows when it begins. Registers that are operands it reads later.
    pub fn begin_wgmma(&mut self, block: &Block, i: &Instruction, place: usize) {
        let descriptor = |operand: &Operand| match operand {
            Operand::List(_) => 0,
            register => self.get(block, register, 0),
        };
        let product = Product {
            place,
            left: descriptor(&i.args[1]),
            right: descriptor(&i.args[2]),
            keeps: self.get(block, &i.args[3], 0) != 0,
        };
        self.products.begin(product);
    }

    /// `wgmma`, of this warp's 16 rows. Operands lie in lines of 128 bytes, swizzled.
    pub fn wgmma(&mut self, block: &Block, i: &Instruction, product: &Product) {
        let Op::MultiplyGroup(factor, n) = i.op else { panic!("{}", i.text) };
        match factor.depth() {
            16 => self.wgmma_of::<16>(block, i, product, factor, n),
            _ => self.wgmma_of::<32>(block, i, product, factor, n),
        }
    }

    fn wgmma_of<const K: usize>(
        &mut self,
        block: &Block,
        i: &Instruction,
        product: &Product,
        factor: Factor,
        n: u32,
    ) {
        let element = |at: u32| (factor.widen)(block.shared.get(swizzled(at), factor.size) as u16);
        // After the predicate: that no operand of floats is negated, and of 16 bits whether each is transposed.
        let flags = &i.args[4..];
        let signs = if factor.integers { 0 } else { 2 };
        assert!(flags[..signs].iter().all(|sign| *sign == Operand::Number(1)), "{}", i.text);
        let transposed = &flags[signs..];
        assert!(factor.size == 2 || transposed.is_empty(), "{}", i.text);
        let is_set = |flag: Option<&Operand>| flag == Some(&Operand::Number(1));
        let left = match &i.args[1] {
            Operand::List(registers) => self.left::<K>(block, registers, factor),
            _ => {
                let lines = Lines::new(product.left, factor, is_set(transposed.first()));
                let first = self.number % 4 * 16;
                let row = |row: usize| {
                    std::array::from_fn(|k| element(lines.place(first + row as u32, k as u32)))
                };
                std::array::from_fn(row)
            }
        };
        let lines = Lines::new(product.right, factor, is_set(transposed.last()));
        let column = |col| std::array::from_fn(|k| element(lines.place(col, k as u32)));
        let right: Vec<[f32; K]> = (0..n).map(column).collect();
        let sums = list(&i.args[0]).to_vec();
        assert_eq!(sums.len() as u32, n / 2, "{}", i.text);
        self.multiply(block, &sums, (product.keeps, factor.integers), &left, &right);
    }

    pub fn ldmatrix(&mut self, block: &Block, i: &Instruction, transposed: bool) {
        for (matrix, register) in list(&i.args[0]).iter().enumerate() {
            let lines = self.lines(block, &i.args[1], matrix);
            for lane in 0..LANES {
                let value = match transposed {
                    false => block.shared.get(lines[lane / 4] + 4 * (lane as u32 % 4), 4),
                    true => {
                        let element =
                            |line: usize| block.shared.get(lines[line] + 2 * (lane as u32 / 4), 2);
                        let first = 2 * (lane % 4);
                        element(first) | element(first + 1) << 16
                    }
                };
                self.set(register, lane, value);
            }
        }
    }

    pub fn stmatrix(&mut self, block: &mut Block, i: &Instruction, transposed: bool) {
        for (matrix, register) in list(&i.args[1]).iter().enumerate() {
            let lines = self.lines(block, &i.args[0], matrix);
            for lane in 0..LANES {
                let value = self.get(block, register, lane);
                let shared: &mut Shared = &mut block.shared;
                match transposed {
                    false => shared.set(lines[lane / 4] + 4 * (lane as u32 % 4), 4, value),
                    true => {
                        let (first, at) = (2 * (lane % 4), 2 * (lane as u32 / 4));
                        shared.set(lines[first] + at, 2, value & 0xffff);
                        shared.set(lines[first + 1] + at, 2, value >> 16);
                    }
                }
            }
        }
    }

    /// Where the lines of an 8×8 matrix lie, which eight lanes say.
    fn lines(&self, block: &Block, place: &Operand, matrix: usize) -> [u32; 8] {
        std::array::from_fn(|line| {
            let at = self.address(block, place, 8 * matrix + line) as u32;
            assert!(at.is_multiple_of(16), "a line of a matrix begins at {at:#x}");
            at
        })
    }
}

/// Sums, left and right operands of `mma`.
fn mma_operands(i: &Instruction) -> (&[Operand], &[Operand], &[Operand]) {
    let [sums, left, right, same] = &i.args[..] else { panic!("{}", i.text) };
    assert_eq!(sums, same, "{}", i.text);
    (list(sums), list(left), list(right))
}

/// An instruction of `wgmma` under way.
pub struct Product {
    /// Of the instruction in the program.
    pub place: usize,
    /// The operands' descriptors.
    left: u64,
    right: u64,
    /// Whether it is added to what the sums hold.
    keeps: bool,
}

/// What the descriptor of an operand of `wgmma` says.
struct Lines {
    begin: u32,
    /// Bytes between the two kinds of groups of lines.
    leading: u32,
    stride: u32,
    /// Bytes of an element.
    size: u32,
    transposed: bool,
}

impl Lines {
    fn new(descriptor: u64, factor: Factor, transposed: bool) -> Self {
        let field = |shift: u32| ((descriptor >> shift & 0x3fff) << 4) as u32;
        let size = factor.size as u32;
        Self { begin: field(0), leading: field(16), stride: field(32), size, transposed }
    }

    /// Where an element lies before the swizzle.
    fn place(&self, outer: u32, k: u32) -> u32 {
        const LINE: u32 = 128;
        self.begin
            + match self.transposed {
                false => outer / 8 * self.stride + outer % 8 * LINE + self.size * k,
                true => {
                    outer / 64 * self.leading + k / 8 * self.stride + k % 8 * LINE + outer % 64 * 2
                }
            }
    }
}
