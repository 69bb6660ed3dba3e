//! States of format 1: whole arrays, in which a hash says where parameters are, as one rank has them that divides none.

use arl_model::Result;

use super::saved::Saved;
use super::{ANOTHER, damaged};
use crate::backend::{Backend, DType};
use crate::engine::Engine;
use crate::mesh::{Mesh, Place};
use crate::placement::Placement;

impl<B: Backend + ?Sized> Engine<B> {
    /// Makes tensors of a state's arrays, where they are of this model, all of whose parameters are trained.
    pub(super) fn split_arrays(&self, saved: &mut Saved) -> Result<()> {
        let one = Placement::new(&self.config, &[], false, &Place::new(Mesh::default(), 1, 0)?)?;
        let trained = self.model.placement.table().iter().all(|spec| spec.trainable);
        if !trained || saved.metadata("layout") != Some(self.layout(&one).as_str()) {
            return Err(damaged(&saved.path, ANOTHER));
        }
        saved.split_arrays(&one.tensors);
        Ok(())
    }

    /// What format 1 identified a model by: order, names, shapes and types of the flat arrays.
    fn layout(&self, placement: &Placement) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |bytes: &[u8]| {
            for &byte in bytes {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        add(&[self.model.dtype.bytes() as u8]);
        let store = &self.model.store;
        match (self.model.dtype, store.masters) {
            (DType::F16, _) => add(b"f16"),
            (DType::Bf16, None) => add(b"stochastic rounding"),
            _ => {}
        }
        if store.training.is_some_and(|training| training.moment1.dtype == DType::Bf16) {
            add(b"bf16 moments");
        }
        for tensor in &placement.tensors {
            add(tensor.spec.name.as_bytes());
            add(&(tensor.param.offset as u64).to_le_bytes());
            for &side in &tensor.spec.shape {
                add(&(side as u64).to_le_bytes());
            }
        }
        format!("{hash:016x}")
    }
}
