//! Rows to normed rows.

use super::{Name, Norm, Tile, Walk, add_to, begin};
use crate::kernel::name::given;
use crate::kernel::rows::{Loaded, Slots, Team, Unit};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block, unless a team has more.
const THREADS: u32 = 128;

/// The choices of a kernel that norms rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forward {
    /// What is computed.
    pub norm: Norm,
    /// Whether a bias is added to the result.
    pub bias: bool,
    /// Whether a residual is added to the rows before, and the sum is a result, too.
    pub add: bool,
    /// Whether what a gradient needs of each row is stored.
    pub save: bool,
    /// How a team holds a row.
    pub tile: Tile,
    /// Whether rows are longer than that: they are read several times.
    pub long: bool,
}

impl Forward {
    /// `norm rms bf16 team256 x2·8 add, f32 weight +bias save`
    pub fn name(&self) -> String {
        let Self { norm, bias, add, save, tile, long } = *self;
        let (long, add) = (given(long, " long"), given(add, " add"));
        let (bias, save) = (given(bias, " +bias"), given(save, " save"));
        let (shape, tile, weight) = (norm.shape(), tile.name(), norm.weight.name());
        format!("norm {shape} {tile}{long}{add}, {weight} weight{bias}{save}")
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.tile.team.max(THREADS)
    }

    /// Blocks that have the registers that they want, at least.
    pub fn blocks_per_sm(&self) -> u32 {
        512 / self.threads()
    }
}

/// The kernel.
pub fn emit(config: &Forward) -> Source {
    let k = &Kernel::new("norm", Target::Sm80, config.threads());
    // Without a bound ptxas takes 32 or 40 registers for some, and spills.
    k.blocks_per_sm(config.blocks_per_sm());
    write(k, config);
    k.finish()
}

fn write<'k>(k: &'k Kernel, config: &Forward) {
    let &Forward { norm, bias, add, save, tile, .. } = config;
    let Norm { element, centred, .. } = norm;
    let operand = |at, row| (k.pointer(at), k.param::<u64>(row));
    let x = operand(Name::X, Name::XRow);
    let residual = add.then(|| operand(Name::Residual, Name::ResidualRow));
    let weight = k.pointer(Name::Weight);
    let bias = bias.then(|| k.pointer(Name::Bias));
    let (out, sum) = (k.pointer(Name::Out), add.then(|| k.pointer(Name::Sum)));
    let stats = save.then(|| (k.pointer(Name::Rstd), centred.then(|| k.pointer(Name::Mean))));
    let [rows, units] = [Name::Rows, Name::Units].map(|name| k.param::<u32>(name));
    let cols = k.param::<u64>(Name::Cols);
    let [inverse, eps] = [Name::Inverse, Name::Eps].map(|name| k.param::<f32>(name));
    let region = Team::shared(tile.team, config.threads(), 1);
    let shared = (region > 0).then(|| k.shared(2 * region));

    let walk = Walk::new(k, tile, config.threads(), rows);
    k.if_(walk.first.lt(rows), || {
        let row = walk.row(walk.first);
        let of_row = |rows| begin(rows, row.number, element);
        let line = Line {
            config,
            walk: &walk,
            units,
            x: of_row(x),
            residual: residual.map(of_row),
            vectors: [Some(weight), bias],
            sum: sum.map(|sum| of_row((sum, cols))),
        };
        let held = line.hold(row.exists);
        let mean_of = |number: u32, sum: Reg<'k, f32>| {
            // Those before may still be read.
            let at = shared.map(|shared| shared + number * region);
            let [sum] = walk.team.combine(at, [sum], |a, b| a + b);
            sum * inverse
        };
        let mean = centred.then(|| {
            let total = k.var(0f32);
            line.pass(&held, &|slots, x| {
                line.keep_sum(slots, x);
                x.iter().flat_map(Loaded::floats).for_each(|x| total.set(total + x));
            });
            mean_of(1, total)
        });
        let squares = k.var(0f32);
        line.pass(&held, &|slots, x| {
            let Some(mean) = mean else {
                line.keep_sum(slots, x);
                return x.iter().for_each(|x| add_to(squares, x.floats().iter().map(|&x| [x, x])));
            };
            // Past the end of a row nothing is away from the mean.
            for (x, mean) in x.iter().zip(slots.or_zero(mean)) {
                let away = x.floats().into_iter().map(|x| x - mean);
                add_to(squares, away.map(|x| [x, x]));
            }
        });
        let rstd = (mean_of(0, squares) + eps).rsqrt();
        if let Some((to_rstd, to_mean)) = stats {
            walk.store(to_rstd, row, [rstd]);
            if let Some((to, mean)) = to_mean.zip(mean) {
                walk.store(to, row, [mean]);
            }
        }
        let out = of_row((out, cols));
        line.pass(&held, &|slots, x| {
            let vectors = held.as_ref().map(|held| held.vectors.clone());
            let [weight, bias] = vectors.unwrap_or_else(|| line.vectors(slots));
            let of_unit = |i: usize| {
                let weight = weight.as_ref().expect("a norm has one")[i].floats();
                let x = x[i].floats().into_iter().map(|x| mean.map_or(x, |mean| x - mean));
                let x = x.zip(weight).map(|(x, weight)| x * rstd * weight);
                let normed: Vec<_> = match &bias {
                    None => x.collect(),
                    Some(bias) => x.zip(bias[i].floats()).map(|(x, bias)| x + bias).collect(),
                };
                line.unit().round(k, &normed)
            };
            slots.store(out, element, &(0..x.len()).map(of_unit).collect::<Vec<_>>());
        });
    });
}

