//! The arrays over both arenas: weights over one; masters, gradients and moments over the optimizer's; and the slots
//! through which offloaded ones pass. Knows how long they are and of which type.

use super::arena::ALIGNMENT;
use super::cut::Cut;
use super::quantized::QuantizedStore;
use super::{Param, Placement, Run};
use crate::backend::{Buffer, DType, Pool};
use crate::events::OPTIMIZER_SLOTS;
use crate::options::EngineOptions;

/// Parameters of a piece: the next ones arrive while a layer of a large model is computed.
const PIECE: usize = 16 << 20;

/// The arrays, in [`Pool::State`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Store {
    /// f32, bf16 or f16. Where ranks divide weights, this one's pieces, what stays whole, and the places for what is gathered
    /// (`placement/shards.rs`).
    pub(crate) weights: Buffer,
    /// Frozen linear layers in NF4.
    pub(crate) quantized: Option<QuantizedStore>,
    /// Of trained parameters; with exact bf16 weights u16, the rest of the exact f32 masters; with f16 weights f32, the
    /// masters. Where ranks divide them, this one's own, as moments.
    pub(crate) masters: Option<Buffer>,
    /// With `optimizer_offload`, where pieces of the arrays in host memory are while they are on the device.
    pub(crate) slots: Option<Slots>,
    /// What only training needs.
    pub(crate) training: Option<TrainingStore>,
    /// Bytes of the pool.
    pub(crate) bytes: usize,
    /// Bytes of [`Pool::HostState`].
    pub(crate) host_bytes: usize,
}

/// Gradients and moments of trained parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TrainingStore {
    /// f32. Where ranks divide them, buckets take turns in it (`placement/cut.rs`).
    pub(crate) gradients: Buffer,
    /// f32 or bf16, as the second.
    pub(crate) moment1: Buffer,
    pub(crate) moment2: Buffer,
    /// f64 `[1]`: the sum of squares of all gradients.
    pub(crate) norm_squared: Buffer,
    /// f32: this rank's piece of the gradients' sums, where micro-batches are summed one by one (see `ranks.rs`).
    pub(crate) sums: Option<Buffer>,
}

impl Store {
    /// The arrays over the arenas, as the options have them; with a `cut`, of what one rank owns. With `optimizer_offload`,
    /// moments and masters are in host memory.
    pub(crate) fn new(placement: &Placement, cut: Option<&Cut>, options: &EngineOptions) -> Self {
        let &EngineOptions { dtype, stochastic_rounding, bf16_moments, inference_only, optimizer_offload, .. } =
            options;
        let moments = if bf16_moments { DType::Bf16 } else { DType::F32 };
        let (mut bytes, mut host_bytes) = (0, 0);
        let mut take = |pool: Pool, dtype: DType, len: usize| {
            let next = if pool == Pool::State { &mut bytes } else { &mut host_bytes };
            let offset = *next;
            *next = (offset + len * dtype.bytes()).next_multiple_of(ALIGNMENT);
            Buffer { pool, offset, len, dtype }
        };
        let optimizer = if optimizer_offload { Pool::HostState } else { Pool::State };
        let nested = options.load_in_4bit.is_some_and(|nf4| nf4.nested);
        let shards = cut.and_then(|cut| cut.weights.as_ref());
        let quantized_shards = shards.map(|shards| &shards.quantized);
        let take_quantized = |dtype, len| take(Pool::State, dtype, len);
        let quantized = placement.quantized.store(quantized_shards, nested, take_quantized);
        let weights = take(Pool::State, dtype, shards.map_or(placement.weights, |shards| shards.weights.len));
        let len = cut.map_or(placement.optimizer, |cut| cut.own_len);
        let gradients = cut.map_or(placement.optimizer, |cut| cut.gradient_len);
        let sums = |ranks: usize| match cut {
            Some(cut) if cut.gradients => cut.own_len,
            _ => placement.optimizer.div_ceil(ranks),
        };
        let ranks = options.data_parallel.map(|data| data * options.mesh.slices());
        let masters = match dtype {
            _ if inference_only => None,
            DType::Bf16 if !stochastic_rounding => Some(take(optimizer, DType::U16, len)),
            DType::F16 => Some(take(optimizer, DType::F32, len)),
            _ => None,
        };
        let training = (!inference_only).then(|| TrainingStore {
            gradients: take(Pool::State, DType::F32, gradients),
            moment1: take(optimizer, moments, len),
            moment2: take(optimizer, moments, len),
            norm_squared: take(Pool::State, DType::F64, 1),
            sums: ranks.map(|ranks| take(Pool::State, DType::F32, sums(ranks))),
        });
        let slots = (optimizer_offload && !inference_only).then(|| {
            let masters = masters.map(|masters| masters.dtype);
            Slots::take(len, moments, masters, |dtype, len| take(Pool::State, dtype, len))
        });
        Self { weights, quantized, masters, slots, training, bytes, host_bytes }
    }

