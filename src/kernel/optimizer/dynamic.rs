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

/// Both books as kernels read them: the values and thresholds of the signed one, then those of the other.
pub fn tables() -> Vec<f32> {
    let [signed, unsigned] = [true, false].map(Book::new);
    [signed.values, signed.thresholds, unsigned.values, unsigned.thresholds].concat()
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
}
