//! Control flow: closures between labels.

use super::{Kernel, Number, Reg, Value};

/// The way out of a [`Kernel::loop_`].
#[derive(Clone, Copy, Debug)]
pub struct Exit<'k> {
    kernel: &'k Kernel,
    label: u32,
}

impl<'k> Exit<'k> {
    /// Leaves the loop if the predicate holds.
    pub fn when(self, holds: Reg<'k, bool>) {
        self.kernel.branch_if(holds, true, self.label);
    }
}

impl Kernel {
    fn label(&self) -> u32 {
        let labels = &mut self.state.borrow_mut().labels;
        *labels += 1;
        *labels
    }

    fn place(&self, label: u32) {
        let state = &mut *self.state.borrow_mut();
        assert!(state.guard.is_none(), "no labels within `when`");
        state.body.push_str(&format!("L{label}:\n"));
    }

    fn branch_if(&self, p: Reg<bool>, holds: bool, label: u32) {
        let not = if holds { "" } else { "!" };
        let state = &mut *self.state.borrow_mut();
        assert!(state.guard.is_none(), "no branches within `when`");
        state.body.push_str(&format!("  @{not}{p} bra L{label};\n"));
    }

    fn branch(&self, label: u32) {
        self.emit(format_args!("bra L{label}"));
    }

    /// Predicates the instructions of `then`, which has no control flow: no branch is made.
    pub fn when<T>(&self, holds: Reg<bool>, then: impl FnOnce() -> T) -> T {
        let outer = self.state.borrow_mut().guard.replace(holds.id());
        assert!(outer.is_none(), "`when` within `when`");
        let result = then();
        self.state.borrow_mut().guard = None;
        result
    }

    /// Runs `then` if the predicate holds.
    pub fn if_(&self, holds: Reg<bool>, then: impl FnOnce()) {
        let end = self.label();
        self.branch_if(holds, false, end);
        then();
        self.place(end);
    }

    /// [`if_`](Self::if_) of a predicate that always holds, which the assembler does not know: it moves
    /// no instructions of `body` among those around. Where much is unrolled that saves registers, in which
    /// what is loaded early waits. Registers that are first written in `body` stay in it.
    pub fn apart(&self, always: Reg<bool>, body: impl FnOnce()) {
        self.if_(always, body);
    }

    /// Runs `then` if the predicate holds, else `other`.
    pub fn if_else(&self, holds: Reg<bool>, then: impl FnOnce(), other: impl FnOnce()) {
        let (otherwise, end) = (self.label(), self.label());
        self.branch_if(holds, false, otherwise);
        then();
        self.branch(end);
        self.place(otherwise);
        other();
        self.place(end);
    }

    /// Repeats `body` until it leaves. The assembler does not unroll it: a Rust loop does that.
    pub fn loop_<'k>(&'k self, body: impl FnOnce(Exit<'k>)) {
        let (start, end) = (self.label(), self.label());
        self.place(start);
        self.emit(format_args!(".pragma \"nounroll\""));
        body(Exit { kernel: self, label: end });
        self.branch(start);
        self.place(end);
    }

    /// `for i in (from..to).step_by(step)`, with `i` in a register.
    pub fn for_<'k, T: Number>(
        &'k self,
        from: impl Into<Value<'k, T>>,
        to: impl Into<Value<'k, T>>,
        step: impl Into<Value<'k, T>>,
        body: impl FnOnce(Reg<'k, T>),
    ) {
        let (i, to, step) = (self.var(from), to.into(), step.into());
        self.loop_(|exit| {
            exit.when(i.ge(to));
            body(i);
            i.increase(step);
        });
    }

    /// Repeats `attempt`, which has no side effects before it succeeds, until it gives true.
    pub(super) fn spin<'k>(&'k self, attempt: impl FnOnce() -> Reg<'k, bool>) {
        let start = self.label();
        self.place(start);
        let done = attempt();
        self.branch_if(done, false, start);
    }
}
