//! One rank, which has nobody to exchange anything with.

use arl_model::Result;

use crate::Group;

/// A rank without others.
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn exchange(&self, sends: &[&[u8]], receives: &mut [Vec<u8>]) -> Result<()> {
        receives[0].copy_from_slice(sends[0]);
        Ok(())
    }

    fn all_gather(&self, source: &[u8], target: &mut [u8]) -> Result<()> {
        target.copy_from_slice(source);
        Ok(())
    }

    fn broadcast(&self, _root: usize, _buffer: &mut [u8]) -> Result<()> {
        Ok(())
    }
}
