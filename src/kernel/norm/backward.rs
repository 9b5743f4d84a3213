//! Gradients of rows, and a block's parts of the weight's and the bias's.

use super::{Name, Norm, Ring, Tile, Walk, add_to, begin};
use crate::kernel::name::given;
use crate::kernel::rows::{Loaded, Team, Unit};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block.
pub const THREADS: u32 = 512;

/// Whence the means over a row come that its gradient takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sums {
    /// Rows have no gradient.
    None,
    /// From the row, which a team holds.
    Own,
    /// From memory: a block has a part of each row.
    Given,
}

/// The choices of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Backward {
    /// The norm.
    pub norm: Norm,
    /// Of the rows' gradient.
    pub sums: Sums,
    /// Whether the sum of rows and residual has a gradient of its own, which is added.
    pub add: bool,
    /// Whether the weight has a gradient.
    pub weight: bool,
    /// Whether the bias has one.
    pub bias: bool,
    /// What a team holds.
    pub tile: Tile,
    /// Blocks that share a multiprocessor.
    pub blocks_per_sm: u32,
    /// Rows of a team that have room in shared memory at a time; none: they go straight to registers.
    pub stages: u32,
    /// Whether x̂ and g wait in registers for the row's means, rather than be computed again.
    pub keep: bool,
}

impl Backward {
    /// `norm backward rms bf16 team256 x2·8 own weight 2/sm, f32 weight`
    pub fn name(&self) -> String {
        let Self { norm, sums, add, weight, bias, tile, blocks_per_sm, stages, keep } = *self;
        let sums = match sums {
            Sums::None => "",
            Sums::Own => " own",
            Sums::Given => " given",
        };
        let (add, weight, bias) =
            (given(add, " add"), given(weight, " weight"), given(bias, " bias"));
        let (shape, tile, of) = (norm.shape(), tile.name(), norm.weight.name());
        let keep = given(keep, " keep");
        format!(
            "norm backward {shape} {tile}{sums}{add}{weight}{bias} {blocks_per_sm}/sm stages{stages}{keep}, {of} weight"
        )
    }

    /// Operands of which it reads rows.
    pub fn operands(&self) -> u32 {
        1 + u32::from(self.sums != Sums::None || self.weight) + u32::from(self.add)
    }

    /// Rows that a block has at a time.
    pub fn rows(&self) -> u32 {
        THREADS / self.tile.team
    }
}

/// The kernel. Blocks go through all rows, from part to part of them in y.
pub fn emit(config: &Backward) -> Source {
    let k = &Kernel::new("norm_backward", Target::Sm80, THREADS);
    k.blocks_per_sm(config.blocks_per_sm);
    write(k, config);
    k.finish()
}

