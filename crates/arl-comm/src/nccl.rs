//! NCCL: moves bytes between GPUs, in the order of a stream. It is opened at run time. Only bytes are moved; sums are made
//! where they have an order. Calls return at once and are polled, so that no thread is ever stuck in one: a rank that learns
//! of another one's failure aborts what is queued.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arl_model::{Error, ErrorCode, Result};

use crate::loader::Opened;
use crate::nccl_abi::{
    Config, Functions, Handle, ID_BYTES, IN_PROGRESS, LEAST_VERSION, SUCCESS, UINT8, UniqueId, version_text,
};
use crate::watch::Watch;

/// How long all ranks have to come together, once each has opened its GPU.
const INIT_TIME: Duration = Duration::from_secs(120);

/// Polls without a pause between them, and the pause of those that follow.
const EAGER_POLLS: usize = 2_000;
const PAUSE: Duration = Duration::from_micros(100);

/// How to get the library.
pub const INSTALL_NCCL: &str = "run `arl cuda install`, or `pip install nvidia-nccl-cu13`, or name a libnccl.so.2 in ARL_NCCL; `arl doctor` shows what is found";

/// The library, open for the life of the process.
pub struct Nccl {
    functions: Functions,
    version: c_int,
    file: String,
}

impl Nccl {
    /// Opens the library at a path, or by the name under which the system's loader finds it. Fails with what is wrong with it;
    /// a version that is too old is named, with the one that is needed.
    pub fn open(file: &Path) -> std::result::Result<Arc<Self>, String> {
        let name = file.display().to_string();
        let opened = Opened::open_alone(&name)?;
        let symbol = |name: &'static CStr| opened.symbol(name);
        let functions = Functions::find(symbol).map_err(|name| format!("it has no {}", name.to_string_lossy()))?;
        let mut version = 0;
        // SAFETY: the result has a place; the function may be called at any time.
        let code = unsafe { (functions.get_version)(&raw mut version) };
        if code != SUCCESS || version < LEAST_VERSION {
            let (has, needs) = (version_text(version), version_text(LEAST_VERSION));
            return Err(format!("it is NCCL {has}, and {needs} or newer is needed"));
        }
        Ok(Arc::new(Nccl { functions, version, file: name }))
    }

    /// The version and the file: `NCCL 2.30.7 (libnccl.so.2)`.
    pub fn text(&self) -> String {
        format!("NCCL {} ({})", version_text(self.version), self.file)
    }

    /// A new id, which all ranks of one communicator share. The process that makes it lives as long as that is being made.
    pub fn unique_id(&self) -> Result<[u8; ID_BYTES]> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: the result has a place.
        self.check("ncclGetUniqueId", std::ptr::null_mut(), unsafe { (self.functions.get_unique_id)(&raw mut id) })?;
        Ok(id.0)
    }

    /// An error where `code` is one, in NCCL's words.
    fn check(&self, what: &str, handle: Handle, code: c_int) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both give null or a C string that the library keeps; the handle is one of its own, or null.
        let [meaning, last] = unsafe {
            [(self.functions.get_error_string)(code), (self.functions.get_last_error)(handle)].map(|text| words(text))
        };
        let detail = if last.is_empty() { String::new() } else { format!(": {last}") };
        let message = format!("{what} failed: {meaning}{detail} ({})", self.text());
        Err(Error::new(ErrorCode::Device, message).hint(
            "look for a rank, a host or a network connection that failed; NCCL_DEBUG=INFO has NCCL report what it does",
        ))
    }
}

/// A text of the library, on one line.
///
/// # Safety
/// `text` is null or a C string that is valid during the call.
unsafe fn words(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller vouches.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What ranks need to make a communicator: each opens its GPU first, then all make it at once.
#[derive(Clone)]
pub struct Gpus {
    /// The library.
    pub nccl: Arc<Nccl>,
    /// The same on every rank.
    pub id: [u8; ID_BYTES],
    /// How the process sees, and ends, what waits for other ranks.
    pub watch: Arc<Watch>,
}

/// Memory of a device, by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The first byte.
    pub address: u64,
    /// Bytes.
    pub bytes: usize,
}

impl Place {
    fn pointer(self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(usize::try_from(self.address).unwrap_or(usize::MAX))
    }
}

