//! What is made once and shared: compiled kernels, and what was decided for a problem.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use once_cell::sync::OnceCell;
use parking_lot::RwLock;

/// Values by key. Each is made once, outside the lock, while those who ask for the same one wait and
/// others do not. What failed leaves no trace; the next who asks tries again.
struct Cache<K, V> {
    slots: RwLock<HashMap<K, Slot<V>>>,
    most: usize,
}

type Slot<V> = Arc<OnceCell<Arc<V>>>;

impl<K: Hash + Eq + Clone, V> Cache<K, V> {
    /// Forgets everything when it holds `most` values and one more comes: for values that are quickly
    /// made, by keys that may never end.
    fn of_at_most(most: usize) -> Self {
        Self { slots: RwLock::default(), most }
    }

    /// The value of a key.
    fn get<E>(&self, key: &K, make: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, E> {
        // In a statement of its own: the lock is given back before another is taken.
        let known = self.slots.read().get(key).cloned();
        let slot = known.unwrap_or_else(|| self.add(key));
        let value = slot.get_or_try_init(|| make().map(Arc::new));
        if value.is_err() {
            let mut slots = self.slots.write();
            // Unless somebody else succeeds, or replaced it.
            if slots.get(key).is_some_and(|now| Arc::ptr_eq(now, &slot) && now.get().is_none()) {
                slots.remove(key);
            }
        }
        value.cloned()
    }

    fn add(&self, key: &K) -> Slot<V> {
        let mut slots = self.slots.write();
        if slots.len() >= self.most && !slots.contains_key(key) {
            slots.clear();
        }
        slots.entry(key.clone()).or_default().clone()
    }
}

/// A cache of each GPU's own.
pub struct PerGpu<K, V> {
    /// With the ordinals; there are few.
    caches: RwLock<Vec<OfGpu<K, V>>>,
    most: usize,
}

type OfGpu<K, V> = (usize, Arc<Cache<K, V>>);

impl<K: Hash + Eq + Clone, V> PerGpu<K, V> {
    /// Keeps everything.
    pub const fn new() -> Self {
        Self::of_at_most(usize::MAX)
    }

    /// For each GPU: forgets everything when it holds `most` values and one more comes. For values that
    /// are quickly made, by keys that may never end.
    pub const fn of_at_most(most: usize) -> Self {
        Self { caches: RwLock::new(Vec::new()), most }
    }

    /// The value of a key on the GPU at an ordinal.
    pub fn get<E>(
        &self,
        ordinal: usize,
        key: &K,
        make: impl FnOnce() -> Result<V, E>,
    ) -> Result<Arc<V>, E> {
        let find = |caches: &[OfGpu<K, V>]| {
            caches.iter().find(|(known, _)| *known == ordinal).map(|(_, cache)| cache.clone())
        };
        let known = find(&self.caches.read());
        let cache = known.unwrap_or_else(|| {
            let mut caches = self.caches.write();
            // Unless somebody was faster.
            find(&caches).unwrap_or_else(|| {
                let cache = Arc::new(Cache::of_at_most(self.most));
                caches.push((ordinal, cache.clone()));
                cache
            })
        });
        cache.get(key, make)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn many_ask_and_one_makes() {
        let (cache, made, start) = (Cache::of_at_most(10), AtomicUsize::new(0), Barrier::new(8));
        let ask = || {
            start.wait();
            let make = || {
                made.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
                Ok::<_, Infallible>("kernel")
            };
            cache.get(&7, make).unwrap()
        };
        let values: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(made.into_inner(), 1);
        assert!(values.iter().all(|value| Arc::ptr_eq(value, &values[0])));
    }

    #[test]
    fn a_failure_leaves_no_trace() {
        let cache = Cache::of_at_most(10);
        assert_eq!(cache.get(&1, || Err::<u32, _>("refused")), Err("refused"));
        assert!(cache.slots.read().is_empty());
        assert_eq!(cache.get(&1, || Ok::<_, &str>(5)), Ok(Arc::new(5)));
        assert_eq!(cache.get(&1, || Err("not asked")), Ok(Arc::new(5)));
    }

    #[test]
    fn others_do_not_wait() {
        let cache = Cache::of_at_most(10);
        let outer = cache.get(&1, || cache.get(&2, || Ok::<_, Infallible>(2)).map(|two| *two - 1));
        assert_eq!(outer, Ok(Arc::new(1)));
    }

    #[test]
    fn each_gpu_has_its_own() {
        static CACHE: PerGpu<u32, (usize, u32)> = PerGpu::new();
        for ordinal in [0, 3, 0] {
            for key in [1, 2] {
                let value = CACHE.get(ordinal, &key, || Ok::<_, Infallible>((ordinal, key)));
                assert_eq!(value, Ok(Arc::new((ordinal, key))));
                let again = CACHE.get(ordinal, &key, || Err("not asked"));
                assert_eq!(again, Ok(Arc::new((ordinal, key))));
            }
        }
        assert_eq!(CACHE.caches.read().len(), 2);
    }

    #[test]
    fn is_bounded_where_asked() {
        let cache = Cache::of_at_most(3);
        for key in 0..100 {
            assert_eq!(cache.get(&key, || Ok::<_, Infallible>(key)), Ok(Arc::new(key)));
            assert!(cache.slots.read().len() <= 3);
        }
    }
}
