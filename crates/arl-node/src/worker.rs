//! A thread that owns a state and works on it, one job after the other, on its own pool of compute threads. JavaScript
//! gets a promise a job, so that its event loop never waits. A job may leave a wait behind, during which others run.
//! Knows nothing of what the state is. Jobs without a state run on a thread of their own, or on one a core.

use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use arl_model::{Error, ErrorCode, Result};
use napi::bindgen_prelude::{Object, ToNapiValue};
use napi::{Env, JsDeferred};

use crate::error::{guard, to_napi};

/// A job's continuation: polls for completion, or blocks if asked to.
type Wait<S> = Box<dyn FnMut(&mut S, bool) -> bool + Send>;
type Job<S> = Box<dyn FnOnce(&mut S) -> Option<Wait<S>> + Send>;
type Resolver<R> = Box<dyn FnOnce(Env) -> napi::Result<R>>;
type Settle<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// A promise, and the function that settles it from any thread: what a job computed is turned into a value of
/// JavaScript on JavaScript's own thread.
fn promise<'env, T, R>(
    env: &'env Env,
    into: impl FnOnce(T) -> R + Send + 'static,
) -> napi::Result<(Settle<T>, Object<'env>)>
where
    T: Send + 'static,
    R: ToNapiValue + 'static,
{
    let (deferred, promise): (JsDeferred<R, Resolver<R>>, _) = env.create_deferred()?;
    let settle = move |result: Result<T>| match result {
        Ok(value) => deferred.resolve(Box::new(move |_| Ok(into(value)))),
        Err(error) => deferred.reject(to_napi(&error)),
    };
    Ok((Box::new(settle), promise))
}

/// Runs one job on a thread of its own.
pub(crate) fn once<'env, T, R>(
    env: &'env Env,
    name: &str,
    job: impl FnOnce() -> Result<T> + Send + 'static,
    into: impl FnOnce(T) -> R + Send + 'static,
) -> napi::Result<Object<'env>>
where
    T: Send + 'static,
    R: ToNapiValue + 'static,
{
    let (settle, promise) = promise(env, into)?;
    spawn(name, move || settle(guard(job)))?;
    Ok(promise)
}

/// Runs one job on a pool that has a thread a core, for many jobs that come at once: in their order, as many at a time. A
/// job must not use rayon, because a thread that waits for a part of its own job would begin another one.
pub(crate) fn pooled<'env, T, R>(
    env: &'env Env,
    job: impl FnOnce() -> Result<T> + Send + 'static,
    into: impl FnOnce(T) -> R + Send + 'static,
) -> napi::Result<Object<'env>>
where
    T: Send + 'static,
    R: ToNapiValue + 'static,
{
    static POOL: OnceLock<std::result::Result<rayon::ThreadPool, String>> = OnceLock::new();
    let start = || rayon::ThreadPoolBuilder::new().thread_name(|i| format!("arl-pool-{i}")).build();
    let pool = POOL.get_or_init(|| start().map_err(|error| error.to_string())).as_ref().map_err(|error| {
        to_napi(&Error::new(ErrorCode::Oom, format!("the operating system gives no further thread: {error}")))
    })?;
    let (settle, promise) = promise(env, into)?;
    pool.spawn_fifo(move || settle(guard(job)));
    Ok(promise)
}

/// How often what a job waits for is looked at while there is no other job.
const LOOK: Duration = Duration::from_micros(200);

/// Does all jobs, until nobody can send any more.
fn work<S>(state: &mut S, inbox: &mpsc::Receiver<Job<S>>) {
    let mut waits: Vec<Wait<S>> = Vec::new();
    loop {
        let next = match waits.is_empty() {
            true => inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            false => inbox.recv_timeout(LOOK),
        };
        let last = matches!(next, Err(mpsc::RecvTimeoutError::Disconnected));
        if let Ok(job) = next {
            waits.extend(job(state));
        }
        waits.retain_mut(|wait| !wait(state, last));
        if last {
            return;
        }
    }
}

