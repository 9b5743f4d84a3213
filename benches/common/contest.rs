//! Who competes in a row. Before anyone is timed, our results are compared with another's: a peer that
//! was given the wrong layout would flatter us, and a wrong kernel is soon fast.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::turns::{Contestant, contestant};

pub const OURS: &str = "kaio-candle";
pub const CANDLE: &str = "candle";
#[allow(dead_code)] // See `add_copy`.
pub const COPY: &str = "copy";

/// We are the first of the contestants.
#[derive(Default)]
pub struct Contest {
    pub contestants: Vec<Contestant>,
    pub notes: Vec<String>,
}

impl Contest {
    pub fn add(&mut self, name: &'static str, run: impl FnMut() -> Result<()> + 'static) {
        self.contestants.push(contestant(name, run));
    }

    /// A copy of as many bytes as the row has to read and write: as fast as memory is.
    #[allow(dead_code)] // Of benches that are bound by memory.
    pub fn add_copy(&mut self, bytes: f64, device: &Device) -> Result<()> {
        let half = Tensor::zeros((bytes / 8.0) as usize, DType::F32, device)?;
        self.add(COPY, move || half.copy().map(drop));
        Ok(())
    }

    /// A peer that cannot do the row is left out of it, and the table says so.
    pub fn add_if_able(
        &mut self,
        name: &'static str,
        mut run: impl FnMut() -> Result<()> + 'static,
    ) {
        match run() {
            Ok(()) => self.add(name, run),
            Err(error) => self.notes.push(format!("no {name}: {error}")),
        }
    }
}

/// Two results of the same sums in f32, each rounded once, are at most an ulp of a line's largest element
/// apart, plus what another order of `terms` additions makes. Forgotten terms are far more.
#[allow(dead_code, reason = "not of every bench")]
pub fn agree(name: &str, ours: &Tensor, peer: &Tensor, terms: usize) -> Result<()> {
    agree_after(name, ours, peer, terms, 1)
}

/// The same of results that are rounded so many times on their way.
pub fn agree_after(
    name: &str,
    ours: &Tensor,
    peer: &Tensor,
    terms: usize,
    roundings: u32,
) -> Result<()> {
    let ulp = match peer.dtype() {
        DType::BF16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
        _ => 2f64.powi(-23),
    };
    if ours.dims() != peer.dims() || ours.dtype() != peer.dtype() {
        bail!("{name}: ours is {:?}, the peer's {:?}", ours.shape(), peer.shape());
    }
    let largest = |t: &Tensor| t.abs()?.max(D::Minus1);
    let (ours, peer) = (ours.to_dtype(DType::F32)?, peer.to_dtype(DType::F32)?);
    let difference = (ours - &peer)?;
    let explained = f64::from(roundings) * ulp + (terms as f64).sqrt() * 2f64.powi(-18);
    let worst = (largest(&difference)? / largest(&peer)?)?.max_all()?.to_scalar::<f32>()?;
    // The maximum skips NaN, the sum does not.
    let sum = difference.abs()?.sum(D::Minus1)?.sum_all()?.to_scalar::<f32>()?;
    if f64::from(worst) <= explained && sum.is_finite() {
        return Ok(());
    }
    let nan = if sum.is_finite() { "" } else { " and NaN or infinity" };
    bail!(
        "{name}: ours and the peer's differ by {worst:.3e}{nan} of a line's largest element, rounding \
         explains {explained:.3e}"
    )
}
