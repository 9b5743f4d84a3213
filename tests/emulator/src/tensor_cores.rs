//! `mma`, `wgmma`, and the loads and stores of their fragments.

use crate::copies::swizzled;
use crate::grid::{Block, Shared};
use crate::program::{Instruction, Op, Operand, Widen};
use crate::warp::{LANES, Warp};

/// Both elements of a register.
fn pair(widen: Widen, value: u64) -> [f32; 2] {
    [value, value >> 16].map(|half| widen(half as u16))
}

pub fn list(operand: &Operand) -> &[Operand] {
    match operand {
        Operand::List(all) => all,
        one => std::slice::from_ref(one),
    }
}

impl Warp {
    /// 16 rows of 16 elements that the lanes hold as a left operand.
    fn left(&self, block: &Block, registers: &[Operand], widen: Widen) -> [[f32; 16]; 16] {
        let mut rows = [[0.0; 16]; 16];
        for lane in 0..LANES {
            for (i, register) in registers.iter().enumerate() {
                let (row, col) = (lane / 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i / 2));
                rows[row][col..col + 2]
                    .copy_from_slice(&pair(widen, self.get(block, register, lane)));
            }
        }
        rows
    }

    /// `sums += left·rightᵀ`, where sums `4j + 2h + c` of a lane are of row `lane/4 + 8h`, column
    /// `8j + 2(lane%4) + c`.
    fn multiply(
        &mut self,
        block: &Block,
        sums: &[Operand],
        keeps: bool,
        left: &[[f32; 16]; 16],
        right: &[[f32; 16]],
    ) {
        for lane in 0..LANES {
            for (i, register) in sums.iter().enumerate() {
                let (row, col) = (lane / 4 + 8 * (i / 2 % 2), i / 4 * 8 + 2 * (lane % 4) + i % 2);
                let before = f32::from_bits(self.get(block, register, lane) as u32);
                let products = left[row].iter().zip(&right[col]).map(|(a, b)| a * b);
                let sum = products.fold(if keeps { before } else { 0.0 }, |sum, x| sum + x);
                self.set(register, lane, sum.to_bits().into());
            }
        }
    }

    /// `mma.sync.m16n8k16`.
    pub fn mma(&mut self, block: &Block, i: &Instruction, widen: Widen) {
        let (sums, left, right) = mma_operands(i);
        let left = self.left(block, left, widen);
        let mut columns = [[0.0; 16]; 8];
        for lane in 0..LANES {
            for (half, register) in right.iter().enumerate() {
                let k = 2 * (lane % 4) + 8 * half;
                columns[lane / 4][k..k + 2]
                    .copy_from_slice(&pair(widen, self.get(block, register, lane)));
            }
        }
        self.multiply(block, sums, true, &left, &columns);
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
        let Op::MultiplyGroup(widen, n) = i.op else { panic!("{}", i.text) };
        let element = |at: u32| widen(block.shared.get(swizzled(at), 2) as u16);
        let is_set = |flag: &Operand| *flag == Operand::Number(1);
        let left = match &i.args[1] {
            Operand::List(registers) => self.left(block, registers, widen),
            _ => {
                let lines = Lines::new(product.left, is_set(&i.args[6]));
                let first = self.number % 4 * 16;
                let row = |row: usize| {
                    std::array::from_fn(|k| element(lines.place(first + row as u32, k as u32)))
                };
                std::array::from_fn(row)
            }
        };
        let transposed = is_set(i.args.last().expect("flags"));
        let lines = Lines::new(product.right, transposed);
        let column = |col| std::array::from_fn(|k| element(lines.place(col, k as u32)));
        let right: Vec<[f32; 16]> = (0..n).map(column).collect();
        let sums = list(&i.args[0]).to_vec();
        assert_eq!(sums.len() as u32, n / 2, "{}", i.text);
        self.multiply(block, &sums, product.keeps, &left, &right);
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
    transposed: bool,
}

impl Lines {
    fn new(descriptor: u64, transposed: bool) -> Self {
        let field = |shift: u32| ((descriptor >> shift & 0x3fff) << 4) as u32;
        Self { begin: field(0), leading: field(16), stride: field(32), transposed }
    }

    /// Where an element lies before the swizzle.
    fn place(&self, outer: u32, k: u32) -> u32 {
        const LINE: u32 = 128;
        self.begin
            + match self.transposed {
                false => outer / 8 * self.stride + outer % 8 * LINE + 2 * k,
                true => {
                    outer / 64 * self.leading + k / 8 * self.stride + k % 8 * LINE + outer % 64 * 2
                }
            }
    }
}
