//! Blocks to which the backward passes of others come as well: of a block, or a checkpoint, that captured one of their results.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use candle_core::{Tensor, TensorId};

/// Of which tape a tensor is a result.
static RESULTS: LazyLock<Mutex<HashMap<TensorId, Arc<AtomicBool>>>> = LazyLock::new(Mutex::default);

fn results() -> MutexGuard<'static, HashMap<TensorId, Arc<AtomicBool>>> {
    RESULTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether other passes come to a tape.
#[derive(Default)]
pub(in crate::op) struct Shared {
    shared: Arc<AtomicBool>,
    results: Mutex<Vec<TensorId>>,
}

impl Shared {
    /// Its results in the graph.
    pub fn know(&self, tensors: &[Tensor]) {
        let ids = tensors.iter().map(Tensor::id);
        results().extend(ids.clone().map(|id| (id, self.shared.clone())));
        self.results.lock().unwrap_or_else(PoisonError::into_inner).extend(ids);
    }

    pub fn get(&self) -> bool {
        self.shared.load(Relaxed)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut all = results();
        let own = self.results.get_mut().unwrap_or_else(PoisonError::into_inner);
        own.iter().for_each(|id| drop(all.remove(id)));
    }
}

/// Another pass than that of their graph comes to some tensors.
pub(in crate::op) fn share(nodes: &[&Tensor]) {
    let all = results();
    let tapes = nodes.iter().filter_map(|node| all.get(&node.id()));
    tapes.for_each(|shared| shared.store(true, Relaxed));
}
