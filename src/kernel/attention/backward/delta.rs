//! Of each query the sum of its result times its gradient, less the gradient of its log-sum-exp: what all keys of
//! a row share in dS. Some lanes of a warp have a row; the kernel is as fast as memory.

use crate::kernel::Element;
use crate::kernel::attention::Name;
use crate::kernel::multiprocessor::WARP;
use crate::kernel::name::given;
use crate::kernel::rows::Unit;
use crate::ptx::{Kernel, Reg, Source, Target};

const THREADS: u32 = 256;
/// Bytes that a thread zeroes at once.
pub const ZEROED_UNIT: u32 = 16;
/// The most elements that a lane loads together.
const MOST: u32 = 8;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The result's type.
    pub out: Element,
    /// That of its gradient.
    pub grad: Element,
    /// Elements of a row.
    pub value_dim: u32,
    /// Those that a lane loads together.
    pub unit: u32,
    /// Whether the log-sum-exp has a gradient.
    pub lse_grad: bool,
    /// Whether it zeroes what the kernels after it add to.
    pub zeroes: bool,
}

impl Config {
    /// For rows that begin at multiples of `aligned` elements. It zeroes nothing.
    pub fn new(out: Element, grad: Element, value_dim: u32, aligned: u32, lse_grad: bool) -> Self {
        // Eight f32 of four rows would take too many registers.
        let most = MOST.min(grad.per_chunk()).min(out.per_chunk());
        let fits = |unit: &u32| aligned.is_multiple_of(*unit) && value_dim.is_multiple_of(*unit);
        let unit = [8, 4, 2].into_iter().find(|unit| *unit <= most && fits(unit)).unwrap_or(1);
        Self { out, grad, value_dim, unit, lse_grad, zeroes: false }
    }

    /// `delta d128 by8, f32·bf16 lse zeroes`
    pub fn name(&self) -> String {
        let Self { value_dim, unit, .. } = self;
        let (out, grad) = (self.out.name(), self.grad.name());
        let words = [given(self.lse_grad, " lse"), given(self.zeroes, " zeroes")].concat();
        format!("delta d{value_dim} by{unit}, {out}·{grad}{words}")
    }

    /// Rows of a thread, all of which are on their way at once: fewer where elements come one by one, which takes
    /// registers.
    fn rows(&self) -> u32 {
        if self.unit > 1 { 4 } else { 1 }
    }

    /// Lanes of a row.
    fn lanes(&self) -> u32 {
        self.chunks().next_power_of_two().min(WARP)
    }

    /// What lanes load of a row, one after the other.
    fn chunks(&self) -> u32 {
        self.value_dim / self.unit
    }

    /// Rows that a block has at once.
    fn rows_together(&self) -> u32 {
        THREADS / self.lanes()
    }

