//! Ranks on processors: what they exchange is in host memory anyway.

use arl_comm::Group;
use arl_model::Result;

use super::CpuBackend;
use super::elementwise::{BLOCK, squares};
use crate::backend::Buffer;
use crate::backend::comm::{self, Collectives, Part};

impl Collectives for CpuBackend {
    fn join_ranks(&mut self, _group: &dyn Group) -> Result<()> {
        Ok(())
    }

    fn join_groups(&mut self, _group: &dyn Group, _groups: &[Vec<usize>]) -> Result<()> {
        Ok(())
    }

    fn exchange_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()> {
        comm::exchange_sum(self, group, parts, sum)
    }

    fn all_gather(&mut self, group: &dyn Group, bytes: usize, own: &[Part], all: &[Vec<Part>]) -> Result<()> {
        comm::all_gather(self, group, bytes, own, all)
    }

    fn gather(&mut self, group: &dyn Group, own: Buffer, all: Buffer) -> Result<()> {
        comm::gather(self, group, own, all)
    }

    fn exchange(&mut self, group: &dyn Group, sends: &[Vec<Buffer>], receives: &[Vec<Buffer>]) -> Result<()> {
        comm::exchange(self, group, sends, receives)
    }

    fn block_squares(&mut self, a: Buffer, tail: &[f32]) -> Result<Vec<f64>> {
        let mut lease = self.memory.lease();
        let a = lease.read::<f32>(a);
        if tail.is_empty() {
            return Ok(squares(a));
        }
        let (whole, rest) = a.split_at(a.len() / BLOCK * BLOCK);
        let mut sums = squares(whole);
        sums.extend(squares(&[rest, tail].concat()));
        Ok(sums)
    }
}
