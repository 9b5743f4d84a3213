//! The kernels.

use super::{Access, Config, Name, Pass, Reduced, SUM_THREADS, Sum};
use crate::kernel::attention::scores::tanh_relative;
use crate::kernel::rows::{Team, Unit};
use crate::ptx::{Kernel, Reg, Source, Target};

/// The kernel of rows. Its parameters are those of [`Name`].
///
/// A row that is ignored is not read. One whose target is out of range is NaN.
pub fn emit(config: &Config) -> Source {
    let &Config { element, team, pass, smoothing, .. } = config;
    let k = &Kernel::new("cross_entropy", Target::Sm80, config.threads());
    let (logits, logits_row) = (k.pointer(Name::Logits), k.param::<u64>(Name::LogitsRow));
    let targets = Targets::declare(k, config.wide);
    let [rows, cols] = [Name::Rows, Name::Cols].map(|name| k.param::<u32>(name));
    let cap = config.softcap.then(|| k.param::<f32>(Name::Cap));
    let (kept, z_loss) = (k.param::<f32>(Name::Kept), k.param::<f32>(Name::ZLoss));
    let spread = smoothing.then(|| k.param::<f32>(Name::Spread));
    let losses = (pass != Pass::Gradient).then(|| k.pointer(Name::Losses));
    let stats = (pass != Pass::Both).then(|| k.pointer(Name::Stats));
    let even = (pass != Pass::Losses && smoothing).then(|| k.param::<f32>(Name::Even));
    let upstream = (pass != Pass::Losses).then(|| {
        let row = k.param::<u32>(Name::UpstreamRow);
        (k.pointer(Name::Upstream), row, k.pointer(Name::Share))
    });
    let out = (pass == Pass::Gradient).then(|| k.pointer(Name::Out));
    // Room for the maxima, and for the sums.
    let places = [1, 1 + u32::from(smoothing)];
    let bytes = places.map(|values| Team::shared(team, config.threads(), values));
    let shared = (bytes[0] > 0 && pass != Pass::Gradient).then(|| k.shared(bytes[0] + bytes[1]));

    let thread = k.thread();
    let number = k.block_x() * (config.threads() / team) + thread / team;
    k.if_(number.lt(rows), || {
        let size = u64::from(element.size());
        let row = Row {
            config,
            from: logits + number.wide() * logits_row * size,
            lane: thread % team,
            cols,
            cap,
        };
        let out = match pass {
            Pass::Losses => None,
            Pass::Gradient => out.map(|out| out + number.wide() * cols.wide() * size),
            Pass::Both => Some(row.from),
        };
        let target = targets.load(number);
        let first = row.lane.eq(0);
        k.if_else(
            target.ignored,
            || {
                let zero = k.var(0f32);
                if let Some(losses) = losses {
                    k.when(first, || k.st_global(losses.element(number, 4), [zero]));
                    if let Some(stats) = stats {
                        k.when(first, || k.st_global(stats.element(number, 8), [zero, zero]));
                    }
                }
                if let Some(out) = out {
                    row.each(|unit, cols| {
                        for &col in cols {
                            let to = out.element(col, element.size());
                            unit.store(to, &vec![zero; unit.count as usize]);
                        }
                    });
                }
            },
            || {
                let exists = target.class.lt(cols) & target.is_class;
                let [max, log] = match losses {
                    None => k.ld_global_nc(stats.expect("they were kept").element(number, 8)),
                    Some(losses) => {
                        let at_target = row.at(target.class, exists);
                        let team = Team::new(thread, team, config.threads());
                        let sums = row.sums(&team, shared.map(|at| [at, at + bytes[0]]));
                        let [max, log] = [sums.max, sums.log];
                        let loss = sums.loss(at_target, kept, spread.zip(sums.total), cols);
                        let lse = max + log;
                        let squared = (lse * lse).fma(z_loss, loss);
                        let loss = k.select(z_loss.gt(0.0), squared, loss);
                        k.when(first, || k.st_global(losses.element(number, 4), [loss]));
                        if let Some(stats) = stats {
                            k.when(first, || k.st_global(stats.element(number, 8), [max, log]));
                        }
                        [max, log]
                    }
                };
                let Some(out) = out else { return };
                let Some((upstream, step, share)) = upstream else { return };
                let [of_row] = k.ld_global_nc::<f32, 1>(upstream.element(number * step, 4));
                let [share] = k.ld_global_nc::<f32, 1>(share);
                let factor = of_row * share;
                let scale = (z_loss * 2.0).fma(max + log, 1.0) * factor;
                let even = even.map_or(k.var(0f32), |even| even * factor);
                let slopes = Slopes {
                    max,
                    log: log * std::f32::consts::LOG2_E,
                    scale,
                    // NaN in all of a row whose target is no class.
                    even: k.select(exists, -even, f32::NAN),
                    target: target.class,
                    hot: -(kept * factor),
                };
                row.store_slopes(&slopes, out);
            },
        );
    });
    k.finish()
}

/// Targets of rows.
struct Targets<'k> {
    from: Reg<'k, u64>,
    ignored: Reg<'k, u64>,
    wide: bool,
}

