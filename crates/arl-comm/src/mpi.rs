//! The group of all ranks that an MPI launcher has started. Calls are non-blocking and polled, so that no thread is ever
//! stuck inside MPI: a rank that learns of another one's failure ends within the next poll.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arl_model::{Error, ErrorCode, Result};

use crate::Group;
use crate::abi::Handle;
use crate::library::Library;
use crate::watch::Watch;

/// Longest message in bytes. Bytes pass through memory that the group owns: where a call is abandoned, MPI may still write to
/// it, so it is never freed then.
const MESSAGE: usize = 16 << 20;

/// Polls without a pause between them, and the pause of those that follow: MPICH shares a core badly where it never sleeps.
const EAGER_POLLS: usize = 2_000;
const PAUSE: Duration = Duration::from_micros(100);

/// All ranks, as MPI knows them.
pub struct World {
    library: Library,
    version: String,
    rank: usize,
    size: usize,
    /// MPI_THREAD_SERIALIZED: one call at a time, from any thread.
    calls: Mutex<()>,
    watch: Arc<Watch>,
}

impl World {
    /// Opens the first of `libraries` that can be opened, initialises MPI, and checks that MPI and the launcher's environment
    /// agree on `rank` and `size`: another MPI than the launcher's makes every process rank 0 of 1. `launcher` names it in
    /// errors. To be called once in a process. Returns when all ranks have called it.
    pub fn open(libraries: &[String], rank: usize, size: usize, launcher: &str) -> Result<Arc<Self>> {
        let library = Library::open(libraries)?;
        let (functions, constants) = (library.functions, library.constants);
        let version = library.version();
        // Under Open MPI's launcher another library does not return from MPI_Init: it ends the process.
        if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() && !version.contains("Open MPI") {
            let found = format!("{version} ({}) is not Open MPI's library", library.file);
            return Err(of_another_launcher(format!("{launcher} has started rank {rank} of {size}, but {found}")));
        }
        let mut provided = 0;
        // SAFETY: no arguments of the program are passed, which MPI 2 and later allow; the result has a place.
        let code = unsafe {
            (functions.init_thread)(
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                constants.thread_serialized,
                &raw mut provided,
            )
        };
        library.check("MPI_Init_thread", code)?;
        // SAFETY: MPI is initialised, and both handles are the library's own.
        let code = unsafe { (functions.comm_set_errhandler)(constants.comm_world, constants.errors_return) };
        library.check("MPI_Comm_set_errhandler", code)?;
        let ask = |what: &str, call: unsafe extern "C" fn(Handle, *mut c_int) -> c_int| {
            let mut value = 0;
            // SAFETY: MPI is initialised, the handle is the library's own, and the result has a place.
            library.check(what, unsafe { call(constants.comm_world, &raw mut value) })?;
            Ok::<usize, Error>(usize::try_from(value).unwrap_or(usize::MAX))
        };
        let found = (ask("MPI_Comm_rank", functions.comm_rank)?, ask("MPI_Comm_size", functions.comm_size)?);
        if provided < constants.thread_serialized {
            let message = format!("{version} ({}) serves one thread only (level {provided})", library.file);
            return Err(Error::new(ErrorCode::Device, message).hint("use an MPI that was built with threads"));
        }
        if found != (rank, size) {
            let message = format!(
                "{launcher} has started rank {rank} of {size}, but {version} ({}) says that this is rank {} of {}",
                library.file, found.0, found.1
            );
            return Err(of_another_launcher(message));
        }
        Ok(Arc::new(World { library, version, rank, size, calls: Mutex::new(()), watch: Arc::new(Watch::new()) }))
    }

    /// The library's version and the name under which it was opened.
    pub fn library(&self) -> String {
        format!("{} ({})", self.version, self.library.file)
    }

    /// How the process sees, and ends, what waits for other ranks.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// Ends MPI in this process. Returns when all ranks have called it.
    pub fn finalize(&self) -> Result<()> {
        let _call = self.begin();
        // SAFETY: no call is in progress, and `finalize` is called once, as the last one.
        self.library.check("MPI_Finalize", unsafe { (self.library.functions.finalize)() })
    }

