//! Where weights in NF4 are: their elements are counted one tensor behind the other, apart from those of the weights' arena, and
//! codes and scales of each tensor have places of their own. Knows names and shapes, no values.

use std::array;

use arl_model::{NF4_BLOCK, NF4_NESTED_BLOCK, Role, TensorSpec, nf4_scale_values};

use super::arena::ALIGNMENT;
use super::divided::{Divided, Shard, extend};
use super::shards::Part;
use super::{Param, Placement, Tensor};
use crate::backend::{Buffer, DType, DeviceKind, Nf4Nested, Nf4Weights};

/// The arrays: codes, two a byte; a scale for each 64 of them; and of scales in 8 bits what they are read with, f32 for each tensor:
/// their offset, and one factor for each 256 of them.
pub(crate) const NF4_ARRAYS: usize = 3;

/// A tensor begins at a multiple of so many elements in each array.
const STEPS: [usize; NF4_ARRAYS] = [ALIGNMENT, ALIGNMENT, ALIGNMENT / size_of::<f32>()];

/// A tensor in NF4.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Its first element, counted over all such tensors.
    first: usize,
    len: usize,
    /// Its first elements in the arrays, before these are divided.
    starts: [usize; NF4_ARRAYS],
    /// The same where products find them: where ranks divide the arrays, those of a part that is gathered.
    found: [usize; NF4_ARRAYS],
}

impl Place {
    /// Its elements in the arrays.
    fn lens(&self) -> [usize; NF4_ARRAYS] {
        let blocks = self.len.div_ceil(NF4_BLOCK);
        [self.len.div_ceil(2), blocks, 1 + blocks.div_ceil(NF4_NESTED_BLOCK)]
    }

    /// Where the next tensor begins.
    fn ends(&self) -> [usize; NF4_ARRAYS] {
        let lens = self.lens();
        array::from_fn(|i| (self.starts[i] + lens[i]).next_multiple_of(STEPS[i]))
    }
}

/// The tensors in NF4.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quantized {
    /// Of the device that multiplies them.
    pub(crate) kind: DeviceKind,
    places: Vec<Place>,
}

/// The arrays that hold them, in [`Pool::State`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantizedStore {
    /// u8.
    codes: Buffer,
    /// u8 or f32.
    scales: Buffer,
    /// f32, where scales are u8; and f32 `[256]`, the values of their codes.
    nested: Option<(Buffer, Buffer)>,
}

/// Whether a tensor is the weight of a linear layer as bitsandbytes quantizes them: every one but the head. Routers and experts
/// are parameters in transformers, and stay.
pub(super) fn is_linear(spec: &TensorSpec) -> bool {
    let attention = matches!(spec.role, Role::QWeight | Role::KWeight | Role::VWeight | Role::OWeight);
    let input = matches!(spec.role, Role::InProjQkv | Role::InProjZ | Role::InProjB | Role::InProjA);
    let dense = matches!(spec.role, Role::Gate | Role::Up | Role::Down);
    let shared = matches!(spec.role, Role::SharedGate | Role::SharedUp | Role::SharedDown | Role::SharedExpertGate);
    attention || input || spec.role == Role::OutProj || dense || shared
}

impl Quantized {
    /// Adds a tensor behind the others.
    pub(super) fn place(&mut self, len: usize) -> Param {
        let (first, starts) =
            self.places.last().map_or_else(Default::default, |last| (last.first + last.len, last.ends()));
        self.places.push(Place { first, len, starts, found: starts });
        Param { offset: first, len, quantized: true, ..Param::default() }
    }

    /// The shards of each array, not yet placed.
    pub(super) fn shards(&self, placement: &Placement) -> [Vec<Shard>; NF4_ARRAYS] {
        let mut arrays: [Vec<Shard>; NF4_ARRAYS] = Default::default();
        let tensors = placement.tensors.iter().filter(|tensor| tensor.param.quantized);
        for (Tensor { spec, param, .. }, place) in tensors.zip(&self.places) {
            let ends = place.ends();
            for (i, shards) in arrays.iter_mut().enumerate() {
                extend(shards, &placement.place, (Part::of(spec), param.axis), (place.starts[i], ends[i]));
            }
        }
        arrays.map(|shards| shards.into_iter().map(|shard| shard.in_pieces(ALIGNMENT)).collect())
    }

    /// Has products find tensors where shards are gathered.
    pub(super) fn divide(&mut self, shards: &[Divided; NF4_ARRAYS]) {
        for Place { starts, found, .. } in &mut self.places {
            *found = array::from_fn(|i| {
                let shard = shards[i].starting_at(false, starts[i]).first();
                shard.map_or(0, |shard| shard.gathered(starts[i]))
            });
        }
    }