fn write<'k>(k: &'k Kernel, config: &Backward) {
    let &Backward { norm, sums, add, weight, bias, tile, stages, keep, .. } = config;
    let Norm { element, weight: of_weight, centred } = norm;
    let reads_x = sums != Sums::None || weight;
    let operand = |at, row| (k.pointer(at), k.param::<u64>(row));
    let x = reads_x.then(|| operand(Name::X, Name::XRow));
    let grad = operand(Name::Grad, Name::GradRow);
    let sum_grad = add.then(|| operand(Name::SumGrad, Name::SumGradRow));
    let [rows, units] = [Name::Rows, Name::Units].map(|name| k.param::<u32>(name));
    let cols = k.param::<u64>(Name::Cols);
    let read = usize::from(reads_x) + usize::from(reads_x && centred);
    let stats = [Name::Rstd, Name::Mean].into_iter().take(read).map(|name| k.pointer(name));
    let stats: Vec<_> = stats.collect();
    let given = (sums == Sums::Given).then(|| k.pointer(Name::Moments));
    let inverse = (sums == Sums::Own).then(|| k.param::<f32>(Name::Inverse));
    let of_x = (sums != Sums::None).then(|| (k.pointer(Name::Weight), k.pointer(Name::XGrad)));
    let parts = (weight || bias).then(|| k.pointer(Name::Parts));
    let values = 1 + u32::from(centred);
    let region = Team::shared(tile.team, THREADS, values);
    let of_teams = if config.rows() > 1 { THREADS * tile.unit * 4 } else { 0 };
    let scratch = (2 * region).max(of_teams).max(4).next_multiple_of(16);
    let operands: Vec<_> = [x, Some(grad), sum_grad].into_iter().flatten().collect();
    let on_their_way = Ring::bytes(tile, THREADS, config.operands(), stages);
    let shared = k.shared(scratch + on_their_way);

    let walk = Walk::new(k, tile, THREADS, rows);
    let before = (sums != Sums::Own).then(|| k.block_y() * tile.units());
    let slots = walk.slots(before, units);
    let weights = of_x.map(|(weight, _)| slots.load(of_weight, weight));
    let zeros = |wanted: bool| {
        let of_unit = || (0..tile.unit).map(|_| k.var(0f32)).collect::<Vec<_>>();
        wanted.then(|| (0..tile.chunks).map(|_| of_unit()).collect::<Vec<_>>())
    };
    let (weight_sums, bias_sums) = (zeros(weight), zeros(bias));
    let turn = k.var(shared);
    let step = k.blocks_x() * config.rows();
    let ring = (stages > 0).then(|| {
        let memory = (k, shared + scratch);
        Ring::new(memory, (tile, element), THREADS, config.operands(), stages)
    });
    let begin_all = |row: Reg<'k, u32>| {
        operands.iter().map(|&rows| begin(rows, row, element)).collect::<Vec<_>>()
    };
    let send = |ring: &Ring<'k>, first: Reg<'k, u32>| {
        let number = walk.row(first).number;
        ring.send(&slots.of(Some(number.lt(rows))), &begin_all(number));
    };
    if let Some(ring) = &ring {
        (0..stages - 1).for_each(|i| send(ring, walk.first + step * i));
    }
    // 1/√variance and the mean of a row, as far as they are read.
    let stats_of = |first: Reg<'k, u32>| -> Vec<Reg<'k, f32>> {
        let at = walk.row(first).number.min(rows - 1);
        stats.iter().map(|from| k.ld_global_nc::<f32, 1>(from.element(at, 4))[0]).collect()
    };
    // With rows on their way, those of the next one are.
    let ahead: Option<Vec<_>> =
        ring.as_ref().map(|_| stats_of(walk.first).into_iter().map(|x| k.var(x)).collect());
    k.for_(walk.first, rows, step, |first| {
        let row = walk.row(first);
        let next = if ahead.is_some() { stats_of(first + step) } else { vec![] };
        let stats = ahead.clone().unwrap_or_else(|| stats_of(first));
        let advance = || stats.iter().zip(&next).for_each(|(x, &next)| x.set(next));
        let slots = slots.of(row.exists);
        let arrived = ring.as_ref().map(|ring| {
            send(ring, first + step * (stages - 1));
            ring.arrive()
        });
        let held: Vec<_> = match &ring {
            None => begin_all(row.number).into_iter().map(|at| slots.load(element, at)).collect(),
            Some(_) => vec![],
        };
        // A unit of x, of the gradient, of the sum's gradient.
        let unit_of = |operand: usize, i: usize| match ring.as_ref().zip(arrived) {
            None => held[operand][i].floats(),
            Some((ring, at)) => ring.unit(at, operand as u32, i as u32).floats(),
        };
        let of_grad = usize::from(reads_x);
        // x̂ of a unit.
        let normed = |i: usize| {
            let (rstd, mean) = (stats[0], stats.get(1));
            let x = unit_of(0, i).into_iter().map(|x| mean.map_or(x, |&mean| x - mean));
            x.map(|x| x * rstd).collect::<Vec<_>>()
        };
        let weighted = |i: usize| {
            let weights = weights.as_ref().expect("it is read")[i].floats();
            unit_of(of_grad, i).into_iter().zip(weights).map(|(dy, w)| dy * w).collect::<Vec<_>>()
        };
        let own = [0, 1].map(|_| k.var(0f32));
        // Floats of one pass do not wait in registers for the next one.
        let always = rows.gt(0);
        let pass = |i: usize| {
            let grads = || unit_of(of_grad, i).into_iter();
            if let Some(sums) = &weight_sums {
                let terms = sums[i].iter().zip(grads()).zip(normed(i));
                terms.for_each(|((sum, dy), x)| sum.set(dy.fma(x, *sum)));
            }
            if let Some(sums) = &bias_sums {
                sums[i].iter().zip(grads()).for_each(|(sum, dy)| sum.set(*sum + dy));
            }
            if sums != Sums::Own {
                return None;
            }
            let (x, g) = (normed(i), weighted(i));
            add_to(own[0], x.iter().zip(&g).map(|(&x, &g)| [x, g]));
            if centred {
                g.iter().for_each(|&g| own[1].set(own[1] + g));
            }
            keep.then_some([x, g])
        };
        let all = 0..tile.chunks as usize;
        let mut kept = vec![];
        match keep {
            true => kept = all.clone().map(pass).collect(),
            false => k.apart(always, || all.clone().map(pass).for_each(drop)),
        }
        let Some((_, x_grad)) = of_x else { return advance() };
        let means = match (inverse, given) {
            (Some(inverse), _) => {
                let at = (region > 0).then_some(turn);
                let means: [Reg<'k, f32>; 2] = match centred {
                    true => walk.team.combine(at, own, |a, b| a + b),
                    false => {
                        let [mean] = walk.team.combine(at, [own[0]], |a, b| a + b);
                        [mean, own[1]]
                    }
                };
                // The next row's sums may come while others still read these.
                turn.set(turn ^ region);
                means.map(|mean| mean * inverse)
            }
            (None, Some(moments)) => {
                let number = row.exists.map_or(row.number, |_| row.number.min(rows - 1));
                k.ld_global_nc::<f32, 2>(moments.element(number, 8))
            }
            (None, None) => unreachable!("rows with a gradient have sums"),
        };
        let (rstd, unit) = (stats[0], Unit { element, count: tile.unit });
        let to = begin((x_grad, cols), row.number, element);
        // Of LayerNorm, −rstd · mean(g·x̂) and −rstd · mean(g).
        let scaled = centred.then(|| means.map(|mean| -(mean * rstd)));
        let gradient = |i: usize| {
            let [x, g] = match kept.get(i).cloned().flatten() {
                Some(kept) => kept,
                None => [normed(i), weighted(i)],
            };
            let of_x = x.into_iter().zip(g).map(|(x, g)| match scaled {
                Some([of_x, mean]) => x.fma(of_x, g.fma(rstd, mean)),
                None => (-x).fma(means[0], g) * rstd,
            });
            let of_x: Vec<_> = match add {
                false => of_x.collect(),
                true => of_x.zip(unit_of(2, i)).map(|(a, b)| a + b).collect(),
            };
            slots.store_unit(i, to, element, &unit.round(k, &of_x));
        };
        for i in all {
            match keep {
                true => gradient(i),
                false => k.apart(always, || gradient(i)),
            }
        }
        advance();
    });

    if let Some(ring) = &ring {
        ring.drain();
    }
    let Some(parts) = parts else { return };
    let size = cols * 4u64;
    let mut to = parts + k.block_x().wide() * size;
    let f32s = Unit { element: crate::kernel::Element::F32, count: tile.unit };
    for sums in [weight_sums, bias_sums].into_iter().flatten() {
        let sums: Vec<_> = sums.iter().map(|sums| f32s.round(k, sums)).collect();
        let sums = match config.rows() {
            1 => sums,
            teams => {
                sums.iter().map(|sums| of_all_teams(&walk, shared, f32s, teams, sums)).collect()
            }
        };
        k.if_(k.thread().lt(tile.team), || slots.store(to, f32s.element, &sums));
        to = to + k.blocks_x().wide() * size;
    }
}

/// Adds what each team of a block has, in their order. The first one gets the sums.
fn of_all_teams<'k>(
    walk: &Walk<'k>,
    shared: Reg<'k, u32>,
    unit: Unit,
    teams: u32,
    sums: &Loaded<'k>,
) -> Loaded<'k> {
    let (k, bytes) = (walk.k, unit.count * 4);
    let sums = sums.floats();
    let mine = shared + k.thread() * bytes;
    // What was there before is no longer read.
    k.sync_block();
    for (i, &sum) in (0..).zip(&sums) {
        k.st_shared(mine.at(4 * i), [sum]);
    }
    k.sync_block();
    k.for_(1u32, teams, 1, |team| {
        let theirs = mine + team * (walk.tile.team * bytes);
        k.if_(k.thread().lt(walk.tile.team), || {
            for (i, sum) in (0..).zip(&sums) {
                let [x] = k.ld_shared::<f32, 1>(theirs.at(4 * i));
                sum.set(*sum + x);
            }
        });
    });
    Loaded::Floats(sums)
}
