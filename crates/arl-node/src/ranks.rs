//! The ranks that a launcher has started, for JavaScript: those that an MPI knows, or that are connected to rank 0 by TCP; and
//! what their GPUs exchange with. Opened once in a process, then given to an engine.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arl_comm::{Gpus, Group, INSTALL_NCCL, Listener, Nccl, Star, Watch, World, with_gpus};
use arl_cuda_libraries::NCCL;
use arl_cuda_libraries::find::{Attempt, find};
use arl_cuda_libraries::places::{Machine, Surroundings, library_places};
use arl_model::{Error, ErrorCode, Result};
use napi::Env;
use napi::bindgen_prelude::{Object, Uint8Array};
use napi_derive::napi;

use crate::cuda::CudaAttempt;
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
    /// Updated weights, to those that keep the same ones in other replicas.
    pub replicas: f64,
    /// Activations and their gradients, to ranks that have other tokens, heads, experts or layers.
    pub tokens: f64,
}

/// What rank `options.rank` sends in a step of `rounds` micro-batches a rank, from formulas.
#[napi]
pub fn plan_traffic(options: EngineOptions, rounds: u32) -> napi::Result<Traffic> {
    sync(|| {
        let config = config(&options)?;
        let (core, kind) = (core_options(&options)?, device_kind(&options.device)?);
        let sent = arl_engine::plan_traffic(&config, &core, kind, u64::from(rounds))?;
        Ok(Traffic {
            gradients: sent.gradients as f64,
            sums: sent.sums as f64,
            weights: sent.weights as f64,
            replicas: sent.replicas as f64,
            tokens: sent.tokens as f64,
        })
    })
}

/// What the ranks of this process are connected by.
enum Link {
    Mpi(Arc<World>),
    Tcp(Arc<Star>),
}

/// All ranks.
#[napi]
pub struct Ranks {
    link: Link,
    watch: Arc<Watch>,
}

impl Ranks {
    fn over_mpi(world: Arc<World>) -> Self {
        Ranks { watch: Arc::clone(world.watch()), link: Link::Mpi(world) }
    }

    fn over_tcp(star: Star) -> Self {
        Ranks { watch: Arc::clone(star.watch()), link: Link::Tcp(Arc::new(star)) }
    }

    /// The ranks as an engine takes them; `id`: that of their GPUs' communicator.
    pub(crate) fn group(&self, id: Option<&[u8]>) -> Result<Box<dyn Group>> {
        let host: Box<dyn Group> = match &self.link {
            Link::Mpi(world) => Box::new(Arc::clone(world)),
            Link::Tcp(star) => Box::new(Arc::clone(star)),
        };
        let Some(id) = id else { return Ok(host) };
        let wrong = |_| Error::new(ErrorCode::Internal, format!("an id of {} bytes", id.len()));
        let id = id.try_into().map_err(wrong)?;
        Ok(with_gpus(host, Gpus { nccl: nccl()?, id, watch: Arc::clone(&self.watch) }))
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
        let open = move || World::open(&libraries, rank as usize, world as usize, &launcher);
        once(env, "arl-mpi", open, Ranks::over_mpi)
    }

    /// Connects to rank 0, whose `RankListener` is on a port of one of `hosts`.
    #[napi(ts_return_type = "Promise<Ranks>")]
    pub fn connect(
        env: &Env,
        hosts: Vec<String>,
        port: u16,
        token: String,
        rank: u32,
        world: u32,
    ) -> napi::Result<Object<'_>> {
        let connect = move || Star::connect(&hosts, port, &token, rank as usize, world as usize);
        once(env, "arl-ranks", connect, Ranks::over_tcp)
    }

    /// MPI's version and file; of ranks over TCP: that.
    #[napi]
    pub fn library(&self) -> String {
        match &self.link {
            Link::Mpi(world) => world.library(),
            Link::Tcp(_) => "TCP".into(),
        }
    }

    /// Resolves with the bytes of rank 0; all ranks pass equally many.
    #[napi(ts_return_type = "Promise<Uint8Array>")]
    pub fn broadcast<'env>(&self, env: &'env Env, bytes: Uint8Array) -> napi::Result<Object<'env>> {
        let (group, mut bytes) = (sync(|| self.group(None))?, bytes.to_vec());
        let job = move || group.broadcast(0, &mut bytes).map(|()| bytes);
        once(env, "arl-ranks", job, Uint8Array::from)
    }

    /// For how many seconds a step has waited for other ranks; 0: it does not wait.
    #[napi]
    pub fn waiting(&self) -> f64 {
        self.watch.waiting().map_or(0.0, |time| time.as_secs_f64())
    }

    /// Seconds that all calls have taken so far, waiting for other ranks included.
    #[napi]
    pub fn spent(&self) -> f64 {
        self.watch.spent().as_secs_f64()
    }

    /// Ends every call that waits for another rank, and each later one, with `ARL_INTERRUPTED`.
    #[napi]
    pub fn fail(&self, reason: String) {
        self.watch.fail(reason);
    }

    /// Ends MPI in this process, and resolves when all ranks have called it; over TCP there is nothing to end.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let world = match &self.link {
            Link::Mpi(world) => Some(Arc::clone(world)),
            Link::Tcp(_) => None,
        };
        once(env, "arl-mpi", move || world.map_or(Ok(()), |world| world.finalize()), |()| ())
    }
}