/// A row's target: a class if it is in range.
struct RowTarget<'k> {
    ignored: Reg<'k, bool>,
    class: Reg<'k, u32>,
    /// Whether it has no more than 32 bits.
    is_class: Reg<'k, bool>,
}

impl<'k> Targets<'k> {
    fn declare(k: &'k Kernel, wide: bool) -> Self {
        Self { from: k.pointer(Name::Targets), ignored: k.param(Name::Ignored), wide }
    }

    fn load(&self, row: Reg<'k, u32>) -> RowTarget<'k> {
        let k = row.kernel();
        let target = match self.wide {
            true => k.ld_global_nc::<u64, 1>(self.from.element(row, 8))[0],
            false => k.ld_global_nc::<u32, 1>(self.from.element(row, 4))[0].wide(),
        };
        let class = target.low();
        let is_class = !class.wide().ne(target);
        RowTarget { ignored: !target.ne(self.ignored), class, is_class }
    }
}

/// A row of logits, as one of its threads sees it.
struct Row<'a, 'k> {
    config: &'a Config,
    from: Reg<'k, u64>,
    /// The thread's number among those of the row.
    lane: Reg<'k, u32>,
    cols: Reg<'k, u32>,
    cap: Option<Reg<'k, f32>>,
}

/// What a row's logits come to.
struct Sums<'k> {
    max: Reg<'k, f32>,
    /// The logarithm of the sum of all exponentials over that of the largest one.
    log: Reg<'k, f32>,
    /// The sum of all logits, where some probability is spread.
    total: Option<Reg<'k, f32>>,
}

impl<'k> Sums<'k> {
    /// Without its log-sum-exp squared.
    fn loss(
        &self,
        at_target: Reg<'k, f32>,
        kept: Reg<'k, f32>,
        spread: Option<(Reg<'k, f32>, Reg<'k, f32>)>,
        cols: Reg<'k, u32>,
    ) -> Reg<'k, f32> {
        let k = at_target.kernel();
        let hot = self.max - at_target + self.log;
        let Some((spread, total)) = spread else { return hot };
        let even = self.max - total / cols.to_f32() + self.log;
        // 0 · ∞ would be NaN. (A target that is no class has a NaN for its logit.)
        let nothing = kept.eq(0.0) & at_target.le(f32::INFINITY);
        let hot = k.select(nothing, k.var(0f32), hot * kept);
        even.fma(spread, hot)
    }
}

/// What the slopes of a row's loss are made of.
struct Slopes<'k> {
    max: Reg<'k, f32>,
    /// To base 2.
    log: Reg<'k, f32>,
    /// A factor of probabilities.
    scale: Reg<'k, f32>,
    /// Added to all.
    even: Reg<'k, f32>,
    target: Reg<'k, u32>,
    /// Added to the target's.
    hot: Reg<'k, f32>,
}

