//! Rows of codes that are in another order than those of their weight (GPTQ's `desc_act`).

use candle_core::{DType, Device, Result, Tensor};

use super::planes::host;
use crate::check;
use crate::error::Error;

/// A permutation of rows, both ways: neither a product nor the weight in floats has to turn it around.
#[derive(Clone)]
pub(crate) struct Order {
    /// u32 `[k]`: row `i` of the codes is row `rows[i]` of the weight.
    pub rows: Tensor,
    /// u32 `[k]`: row `i` of the weight is row `inverse[i]` of the codes.
    pub inverse: Tensor,
}

impl Order {
    /// Of a u32 vector in which each row comes once, on its device.
    pub fn new(op: &'static str, rows: &Tensor) -> Result<Self> {
        let arg = ("order", rows);
        check::tensor(op, arg)?;
        check::untracked(op, &[arg])?;
        check::dtype(op, arg, &[DType::U32])?;
        check::rank(op, arg, 1..=1, "[K]", "take the tensor as it is in the file")?;
        let of_codes = host(rows, DType::U32)?.to_vec1::<u32>()?;
        let mut inverse = vec![None; of_codes.len()];
        for (i, &row) in (0u32..).zip(&of_codes) {
            match inverse.get_mut(row as usize) {
                Some(place @ None) => *place = Some(i),
                _ => {
                    return Err(Error::Value {
                        op,
                        name: "order",
                        got: format!("{row} at element {i}"),
                        want: format!("each of 0 to {} once", of_codes.len() - 1),
                        fix: "check the file that it comes from",
                    }
                    .into());
                }
            }
        }
        let vector = |all: Vec<u32>| {
            let len = all.len();
            Tensor::from_vec(all, len, &Device::Cpu)?.to_device(rows.device())
        };
        Ok(Self {
            rows: vector(of_codes)?,
            inverse: vector(inverse.into_iter().flatten().collect())?,
        })
    }

    /// The same on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { rows: self.rows.to_device(device)?, inverse: self.inverse.to_device(device)? })
    }
}
