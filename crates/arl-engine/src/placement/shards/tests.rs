//! Every rank's pieces and places together are the model.

use std::path::Path;

use arl_model::ModelConfig;

use super::*;
use crate::backend::{DType, Pool};
use crate::mesh::Mesh;
use crate::placement::cut::owned;
use crate::placement::quantized::{Quantized, QuantizedStore};

/// Placements of models of which all is trained, or some, and their cuts, by ranks.
fn cuts() -> Vec<(Placement, Vec<Cut>)> {
    let mut all = Vec::new();
    for name in ["moe-balance", "window-bias", "qwen2-window"] {
        for frozen in [&[][..], &["*embed*", "model.layers.0.*", "*.o_proj.weight"]] {
            for (ranks, overlaps) in [(1, true), (2, false), (2, true), (3, false), (7, true)] {
                let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
                let frozen: Vec<String> = frozen.iter().map(|pattern| (*pattern).to_owned()).collect();
                let config = ModelConfig::from_dir(&dir).unwrap();
                let placement = |rank| {
                    let place = Place::new(Mesh::default(), ranks, rank).unwrap();
                    Placement::new(&config, &frozen, false, &place).unwrap()
                };
                let cut = |rank| Cut::new(&placement(rank), true).overlapping(overlaps).with_weights(&placement(rank));
                all.push((placement(0), (0..ranks).map(cut).collect()));
            }
        }
    }
    all
}

fn array(shards: &Shards) -> Buffer {
    Buffer { pool: Pool::State, offset: 0, len: shards.weights.len, dtype: DType::U8 }
}

#[test]
fn what_is_gathered_from_the_pieces_of_all_ranks_is_every_parameter() {
    for (placement, cuts) in cuts() {
        // The arrays of all ranks, with the number of each element where a rank keeps it.
        let mut arrays: Vec<Vec<usize>> = Vec::new();
        for cut in &cuts {
            let shards = cut.weights.as_ref().unwrap();
            let mut values = vec![usize::MAX; shards.weights.len];
            for tensor in &placement.tensors {
                for (start, part) in shards.parts(tensor.param, array(shards)) {
                    assert!(
                        part.offset + part.len <= shards.weights.kept,
                        "what is kept is apart from what is gathered"
                    );
                    for i in 0..part.len {
                        let value = std::mem::replace(&mut values[part.offset + i], tensor.param.offset + start + i);
                        assert_eq!(value, usize::MAX, "{}: a place of its own", tensor.spec.name);
                    }
                }
            }
            arrays.push(values);
        }
        let shards = cuts[0].weights.as_ref().unwrap();
        for tensor in &placement.tensors {
            let mut gathered = arrays[0].clone();
            for shard in shards.weights.of(Part::of(&tensor.spec)) {
                for (rank, cut) in cuts.iter().enumerate() {
                    let same = |other: &&Shard| (other.trained, other.start) == (shard.trained, shard.start);
                    let from = cut.weights.as_ref().unwrap().weights.all.iter().find(same).unwrap();
                    let piece = arrays[rank][from.own..from.own + shard.piece].to_vec();
                    let to = shard.place + rank * shard.piece;
                    gathered[to..to + shard.piece].copy_from_slice(&piece);
                }
            }
            let place = shards.place(tensor.param);
            let found = &gathered[place..place + tensor.param.len];
            assert!(found.iter().copied().eq(tensor.param.offset..tensor.param.offset + tensor.param.len));
            // Places are aligned as those in the arena are.
            assert_eq!(place % STEP, tensor.param.offset % STEP, "{}", tensor.spec.name);
        }
    }
}

/// The arrays of a model in NF4, or of a rank of it, from offset 0 each.
fn nf4_arrays(quantized: &Quantized, shards: Option<&Shards>) -> QuantizedStore {
    let take = |dtype, len| Buffer { pool: Pool::State, offset: 0, len, dtype };
    quantized.store(shards.map(|shards| &shards.quantized), true, take).unwrap()
}

/// First elements and lengths of a tensor in NF4 in the arrays.
fn nf4_places(quantized: &Quantized, store: &QuantizedStore, param: Param) -> [(usize, usize); NF4_ARRAYS] {
    let [(0, part)] = quantized.parts(store, param)[..] else { panic!("one tensor") };
    [part.codes, part.scales, part.nested.unwrap().largest].map(|place| (place.offset / place.dtype.bytes(), place.len))
}

/// The arrays of a rank, with the number of each element, counted before they are divided, where the rank keeps it.
fn nf4_kept(placement: &Placement, shards: &Shards) -> Vec<Vec<usize>> {
    let (quantized, store) = (&placement.quantized, nf4_arrays(&placement.quantized, Some(shards)));
    let mut arrays: Vec<_> = store.arrays().map(|array| vec![usize::MAX; array.len]).collect();
    for tensor in placement.tensors.iter().filter(|tensor| tensor.param.quantized) {
        let before = nf4_places(quantized, &nf4_arrays(quantized, None), tensor.param);
        let kept = quantized.kept(&store, Some(&shards.quantized), tensor.param);
        for (i, (start, place)) in (0..).zip(kept).flat_map(|(i, parts)| parts.into_iter().map(move |part| (i, part))) {
            let at = place.offset / place.dtype.bytes();
            assert!(at + place.len <= shards.quantized[i].kept, "what is kept is apart from what is gathered");
            for element in 0..place.len {
                let number = before[i].0 + start + element;
                assert_eq!(std::mem::replace(&mut arrays[i][at + element], number), usize::MAX);
            }
        }
    }
    arrays
}