/// What ranks do with places in their devices' memory.
#[derive(Clone, Debug)]
pub enum Collective<P = Place> {
    /// `target` becomes the `source` of every rank, in their order; all are equally long. `source` may be its own place there.
    AllGather {
        /// This rank's.
        source: P,
        /// Every rank's.
        target: P,
    },
    /// Sends each of `sends` to a rank, and fills each of `receives` by what one sends. Those of a pair are in one order and
    /// equally long on both sides; none is of a rank to itself.
    Exchange {
        /// To whom, and what.
        sends: Vec<(usize, P)>,
        /// From whom, and where to.
        receives: Vec<(usize, P)>,
    },
    /// Gives every rank the bytes of one; all places are equally long.
    Broadcast {
        /// The one.
        root: usize,
        /// What it has, and where the others get it.
        place: P,
    },
}

impl<P: Copy> Collective<P> {
    /// The same with other names of the places.
    pub fn map<Q>(&self, place: impl Fn(P) -> Q) -> Collective<Q> {
        let list = |all: &[(usize, P)]| all.iter().map(|&(rank, one)| (rank, place(one))).collect();
        match self {
            Collective::AllGather { source, target } => {
                Collective::AllGather { source: place(*source), target: place(*target) }
            }
            Collective::Exchange { sends, receives } => {
                Collective::Exchange { sends: list(sends), receives: list(receives) }
            }
            Collective::Broadcast { root, place: one } => Collective::Broadcast { root: *root, place: place(*one) },
        }
    }

    /// What is read, and what is written.
    pub fn uses(&self) -> (Vec<P>, Vec<P>) {
        let list = |all: &[(usize, P)]| all.iter().map(|&(_, place)| place).collect();
        match self {
            Collective::AllGather { source, target } => (vec![*source], vec![*target]),
            Collective::Exchange { sends, receives } => (list(sends), list(receives)),
            Collective::Broadcast { place, .. } => (vec![*place], vec![*place]),
        }
    }
}

/// Ranks with a device each. One thread uses it, in whose context the device is.
pub struct Communicator {
    gpus: Gpus,
    handle: Option<NonNull<c_void>>,
    size: usize,
}

