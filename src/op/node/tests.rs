//! An op with any number of inputs and two results, in graphs of every form.

use candle_core::Device::Cpu;
use candle_core::{CpuStorage, CudaStorage, Result, Tensor, Var, bail};

use super::super::{Computed, Differentiable, Op, View};
use super::apply;
use crate::Error;

/// `Σ (i+1)·xᵢ` and `Σ (i+1)²·xᵢ` of f64 vectors of two; saves the number of inputs.
#[derive(Default)]
struct Sums {
    /// The input that has no gradient.
    constant: Option<usize>,
    /// An input whose gradient is forgotten.
    forgets: Option<usize>,
    /// An input that the gradient says not to read.
    unread: Option<usize>,
    /// Whether the backward pass fails.
    fails: bool,
}

fn factors(i: usize) -> [f64; 2] {
    let i = i as f64 + 1.0;
    [i, i * i]
}

impl Op for Sums {
    fn name(&self) -> &'static str {
        "sums"
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let mut sums = [[0f64; 2]; 2];
        for (i, (storage, _)) in inputs.iter().enumerate() {
            for (sum, factor) in sums.iter_mut().zip(factors(i)) {
                let x = storage.as_slice::<f64>()?;
                (0..2).for_each(|at| sum[at] += factor * x[at]);
            }
        }
        let result = |sum: &[f64]| (CpuStorage::F64(sum.to_vec()), sum.len().into());
        Ok(vec![result(&sums[0]), result(&sums[1]), result(&[inputs.len() as f64])])
    }

    fn cuda(&self, _: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        bail!("a test on the CPU")
    }
}

impl Differentiable for Sums {
    fn differentiates(&self, input: usize) -> bool {
        self.constant != Some(input)
    }

    fn reads(&self, input: usize, _: &[&Tensor]) -> bool {
        self.unread != Some(input)
    }

    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        assert_eq!(results.last().expect("saved").to_vec1::<f64>()?, [inputs.len() as f64]);
        assert!(results.iter().all(|t| !t.track_op()) && grads.iter().any(Option::is_some));
        if self.fails {
            bail!("failed on purpose");
        }
        let of = |i: usize| {
            let mut sum = inputs[i].zeros_like()?;
            for (grad, factor) in grads.iter().zip(factors(i)) {
                if let Some(grad) = grad {
                    sum = (sum + (grad * factor)?)?;
                }
            }
            Ok(Some(sum).filter(|_| self.forgets != Some(i)))
        };
        (0..inputs.len()).map(of).collect()
    }
}

fn vars(count: usize) -> Result<Vec<Var>> {
    (0..count).map(|i| Var::new(&[i as f64, 0.5], &Cpu)).collect()
}

/// The gradient's elements.
fn of(grads: &candle_core::backprop::GradStore, var: &Var) -> Option<Vec<f64>> {
    grads.get(var).map(|grad| grad.to_vec1().expect("a vector"))
}