    /// Blocks for each head.
    pub fn columns(&self, queries: u64) -> u64 {
        queries.div_ceil((self.rows() * self.rows_together()).into())
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("delta", Target::Sm80, THREADS);
    k.blocks_per_sm(4);
    let out = Rows::params(k, [Name::Out, Name::OutRow, Name::OutHead, Name::OutBatch], config.out);
    let names = [Name::Grad, Name::GradRow, Name::GradHead, Name::GradBatch];
    let grad = Rows::params(k, names, config.grad);
    let lse_grad = config.lse_grad.then(|| k.pointer(Name::LseGrad));
    let delta = k.pointer(Name::Delta);
    let (queries, heads) = (k.param::<u32>(Name::Queries), k.param(Name::Heads));
    let columns = k.param::<u32>(Name::Columns);
    let zeroed = config.zeroes.then(|| (k.pointer(Name::Zeroed), k.param(Name::ZeroedUnits)));
    let (thread, block) = (k.thread(), k.block_x());
    let head = block / columns;
    let batch = head / heads;
    let place = [batch, head - batch * heads];
    let lanes = config.lanes();
    let first =
        (block - head * columns) * (config.rows() * config.rows_together()) + thread / lanes;
    let lane = thread % lanes;
    let rows: Vec<_> = (0..config.rows()).map(|i| first + i * config.rows_together()).collect();
    let loaded: Vec<_> = rows
        .iter()
        .map(|&row| {
            // There is at least one row.
            let row = row.min(queries - 1);
            let [out, grad] = [out, grad].map(|operand| operand.load(config, place, row, lane));
            let lse_grad = lse_grad.map(|at| {
                let [value] = k.ld_global_nc::<f32, 1>(index(at, head, queries, row));
                value
            });
            (out, grad, lse_grad)
        })
        .collect();
    if let Some((zeroed, units)) = zeroed {
        // While those are on their way.
        let zero = k.var(0f32);
        k.for_(block * THREADS + thread, units, k.blocks_x() * THREADS, |unit| {
            k.st_global(zeroed.element(unit, ZEROED_UNIT), [zero; 4]);
        });
    }
    for (&row, (out, grad, lse_grad)) in rows.iter().zip(loaded) {
        let chunks = out.into_iter().zip(grad).zip(0..);
        let parts = chunks.map(|((out, grad), chunk)| {
            let terms = out.into_iter().zip(grad);
            let sum = terms.fold(k.var(0f32), |sum, (o, g)| o.fma(g, sum));
            match (chunk + 1) * lanes <= config.chunks() {
                true => sum,
                // Past the end of the row the last elements were loaded again.
                false => k.select(lane.lt(config.chunks() - chunk * lanes), sum, 0.0),
            }
        });
        let sum = parts.reduce(|a, b| a + b).expect("a row has elements");
        let xors = (0..lanes.ilog2()).map(|i| 1 << i);
        let mut sum = xors.fold(sum, |sum, xor| sum + k.shfl_bfly(sum, xor));
        if let Some(lse_grad) = lse_grad {
            sum = sum - lse_grad;
        }
        let writes = lane.eq(0) & row.lt(queries);
        let at = index(delta, head, queries, row);
        k.when(writes, || k.st_global(at, [sum]));
    }
    k.finish()
}

/// The address of a row's element of f32 `[heads, queries]`.
fn index<'k>(
    at: Reg<'k, u64>,
    head: Reg<'k, u32>,
    queries: Reg<'k, u32>,
    row: Reg<'k, u32>,
) -> Reg<'k, u64> {
    at + (head.mul_wide(queries) + row.wide()) * 4u64
}

/// Rows in memory, strides in elements.
#[derive(Clone, Copy)]
struct Rows<'k> {
    element: Element,
    address: Reg<'k, u64>,
    row: Reg<'k, u64>,
    head: Reg<'k, u64>,
    batch: Reg<'k, u64>,
}

impl<'k> Rows<'k> {
    fn params(k: &'k Kernel, [at, row, head, batch]: [Name; 4], element: Element) -> Self {
        let address = k.pointer(at);
        Self { element, address, row: k.param(row), head: k.param(head), batch: k.param(batch) }
    }

    /// A lane's chunks of a row of a sequence and head. Past the row's end it is the last one again.
    fn load(
        &self,
        config: &Config,
        [batch, head]: [Reg<'k, u32>; 2],
        row: Reg<'k, u32>,
        lane: Reg<'k, u32>,
    ) -> Vec<Vec<Reg<'k, f32>>> {
        let (size, lanes) = (self.element.size(), config.lanes());
        let start = batch.wide() * self.batch + head.wide() * self.head + row.wide() * self.row;
        let start = self.address + start * u64::from(size);
        let bytes = config.unit * size;
        let own = start.element(lane, bytes);
        let chunk = |i: u32| {
            let at = match (i + 1) * lanes <= config.chunks() {
                true => own.at((i * lanes * bytes).into()),
                false => {
                    let chunk = (lane + i * lanes).min(config.chunks() - 1);
                    start.element(chunk, bytes).into()
                }
            };
            let unit = Unit { element: self.element, count: config.unit };
            unit.load(lane.kernel(), at).floats()
        };
        (0..config.chunks().div_ceil(lanes)).map(chunk).collect()
    }
}
