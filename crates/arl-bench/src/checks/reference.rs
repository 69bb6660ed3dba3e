//! A device and the CPU as its reference, with the memory that trials need. Knows no leaf.

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{Backend, Buffer, DType, Pool};
use arl_model::Result;

use super::trial::{Figures, Trial};

/// Columns and tokens for which scratch is reserved; no trial has more.
const MOST: usize = 1 << 14;

/// A device, and the CPU that its results are compared with.
pub(crate) struct WithReference<'a> {
    pub(crate) device: &'a mut dyn Backend,
    cpu: CpuBackend,
    /// Bytes of [`Pool::Step`] on both.
    room: usize,
}

impl<'a> WithReference<'a> {
    /// Reserves scratch on both.
    pub(crate) fn new(device: &'a mut dyn Backend) -> Result<Self> {
        let mut cpu = CpuBackend::new();
        let scratch = device.scratch_bytes(MOST, MOST);
        device.reserve(Pool::Scratch, scratch)?;
        cpu.reserve(Pool::Scratch, cpu.scratch_bytes(MOST, MOST))?;
        // NaN, so that a partial sum that is read but not written shows.
        let poisoned = Buffer { pool: Pool::Scratch, offset: 0, len: scratch / 4, dtype: DType::F32 };
        device.upload(&vec![0xff; poisoned.bytes()], poisoned);
        Ok(WithReference { device, cpu, room: 0 })
    }

    /// Makes the call on both; fails on the first result that is not near enough. What it left in the device's memory.
    pub(crate) fn compare(&mut self, trial: &Trial, activations: DType, worst: &mut Figures) -> Result<Vec<u8>> {
        if trial.bytes() > self.room {
            self.room = 2 * trial.bytes();
            self.device.reserve(Pool::Step, self.room)?;
            self.cpu.reserve(Pool::Step, self.room)?;
        }
        let expected = trial.run(&mut self.cpu)?;
        let actual = trial.run(self.device)?;
        let narrows = self.device.logits_gradient(activations) != DType::F32;
        trial.compare(&actual, narrows, &expected, worst)?;
        Ok(actual)
    }

    /// The same call on the device again.
    pub(crate) fn repeat(&mut self, trial: &Trial) -> Result<Vec<u8>> {
        trial.run(self.device)
    }
}