impl<'k> Row<'_, 'k> {
    /// Calls `visit` for all elements of the thread: for the columns where some units begin, whose loads may be on
    /// their way together.
    fn each(&self, visit: impl Fn(Unit, &[Reg<'k, u32>])) {
        // Elements on their way.
        const TOGETHER: u32 = 16;
        const MOST: u32 = 8;
        let &Config { element, access, team, .. } = self.config;
        let (k, lane) = (self.lane.kernel(), self.lane);
        let unit = Unit::of(element, access != Access::Elements);
        let (units, before) = match access {
            Access::Elements | Access::Lines => (self.cols / unit.count, k.var(0u32)),
            Access::Peeled => {
                let after = self.from.low() % 16 / element.size();
                let before = ((k.var(unit.count) - after) % unit.count).min(self.cols);
                let units = (self.cols - before) / unit.count;
                // Fewer than two lines, one element a thread.
                let (inside, one) = (units * unit.count, Unit::of(element, false));
                k.if_(lane.lt(self.cols - inside), || {
                    visit(one, &[k.select(lane.lt(before), lane, lane + inside)]);
                });
                (units, before)
            }
        };
        let together = (TOGETHER / unit.count).min(MOST);
        let col = |at: Reg<'k, u32>| at * unit.count + before;
        let at = k.var(lane);
        k.loop_(|exit| {
            exit.when((at + team * (together - 1)).ge(units));
            let cols = (0..together).map(|i| col(at + i * team)).collect::<Vec<_>>();
            visit(unit, &cols);
            at.increase(team * together);
        });
        k.for_(at, units, team, |at| visit(unit, &[col(at)]));
    }

    /// The elements of units, in f32, in their order.
    fn load(&self, unit: Unit, cols: &[Reg<'k, u32>]) -> Vec<Reg<'k, f32>> {
        let size = self.config.element.size();
        let load = |&col| match self.config.pass {
            // Written later.
            Pass::Both => unit.load_mutable(self.from.kernel(), self.from.element(col, size)),
            Pass::Losses | Pass::Gradient => {
                unit.load(self.from.kernel(), self.from.element(col, size))
            }
        };
        let loaded: Vec<_> = cols.iter().map(load).collect();
        loaded.iter().flat_map(|loaded| loaded.floats()).collect()
    }

    /// A logit under the cap, and the hyperbolic tangent that it comes from.
    fn capped(&self, x: Reg<'k, f32>) -> (Reg<'k, f32>, Option<Reg<'k, f32>>) {
        match self.cap {
            None => (x, None),
            Some(cap) => {
                let tanh = tanh_relative(x / cap);
                (tanh * cap, Some(tanh))
            }
        }
    }

    /// The logit of a class that exists; else NaN.
    fn at(&self, class: Reg<'k, u32>, exists: Reg<'k, bool>) -> Reg<'k, f32> {
        let k = class.kernel();
        let x = k.var(f32::NAN);
        k.if_(exists, || {
            x.set(self.load(Unit::of(self.config.element, false), &[class])[0]);
        });
        self.capped(x).0
    }

    fn sums(&self, team: &Team<'k>, shared: Option<[Reg<'k, u32>; 2]>) -> Sums<'k> {
        let k = self.lane.kernel();
        // Not −∞: differences of two of these would be NaN.
        let (max, sum) = (k.var(f32::MIN), k.var(0f32));
        let total = self.config.smoothing.then(|| k.var(0f32));
        self.each(|unit, cols| {
            let loaded = self.load(unit, cols);
            let z: Vec<_> = loaded.into_iter().map(|x| self.capped(x).0).collect();
            let largest = z.iter().fold(max, |max, &z| max.max(z));
            let add = z.iter().map(|&z| exp(z - largest)).reduce(|a, b| a + b);
            sum.set(sum.fma(exp(max - largest), add.expect("a unit has elements")));
            max.set(largest);
            if let Some(total) = total {
                z.iter().for_each(|&z| total.increase(z));
            }
        });
        let [largest] = team.combine(shared.map(|[max, _]| max), [max], |a, b| a.max(b));
        let (sum, shared) = (sum * exp(max - largest), shared.map(|[_, sums]| sums));
        let (sum, total) = match total {
            None => (team.combine(shared, [sum], |a, b| a + b)[0], None),
            Some(total) => {
                let [sum, total] = team.combine(shared, [sum, total], |a, b| a + b);
                (sum, Some(total))
            }
        };
        Sums { max: largest, log: sum.log2() * std::f32::consts::LN_2, total }
    }

    fn store_slopes(&self, slopes: &Slopes<'k>, out: Reg<'k, u64>) {
        let &Slopes { max, log, scale, even, target, hot } = slopes;
        let k = max.kernel();
        self.each(|unit, cols| {
            let loaded = self.load(unit, cols);
            for (&col, x) in cols.iter().zip(loaded.chunks_exact(unit.count as usize)) {
                let after = target - col;
                let slope = |(i, &x): (u32, &Reg<'k, f32>)| {
                    let (z, tanh) = self.capped(x);
                    let p = (z - max).fma(std::f32::consts::LOG2_E, -log).exp2_ftz();
                    let slope = p.fma(scale, even);
                    k.when(after.eq(i), || slope.increase(hot));
                    match tanh {
                        None => slope,
                        Some(tanh) => slope * (tanh * tanh).fma(-1.0, 1.0),
                    }
                };
                let done: Vec<_> = (0..).zip(x).map(slope).collect();
                unit.store(out.element(col, self.config.element.size()), &done);
            }
        });
    }
}

/// `e^x` of no more than 0, as 0 where that is subnormal.
fn exp(x: Reg<f32>) -> Reg<f32> {
    (x * std::f32::consts::LOG2_E).exp2_ftz()
}

/// The kernel that adds the losses of all rows, in one order: one block.
pub fn emit_sum(config: &Sum) -> Source {
    let k = &Kernel::new("cross_entropy_sum", Target::Sm80, SUM_THREADS);
    let (losses, rows) = (k.pointer(Name::Losses), k.param::<u32>(Name::Rows));
    let mean = (config.reduced == Reduced::Mean).then(|| Targets::declare(k, config.wide));
    let (total, share) = (k.pointer(Name::Total), k.pointer(Name::Share));
    let shared = k.shared(Team::shared(SUM_THREADS, SUM_THREADS, 2));
    let (thread, sum, counted) = (k.thread(), k.var(0f32), k.var(0u32));
    k.for_(thread, rows, SUM_THREADS, |row| {
        let [loss] = k.ld_global_nc::<f32, 1>(losses.element(row, 4));
        sum.increase(loss);
        if let Some(targets) = &mean {
            counted.increase(k.select(targets.load(row).ignored, k.var(0u32), 1));
        }
    });
    let team = Team::new(thread, SUM_THREADS, SUM_THREADS);
    let [sum, counted] = team.combine(Some(shared), [sum, counted.to_f32()], |a, b| a + b);
    let one = k.var(1f32);
    let (sum, one) = match mean {
        None => (sum, one),
        // Of none the gradient is 0, and the loss NaN.
        Some(_) => (sum / counted, k.select(counted.gt(0.0), one / counted, 0.0)),
    };
    k.when(thread.eq(0), || {
        k.st_global(total, [sum]);
        k.st_global(share, [one]);
    });
    k.finish()
}