#[test]
fn what_is_gathered_of_arrays_in_nf4_is_every_tensor() {
    for name in ["moe-balance", "window-bias", "qwen2-window"] {
        for (ranks, overlaps) in [(1, true), (2, false), (3, true), (7, false)] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
            let config = ModelConfig::from_dir(&dir).unwrap();
            let of_rank = |rank| {
                let place = Place::new(Mesh::default(), ranks, rank).unwrap();
                let placement = Placement::new(&config, &[], true, &place).unwrap();
                let cut = Cut::new(&placement, true).overlapping(overlaps).with_weights(&placement);
                (placement, cut.weights.unwrap())
            };
            let kept: Vec<_> =
                (0..ranks).map(of_rank).map(|(placement, shards)| nf4_kept(&placement, &shards)).collect();
            let (placement, shards) = of_rank(0);
            let mut divided = placement.quantized.clone();
            divided.divide(&shards.quantized);
            for tensor in placement.tensors.iter().filter(|tensor| tensor.param.quantized) {
                let whole = nf4_arrays(&placement.quantized, None);
                let before = nf4_places(&placement.quantized, &whole, tensor.param);
                let found = nf4_places(&divided, &nf4_arrays(&divided, Some(&shards)), tensor.param);
                for (i, (before, found)) in before.into_iter().zip(found).enumerate() {
                    let mut gathered = kept[0][i].clone();
                    for shard in shards.quantized[i].of(Part::of(&tensor.spec)) {
                        // Pieces of a shard are in the same place on every rank.
                        for (rank, arrays) in kept.iter().enumerate() {
                            let (own, to) = (shard.own, shard.place + rank * shard.piece);
                            gathered[to..to + shard.piece].copy_from_slice(&arrays[i][own..own + shard.piece]);
                        }
                    }
                    let elements = gathered[found.0..found.0 + found.1].iter().copied();
                    assert!(elements.eq(before.0..before.0 + before.1), "{}, array {i}", tensor.spec.name);
                    assert_eq!(found.0 % 16, 0, "aligned to 64 bytes");
                }
            }
        }
    }
}

#[test]
fn every_element_is_owned_by_one_rank_which_keeps_it() {
    for (placement, cuts) in cuts() {
        for tensor in &placement.tensors {
            let mut covered = vec![0; tensor.param.len];
            for (rank, cut) in cuts.iter().enumerate() {
                let shards = cut.weights.as_ref().unwrap();
                for part in owned(Some(cut), tensor.param, rank) {
                    covered[part.start..part.start + part.len].iter_mut().for_each(|count| *count += 1);
                    let kept = shards.parts(tensor.param.part(part.start, part.len), array(shards));
                    let [(0, place)] = kept[..] else { panic!("{}: {kept:?}", tensor.spec.name) };
                    assert_eq!(place.len, part.len);
                    if let Some(first) = tensor.param.trained {
                        assert_eq!(shards.own_place(first + part.start), place.offset);
                    }
                }
            }
            assert!(covered.iter().all(|&count| count == 1), "{}", tensor.spec.name);
        }
    }
}

#[test]
fn parts_that_are_needed_at_once_have_places_of_their_own() {
    for (_, cuts) in cuts() {
        let shards = cuts[0].weights.as_ref().unwrap();
        let apart = |a: Part, b: Part| match (a, b) {
            (Part::Layer(a), Part::Layer(b)) => a % shards.slots != b % shards.slots,
            (Part::Layer(_) | Part::Whole, _) | (_, Part::Layer(_) | Part::Whole) => a != b,
            _ => false,
        };
        for (i, a) in shards.weights.all.iter().enumerate() {
            let end = |shard: &Shard| shard.place + cuts.len() * shard.piece;
            assert!(end(a) <= shards.weights.len);
            for b in &shards.weights.all[..i] {
                if a.part == b.part || apart(a.part, b.part) {
                    assert!(end(a) <= b.place || end(b) <= a.place, "{a:?} {b:?}");
                }
            }
        }
    }
}

#[test]
fn a_part_is_gathered_where_another_one_was_in_its_place() {
    let mut held = Held::default();
    let layers = [0, 1, 2, 2, 1, 0];
    assert_eq!(layers.map(|layer| held.claim(Part::Layer(layer), 2)), [true, true, true, false, false, true]);
    let parts = [Part::Embedding, Part::Embedding, Part::Head, Part::Tower, Part::Embedding];
    assert_eq!(parts.map(|part| held.claim(part, 2)), [true, false, true, true, true]);
    assert_eq!([Part::Whole; 2].map(|part| held.claim(part, 2)), [true, false]);
    for part in [Part::Whole, Part::Tower, Part::Embedding, Part::Head, Part::Layer(0), Part::Layer(77)] {
        assert_eq!(Part::from_number(part.number()), Some(part));
    }
    assert_eq!(Part::from_number(0), None);
}
