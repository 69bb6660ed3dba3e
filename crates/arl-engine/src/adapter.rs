//! An engine's adapters: from a folder, and to one. Their gradients, moments and masters are those of any trained parameter.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arl_model::{AdapterFile, Error, ErrorCode, Lora, Result, save_adapter};

use crate::backend::Backend;
use crate::engine::Engine;
use crate::placement::{Param, Tensor};

impl<B: Backend + ?Sized> Engine<B> {
    /// What is adapted; none where the engine has no adapters.
    pub fn lora(&self) -> Option<&Lora> {
        self.model.lora.as_ref().map(|(lora, _)| lora.as_ref())
    }

    fn adapted(&self) -> Result<Arc<Lora>> {
        let lora = self.model.lora.as_ref().map(|(lora, _)| Arc::clone(lora));
        lora.ok_or_else(|| Error::new(ErrorCode::Internal, "the engine was opened without adapters"))
    }

    /// Reads all that is trained from an adapter's folder, whose configuration the engine was opened with.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<()> {
        let file = AdapterFile::open(dir, &*self.adapted()?)?;
        self.settle();
        self.complete_update();
        let trained = self.model.placement.tensors.iter().filter(|tensor| tensor.spec.trainable);
        for Tensor { spec, slice, param, .. } in trained.cloned().collect::<Vec<_>>() {
            let mut values = vec![0f32; spec.elements()];
            file.read_f32(&spec.name, &mut values)?;
            self.write_weights(param, &slice.of_whole(values));
        }
        Ok(())
    }

    /// Writes what is trained to `dir`, an empty folder or none yet, as PEFT does, and the tokenizer's files next to it. `base`
    /// is what the adapter's configuration calls the model. With weights of 16 bits, what is written is the exact masters.
    pub fn export_adapter(&mut self, dir: &Path, base: Option<&str>) -> Result<()> {
        let lora = self.adapted()?;
        if self.is_divided() {
            return self.export_gathered(dir, &lora, base);
        }
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e))?;
        let trained = self.model.placement.tensors.iter().filter(|tensor| tensor.spec.trainable);
        let places: HashMap<String, Param> = trained.map(|tensor| (tensor.spec.name.clone(), tensor.param)).collect();
        save_adapter(dir, &self.files.clone(), &lora, base, |name, out| match places.get(name) {
            Some(&param) => self.read_weights(param, out),
            None => Err(Error::new(ErrorCode::Internal, format!("the engine trains no tensor `{name}`"))),
        })
    }
}