/// A row on its way.
struct Line<'a, 'k> {
    config: &'a Forward,
    walk: &'a Walk<'k>,
    /// Units of a row.
    units: Reg<'k, u32>,
    /// The address of the row.
    x: Reg<'k, u64>,
    /// That of what is added to it.
    residual: Option<Reg<'k, u64>>,
    /// Those of weight and bias.
    vectors: [Option<Reg<'k, u64>>; 2],
    /// That of where the sum goes.
    sum: Option<Reg<'k, u64>>,
}

/// A thread's units of a row, where all fit its registers.
struct Held<'k> {
    slots: Slots<'k>,
    x: Vec<Loaded<'k>>,
    vectors: [Option<Vec<Loaded<'k>>>; 2],
}

impl<'k> Line<'_, 'k> {
    fn unit(&self) -> Unit {
        Unit { element: self.config.norm.element, count: self.config.tile.unit }
    }

    /// Weight and bias are loaded with the row, before its sums go from thread to thread.
    fn hold(&self, exists: Option<Reg<'k, bool>>) -> Option<Held<'k>> {
        if self.config.long {
            return None;
        }
        let slots = self.walk.slots(None, self.units).of(exists);
        Some(Held { x: self.load(&slots), vectors: self.vectors(&slots), slots })
    }

    /// Units of the row, or of its rounded sum with the residual.
    fn load(&self, slots: &Slots<'k>) -> Vec<Loaded<'k>> {
        let (unit, k) = (self.unit(), self.walk.k);
        let x = slots.load(unit.element, self.x);
        let Some(residual) = self.residual else { return x };
        let residual = slots.load(unit.element, residual);
        let sums = x.iter().zip(&residual).map(|(x, residual)| {
            let pairs = x.floats().into_iter().zip(residual.floats());
            unit.round(k, &pairs.map(|(x, residual)| x + residual).collect::<Vec<_>>())
        });
        sums.collect()
    }

    fn vectors(&self, slots: &Slots<'k>) -> [Option<Vec<Loaded<'k>>>; 2] {
        self.vectors.map(|at| at.map(|at| slots.load(self.config.norm.weight, at)))
    }

    fn keep_sum(&self, slots: &Slots<'k>, x: &[Loaded<'k>]) {
        if let Some(sum) = self.sum {
            slots.store(sum, self.config.norm.element, x);
        }
    }

    /// Once over the row.
    fn pass(&self, held: &Option<Held<'k>>, f: &dyn Fn(&Slots<'k>, &[Loaded<'k>])) {
        match held {
            Some(Held { slots, x, .. }) => f(slots, x),
            None => {
                let span = self.config.tile.units();
                self.walk.k.for_(0u32, self.units, span, |before| {
                    let slots = self.walk.slots(Some(before), self.units);
                    f(&slots, &self.load(&slots));
                });
            }
        }
    }
}