// SAFETY: NCCL's communicators may be used from any thread, one at a time; nothing here is shared but through `&mut self`, or
// by calls that NCCL allows at any time.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Makes it, together with the other ranks; the device is the current one of this thread. Fails where one has failed, and
    /// where not all have come after two minutes.
    pub fn new(gpus: Gpus, rank: usize, size: usize) -> Result<Self> {
        let mut handle: Handle = std::ptr::null_mut();
        let mut config = Config::not_blocking();
        let (ranks, number) = (int(size), int(rank));
        let Gpus { nccl, watch, .. } = &gpus;
        // SAFETY: the handle has a place that is filled before the call returns, the id was made by NCCL, and the
        // configuration is read within the call.
        let code =
            unsafe { (nccl.functions.init_rank)(&raw mut handle, ranks, UniqueId(gpus.id), number, &raw mut config) };
        nccl.check("ncclCommInitRankConfig", handle, code)?;
        let watch = Arc::clone(watch);
        let mut communicator = Communicator { handle: NonNull::new(handle), gpus, size };
        let begun = Instant::now();
        let made = watch.during(|| {
            communicator.settle("making NCCL's communicator", || {
                if begun.elapsed() < INIT_TIME {
                    return Ok(());
                }
                let message = format!("rank {rank} has waited {} s for the other ranks' GPUs", INIT_TIME.as_secs());
                Err(Error::new(ErrorCode::Device, message).hint("look for a rank that did not open its GPU"))
            })
        });
        if let Err(error) = made {
            communicator.abort();
            return Err(error);
        }
        Ok(communicator)
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// How the process sees, and ends, what waits for other ranks.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.gpus.watch
    }

    /// Queues a collective on a stream: a `cudaStream_t`, or null for a device that has none. Places must live until it is
    /// done. After a failure nothing can be queued any more.
    ///
    /// # Safety
    /// Every place is within the device's memory, and the stream is one of the device's.
    pub unsafe fn queue(&mut self, collective: &Collective, stream: *mut c_void) -> Result<()> {
        let result = self.queue_calls(collective, stream);
        if result.is_err() {
            self.abort();
        }
        result
    }

    fn queue_calls(&mut self, collective: &Collective, stream: *mut c_void) -> Result<()> {
        self.gpus.watch.check()?;
        let (functions, handle) = (self.gpus.nccl.functions, self.handle()?);
        match collective {
            Collective::AllGather { source, target } => {
                if target.bytes != source.bytes * self.size {
                    return Err(unlike(format!("{source:?} of {} ranks in {target:?}", self.size)));
                }
                // SAFETY: the places are as the caller of `queue` vouches, and as long as just checked.
                let code = unsafe {
                    (functions.all_gather)(source.pointer(), target.pointer(), source.bytes, UINT8, handle, stream)
                };
                self.queued("ncclAllGather", code)
            }
            Collective::Broadcast { root, place } => {
                let (pointer, root) = (place.pointer(), int(*root));
                // SAFETY: as above.
                let code = unsafe { (functions.broadcast)(pointer, pointer, place.bytes, UINT8, root, handle, stream) };
                self.queued("ncclBroadcast", code)
            }
            Collective::Exchange { sends, receives } => {
                // SAFETY: no arguments.
                self.gpus.nccl.check("ncclGroupStart", handle, unsafe { (functions.group_start)() })?;
                let mut result = Ok(());
                for (peer, place) in sends.iter().filter(|(_, place)| place.bytes > 0) {
                    // SAFETY: as above.
                    let code =
                        unsafe { (functions.send)(place.pointer(), place.bytes, UINT8, int(*peer), handle, stream) };
                    result = result.and(self.gpus.nccl.check("ncclSend", handle, code));
                }
                for (peer, place) in receives.iter().filter(|(_, place)| place.bytes > 0) {
                    // SAFETY: as above.
                    let code =
                        unsafe { (functions.receive)(place.pointer(), place.bytes, UINT8, int(*peer), handle, stream) };
                    result = result.and(self.gpus.nccl.check("ncclRecv", handle, code));
                }
                // A group that was begun is ended, whatever failed within it.
                // SAFETY: no arguments.
                let code = unsafe { (functions.group_end)() };
                result?;
                self.queued("sending to, and receiving from, other ranks", code)
            }
        }
    }

    /// Fails where a rank has failed, or NCCL; then everything that was queued is aborted, and the stream comes to its end. To
    /// be polled by the caller that waits for the stream.
    pub fn poll(&mut self) -> Result<()> {
        let result = self.gpus.watch.check().and_then(|()| self.state().map(|_| ()));
        if result.is_err() {
            self.abort();
        }
        result
    }

    fn handle(&self) -> Result<Handle> {
        match self.handle {
            Some(handle) => Ok(handle.as_ptr()),
            None => {
                Err(Error::new(ErrorCode::Interrupted, "the ranks' GPUs exchange nothing any more after a failure"))
            }
        }
    }

    /// Waits until a call that was accepted is queued.
    fn queued(&mut self, what: &str, code: c_int) -> Result<()> {
        self.gpus.nccl.check(what, self.handle()?, code)?;
        if code == IN_PROGRESS { self.settle(what, || Ok(())) } else { Ok(()) }
    }

    /// Waits until no call is in progress on the host.
    fn settle(&self, what: &str, more: impl Fn() -> Result<()>) -> Result<()> {
        let mut polls = 0;
        while self.state().map_err(|error| Error { message: format!("{what}: {}", error.message), ..error })? {
            self.gpus.watch.check()?;
            more()?;
            polls += 1;
            if polls < EAGER_POLLS { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
        }
        Ok(())
    }

    /// Whether a call is in progress on the host.
    fn state(&self) -> Result<bool> {
        let handle = self.handle()?;
        let (nccl, mut state) = (&self.gpus.nccl, SUCCESS);
        // SAFETY: the handle is one of the library's own that is not destroyed, and the result has a place.
        let code = unsafe { (nccl.functions.get_async_error)(handle, &raw mut state) };
        nccl.check("ncclCommGetAsyncError", handle, code)?;
        nccl.check("a collective", handle, state)?;
        Ok(state == IN_PROGRESS)
    }

    /// Aborts everything that was queued, so that the stream comes to its end; nothing can be queued any more.
    pub fn abort(&mut self) {
        if let Some(handle) = self.handle.take() {
            // SAFETY: a communicator of the library's own, which is not used any more. No caller is left to report to.
            let _ = unsafe { (self.gpus.nccl.functions.abort)(handle.as_ptr()) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Where a rank has failed, the others do not come to an orderly end.
        if self.gpus.watch.check().is_err() {
            self.abort();
        }
        if let Some(handle) = self.handle.take() {
            // SAFETY: as in `abort`; nothing is queued any more that a caller waits for.
            let _ = unsafe { (self.gpus.nccl.functions.destroy)(handle.as_ptr()) };
        }
    }
}

fn unlike(what: String) -> Error {
    Error::new(ErrorCode::Internal, format!("a collective of unlike lengths: {what}"))
}

fn int(number: usize) -> c_int {
    c_int::try_from(number).unwrap_or(c_int::MAX)
}
