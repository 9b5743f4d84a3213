//! Which views are recognised, and what becomes of their gradients.

use candle_core::{DType, Device::Cpu, Result, Tensor, Var};

use super::sum::Sum;
use super::view::View;

type Case = fn(&Tensor) -> Result<Tensor>;

/// Views that candle has no part in.
const KNOWN: &[Case] = &[
    |x| Ok(x.clone()),
    |x| x.reshape((6, 20)),
    |x| x.flatten_all(),
    |x| x.unsqueeze(1),
    |x| x.permute((2, 0, 1)),
    |x| x.reshape((3, 2, 2, 10))?.permute((3, 1, 0, 2)),
    |x| x.narrow(2, 3, 5)?.transpose(0, 1),
    |x| x.narrow(2, 9, 1)?.squeeze(2),
    |x| x.narrow(1, 1, 2),
    |x| x.narrow(0, 2, 1)?.squeeze(0)?.t(),
    |x| x.reshape((3, 4, 5, 2))?.narrow(2, 2, 2)?.transpose(1, 2),
    |x| x.narrow(2, 1, 8)?.narrow(2, 3, 4),
    |x| x.unsqueeze(0)?.broadcast_as((1, 3, 4, 10)),
];

/// And those that it has.
const UNKNOWN: &[Case] = &[
    |x| x.narrow(0, 0, 2)?.narrow(2, 1, 3),
    |x| x.narrow(1, 0, 1)?.broadcast_as((3, 5, 10)),
    |x| x.unsqueeze(0)?.broadcast_as((2, 3, 4, 10)),
    |x| x.narrow(1, 0, 0),
];

#[test]
fn gradients_of_views() -> Result<()> {
    let x = Var::randn(0f32, 1., (3, 4, 10), &Cpu)?;
    for (i, case) in KNOWN.iter().enumerate() {
        let view = case(&x)?;
        let grad = Tensor::randn(0f32, 1., view.shape(), &Cpu)?;
        let want = (&view * &grad)?.sum_all()?.backward()?;
        let known = View::between(view.layout(), x.layout());
        let known = known.unwrap_or_else(|| panic!("view {i} is not recognised"));
        let mut sum = Sum::default();
        sum.add_view(&known, grad)?;
        let got = sum.total()?.expect("a gradient");
        assert_eq!(got.shape(), x.shape(), "view {i}");
        let want = want.get(&x).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(got.flatten_all()?.to_vec1::<f32>()?, want, "view {i}");
    }
    for (i, case) in UNKNOWN.iter().enumerate() {
        assert_eq!(View::between(case(&x)?.layout(), x.layout()), None, "view {i}");
    }
    // Of what is not contiguous itself.
    let t = x.transpose(0, 1)?;
    assert_eq!(View::between(t.layout(), t.layout()), None);
    Ok(())
}

#[test]
fn nothing_arrives() -> Result<()> {
    assert!(Sum::default().total()?.is_none());
    Ok(())
}

#[test]
fn the_first_gradient_is_moved() -> Result<()> {
    let place = |t: &Tensor| std::ptr::from_ref(&*t.storage_and_layout().0).addr();
    let (x, grad) =
        (Tensor::zeros((2, 6), DType::F32, &Cpu)?, Tensor::ones((3, 4), DType::F32, &Cpu)?);
    let view = View::between(x.reshape((3, 4))?.layout(), x.layout()).expect("a reshape");
    let mut sum = Sum::default();
    sum.add_view(&view, grad.clone())?;
    let moved = sum.total()?.expect("a gradient");
    assert_eq!((moved.dims(), place(&moved)), (&[2, 6][..], place(&grad)));
    Ok(())
}
