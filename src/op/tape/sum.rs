//! Sums of gradients.

use candle_core::{Result, Tensor};

use super::view::View;

/// The gradients of a tensor that have arrived, of which the first is there as it came.
#[derive(Default)]
pub(super) struct Sum {
    whole: Option<Tensor>,
    /// Of views of a part of it.
    parts: Vec<(View, Tensor)>,
}

impl Sum {
    pub(super) fn add(&mut self, grad: Tensor) -> Result<()> {
        self.whole = Some(match self.whole.take() {
            None => grad,
            Some(sum) => sum.add(&grad)?,
        });
        Ok(())
    }

    /// Adds the gradient of a view.
    pub(super) fn add_view(&mut self, view: &View, grad: Tensor) -> Result<()> {
        let grad = view.arrange(&grad)?;
        match view.is_all() {
            true => self.add(grad),
            false => {
                self.parts.push((view.clone(), grad));
                Ok(())
            }
        }
    }

    /// The sum. Parts that do not overlap are written next to each other, with zeros only where there is none.
    pub(super) fn total(mut self) -> Result<Option<Tensor>> {
        let mut parts = std::mem::take(&mut self.parts);
        parts.sort_by_key(|(view, _)| (view.columns.of, view.columns.first));
        while let Some((first, _)) = parts.first() {
            let (shape, of) = (first.shape.clone(), first.columns.of);
            let (mut end, mut row, mut rest) = (0, vec![], vec![]);
            for (view, grad) in parts {
                let columns = view.columns;
                if columns.of != of || columns.first < end {
                    rest.push((view, grad));
                    continue;
                }
                if columns.first > end {
                    row.push(zeros(columns.first - end, &grad)?);
                }
                end = columns.first + columns.count;
                row.push(grad);
            }
            if let Some(last) = row.last().filter(|_| end < of) {
                row.push(zeros(of - end, last)?);
            }
            self.add(Tensor::cat(&row, 1)?.reshape(shape)?)?;
            parts = rest;
        }
        Ok(self.whole)
    }
}

/// As many columns next to those of a matrix.
fn zeros(columns: usize, next_to: &Tensor) -> Result<Tensor> {
    Tensor::zeros((next_to.dim(0)?, columns), next_to.dtype(), next_to.device())
}