fn spawn(name: &str, job: impl FnOnce() + Send + 'static) -> napi::Result<()> {
    std::thread::Builder::new().name(name.to_string()).spawn(job).map(drop).map_err(|error| {
        to_napi(&Error::new(ErrorCode::Oom, format!("the operating system gives no further thread: {error}")))
    })
}

/// The sending end of a working thread. The thread ends when this is dropped or closed.
pub(crate) struct Worker<S> {
    jobs: mpsc::Sender<Job<S>>,
}

impl<S: 'static> Worker<S> {
    /// Starts the thread; `open` makes the state there, within a pool of `threads` compute threads (0: one a core).
    /// The promise resolves with what `into` makes of the running worker.
    pub(crate) fn start<'env, T, R>(
        env: &'env Env,
        name: &str,
        threads: usize,
        open: impl FnOnce() -> Result<(S, T)> + Send + 'static,
        into: impl FnOnce(Worker<S>, T) -> R + Send + 'static,
    ) -> napi::Result<Object<'env>>
    where
        T: Send + 'static,
        R: ToNapiValue + 'static,
    {
        let (jobs, inbox) = mpsc::channel::<Job<S>>();
        let (settle, promise) = promise(env, move |found| into(Worker { jobs }, found))?;
        let thread_name = name.to_string();
        spawn(name, move || {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(move |i| format!("{thread_name}-{i}"))
                .build();
            let pool = match pool {
                Ok(pool) => pool,
                Err(error) => {
                    settle(Err(Error::new(ErrorCode::Oom, format!("cannot start the compute threads: {error}"))));
                    return;
                }
            };
            // The whole loop runs inside the pool, so that no leaf of a step pays for a change of threads.
            pool.install(move || {
                let mut state = match guard(open) {
                    Ok((state, found)) => {
                        settle(Ok(found));
                        state
                    }
                    Err(error) => {
                        settle(Err(error));
                        return;
                    }
                };
                work(&mut state, &inbox);
            });
        })?;
        Ok(promise)
    }

    /// Queues a job and returns its promise.
    pub(crate) fn submit<'env, T, R>(
        &self,
        env: &'env Env,
        job: impl FnOnce(&mut S) -> Result<T> + Send + 'static,
        into: impl FnOnce(T) -> R + Send + 'static,
    ) -> napi::Result<Object<'env>>
    where
        T: Send + 'static,
        R: ToNapiValue + 'static,
    {
        let (settle, promise) = promise(env, into)?;
        self.send(Box::new(move |state| {
            settle(guard(|| job(state)));
            None
        }))?;
        Ok(promise)
    }

    /// Queues a job that ends in a wait: `begin` starts it, `ready` looks whether `end` would not wait any more, and until
    /// then other jobs run.
    pub(crate) fn submit_waiting<'env, T, R>(
        &self,
        env: &'env Env,
        begin: impl FnOnce(&mut S) -> Result<()> + Send + 'static,
        ready: impl Fn(&mut S) -> bool + Send + 'static,
        end: impl FnOnce(&mut S) -> Result<T> + Send + 'static,
        into: impl FnOnce(T) -> R + Send + 'static,
    ) -> napi::Result<Object<'env>>
    where
        T: Send + 'static,
        R: ToNapiValue + 'static,
    {
        let (settle, promise) = promise(env, into)?;
        self.send(Box::new(move |state| {
            if let Err(error) = guard(|| begin(state)) {
                settle(Err(error));
                return None;
            }
            let mut rest = Some((end, settle));
            Some(Box::new(move |state, wait| {
                if (wait || ready(state))
                    && let Some((end, settle)) = rest.take()
                {
                    settle(guard(|| end(state)));
                }
                rest.is_none()
            }))
        }))?;
        Ok(promise)
    }

    fn send(&self, job: Job<S>) -> napi::Result<()> {
        self.jobs.send(job).map_err(|_| to_napi(&Error::new(ErrorCode::Internal, "the engine's thread has ended")))
    }
}
