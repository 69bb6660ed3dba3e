//! The ranks that an MPI launcher has started, for JavaScript: opened once in a process, then given to an engine.

use std::sync::Arc;

use arl_comm::{Group, World};
use napi::Env;
use napi::bindgen_prelude::{Object, Uint8Array};
use napi_derive::napi;

use crate::device::device_kind;
use crate::error::sync;
use crate::parts::config;
use crate::values::{EngineOptions, core_options};
use crate::worker::once;

/// Bytes that a rank sends to others in a step; figures come on top, a few hundred bytes a micro-batch.
#[napi(object)]
pub struct Traffic {
    /// Gradients, to those that sum them.
    pub gradients: f64,
    /// Sums of gradients, to all.
    pub sums: f64,
    /// Weights, to all: those that were updated, or with zero 3 those that a pass needs.
    pub weights: f64,
}

/// What rank `options.rank` sends in a step of `rounds` micro-batches a rank, from formulas.
#[napi]
pub fn plan_traffic(options: EngineOptions, rounds: u32) -> napi::Result<Traffic> {
    sync(|| {
        let config = config(&options)?;
        let (core, kind) = (core_options(&options)?, device_kind(&options.device)?);
        let sent = arl_engine::plan_traffic(&config, &core, kind, u64::from(rounds))?;
        Ok(Traffic { gradients: sent.gradients as f64, sums: sent.sums as f64, weights: sent.weights as f64 })
    })
}

/// All ranks, as MPI knows them.
#[napi]
pub struct Ranks {
    world: Arc<World>,
}

impl Ranks {
    /// The ranks as an engine takes them.
    pub(crate) fn group(&self) -> Box<dyn Group> {
        Box::new(Arc::clone(&self.world))
    }
}

#[napi]
impl Ranks {
    /// Opens the first of `libraries` that the system's loader can open, initialises MPI, and checks that it agrees with the
    /// launcher on `rank` and `world`. Resolves when all ranks have called it.
    #[napi(ts_return_type = "Promise<Ranks>")]
    pub fn open(
        env: &Env,
        libraries: Vec<String>,
        rank: u32,
        world: u32,
        launcher: String,
    ) -> napi::Result<Object<'_>> {
        once(
            env,
            "arl-mpi",
            move || World::open(&libraries, rank as usize, world as usize, &launcher),
            |world| Ranks { world },
        )
    }

    /// The library's version and file.
    #[napi]
    pub fn library(&self) -> String {
        self.world.library()
    }

    /// Resolves with the bytes of rank 0; all ranks pass equally many.
    #[napi(ts_return_type = "Promise<Uint8Array>")]
    pub fn broadcast<'env>(&self, env: &'env Env, bytes: Uint8Array) -> napi::Result<Object<'env>> {
        let (world, mut bytes) = (Arc::clone(&self.world), bytes.to_vec());
        let job = move || world.broadcast(0, &mut bytes).map(|()| bytes);
        once(env, "arl-mpi", job, Uint8Array::from)
    }

    /// For how many seconds a step has waited for other ranks; 0: it does not wait.
    #[napi]
    pub fn waiting(&self) -> f64 {
        self.world.waiting().map_or(0.0, |time| time.as_secs_f64())
    }

    /// Seconds that all calls have taken so far, waiting for other ranks included.
    #[napi]
    pub fn spent(&self) -> f64 {
        self.world.spent().as_secs_f64()
    }

    /// Ends every call that waits for another rank, and each later one, with `ARL_INTERRUPTED`.
    #[napi]
    pub fn fail(&self, reason: String) {
        self.world.fail(reason);
    }

    /// Ends MPI in this process. Resolves when all ranks have called it.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let world = Arc::clone(&self.world);
        once(env, "arl-mpi", move || world.finalize(), |()| ())
    }
}