/// Where rank 0 waits for the other ranks' connections.
#[napi]
pub struct RankListener {
    listener: Mutex<Option<Listener>>,
    port: u16,
}

#[napi]
impl RankListener {
    /// Listens for `world - 1` ranks that know the token.
    #[napi]
    pub fn open(world: u32, token: String) -> napi::Result<RankListener> {
        sync(|| {
            let listener = Listener::open(world as usize, token)?;
            Ok(RankListener { port: listener.port()?, listener: Mutex::new(Some(listener)) })
        })
    }

    /// The port.
    #[napi]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Resolves with the ranks when all are connected, within so many seconds. To be called once.
    #[napi(ts_return_type = "Promise<Ranks>")]
    pub fn accept<'env>(&self, env: &'env Env, seconds: f64) -> napi::Result<Object<'env>> {
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        let accept = move || {
            let listener = listener.ok_or_else(|| Error::new(ErrorCode::Internal, "the listener is used up"))?;
            listener.accept(Duration::from_secs_f64(seconds))
        };
        once(env, "arl-ranks", accept, Ranks::over_tcp)
    }
}

/// What there is of NCCL.
#[napi(object)]
pub struct NcclReport {
    /// Version and file; absent: none can be used.
    pub found: Option<String>,
    /// What was tried before.
    pub tried: Vec<CudaAttempt>,
    /// How to get it.
    pub hint: String,
}

/// Opens NCCL in this process, if it can. Never throws because it is missing.
#[napi]
pub fn nccl_report() -> NcclReport {
    let (found, tried) = open_nccl();
    let tried = tried.into_iter().map(|attempt| CudaAttempt { at: attempt.at, why: attempt.why }).collect();
    NcclReport { found: found.map(|nccl| nccl.text()), tried, hint: INSTALL_NCCL.into() }
}

/// A new id of a communicator of GPUs, for all its ranks. Throws `ARL_DEVICE` where there is no NCCL.
#[napi]
pub fn nccl_id() -> napi::Result<Uint8Array> {
    sync(|| Ok(Uint8Array::from(nccl()?.unique_id()?.to_vec())))
}

/// The library that `ARL_NCCL` names, else the first that opens where CUDA's libraries may be. One that was opened stays.
fn open_nccl() -> (Option<Arc<Nccl>>, Vec<Attempt>) {
    static OPENED: Mutex<Option<Arc<Nccl>>> = Mutex::new(None);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if opened.is_some() {
        return (opened.clone(), Vec::new());
    }
    let (found, tried) = match Machine.variable("ARL_NCCL") {
        Some(file) => match Nccl::open(Path::new(&file)) {
            Ok(nccl) => (Some(nccl), Vec::new()),
            Err(why) => (None, vec![Attempt { at: file, why }]),
        },
        None => {
            let none: [PathBuf; 0] = [];
            let search = find(NCCL.soname, &library_places(&Machine, &none), &Machine, Nccl::open);
            (search.opened, search.tried)
        }
    };
    opened.clone_from(&found);
    (found, tried)
}

fn nccl() -> Result<Arc<Nccl>> {
    let (found, tried) = open_nccl();
    found.ok_or_else(|| {
        let failed = tried.iter().filter(|attempt| attempt.why != arl_cuda_libraries::find::NOT_THERE);
        let reasons: Vec<String> = failed.map(|attempt| format!("; {}: {}", attempt.at, attempt.why)).collect();
        let message = format!("several GPUs need NCCL (libnccl.so.2), and there is none{}", reasons.concat());
        Error::new(ErrorCode::Device, message).hint(INSTALL_NCCL)
    })
}
