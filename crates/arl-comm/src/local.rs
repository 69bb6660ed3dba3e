//! Ranks that are threads of one process, over channels: for tests of what uses a group, without an MPI.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use arl_model::{Error, ErrorCode, Result};

use crate::Group;

/// One of the ranks that [`local_groups`] makes.
struct Local {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

/// The groups of `size` ranks, each for a thread of its own. A rank whose group is dropped has failed.
pub fn local_groups(size: usize) -> Vec<Box<dyn Group>> {
    let mut senders: Vec<Vec<Sender<Vec<u8>>>> = (0..size).map(|_| Vec::new()).collect();
    let mut receivers: Vec<Vec<Mutex<Receiver<Vec<u8>>>>> = (0..size).map(|_| Vec::new()).collect();
    for sends in &mut senders {
        for receives in &mut receivers {
            let (to, from) = channel();
            sends.push(to);
            receives.push(Mutex::new(from));
        }
    }
    let ranks = senders.into_iter().zip(receivers).enumerate();
    ranks.map(|(rank, (to, from))| Box::new(Local { rank, to, from }) as Box<dyn Group>).collect()
}

impl Local {
    fn send(&self, to: usize, bytes: &[u8]) -> Result<()> {
        self.to[to].send(bytes.to_vec()).map_err(|_| gone(to))
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let receiver = self.from[from].lock().unwrap_or_else(PoisonError::into_inner);
        let received = receiver.recv().map_err(|_| gone(from))?;
        if received.len() != bytes.len() {
            let message = format!("rank {from} sends {} bytes where {} are expected", received.len(), bytes.len());
            return Err(Error::new(ErrorCode::Internal, message));
        }
        bytes.copy_from_slice(&received);
        Ok(())
    }
}

fn gone(rank: usize) -> Error {
    Error::new(ErrorCode::Interrupted, format!("ended because rank {rank} has ended"))
}

impl Group for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn exchange(&self, sends: &[&[u8]], receives: &mut [Vec<u8>]) -> Result<()> {
        let mut sends = sends.iter().enumerate().filter(|(_, bytes)| !bytes.is_empty());
        sends.try_for_each(|(to, bytes)| self.send(to, bytes))?;
        let mut receives = receives.iter_mut().enumerate().filter(|(_, bytes)| !bytes.is_empty());
        receives.try_for_each(|(from, bytes)| self.receive(from, bytes))
    }

    fn all_gather(&self, source: &[u8], target: &mut [u8]) -> Result<()> {
        let mut receives = vec![vec![0; source.len()]; self.size()];
        self.exchange(&vec![source; self.size()], &mut receives)?;
        target.copy_from_slice(&receives.concat());
        Ok(())
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        if self.rank == root {
            (0..self.size()).filter(|&to| to != root).try_for_each(|to| self.send(to, buffer))
        } else {
            self.receive(root, buffer)
        }
    }
}
