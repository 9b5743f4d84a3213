//! Plain codes to packed ones, and back: a byte of two rows of a column becomes both elements of a register.

use super::{Name, THREADS};
use crate::kernel::w4::{BLOCK, BLOCK_BYTES, Codes};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Rows of a plain word.
const ROWS: u32 = 8;
/// Plain words of a column of a block.
const WORDS: u32 = BLOCK / ROWS;

/// Where a block of threads is: its block of codes along K and N, and the address of that.
struct Place<'k> {
    kb: Reg<'k, u32>,
    nb: Reg<'k, u32>,
    codes: Reg<'k, u64>,
}

impl<'k> Place<'k> {
    fn new(k: &'k Kernel, codes: Reg<'k, u64>, rows: Reg<'k, u32>) -> Self {
        let (kb, nb) = (k.block_x(), k.block_y());
        let number = nb.mul_wide(rows.div_ceil(BLOCK)) + kb.wide();
        Self { kb, nb, codes: codes + number * u64::from(BLOCK_BYTES) }
    }
}

/// The topmost bit of each code of a word: a number of four bits in two's complement, and one that is 8 more, differ in it.
const TOPMOST: u32 = 0x8888_8888;

/// A thread has the 16 bytes that a thread of a product will have.
pub fn pack(of: Codes, zero: u32, signed: bool) -> Source {
    let k = &Kernel::new("w4_pack", Target::Sm80, THREADS);
    let (plain, codes) = (k.pointer(Name::Plain), k.pointer(Name::Codes));
    let (row_stride, col_stride) = (k.param::<u64>(Name::PlainRow), k.param::<u64>(Name::PlainCol));
    let (rows, cols) = (k.param::<u32>(Name::K), k.param::<u32>(Name::N));
    let (thread, place) = (k.thread(), Place::new(k, codes, rows));
    let plain_rows = rows.div_ceil(ROWS);
    let zeros = zero * 0x1111_1111;
    let shift = thread % 4 * 8;
    let column = place.nb * BLOCK + thread / 32 * 16 + thread % 32 / 4;
    let packed = std::array::from_fn::<_, 4, _>(|step| {
        // Of a lane's two columns, of eight rows and the eight after them.
        let bytes = [(0, 0), (8, 0), (0, 1), (8, 1)].map(|(right, below)| {
            let row = place.kb * WORDS + (2 * step as u32 + below);
            let column = if right == 0 { column } else { column + right };
            let word = k.var(zeros);
            k.if_(row.lt(plain_rows) & column.lt(cols), || {
                let at = row.wide() * row_stride + column.wide() * col_stride;
                let [codes] = k.ld_global_nc::<u32, 1>(plain + at * 4u64);
                word.set(if signed { codes ^ TOPMOST } else { codes });
            });
            word >> shift
        });
        let placed = (0..).zip(bytes).map(|(register, byte)| {
            let [low, high] = of.bits(register);
            ((byte & 0xf) << low) | ((byte & 0xf0) << (high - 4))
        });
        placed.reduce(|all, byte| all | byte).expect("there are four")
    });
    k.st_global(place.codes.element(thread, 16), packed);
    k.finish()
}

/// A thread has four words of a column.
pub fn unpack(of: Codes) -> Source {
    let k = &Kernel::new("w4_unpack", Target::Sm80, THREADS);
    let (codes, plain) = (k.pointer(Name::Codes), k.pointer(Name::Plain));
    let (rows, cols) = (k.param::<u32>(Name::K), k.param::<u32>(Name::N));
    let (thread, place) = (k.thread(), Place::new(k, codes, rows));
    let plain_rows = rows.div_ceil(ROWS);
    let right = thread % BLOCK;
    let column = place.nb * BLOCK + right;
    let lane = right / 16 * 32 + right % 8 * 4;
    let first = place.codes.element(lane, 16);
    for step in 0..WORDS * BLOCK / THREADS {
        let word = thread / BLOCK + step * (THREADS / BLOCK);
        // Its 16 rows, and whether it has the second eight of them.
        let (group, below) = (word / 2, word % 2);
        let [[low, high], [next, _]] = [0, 1].map(|register| of.bits(register));
        let shift = (right % 16 / 8 + below * 2) * next;
        let at = first.element(group, 4);
        let plain_word = (0..4u32)
            .map(|lane| {
                let [packed] = k.ld_global_nc::<u32, 1>(at.at((16 * lane).into()));
                let nibbles = packed >> shift;
                let second = nibbles >> (high - low - 4);
                ((nibbles & 0xf) | (second & 0xf0)) << (8 * lane)
            })
            .reduce(|all, byte| all | byte)
            .expect("there are four");
        let row = place.kb * WORDS + word;
        let to = plain + (row.mul_wide(cols) + column.wide()) * 4u64;
        k.when(row.lt(plain_rows) & column.lt(cols), || k.st_global(to, [plain_word]));
    }
    k.finish()
}
