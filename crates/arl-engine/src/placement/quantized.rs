//! Where weights in NF4 are: their elements are counted one tensor behind the other, apart from those of the weights' arena, and
//! codes and scales of each tensor have places of their own. Knows names and shapes, no values.

use arl_model::{NF4_BLOCK, NF4_NESTED_BLOCK, Role, TensorSpec, nf4_scale_values};

use super::Param;
use super::arena::ALIGNMENT;
use crate::backend::{Buffer, DType, DeviceKind, Nf4Nested, Nf4Weights};

/// A tensor in NF4.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Its first element, counted over all such tensors.
    first: usize,
    len: usize,
    /// Bytes from the beginning of the codes.
    codes: usize,
    /// Scales before its own.
    scales: usize,
    /// Of scales in 8 bits: f32s before its own, which are the offset and one for each 256 scales.
    nested: usize,
}

/// The tensors in NF4.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quantized {
    /// Of the device that multiplies them.
    pub(crate) kind: DeviceKind,
    places: Vec<Place>,
    /// The place behind the last one.
    end: Option<Place>,
}

/// The arrays that hold them, in [`Pool::State`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantizedStore {
    /// u8.
    codes: Buffer,
    /// u8 or f32.
    scales: Buffer,
    /// f32, where scales are u8; and f32 `[256]`, what their codes stand for.
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
        let start = Place { first: 0, len: 0, codes: 0, scales: 0, nested: 0 };
        let place = Place { len, ..self.end.unwrap_or(start) };
        let blocks = len.div_ceil(NF4_BLOCK);
        self.places.push(place);
        self.end = Some(Place {
            first: place.first + len,
            len: 0,
            codes: (place.codes + len.div_ceil(2)).next_multiple_of(ALIGNMENT),
            scales: (place.scales + blocks).next_multiple_of(ALIGNMENT),
            nested: (place.nested + 1 + blocks.div_ceil(NF4_NESTED_BLOCK)).next_multiple_of(ALIGNMENT / 4),
        });
        Param { offset: place.first, len, quantized: true, ..Param::default() }
    }

    /// The arrays; `nested`: with scales in 8 bits.
    pub(super) fn store(&self, nested: bool, mut take: impl FnMut(DType, usize) -> Buffer) -> Option<QuantizedStore> {
        let end = self.end?;
        Some(QuantizedStore {
            codes: take(DType::U8, end.codes),
            scales: take(if nested { DType::U8 } else { DType::F32 }, end.scales),
            nested: nested.then(|| (take(DType::F32, end.nested), take(DType::F32, nf4_scale_values().len()))),
        })
    }

    /// The tensors of a parameter, or of several side by side: each with its first element there.
    pub(crate) fn parts(&self, store: &QuantizedStore, param: Param) -> Vec<(usize, Nf4Weights)> {
        let begin = self.places.partition_point(|place| place.first + place.len <= param.offset);
        let of_param = self.places[begin..].iter().take_while(|place| place.first < param.offset + param.len);
        of_param.map(|place| (place.first - param.offset, store.weights(place))).collect()
    }
}

impl QuantizedStore {
    fn weights(&self, place: &Place) -> Nf4Weights {
        let blocks = place.len.div_ceil(NF4_BLOCK);
        Nf4Weights {
            len: place.len,
            codes: self.codes.slice(place.codes, place.len.div_ceil(2)),
            scales: self.scales.slice(place.scales, blocks),
            nested: self.nested.map(|(largest, values)| Nf4Nested {
                largest: largest.slice(place.nested, 1 + blocks.div_ceil(NF4_NESTED_BLOCK)),
                values,
            }),
        }
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
            .store(true, |dtype, len| {
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
