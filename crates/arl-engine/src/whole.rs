//! The whole model on rank 0, where a mesh divides it: what rank 0 computes alone, evaluations and replies, it computes with this one,
//! whose weights its own engine and the others give it part by part (`ranks/whole.rs`).

use std::collections::HashMap;
use std::sync::Arc;

use arl_model::{Error, ErrorCode, ModelConfig, Result};

use crate::backend::{Backend, Buffer, DeviceKind, Pool};
use crate::engine::Engine;
use crate::mesh::Mesh;
use crate::model::Model;
use crate::options::EngineOptions;
use crate::placement::arena::{Arena, Category};
use crate::placement::whole::WholeParts;
use crate::placement::{Param, Placement};

/// What a whole model is put together from.
#[derive(Clone, Debug)]
pub(crate) struct Whole {
    /// What this rank has of the model.
    pub(crate) divided: Arc<Model>,
    pub(crate) parts: WholeParts,
    /// The places of all parameters, in the order that all ranks have ([`Placement::table`]).
    pub(crate) params: Vec<Param>,
}

impl Whole {
    /// Has the parts of a placement take turns, and finds the parameters of the divided model in it.
    pub(crate) fn new(divided: &Model, placement: &mut Placement) -> Arc<Self> {
        let parts = placement.take_turns();
        let places: HashMap<&str, Param> =
            placement.tensors.iter().map(|tensor| (tensor.spec.name.as_str(), tensor.param)).collect();
        let of = |name: &str| places.get(name).copied().unwrap_or_default();
        let params = divided.placement.table().iter().map(|spec| of(&spec.name)).collect();
        Arc::new(Whole { divided: Arc::new(divided.clone()), parts, params })
    }
}

impl Model {
    /// The model that rank 0 computes alone with, where a mesh divides this one; none: this one itself, or another rank's.
    pub(crate) fn whole_model(
        &self,
        config: &ModelConfig,
        options: &EngineOptions,
        kind: DeviceKind,
    ) -> Result<Option<Self>> {
        if !self.place.mesh.divides_model() || self.place.rank > 0 {
            return Ok(None);
        }
        let alone = EngineOptions {
            inference_only: true,
            data_parallel: None,
            zero: 0,
            mesh: Mesh::default(),
            ..options.clone()
        };
        Model::of(config, &alone, kind, Some(self)).map(Some)
    }

    /// Takes the place of the weights, where they are put together: at the bottom of the stack, so that parts that are there stay from
    /// one computation to the next.
    pub(crate) fn take_weights(&self, arena: &mut Arena) {
        if self.whole.is_some() {
            let Buffer { dtype, len, .. } = self.store.weights;
            let taken = arena.take(Category::WholeLayers, dtype, len);
            debug_assert_eq!(taken, self.store.weights, "weights are at the bottom of the stack");
        }
    }

    /// The model that is trained.
    pub(crate) fn trained(&self) -> &Self {
        self.whole.as_ref().map_or(self, |whole| &whole.divided)
    }

    /// Has weights be where [`Model::take_weights`] takes them.
    pub(crate) fn place_weights(&mut self) {
        if let Some(whole) = &self.whole {
            self.store.weights = Buffer { pool: Pool::Step, offset: 0, len: whole.parts.len, ..self.store.weights };
            self.store.bytes = 0;
        }
    }
}

impl<B: Backend + ?Sized> Engine<B> {
    /// What a rank computes alone. Where a mesh divides the model, that is rank 0, with the whole model in this one's place meanwhile.
    pub(crate) fn alone<T>(&mut self, what: &str, compute: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let Some(whole) = self.whole.take() else {
            self.check_undivided(what)?;
            return compute(self);
        };
        let divided = std::mem::replace(&mut self.model, whole);
        let result = compute(self);
        self.whole = Some(std::mem::replace(&mut self.model, divided));
        result
    }

    /// Fails where the mesh divides the model: this is not rank 0, which has the others' weights.
    fn check_undivided(&self, what: &str) -> Result<()> {
        let place = self.model.place;
        if !place.mesh.divides_model() {
            return Ok(());
        }
        let what = format!("{what} by rank {} alone, which has a part of the model; only rank 0 may", place.rank);
        Err(Error::new(ErrorCode::Internal, what))
    }
}
