//! Numbers in eight bits with a scale for each block: block-wise dynamic quantisation (Dettmers, Lewis, Shleifer and
//! Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", 2021, arXiv 2110.02861).
//!
//! A code stands for a part of the block's largest magnitude. In each decade from 10⁻⁶ on there are twice as many codes
//! as in the one below, so that small numbers keep their order of magnitude and large ones three digits.

/// Elements that share a scale.
pub const BLOCK: u32 = 256;
/// Codes of a book.
pub const CODES: usize = 256;
/// Decades.
const DECADES: i32 = 7;

/// What codes stand for, in ascending order; and above which number a code is less near than the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Book {
    /// Of each code.
    pub values: [f32; CODES],
    /// Between each code and the next; infinite after the last.
    pub thresholds: [f32; CODES],
}

impl Book {
    /// The book of numbers from −1 to 1, or from 0 to 1.
    pub fn new(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let count = 1 << (decade + i32::from(!signed));
            let unit = 10f64.powi(decade + 1 - DECADES);
            // The middles of equal parts of 0.1 to 1.
            for i in 0..count {
                let part = 0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(count);
                values.push(unit * part);
                if signed {
                    values.push(-unit * part);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
        let values: [f32; CODES] = values.try_into().expect("as many as there are codes");
        let mut thresholds = [f32::INFINITY; CODES];
        for (threshold, pair) in thresholds.iter_mut().zip(values.windows(2)) {
            *threshold = ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32;
        }
        Self { values, thresholds }
    }

    /// The code of a part of a scale: the nearest one. NaN is the first one, whose scale is NaN.
    pub fn code(&self, part: f32) -> u8 {
        let mut code = 0;
        let mut half = CODES / 2;
        while half > 0 {
            if part > self.thresholds[code + half - 1] {
                code += half;
            }
            half /= 2;
        }
        code as u8
    }

    /// The code of 0.
    pub fn zero(&self) -> u8 {
        self.code(0.0)
    }
}

/// Where a kernel finds a number's code: numbers from 2⁻²³ to 1 that begin with the same bits, as [`Guide::of`] says how many,
/// have one code or one of two. A guide has the lower one for all such beginnings, first the positive ones and then, in a signed
/// book, the negative ones. Smaller numbers are among those of the first beginning, and what is no number has the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guide {
    /// Bits that do not count.
    pub shift: u32,
    /// Beginnings of one sign, with the last one for what is no number.
    pub len: u32,
    /// Whether there are negative ones.
    pub signed: bool,
}

impl Guide {
    const LEAST: f32 = 1.0 / (1 << 23) as f32;

    /// Of the signed book and of the other one, whose numbers are twice as dense.
    pub const fn of(signed: bool) -> Self {
        let shift = if signed { 17 } else { 16 };
        let len = ((1f32.to_bits() >> shift) - (Self::LEAST.to_bits() >> shift)) + 2;
        Self { shift, len, signed }
    }

    /// The first beginning.
    pub const fn least(&self) -> u32 {
        Self::LEAST.to_bits() >> self.shift
    }

    /// Codes that it has.
    pub const fn codes(&self) -> usize {
        self.len as usize * if self.signed { 2 } else { 1 }
    }

