//! Ranks: processes that train one model together. A [`Group`] moves bytes between them and computes nothing; every sum is
//! made here or in the engine, in the order of the ranks, so that results are equal in bits whatever moves the bytes.
//! Knows nothing of models, rows or launchers.

mod abi;
mod alone;
mod groups;
mod library;
mod loader;
mod local;
mod mpi;
mod nccl;
mod nccl_abi;
mod part;
mod star;
mod sums;
mod watch;

pub use alone::Alone;
pub use groups::Groups;
pub use local::local_groups;
pub use mpi::World;
pub use nccl::{Collective, Communicator, Gpus, INSTALL_NCCL, Nccl, Place};
pub use nccl_abi::ID_BYTES;
pub use part::Part;
pub use star::{Listener, Star};
pub use sums::add_parts;
pub use watch::Watch;

use arl_model::Result;

/// Ranks that call the same operations in the same order. A failure leaves the group unusable: the ranks end.
pub trait Group: Send + Sync {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Sends `sends[r]` to each rank `r`, and fills `receives[r]` with what rank `r` sends to this one. The lengths of a pair
    /// agree on both sides; 0 is no message. What a rank sends to itself is copied.
    fn exchange(&self, sends: &[&[u8]], receives: &mut [Vec<u8>]) -> Result<()>;

    /// Fills `target` with the `source` of every rank, in their order: `target.len() == size * source.len()`, and all
    /// sources are equally long.
    fn all_gather(&self, source: &[u8], target: &mut [u8]) -> Result<()>;

    /// Gives every rank the bytes of rank `root`; all buffers are equally long.
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()>;

    /// What makes the communicator of the ranks' GPUs; `None`: ranks exchange host memory alone.
    fn gpus(&self) -> Option<&Gpus> {
        None
    }

    /// Which of the ranks that [`Group::gpus`] is of these are, ascending; `None`: all.
    fn members(&self) -> Option<&[usize]> {
        None
    }
}

/// Ranks with a GPU each: `host` moves what the host has, NCCL what the GPUs have.
struct WithGpus {
    host: Box<dyn Group>,
    gpus: Gpus,
}

/// The ranks of `host`, each with a GPU of its own.
pub fn with_gpus(host: Box<dyn Group>, gpus: Gpus) -> Box<dyn Group> {
    Box::new(WithGpus { host, gpus })
}

impl Group for WithGpus {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn exchange(&self, sends: &[&[u8]], receives: &mut [Vec<u8>]) -> Result<()> {
        self.host.exchange(sends, receives)
    }

    fn all_gather(&self, source: &[u8], target: &mut [u8]) -> Result<()> {
        self.host.all_gather(source, target)
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        self.host.broadcast(root, buffer)
    }

    fn gpus(&self) -> Option<&Gpus> {
        Some(&self.gpus)
    }
}
