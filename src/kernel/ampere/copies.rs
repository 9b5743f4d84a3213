//! A thread's copies of attention's operands to shared memory. What no sequence has becomes zeros.

use super::swizzle::CHUNK;
use super::tile::SwizzledTile;
use crate::ptx::{Address, Kernel, Reg, Value};

/// An operand in global memory, strides in elements.
#[derive(Clone, Copy)]
pub struct Operand<'k> {
    address: Reg<'k, u64>,
    row: Reg<'k, u64>,
    head: Reg<'k, u64>,
    batch: Reg<'k, u64>,
}

impl<'k> Operand<'k> {
    /// Declares its parameters: the address, and the strides of rows, heads and sequences.
    pub fn params(k: &'k Kernel, [at, row, head, batch]: [impl AsRef<str>; 4]) -> Self {
        let address = k.pointer(at);
        Self { address, row: k.param(row), head: k.param(head), batch: k.param(batch) }
    }

    fn head(&self, batch: Reg<'k, u32>, head: Reg<'k, u32>) -> Reg<'k, u64> {
        batch.wide() * self.batch + head.wide() * self.head
    }
}

/// One thread's part of a stage of an operand.
pub struct Copies<'k> {
    operand: Operand<'k>,
    lines: SwizzledTile,
    /// How many are copied together.
    together: u32,
    /// The first of this thread's lines.
    line: Reg<'k, u32>,
    /// The elements before its chunks in a panel.
    along: Reg<'k, u32>,
    /// The address of its first copy in the first stage, but for `region`.
    to: Reg<'k, u32>,
    region: u32,
    /// For a last panel that is not whole: whether it has the thread's chunk, and how many of its bytes
    /// are in memory.
    last: Option<(Reg<'k, bool>, Reg<'k, u32>)>,
}

impl<'k> Copies<'k> {
    /// The copies of a thread among `threads`, to lines that begin at `to`.
    pub fn new(
        operand: Operand<'k>,
        lines: SwizzledTile,
        threads: u32,
        thread: Reg<'k, u32>,
        to: Reg<'k, u32>,
    ) -> Self {
        let k = to.kernel();
        let (line, chunk) = SwizzledTile::first_copy(thread);
        let along = chunk * lines.chunk();
        let left = lines.dim % lines.width();
        let last = (left > 0).then(|| {
            let bytes = (k.var(left) - along.min(left)).min(lines.chunk()) * lines.size;
            (chunk.lt(lines.chunks(lines.panels() - 1)), bytes)
        });
        let together = SwizzledTile::lines_together(threads);
        Self {
            operand,
            lines,
            together,
            line,
            along,
            to: to + SwizzledTile::place(line, chunk),
            region: 0,
            last,
        }
    }

    /// The same, to lines so many bytes further: copies whose places differ in them alone share registers.
    pub fn at(self, region: u32) -> Self {
        Self { region, ..self }
    }

    /// This thread's lines, from its first.
    fn further(&self) -> impl Iterator<Item = u32> {
        (0..self.lines.count).step_by(self.together as usize)
    }

    /// Copies a line, `further` lines after the thread's first, if it is `valid`, or else zeros.
    fn copy(
        &self,
        stage: Reg<'k, u32>,
        further: u32,
        from: Reg<'k, u64>,
        valid: Option<Reg<'k, bool>>,
    ) {
        let k = stage.kernel();
        for panel in 0..self.lines.panels() {
            let to = panel * self.lines.panel_bytes() + further * SwizzledTile::BYTES;
            let to = stage.at((self.region + to).into());
            let from = Address::from(from).at((panel * SwizzledTile::BYTES).into());
            match self.last {
                Some((mine, bytes)) if panel + 1 == self.lines.panels() => {
                    let bytes = valid.map_or(bytes, |valid| k.select(valid, bytes, 0));
                    k.when(mine, || k.cp_async(to, from, bytes));
                }
                _ => {
                    let all = |valid: Reg<'k, bool>| k.select(valid, k.var(CHUNK), 0);
                    let bytes = valid.map_or(Value::Literal(CHUNK), |v| Value::Reg(all(v)));
                    k.cp_async(to, from, bytes);
                }
            }
        }
    }

    /// Copies lines, each from a position and head of its own, or zeros where it has none.
    pub fn gather(
        &self,
        batch: Reg<'k, u32>,
        at: impl Fn(Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>, Reg<'k, bool>),
    ) {
        for further in self.further() {
            let (position, head, valid) = at(self.line + further);
            let start = self.operand.head(batch, head) + position.wide() * self.operand.row;
            let from =
                self.operand.address + (start + self.along.wide()) * u64::from(self.lines.size);
            self.copy(self.to, further, from, Some(valid));
        }
    }

    /// The source of the thread's first line, where the first line of all is `position` of a head.
    pub fn begin(
        &self,
        batch: Reg<'k, u32>,
        head: Reg<'k, u32>,
        position: Reg<'k, u32>,
    ) -> Reg<'k, u64> {
        let start = self.operand.head(batch, head);
        let start = start + (position + self.line).wide() * self.operand.row;
        self.operand.address + (start + self.along.wide()) * u64::from(self.lines.size)
    }

    /// Copies lines that follow each other, the first of this thread's from `pointer`, to the stage that begins
    /// `stage` bytes after the first. Those from line `limit` on become zeros.
    pub fn lines(&self, pointer: Reg<'k, u64>, stage: Reg<'k, u32>, limit: Option<Reg<'k, i32>>) {
        let stage = self.to + stage;
        let step = self.operand.row * u64::from(self.together * self.lines.size);
        let mut from = pointer;
        for further in self.further() {
            if further > 0 {
                from = from + step;
            }
            let valid = limit.map(|limit| limit.gt((self.line + further).cast::<i32>()));
            self.copy(stage, further, from, valid);
        }
    }

    /// The same, and goes back to the lines before them.
    pub fn next(&self, pointer: Reg<'k, u64>, stage: Reg<'k, u32>, limit: Option<Reg<'k, i32>>) {
        self.lines(pointer, stage, limit);
        let back = self.operand.row * u64::from(self.lines.count * self.lines.size);
        pointer.set(pointer - back);
    }
}
