//! NCCL's communicators of some of the ranks that have a device each: those that do something without the others.

use arl_model::{Error, ErrorCode, Result};

use crate::{Communicator, Gpus};

/// The communicators, by the numbers of their ranks among all, ascending. A rank's number in one is its place there.
#[derive(Default)]
pub struct Groups {
    joined: Vec<(Vec<usize>, Communicator)>,
}

impl Groups {
    /// Makes the communicator of `members`, together with the others of them; `rank` is this one, and the device is the current one
    /// of this thread.
    ///
    /// # Errors
    /// As [`Communicator::new`]; `ARL_INTERNAL` where this rank is none of the members.
    pub fn join(&mut self, gpus: Gpus, members: &[usize], rank: usize) -> Result<()> {
        let place = members.iter().position(|&member| member == rank).ok_or_else(|| {
            Error::new(ErrorCode::Internal, format!("rank {rank} joins ranks {members:?}, and is none of them"))
        })?;
        self.joined.push((members.to_vec(), Communicator::new(gpus, place, members.len())?));
        Ok(())
    }

    /// The communicator of these ranks.
    ///
    /// # Errors
    /// `ARL_INTERNAL` where they have none.
    pub fn of(&mut self, members: &[usize]) -> Result<&mut Communicator> {
        let found = self.joined.iter_mut().find(|(joined, _)| joined == members);
        found.map(|(_, communicator)| communicator).ok_or_else(|| {
            Error::new(ErrorCode::Internal, format!("the devices of ranks {members:?} were not joined by themselves"))
        })
    }

    /// As [`Communicator::poll`], of each.
    pub fn poll(&mut self) -> Result<()> {
        self.joined.iter_mut().try_for_each(|(_, communicator)| communicator.poll())
    }

    /// As [`Communicator::abort`], of each.
    pub fn abort(&mut self) {
        self.joined.iter_mut().for_each(|(_, communicator)| communicator.abort());
    }
}
