//! Rows of a table, and its gradient.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::Backward;

use super::Layout::{self, Plain};
use super::{Nd, Source, Tally, close, identical, pairs, results_alone, ulp};

/// Which ids there are.
#[derive(Clone, Copy, Debug)]
enum Ids {
    /// Any.
    Random,
    /// One, again and again.
    Same,
    /// Runs of some hundred.
    Runs,
}

#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    /// Rows and columns of the table.
    table: [usize; 2],
    dims: Vec<usize>,
    layout: Layout,
    ids: Ids,
    wide: bool,
}

impl Case {
    fn new(dtype: DType, table: [usize; 2], dims: &[usize]) -> Self {
        Self { dtype, table, dims: dims.to_vec(), layout: Plain, ids: Ids::Random, wide: true }
    }

    fn check(&self, device: &Device) -> Result<()> {
        let Self { dtype, table: [classes, cols], ref dims, layout, ids, wide } = *self;
        let source = &mut Source::new(&format!("{self:?}"), device);
        let base = layout.base(&[classes, cols]);
        let leaf = source.tensor_of(dtype, &base, Plain, Source::unit)?;
        let count: usize = dims.iter().product();
        let ids: Vec<_> = (0..count)
            .map(|i| match ids {
                Ids::Random => (source.bits() % classes as u64) as usize,
                Ids::Same => classes / 2,
                Ids::Runs => (i / 300 * 7 + 3) % classes,
            })
            .collect();
        let given = match wide {
            true => {
                Tensor::from_vec(ids.iter().map(|&id| id as i64).collect(), dims.as_slice(), device)
            }
            false => {
                Tensor::from_vec(ids.iter().map(|&id| id as u32).collect(), dims.as_slice(), device)
            }
        }?;
        let var = Var::from_tensor(&leaf)?;
        let view = |t: &Tensor| layout.view(t, &[classes, cols]);
        let tracked = !results_alone() || layout == Plain;
        let table = if tracked { view(var.as_tensor())? } else { view(&var.detach())? };
        let exact = Nd::of(&view(&Nd::of(&leaf)?.tensor(DType::F64)?)?)?;
        let rows = table.kaio_embedding(&given)?;
        if rows.dtype() != dtype {
            bail!("the rows are {:?}", rows.dtype());
        }
        let of = |&id: &usize| exact.data[id * cols..][..cols].to_vec();
        let want = Nd {
            dims: [dims.as_slice(), &[cols]].concat(),
            data: ids.iter().flat_map(of).collect(),
        };
        identical("rows", &rows, &want)?;
        if !tracked {
            return Ok(());
        }
        // Each row has a gradient of its own. (The emulator's candle has no sum, which a product ends with.)
        let upstream = source.tensor_of(dtype, &want.dims, Plain, Source::unit)?;
        let grads = match results_alone() {
            true => rows.backward()?,
            false => (&rows * &upstream)?.sum_all()?.backward()?,
        };
        let Some(grad) = grads.get(&var) else { bail!("no gradient") };
        let weights = if results_alone() { Nd::full(&want.dims, 1.0) } else { Nd::of(&upstream)? };
        let mut sums = Nd::full(&[classes, cols], 0.0);
        let mut sizes = vec![0.0; classes * cols];
        for (row, &id) in ids.iter().enumerate() {
            for col in 0..cols {
                let x = weights.data[row * cols + col];
                sums.data[id * cols + col] += x;
                sizes[id * cols + col] += x.abs();
            }
        }
        let zeros = Var::zeros(base.as_slice(), DType::F64, &Device::Cpu)?;
        let sum = (view(&zeros)? * sums.tensor(DType::F64)?)?.sum_all()?;
        let want = Nd::of(sum.backward()?.get(&zeros).expect("the sum depends on it"))?;
        // Rounded once; sums in f32 of as many terms, in parts.
        let peak = sizes.iter().fold(0.0, |peak: f64, &x| peak.max(x));
        close("gradient", grad, &want, |i| ulp(dtype, want.data[i]) / 1.9 + 64.0 * ulp(F32, peak))?;
        if !results_alone() {
            let again = (&table.kaio_embedding(&given)? * &upstream)?.sum_all()?.backward()?;
            identical("gradient", again.get(&var).expect("tracked"), &Nd::of(grad)?)?;
        }
        Ok(())
    }
}

/// Tables of a row to those whose ids take three passes to sort, rows of a unit to those of several blocks, and ids that are
/// all the same.
pub fn values(device: &Device) {
    let mut tally = Tally::new("embedding", device);
    let mut cases = vec![];
    for dtype in [F32, F16, BF16] {
        let sizes: [([usize; 2], &[usize]); 8] = [
            ([1, 1], &[]),
            ([3, 5], &[1]),
            ([10, 8], &[2, 3]),
            ([255, 24], &[7, 10]),
            ([256, 16], &[200]),
            ([263_000, 8], &[300]),
            ([500, 8], &[5000]),
            ([40, 1032], &[3, 50]),
        ];
        for (i, (table, dims)) in sizes.into_iter().enumerate() {
            cases.push(Case { wide: i % 2 == 0, ..Case::new(dtype, table, dims) });
        }
        for (ids, count) in pairs([Ids::Same, Ids::Runs], [64, 65, 1000]) {
            cases.push(Case { ids, ..Case::new(dtype, [90, 24], &[count]) });
            cases.push(Case { ids, wide: false, ..Case::new(dtype, [90, 7], &[count]) });
        }
        let layouts = [Layout::Transposed, Layout::Narrowed, Layout::Rows, Layout::Columns];
        for layout in layouts {
            cases.push(Case { layout, ..Case::new(dtype, [12, 16], &[20]) });
        }
    }
    for case in &cases {
        tally.case(format!("{case:?}"), || case.check(device));
    }
    for (table, ids) in [([4, 8], 0), ([4, 0], 3), ([0, 8], 0)] {
        tally.case(format!("{table:?} {ids}"), || {
            let table = Var::zeros(&table, BF16, device)?;
            let ids = Tensor::zeros(ids, DType::U32, device)?;
            let mut rows = None;
            let backward = Backward::of(|| {
                rows = Some(table.kaio_embedding(&ids)?);
                Ok(())
            })?;
            let rows = rows.expect("it was computed");
            close("rows", &rows, &Nd::full(&[ids.elem_count(), table.dims()[1]], 0.0), |_| 0.0)?;
            let grads = backward.run(&[Some(rows.zeros_like()?)])?;
            let Some(Some(grad)) = grads.first() else { bail!("no gradient") };
            close("gradient", grad, &Nd::full(table.dims(), 0.0), |_| 0.0)
        });
    }
    // Nobody waits for a GPU to say so.
    if !device.is_cpu() {
        tally.case("out of range", || {
            let table = Var::ones((3, 4), F32, device)?;
            let ids = Tensor::new(&[3i64, 1, -1, 1 << 32], device)?;
            let rows = table.kaio_embedding(&ids)?;
            let got = rows.to_vec2::<f32>()?;
            let grads = rows.backward()?;
            let grad = grads.get(&table).expect("tracked").to_vec2::<f32>()?;
            let nan = |row: &[f32]| row.iter().all(|x| x.is_nan());
            match nan(&got[0]) && got[1] == [1.0; 4] && nan(&got[2]) && nan(&got[3]) {
                true if grad == [[0.0; 4], [1.0; 4], [0.0; 4]] => Ok(()),
                _ => bail!("{got:?}, {grad:?}"),
            }
        });
    }
    tally.finish();
}
