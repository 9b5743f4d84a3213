//! The means over a row that its gradient takes, where rows are too long for a team's registers: of `g · x̂` and, where
//! the mean was subtracted, of `g`.

use super::{Name, Norm, Tile, Walk, add_to, begin};
use crate::kernel::rows::Team;
use crate::ptx::{Kernel, Source, Target};

/// The choices of that kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Moments {
    /// The norm.
    pub norm: Norm,
    /// What a team holds at a time.
    pub tile: Tile,
}

impl Moments {
    /// `norm moments rms bf16 team512 x4·8, f32 weight`
    pub fn name(&self) -> String {
        let (shape, tile, weight) = (self.norm.shape(), self.tile.name(), self.norm.weight.name());
        format!("norm moments {shape} {tile}, {weight} weight")
    }
}

/// The kernel. A block has a row.
pub fn emit(config: &Moments) -> Source {
    let &Moments { norm, tile } = config;
    let Norm { element, weight: of_weight, centred } = norm;
    let k = &Kernel::new("norm_moments", Target::Sm80, tile.team);
    let operand = |at, row| (k.pointer(at), k.param::<u64>(row));
    let (x, grad) = (operand(Name::X, Name::XRow), operand(Name::Grad, Name::GradRow));
    let (weight, moments) = (k.pointer(Name::Weight), k.pointer(Name::Moments));
    let (of_rstd, of_mean) = (k.pointer(Name::Rstd), centred.then(|| k.pointer(Name::Mean)));
    let [rows, units] = [Name::Rows, Name::Units].map(|name| k.param::<u32>(name));
    let inverse = k.param::<f32>(Name::Inverse);
    let shared = k.shared(Team::shared(tile.team, tile.team, 2));

    let walk = Walk::new(k, tile, tile.team, rows);
    let row = walk.row(walk.first);
    let (rstd, mean) = (walk.load(of_rstd, row), of_mean.map(|mean| walk.load(mean, row)));
    let [x, grad] = [x, grad].map(|rows| begin(rows, row.number, element));
    let [with_x, alone] = [0, 1].map(|_| k.var(0f32));
    k.for_(0u32, units, tile.units(), |before| {
        let slots = walk.slots(Some(before), units);
        let (x, grad) = (slots.load(element, x), slots.load(element, grad));
        let weight = slots.load(of_weight, weight);
        for ((x, grad), weight) in x.iter().zip(&grad).zip(&weight) {
            let normed = x.floats().into_iter().map(|x| mean.map_or(x, |mean| x - mean) * rstd);
            let g: Vec<_> =
                grad.floats().into_iter().zip(weight.floats()).map(|(dy, w)| dy * w).collect();
            add_to(with_x, normed.zip(&g).map(|(x, &g)| [x, g]));
            if centred {
                g.iter().for_each(|&g| alone.set(alone + g));
            }
        }
    });
    let means = walk.team.combine(Some(shared), [with_x, alone], |a, b| a + b);
    walk.store(moments, row, means.map(|x| x * inverse));
    k.finish()
}
