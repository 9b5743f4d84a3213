//! Which rows of a weight share a scale.

use candle_core::{Result, Tensor};

use crate::error::Error;

/// Rows of a weight in groups, as a scheme can have them.
#[derive(Debug, PartialEq)]
pub struct Groups {
    /// Rows of a group, −1 for all.
    pub group: i32,
    /// How many groups there are.
    pub count: usize,
    /// Rows that share a scale in the format; there may be fewer for the last. Groups of 256 rows become two of 128
    /// with the same scale, and so on.
    pub size: usize,
    /// The row of the weight that each row of the codes is to be; none if they are in order.
    pub order: Option<Vec<u32>>,
}

impl Groups {
    /// `k` rows with `count` rows of scales, in order, or with the group of each row (`g_idx` of a GPTQ that took
    /// rows by the size of their activations).
    pub fn new(
        op: &'static str,
        k: usize,
        (scales, count): (&'static str, usize),
        g_idx: Option<(&'static str, &[i64])>,
    ) -> Result<Self> {
        let (size, order) = match g_idx {
            Some((arg, g_idx)) => ordered(op, (arg, g_idx), (scales, count))?,
            None => (size(op, k, (scales, count))?, None),
        };
        if count == 1 {
            return Ok(Self { group: -1, count, size, order });
        }
        Ok(Self { order, ..Self::of_size(op, scales, k, size)? })
    }

    /// `k` rows in order, `size` of which share a scale.
    pub fn of_size(op: &'static str, scales: &'static str, k: usize, size: usize) -> Result<Self> {
        let group = match size {
            32 | 64 => size,
            size if size > 0 && size.is_multiple_of(128) => 128,
            _ => {
                return Err(Error::Value {
                    op,
                    name: scales,
                    got: format!("one for {size} rows"),
                    want: "one for 32, 64, a multiple of 128, or all rows".into(),
                    fix: "dequantise the weight with the package that made it, and quantise it anew",
                }
                .into());
            }
        };
        Ok(Self { group: group as i32, count: k.div_ceil(group), size, order: None })
    }

    /// How many groups share a row of the format's scales.
    fn repeat(&self) -> usize {
        usize::try_from(self.group).map_or(1, |group| self.size / group)
    }

    /// The scales of the groups, from the format's, on their device.
    pub fn scales(&self, scales: &Tensor) -> Result<Tensor> {
        let (rows, n) = scales.dims2()?;
        if self.repeat() == 1 && rows == self.count {
            return Ok(scales.clone());
        }
        if self.count == 0 || n == 0 {
            return Tensor::zeros((self.count, n), scales.dtype(), scales.device());
        }
        let rows = (0..self.count).map(|group| (group / self.repeat()) as u32);
        scales.contiguous()?.index_select(&Tensor::from_iter(rows, scales.device())?, 0)
    }

    /// The zero points of the groups, from the format's `[.., n]`.
    pub fn zeros(&self, zeros: Vec<u8>, n: usize) -> Vec<u8> {
        let rows = zeros.chunks(n.max(1)).flat_map(|row| std::iter::repeat_n(row, self.repeat()));
        rows.take(self.count).flatten().copied().collect()
    }
}

/// Rows of a group, from the numbers of rows and of groups alone.
fn size(op: &'static str, k: usize, (scales, count): (&'static str, usize)) -> Result<usize> {
    let size = match count {
        1 => Some(k),
        _ if count > 0 && k.is_multiple_of(count) => Some(k / count),
        // The last group is smaller.
        _ => [32, 64, 128].into_iter().find(|&size| k.div_ceil(size) == count),
    };
    size.ok_or_else(|| {
        Error::Dimension {
            op,
            arg: scales,
            dim: "groups",
            got: count,
            want: format!("the groups of 32, 64, a multiple of 128, or all of the {k} rows"),
            fix: "take all tensors from the same layer".into(),
        }
        .into()
    })
}

/// Rows of a group, and the order in which the groups follow each other.
fn ordered(
    op: &'static str,
    (arg, g_idx): (&'static str, &[i64]),
    (scales, count): (&'static str, usize),
) -> Result<(usize, Option<Vec<u32>>)> {
    // No more than there are rows, so that what a file claims takes no memory; the next ones are without a row.
    let mut sizes = vec![0usize; count.min(g_idx.len() + 1)];
    for (row, &group) in g_idx.iter().enumerate() {
        match usize::try_from(group).ok().and_then(|group| sizes.get_mut(group)) {
            Some(size) => *size += 1,
            None => {
                return Err(Error::Value {
                    op,
                    name: arg,
                    got: format!("{group} at row {row}"),
                    want: format!("a row of `{scales}`, of which there are {count}"),
                    fix: "take all tensors from the same layer",
                }
                .into());
            }
        }
    }
    let size = sizes.first().copied().unwrap_or(0);
    let whole = sizes.iter().take(sizes.len().saturating_sub(1)).all(|&rows| rows == size);
    if !whole || sizes.last().is_some_and(|&last| last > size || (last == 0 && size > 0)) {
        let odd = sizes.iter().position(|&rows| rows != size).unwrap_or(0);
        return Err(Error::Value {
            op,
            name: arg,
            got: format!("{odd} in {} rows, and 0 in {size}", sizes[odd]),
            want: "groups of the same number of rows, but for the last".into(),
            fix: "join the parts of a layer that was split before it is loaded",
        }
        .into());
    }
    if g_idx.is_sorted() {
        return Ok((size, None));
    }
    // Rows of a group stay in order.
    let mut order: Vec<u32> = (0..g_idx.len() as u32).collect();
    order.sort_by_key(|&row| g_idx[row as usize]);
    Ok((size, Some(order)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn of(k: usize, count: usize) -> Result<(i32, usize, usize)> {
        let groups = Groups::new("op", k, ("scales", count), None)?;
        Ok((groups.group, groups.count, groups.size))
    }

    fn by(g_idx: &[i64], count: usize) -> Result<Groups> {
        Groups::new("op", g_idx.len(), ("scales", count), Some(("g_idx", g_idx)))
    }

    #[test]
    fn sizes_follow_from_counts() -> Result<()> {
        assert_eq!(of(96, 3)?, (32, 3, 32));
        assert_eq!(of(128, 2)?, (64, 2, 64));
        assert_eq!(of(384, 3)?, (128, 3, 128));
        assert_eq!(of(512, 2)?, (128, 4, 256));
        assert_eq!(of(96, 1)?, (-1, 1, 96));
        assert_eq!(of(128, 1)?, (-1, 1, 128));
        // Groups of 64, 64 and 2 rows.
        assert_eq!(of(130, 3)?, (64, 3, 64));
        assert_eq!(of(0, 1)?, (-1, 1, 0));
        assert_eq!(of(0, 0)?, (32, 0, 32));
        for (k, count) in [(96, 2), (96, 96), (100, 0), (129, 3), (129, 4), (8, 3)] {
            let error = of(k, count).unwrap_err();
            assert!(error.to_string().contains("`scales`"), "{k} rows, {count} groups: {error}");
        }
        Ok(())
    }

    #[test]
    fn groups_take_rows_in_their_order() -> Result<()> {
        // Three groups of 32, 32 and 6 rows.
        let mut g_idx = vec![1; 32];
        g_idx.extend([2; 6]);
        g_idx.extend([0; 32]);
        let groups = by(&g_idx, 3)?;
        let order = (38..70).chain(0..32).chain(32..38);
        let order = Some(order.collect());
        assert_eq!(groups, Groups { group: 32, count: 3, size: 32, order });
        Ok(())
    }

    #[test]
    fn rows_in_order_need_none() -> Result<()> {
        let g_idx: Vec<i64> = (0..96).map(|row| row / 32).collect();
        assert_eq!(by(&g_idx, 3)?.order, None);
        assert_eq!(by(&[0; 40], 1)?, Groups { group: -1, count: 1, size: 40, order: None });
        Ok(())
    }

    #[test]
    fn bad_groups_are_refused() {
        let cases: [(&[i64], usize, &str); 7] = [
            (&[0, 1, 2], 2, "2 at row 2"),
            (&[0, -1], 2, "-1 at row 1"),
            (&[0, 0, 1, 2, 2], 3, "1 in 1 rows"),
            (&[0, 1, 1], 2, "1 in 2 rows"),
            (&[0, 0], 2, "1 in 0 rows"),
            (&[0, 1], usize::MAX, "2 in 0 rows"),
            (&[], usize::MAX, "one for 0 rows"),
        ];
        for (g_idx, count, message) in cases {
            let error = by(g_idx, count).unwrap_err().to_string();
            assert!(error.contains(message), "{g_idx:?}: {error}");
        }
    }

    #[test]
    fn scales_and_zeros_follow() -> Result<()> {
        let scales = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
        // 600 rows of groups of 512 are five groups of up to 128.
        let groups = Groups::of_size("op", "scales", 600, 512)?;
        assert_eq!(
            groups.scales(&scales)?.narrow(1, 1, 1)?.flatten_all()?.to_vec1::<f32>()?,
            [2., 2., 2., 2., 4.]
        );
        assert_eq!(groups.zeros(vec![1, 2, 3, 4], 2), [1, 2, 1, 2, 1, 2, 1, 2, 3, 4]);
        Ok(())
    }
}
