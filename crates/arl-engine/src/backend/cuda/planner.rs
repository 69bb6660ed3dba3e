//! Plans that are made on threads of their own: each begins as soon as its key is known, and is waited for where it is used.

use std::any::Any;
use std::collections::HashMap;
use std::hash::Hash;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What becomes of a key; the reason, in a sentence, where there is no plan.
pub(super) type Made<P> = Result<P, String>;

/// Makes plans on one thread, with what that thread opened for it.
pub(super) type Maker<K, P> = Box<dyn FnMut(&K) -> Made<P>>;

/// Plans by their keys, each made once.
pub(super) struct Planner<K, P> {
    /// `None`: on its way.
    plans: HashMap<K, Option<Made<P>>>,
    /// `None` while it is dropped.
    wanted: Option<Sender<K>>,
    made: Receiver<(K, Made<P>)>,
    threads: Vec<JoinHandle<()>>,
    /// Plans that nobody waits for any more are not begun.
    closed: Arc<AtomicBool>,
}

impl<K: Clone + Eq + Hash + Send + 'static, P: Send + 'static> Planner<K, P> {
    /// Starts `count` threads, each of which makes plans with what `open` gives it there. Fails where the system has no
    /// more threads.
    pub(super) fn start(count: usize, open: impl Fn() -> Maker<K, P> + Send + Clone + 'static) -> Result<Self, String> {
        let (wanted, keys) = channel::<K>();
        let (made, results) = channel();
        let (keys, closed) = (Arc::new(Mutex::new(keys)), Arc::new(AtomicBool::new(false)));
        let mut planner = Planner {
            plans: HashMap::new(),
            wanted: Some(wanted),
            made: results,
            threads: Vec::new(),
            closed: Arc::clone(&closed),
        };
        for _ in 0..count.max(1) {
            let (open, keys, made, closed) = (open.clone(), Arc::clone(&keys), made.clone(), Arc::clone(&closed));
            let work = move || {
                let mut make = open();
                loop {
                    let key = keys.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(key) = key else { return };
                    if closed.load(Ordering::Relaxed) {
                        return;
                    }
                    let plan = catch_unwind(AssertUnwindSafe(|| make(&key))).unwrap_or_else(|panic| Err(text(&*panic)));
                    if made.send((key, plan)).is_err() {
                        return;
                    }
                }
            };
            let thread = std::thread::Builder::new().name("arl-plans".into()).spawn(work);
            planner.threads.push(thread.map_err(|error| format!("no thread to make plans on: {error}"))?);
        }
        Ok(planner)
    }

    /// Has the plan of a key made, unless that was asked before. Does not wait.
    pub(super) fn expect(&mut self, key: &K) {
        if let (Some(wanted), false) = (&self.wanted, self.plans.contains_key(key)) {
            let sent = wanted.send(key.clone());
            self.plans.insert(key.clone(), sent.err().map(|_| Err(ENDED.into())));
        }
    }

    /// The plan of a key; waits for it where it is on its way.
    pub(super) fn get(&mut self, key: &K) -> Result<&P, &String> {
        self.expect(key);
        while let Some(None) = self.plans.get(key) {
            match self.made.recv() {
                Ok((other, plan)) => drop(self.plans.insert(other, Some(plan))),
                Err(_) => drop(self.plans.insert(key.clone(), Some(Err(ENDED.into())))),
            }
        }
        match self.plans.get(key) {
            Some(Some(made)) => made.as_ref(),
            _ => unreachable!("waited for above"),
        }
    }

    /// The plan of a key that was waited for before.
    pub(super) fn made_before(&self, key: &K) -> Option<Result<&P, &String>> {
        self.plans.get(key)?.as_ref().map(Result::as_ref)
    }
}

const ENDED: &str = "the threads that make plans have ended";

/// What a thread panicked with.
fn text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "making the plan panicked".into())
}

impl<K, P> Drop for Planner<K, P> {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        self.wanted = None;
        // What the plans were made with ends with its thread, after the plans.
        self.plans.clear();
        while self.made.try_recv().is_ok() {}
        for thread in self.threads.drain(..) {
            // A panic was reported as a plan's reason.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn plans_are_made_once_each_concurrently_and_kept_with_their_reasons() {
        // Both plans are begun before either is done.
        let (begun, first) = channel();
        let gate = Arc::new(std::sync::Barrier::new(3));
        let open = {
            let gate = Arc::clone(&gate);
            move || -> Maker<u32, u32> {
                let (begun, gate) = (begun.clone(), Arc::clone(&gate));
                Box::new(move |key| {
                    begun.send(*key).unwrap();
                    if *key < 2 {
                        gate.wait();
                    }
                    match key {
                        7 => Err("no plan".into()),
                        8 => panic!("a defect"),
                        _ => Ok(10 * key),
                    }
                })
            }
        };
        let mut planner = Planner::start(2, open).unwrap();
        for key in [0, 1, 0, 1] {
            planner.expect(&key);
        }
        let mut keys = [first.recv().unwrap(), first.recv().unwrap()];
        keys.sort_unstable();
        assert_eq!(keys, [0, 1]);
        assert!(planner.made_before(&0).is_none());
        gate.wait();
        assert_eq!(planner.get(&1), Ok(&10));
        assert_eq!(planner.get(&0), Ok(&0));
        for _ in 0..2 {
            assert_eq!(planner.get(&7), Err(&"no plan".to_string()));
            assert_eq!(planner.get(&8), Err(&"a defect".to_string()));
            assert_eq!(planner.get(&3), Ok(&30));
        }
        assert_eq!(planner.made_before(&3), Some(Ok(&30)));
        let mut made: Vec<u32> = first.try_iter().collect();
        made.sort_unstable();
        assert_eq!(made, [3, 7, 8]);
    }

    #[test]
    fn a_planner_that_is_dropped_begins_no_further_plan_and_outlives_none_of_its_threads() {
        let (begun, first) = sync_channel(100);
        let alive = Arc::new(());
        let open = {
            let alive = Arc::clone(&alive);
            move || -> Maker<u32, u32> {
                let (begun, alive) = (begun.clone(), Arc::clone(&alive));
                Box::new(move |key| {
                    let _ = &alive;
                    begun.send(*key).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    Ok(*key)
                })
            }
        };
        let mut planner = Planner::start(1, open).unwrap();
        (0..50).for_each(|key| planner.expect(&key));
        first.recv().unwrap();
        drop(planner);
        assert!(first.try_iter().count() < 49);
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}