    fn table(&self, book: &Book) -> Vec<u8> {
        let positive = (0..self.len - 1).map(|i| match i {
            0 => book.code(0.0),
            _ => book.code(f32::from_bits((self.least() + i) << self.shift)),
        });
        // The lowest of them is the one of the largest magnitude.
        let negative = (0..self.len - 1)
            .map(|i| book.code(-f32::from_bits(((self.least() + i + 1) << self.shift) - 1)));
        let none = std::iter::once(book.code(f32::NAN));
        let positive = positive.chain(none.clone());
        match self.signed {
            true => positive.chain(negative).chain(none).collect(),
            false => positive.collect(),
        }
    }
}

/// Bytes of a book's values, and of its thresholds.
pub const NUMBERS: u32 = 4 * CODES as u32;
/// Bytes of the tables: a multiple of 16.
pub const BYTES: u32 =
    (4 * NUMBERS + Guide::of(true).codes() as u32 + Guide::of(false).codes() as u32)
        .next_multiple_of(16);

/// Both books as kernels read them: the values and thresholds of the signed one, then those of the other, and then their
/// guides.
pub fn tables() -> Vec<u8> {
    let books = [true, false].map(Book::new);
    let numbers = books.iter().flat_map(|book| [book.values, book.thresholds]).flatten();
    let guides = [true, false]
        .into_iter()
        .zip(&books)
        .flat_map(|(signed, book)| Guide::of(signed).table(book));
    let mut bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).chain(guides).collect();
    bytes.resize(BYTES as usize, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_are_those_of_the_paper() {
        let [signed, unsigned] = [true, false].map(Book::new);
        for book in [&signed, &unsigned] {
            assert!(book.values.is_sorted() && book.values.contains(&0.0));
            assert_eq!(book.values[255], 1.0);
            assert_eq!(book.values[book.zero() as usize], 0.0);
            for (code, &value) in book.values.iter().enumerate() {
                assert_eq!(usize::from(book.code(value)), code);
            }
        }
        // bitsandbytes' `create_dynamic_map(signed=True)` and `(signed=False)`: ends and smallest steps.
        assert_eq!([signed.values[0], signed.values[254]], [-0.992_968_75, 0.992_968_75]);
        assert_eq!([signed.values[126], signed.values[128]], [-5.5e-7, 5.5e-7]);
        assert_eq!(unsigned.values[..4], [0.0, 3.25e-7, 7.75e-7, 2.125e-6]);
        assert_eq!(unsigned.values[254], 0.996_484_4);
    }

    #[test]
    fn codes_are_the_nearest() {
        for book in [true, false].map(Book::new) {
            for i in -4000..=4000 {
                let x = i as f32 / 3999.0;
                let far =
                    |code: u8| (f64::from(book.values[usize::from(code)]) - f64::from(x)).abs();
                let best = (0..=255).map(far).fold(f64::INFINITY, f64::min);
                assert!(far(book.code(x)) <= best + 1e-9, "{x}");
            }
            assert_eq!(book.code(f32::NAN), 0);
        }
    }

    /// What the kernel does: the guide's code, or the next one.
    #[test]
    fn guides_lead_to_codes() {
        for signed in [true, false] {
            let (book, guide) = (Book::new(signed), Guide::of(signed));
            let table = guide.table(&book);
            assert_eq!(table.len(), guide.codes());
            let guided = |x: f32| {
                let magnitude = x.abs().to_bits() >> guide.shift;
                let at = magnitude.max(guide.least()) - guide.least();
                let negative = if x.is_sign_negative() { guide.len } else { 0 };
                let code = table[(at.min(guide.len - 1) + negative) as usize];
                code + u8::from(x > book.thresholds[usize::from(code)])
            };
            let check = |x: f32| {
                assert_eq!(guided(x), book.code(x), "{x}");
                if signed {
                    assert_eq!(guided(-x), book.code(-x), "-{x}");
                }
            };
            // Both ends of each beginning, both sides of each threshold, and what lies between.
            let beginnings = 0..=(1f32.to_bits() >> guide.shift);
            let ends = beginnings.flat_map(|i| [i << guide.shift, ((i + 1) << guide.shift) - 1]);
            let thresholds = book.thresholds.iter().filter(|x| x.is_finite() && **x != 0.0);
            let sides = thresholds.map(|x| x.abs().to_bits()).flat_map(|x| [x - 1, x, x + 1]);
            ends.chain(sides).map(f32::from_bits).for_each(check);
            (0..=1 << 20).map(|i| i as f32 / (1 << 20) as f32).for_each(check);
            check(f32::NAN);
        }
    }
}
