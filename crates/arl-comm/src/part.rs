//! Some of the ranks of a group, as a group of their own.

use arl_model::{Error, ErrorCode, Result};

use crate::{Gpus, Group};

/// Ranks of another group that call operations without the rest. What they exchange is sent from rank to rank; the others need not
/// know of it.
pub struct Part<'a> {
    whole: &'a dyn Group,
    members: Vec<usize>,
    rank: usize,
}

impl<'a> Part<'a> {
    /// The group of these ranks of `whole`, ascending, one of which is this one.
    ///
    /// # Errors
    /// `ARL_INTERNAL` where this rank is none of them.
    pub fn new(whole: &'a dyn Group, members: Vec<usize>) -> Result<Self> {
        let rank = members.iter().position(|&member| member == whole.rank()).ok_or_else(|| {
            let message = format!("rank {} is none of the ranks {members:?} that it calls", whole.rank());
            Error::new(ErrorCode::Internal, message)
        })?;
        Ok(Part { whole, members, rank })
    }
}

impl Group for Part<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn exchange(&self, sends: &[&[u8]], receives: &mut [Vec<u8>]) -> Result<()> {
        let mut of_whole: Vec<&[u8]> = vec![&[]; self.whole.size()];
        let mut into_whole: Vec<Vec<u8>> = vec![Vec::new(); self.whole.size()];
        for (i, &member) in self.members.iter().enumerate() {
            (of_whole[member], into_whole[member]) = (sends[i], std::mem::take(&mut receives[i]));
        }
        let exchanged = self.whole.exchange(&of_whole, &mut into_whole);
        for (i, &member) in self.members.iter().enumerate() {
            receives[i] = std::mem::take(&mut into_whole[member]);
        }
        exchanged
    }

    fn all_gather(&self, source: &[u8], target: &mut [u8]) -> Result<()> {
        let mut receives = vec![vec![0; source.len()]; self.size()];
        self.exchange(&vec![source; self.size()], &mut receives)?;
        for (place, bytes) in target.chunks_exact_mut(source.len().max(1)).zip(&receives) {
            place.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        let mut sends: Vec<&[u8]> = vec![&[]; self.size()];
        let mut receives = vec![Vec::new(); self.size()];
        receives[root] = vec![0; buffer.len()];
        if self.rank == root {
            sends.fill(buffer);
        }
        self.exchange(&sends, &mut receives)?;
        buffer.copy_from_slice(&receives[root]);
        Ok(())
    }

    fn gpus(&self) -> Option<&Gpus> {
        self.whole.gpus()
    }

    fn members(&self) -> Option<&[usize]> {
        (self.members.len() < self.whole.size()).then_some(self.members.as_slice())
    }
}