    fn begin(&self) -> MutexGuard<'_, ()> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for requests, and gives up where a rank has failed.
    fn poll(&self, requests: &mut [Handle]) -> Result<()> {
        let mut open: Vec<usize> = (0..requests.len()).collect();
        let mut polls = 0;
        loop {
            let mut still = Vec::with_capacity(open.len());
            for i in open {
                let mut done = 0;
                let status = std::ptr::without_provenance_mut(self.library.constants.status_ignore);
                // SAFETY: the request was returned by MPI and not completed before; the status is to be ignored.
                let code = unsafe { (self.library.functions.test)(&raw mut requests[i], &raw mut done, status) };
                self.library.check("MPI_Test", code)?;
                if done == 0 {
                    still.push(i);
                }
            }
            if still.is_empty() {
                return Ok(());
            }
            self.watch.check()?;
            open = still;
            polls += 1;
            if polls < EAGER_POLLS { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
        }
    }

    /// Runs `post`, which posts calls on the memory that it is given, of these lengths, and waits for them. Where that fails
    /// the memory is leaked, because MPI may still use it.
    fn with_memory(
        &self,
        mut memory: Vec<Vec<u8>>,
        post: impl FnOnce(&mut [Vec<u8>], &mut Vec<Handle>) -> Result<()>,
    ) -> Result<Vec<Vec<u8>>> {
        let mut requests = Vec::new();
        let call = || post(&mut memory, &mut requests).and_then(|()| self.poll(&mut requests));
        match self.watch.during(call) {
            Ok(()) => Ok(memory),
            Err(error) => {
                std::mem::forget((memory, requests));
                Err(error)
            }
        }
    }
}

fn of_another_launcher(message: String) -> Error {
    Error::new(ErrorCode::Device, message).hint(
        "the library does not belong to the launcher: start the ranks with that MPI's own mpirun, or name the launcher's \
         libmpi in ARL_MPI",
    )
}

/// A length as MPI takes it. Messages are at most [`MESSAGE`] long.
fn count(bytes: usize) -> c_int {
    c_int::try_from(bytes).unwrap_or(c_int::MAX)
}

/// Part `i` of `bytes`, cut into messages.
fn message(bytes: &[u8], i: usize) -> &[u8] {
    let start = bytes.len().min(i * MESSAGE);
    &bytes[start..bytes.len().min(start + MESSAGE)]
}

impl Group for Arc<World> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, sends: &[&[u8]], receives: &mut [Vec<u8>]) -> Result<()> {
        let _call = self.begin();
        let (functions, constants) = (&self.library.functions, self.library.constants);
        receives[self.rank].copy_from_slice(sends[self.rank]);
        let longest = sends.iter().map(|bytes| bytes.len()).chain(receives.iter().map(Vec::len)).max().unwrap_or(0);
        let peers: Vec<usize> = (0..self.size).filter(|&rank| rank != self.rank).collect();
        for i in 0..longest.div_ceil(MESSAGE) {
            let incoming = peers.iter().map(|&peer| vec![0; message(&receives[peer], i).len()]);
            let outgoing = peers.iter().map(|&peer| message(sends[peer], i).to_vec());
            let memory = incoming.chain(outgoing).collect();
            let memory = self.with_memory(memory, |memory, requests| {
                for (k, bytes) in memory.iter_mut().enumerate().filter(|(_, bytes)| !bytes.is_empty()) {
                    let peer = count(peers[k % peers.len()]);
                    requests.push(0);
                    let Some(request) = requests.last_mut() else { continue };
                    // SAFETY: `with_memory` keeps the bytes until MPI has completed the request, or for ever; the
                    // request has a place.
                    let code = unsafe {
                        if k < peers.len() {
                            let target = bytes.as_mut_ptr().cast();
                            let length = count(bytes.len());
                            (functions.irecv)(target, length, constants.byte, peer, 0, constants.comm_world, request)
                        } else {
                            let source = bytes.as_ptr().cast();
                            let length = count(bytes.len());
                            (functions.isend)(source, length, constants.byte, peer, 0, constants.comm_world, request)
                        }
                    };
                    self.library.check("sending to, or receiving from, another rank", code)?;
                }
                Ok(())
            })?;
            for (&peer, bytes) in peers.iter().zip(&memory) {
                let start = receives[peer].len().min(i * MESSAGE);
                receives[peer][start..start + bytes.len()].copy_from_slice(bytes);
            }
        }
        Ok(())
    }

    fn all_gather(&self, source: &[u8], target: &mut [u8]) -> Result<()> {
        let _call = self.begin();
        let (functions, constants) = (&self.library.functions, self.library.constants);
        assert_eq!(target.len(), self.size * source.len(), "the target of all_gather has another length");
        // As many bytes at a time as the gathered ones fit in a message.
        let part = (MESSAGE / self.size).max(1);
        for start in (0..source.len()).step_by(part) {
            let bytes = &source[start..source.len().min(start + part)];
            let length = bytes.len();
            let memory = vec![bytes.to_vec(), vec![0; self.size * length]];
            let memory = self.with_memory(memory, |memory, requests| {
                requests.push(0);
                let from = memory[0].as_ptr().cast();
                let to = memory[1].as_mut_ptr().cast();
                // SAFETY: as in `exchange`; the target has room for a part of every rank.
                let code = unsafe {
                    (functions.iallgather)(
                        from,
                        count(length),
                        constants.byte,
                        to,
                        count(length),
                        constants.byte,
                        constants.comm_world,
                        &raw mut requests[0],
                    )
                };
                self.library.check("gathering from all ranks", code)
            })?;
            for (rank, bytes) in memory[1].chunks_exact(length).enumerate() {
                let place = rank * source.len() + start;
                target[place..place + length].copy_from_slice(bytes);
            }
        }
        Ok(())
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        let _call = self.begin();
        let (functions, constants) = (&self.library.functions, self.library.constants);
        for bytes in buffer.chunks_mut(MESSAGE) {
            let memory = self.with_memory(vec![bytes.to_vec()], |memory, requests| {
                requests.push(0);
                let place = memory[0].as_mut_ptr().cast();
                // SAFETY: as in `exchange`.
                let code = unsafe {
                    (functions.ibcast)(
                        place,
                        count(bytes.len()),
                        constants.byte,
                        count(root),
                        constants.comm_world,
                        &raw mut requests[0],
                    )
                };
                self.library.check("broadcasting", code)
            })?;
            bytes.copy_from_slice(&memory[0]);
        }
        Ok(())
    }
}