    /// The arrays, or what a rank has of them; `nested`: with scales in 8 bits.
    pub(super) fn store(
        &self,
        shards: Option<&[Divided; NF4_ARRAYS]>,
        nested: bool,
        mut take: impl FnMut(DType, usize) -> Buffer,
    ) -> Option<QuantizedStore> {
        let ends = self.places.last()?.ends();
        let [codes, scales, factors] = shards.map_or(ends, |arrays| arrays.each_ref().map(|array| array.len));
        Some(QuantizedStore {
            codes: take(DType::U8, codes),
            scales: take(if nested { DType::U8 } else { DType::F32 }, scales),
            nested: nested.then(|| (take(DType::F32, factors), take(DType::F32, nf4_scale_values().len()))),
        })
    }

    /// The places of a parameter's tensors.
    fn of(&self, param: Param) -> impl Iterator<Item = &Place> {
        let begin = self.places.partition_point(|place| place.first + place.len <= param.offset);
        self.places[begin..].iter().take_while(move |place| place.first < param.offset + param.len)
    }

    /// The tensors of a parameter, or of several side by side: each with its first element there. Where ranks divide them, what is
    /// there once their part is gathered.
    pub(crate) fn parts(&self, store: &QuantizedStore, param: Param) -> Vec<(usize, Nf4Weights)> {
        self.of(param).map(|place| (place.first - param.offset, store.weights(place))).collect()
    }

    /// What this rank has of a tensor all the time, of each array: first elements within what is the tensor's there, and their
    /// places. All of it, unless ranks divide it.
    pub(crate) fn kept(
        &self,
        store: &QuantizedStore,
        shards: Option<&[Divided; NF4_ARRAYS]>,
        param: Param,
    ) -> Vec<Vec<(usize, Buffer)>> {
        let Some(place) = self.of(param).next() else { return Vec::new() };
        let lens = place.lens();
        let kept = |(i, array): (usize, Buffer)| {
            let range = (place.starts[i], place.starts[i] + lens[i]);
            match shards {
                Some(shards) => shards[i].kept_of(false, range, array),
                None => vec![(0, array.slice(place.starts[i], lens[i]))],
            }
        };
        store.arrays().enumerate().map(kept).collect()
    }
}

impl QuantizedStore {
    fn weights(&self, place: &Place) -> Nf4Weights {
        let ([codes, scales, factors], lens) = (place.found, place.lens());
        Nf4Weights {
            len: place.len,
            codes: self.codes.slice(codes, lens[0]),
            scales: self.scales.slice(scales, lens[1]),
            nested: self.nested.map(|(largest, values)| Nf4Nested { largest: largest.slice(factors, lens[2]), values }),
        }
    }

    /// The arrays, of which there are [`NF4_ARRAYS`] with scales in 8 bits, and one less without.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = Buffer> {
        [self.codes, self.scales].into_iter().chain(self.nested.map(|(factors, _)| factors))
    }

    /// The values of codes of scales in 8 bits.
    pub(crate) fn scale_values(&self) -> Option<Buffer> {
        self.nested.map(|(_, values)| values)
    }

    /// Whether scales are in 8 bits.
    pub(crate) fn is_nested(&self) -> bool {
        self.nested.is_some()
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        let nested = self.nested.map_or(0, |(largest, values)| largest.bytes() + values.bytes());
        self.codes.bytes() + self.scales.bytes() + nested
    }

    /// Bytes of the places for what is gathered.
    pub(crate) fn gathered_bytes(&self, shards: Option<&[Divided; NF4_ARRAYS]>) -> usize {
        let arrays = self.arrays().zip(shards.into_iter().flatten());
        arrays.map(|(array, shards)| (shards.len - shards.kept) * array.dtype.bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Pool;

    #[test]
    fn tensors_side_by_side_keep_blocks_of_their_own() {
        let mut quantized = Quantized::default();
        let params = [100, 64, 4_000_000].map(|len| quantized.place(len));
        assert_eq!(params.map(|param| param.offset), [0, 100, 164]);
        let mut next = 0;
        let store = quantized
            .store(None, true, |dtype, len| {
                let buffer = Buffer { pool: Pool::State, offset: next, len, dtype };
                next = (next + buffer.bytes()).next_multiple_of(ALIGNMENT);
                buffer
            })
            .unwrap();
        let span = Param { len: 164, ..params[0] };
        let parts = quantized.parts(&store, span);
        assert_eq!(parts.iter().map(|(first, part)| (*first, part.len)).collect::<Vec<_>>(), [(0, 100), (100, 64)]);
        let [(_, last)] = quantized.parts(&store, params[2])[..] else { panic!("one tensor") };
        assert_eq!((last.codes.len, last.scales.len, last.nested.unwrap().largest.len), (2_000_000, 62_500, 246));
        // 4 bits a weight, 8 a scale of 64 of them, 32 of 256 of those.
        let bytes = store.bytes() - 4 * nf4_scale_values().len();
        assert!((8.0 * bytes as f64 / 4_000_164.0 - 4.13).abs() < 0.01, "{bytes}");
    }
}