    /// A parameter's weights, which are not in NF4; [`crate::blocks::Context::weight`] has either. Where ranks divide weights, what
    /// is there once its part is gathered.
    pub(crate) fn weight(&self, param: Param) -> Buffer {
        assert!(!param.quantized, "weights in NF4 have no place in the arena");
        weights_of(self.weights, param.weight, param.len, param.wide)
    }

    /// The weights of a run.
    pub(crate) fn of_run(weights: Buffer, run: Run) -> Buffer {
        weights_of(weights, run.weights, run.len, run.wide)
    }

    /// A parameter's place in an array over the optimizer's arena; none: it is frozen.
    pub(crate) fn trained(array: Buffer, param: Param) -> Option<Buffer> {
        param.trained.map(|first| array.slice(first, param.len))
    }

    /// A parameter's gradients; none: it is frozen, or the engine is for inference only.
    pub(crate) fn gradient(&self, param: Param) -> Option<Buffer> {
        let training = self.training.filter(|_| param.trained.is_some())?;
        Some(training.gradients.slice(param.gradient, param.len))
    }
}

/// `len` elements from `first` on, counted in those of the arena; `wide` ones are f32 ([`Param::wide`]).
fn weights_of(weights: Buffer, first: usize, len: usize, wide: bool) -> Buffer {
    if wide { weights.slice(first, 2 * len).view(DType::F32) } else { weights.slice(first, len) }
}

/// The place of a piece on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) moment1: Buffer,
    pub(crate) moment2: Buffer,
    pub(crate) masters: Option<Buffer>,
}

impl Slot {
    fn buffers(&self) -> impl Iterator<Item = Buffer> + use<> {
        [self.moment1, self.moment2].into_iter().chain(self.masters)
    }
}

/// The places of the pieces that are on the device. They are kept from step to step, because the first pieces come while
/// the last layers' gradients are computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    pub(crate) places: [Slot; OPTIMIZER_SLOTS],
    /// Parameters of a piece.
    pub(crate) piece: usize,
}

impl Slots {
    /// Takes the slots for `len` parameters, with moments of a type, and masters of a type or none.
    fn take(len: usize, moments: DType, masters: Option<DType>, mut take: impl FnMut(DType, usize) -> Buffer) -> Self {
        // A small model has several pieces too, so that its tests are about the same thing.
        let piece = PIECE.min(len.div_ceil(5).next_multiple_of(64));
        let mut slot = || Slot {
            moment1: take(moments, piece),
            moment2: take(moments, piece),
            masters: masters.map(|dtype| take(dtype, piece)),
        };
        Slots { places: [slot(), slot(), slot()], piece }
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        self.places.iter().flat_map(Slot::buffers).map(Buffer::bytes).sum()
    }

    /// Bytes of a place in [`Pool::Kept`].
    pub(crate) fn kept_bytes(&self) -> usize {
        self.places[0].buffers().map(|buffer| buffer.bytes().next_multiple_of(ALIGNMENT)).sum()
    }

    /// Place `number` in [`Pool::Kept`].
    pub(crate) fn kept(&self, number: usize) -> Slot {
        let mut next = number * self.kept_bytes();
        let mut take = |like: Buffer| {
            let offset = next;
            next += like.bytes().next_multiple_of(ALIGNMENT);
            Buffer { pool: Pool::Kept, offset, ..like }
        };
        let Slot { moment1, moment2, masters } = self.places[0];
        Slot { moment1: take(moment1), moment2: take(moment2), masters: masters.map(take) }
    }
}
