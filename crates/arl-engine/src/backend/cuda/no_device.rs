//! A device that computes nothing: for the order of things alone.

use arl_comm::{Collective, Gpus};
use arl_model::Result;

use super::super::device::{Device, Launch};
use super::super::packed::{PackedAttention, PackedShape};
use crate::backend::{Buffer, Event, Matmul, Pool, Stream};

/// Computes nothing; what is read back is zero.
pub(in crate::backend::cuda) struct NoDevice;

impl Device for NoDevice {
    fn name(&self) -> String {
        "nothing".into()
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn reserve(&mut self, _pool: Pool, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn read_back(&mut self, _source: Buffer, target: &mut [u8]) -> Result<()> {
        target.fill(0);
        Ok(())
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        target.fill(0);
        Ok(())
    }

    fn upload(&mut self, _source: &[u8], _target: Buffer) {}
    fn queue_read(&mut self, _sources: &[Buffer]) {}
    fn transfer(&mut self, _stream: Stream, _source: Buffer, _target: Buffer) {}
    fn record(&mut self, _stream: Stream, _event: Event) {}
    fn wait(&mut self, _stream: Stream, _event: Event) {}
    fn zero(&mut self, _target: Buffer) {}
    fn copy(&mut self, _source: Buffer, _target: Buffer) {}
    fn launch(&mut self, _launch: &Launch<'_>) {}
    fn matmul(&mut self, _op: &Matmul) {}
    fn packed_attention(&mut self, _pass: &PackedAttention) {}

    fn join_ranks(&mut self, _gpus: Gpus, _rank: usize, _size: usize) -> Result<()> {
        Ok(())
    }

    fn start_collective(&mut self, _collective: &Collective<Buffer>) -> Result<()> {
        Ok(())
    }

    fn join_group(&mut self, _gpus: Gpus, _members: &[usize], _rank: usize) -> Result<()> {
        Ok(())
    }

    fn start_collective_among(&mut self, _members: &[usize], _collective: &Collective<Buffer>) -> Result<()> {
        Ok(())
    }

    fn plan_attention(&mut self, _shape: &PackedShape) -> std::result::Result<(), String> {
        Ok(())
    }
}
