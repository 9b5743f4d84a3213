//! Which kernels are launched, for those who ask: `KAIO_LOG=1` prints each once, and [`record`] gives those of some work.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::{Mutex, OnceLock, PoisonError};

thread_local! {
    /// What was launched in this thread, while somebody records.
    static RECORD: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// A kernel is about to be launched.
pub fn launched(op: &'static str, kernel: impl Fn() -> String) {
    RECORD.with_borrow_mut(|record| {
        if let Some(record) = record {
            record.push(kernel());
        }
    });
    static SEEN: OnceLock<Option<Mutex<HashSet<String>>>> = OnceLock::new();
    let asked = || std::env::var_os("KAIO_LOG").is_some_and(|value| value != "0");
    if let Some(seen) = SEEN.get_or_init(|| asked().then(Mutex::default)) {
        let line = format!("kaio-candle: {op}: {}", kernel());
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.contains(&line) {
            eprintln!("{line}");
            seen.insert(line);
        }
    }
}

/// Does some work, and gives the kernels that it launched in this thread, in their order.
pub fn record<T>(work: impl FnOnce() -> T) -> (T, Vec<String>) {
    /// What was recorded before, which is put back also after a panic.
    struct Before(Option<Vec<String>>);
    impl Drop for Before {
        fn drop(&mut self) {
            RECORD.set(self.0.take());
        }
    }
    let before = Before(RECORD.replace(Some(Vec::new())));
    let result = work();
    let record = RECORD.take().unwrap_or_default();
    drop(before);
    (result, record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_what_is_launched_within() {
        launched("op", || "before".into());
        let (result, outer) = record(|| {
            launched("op", || "a".into());
            let (_, inner) = record(|| launched("op", || "b".into()));
            launched("op", || "c".into());
            inner
        });
        launched("op", || "after".into());
        assert_eq!(
            (result, outer),
            (vec!["b".to_string()], vec!["a".to_string(), "c".to_string()])
        );
    }
}