#[test]
fn any_number_of_inputs_and_both_results() -> Result<()> {
    for count in 1..10 {
        let vars = vars(count)?;
        // All inputs, each by itself, and every second one.
        let singles = (0..count).map(|i| 1 << i);
        for tracked in singles.chain([(1 << count) - 1, 0b0101_0101_0101, 0b1010_1010_1010]) {
            let tracks = |i: usize| tracked >> i & 1 == 1;
            let inputs: Vec<_> = (0..count)
                .map(|i| if tracks(i) { vars[i].as_tensor().clone() } else { vars[i].detach() })
                .collect();
            let inputs: Vec<_> = inputs.iter().collect();
            let [one, two] = apply(Sums::default(), &inputs)?;
            assert_eq!(one.track_op(), (0..count).any(tracks));
            let expected = |a: f64, b: f64, i: usize| {
                let [one, two] = factors(i);
                Some(vec![a * one + b * two; 2]).filter(|_| tracks(i))
            };
            for (a, b) in [(1.0, 0.0), (0.0, 3.0), (-2.0, 5.0)] {
                let mut loss = Tensor::zeros((), candle_core::DType::F64, &Cpu)?;
                for (result, factor) in [(&one, a), (&two, b)] {
                    if factor != 0.0 {
                        loss = (loss + (result * factor)?.sum_all()?)?;
                    }
                }
                let grads = loss.backward()?;
                for (i, var) in vars.iter().enumerate() {
                    assert_eq!(
                        of(&grads, var),
                        expected(a, b, i),
                        "{count} inputs, {tracked:b}, {i}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn one_result_and_the_same_input_twice() -> Result<()> {
    let var = Var::new(&[1f64, 2.], &Cpu)?;
    let x = var.as_tensor();
    let [one] = apply(Sums::default(), &[x, x, x, x, x])?;
    // With one result the others are saved.
    assert_eq!(of(&one.sum_all()?.backward()?, &var), Some(vec![15.0; 2]));
    Ok(())
}

#[test]
fn passes_in_threads_do_not_mix() -> Result<()> {
    let vars = vars(6)?;
    let inputs: Vec<_> = vars.iter().map(|var| var.as_tensor()).collect();
    let [one, two] = apply(Sums::default(), &inputs)?;
    std::thread::scope(|scope| {
        for factor in 1..5 {
            let (one, two, vars) = (&one, &two, &vars);
            scope.spawn(move || {
                for _ in 0..50 {
                    let factor = f64::from(factor);
                    let loss = ((one * factor).unwrap() + two).unwrap().sum_all().unwrap();
                    let grads = loss.backward().unwrap();
                    for (i, var) in vars.iter().enumerate() {
                        let [a, b] = factors(i);
                        assert_eq!(of(&grads, var), Some(vec![factor * a + b; 2]));
                    }
                }
            });
        }
    });
    Ok(())
}

#[test]
fn what_cannot_be_tracked_is_an_error() -> Result<()> {
    let vars = vars(5)?;
    let inputs: Vec<_> = vars.iter().map(|var| var.as_tensor()).collect();
    for constant in 0..5 {
        let op = Sums { constant: Some(constant), ..Sums::default() };
        let error = apply::<_, 1>(op, &inputs).unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::Tracked { op: "sums", .. })), "{error}");
        let op = Sums { forgets: Some(constant), ..Sums::default() };
        let [one] = apply(op, &inputs)?;
        let error = one.sum_all()?.backward().unwrap_err().to_string();
        assert!(error.contains(&format!("sums: input {constant} has no gradient")), "{error}");
    }
    Ok(())
}

#[test]
fn a_pass_that_failed_leaves_nothing_for_the_next() -> Result<()> {
    let vars = vars(4)?;
    let inputs: Vec<_> = vars.iter().map(|var| var.as_tensor()).collect();
    let [one, two] = apply(Sums::default(), &inputs)?;
    // The second result's gradient is left, and then another op of the same graph fails.
    let [fails] = apply(Sums { fails: true, ..Sums::default() }, &[&one])?;
    assert!((fails.sum_all()? + two.sum_all()?)?.backward().is_err());
    let loss = (one.sum_all()? + (&two * 2.0)?.sum_all()?)?;
    let grads = loss.backward()?;
    for (i, var) in vars.iter().enumerate() {
        let [a, b] = factors(i);
        assert_eq!(of(&grads, var), Some(vec![a + 2.0 * b; 2]));
    }
    Ok(())
}

/// A weight that an op does not read would stay as it is without a word.
#[test]
fn an_input_that_is_not_read_has_its_gradient() -> Result<()> {
    let vars = vars(3)?;
    let inputs: Vec<_> = vars.iter().map(Var::as_tensor).collect();
    let [sum, _]: [Tensor; 2] = apply(Sums { unread: Some(1), ..Sums::default() }, &inputs)?;
    let grads = sum.sum_all()?.backward()?;
    for (i, var) in vars.iter().enumerate() {
        let grad = grads.get(var).expect("it is tracked").to_vec1::<f64>()?;
        assert_eq!(grad, [factors(i)[0]; 2], "input {i}");
    }
    Ok(())
}
