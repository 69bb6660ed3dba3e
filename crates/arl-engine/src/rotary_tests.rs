//! The tables against angles that are computed for each token of each sequence.

use std::path::Path;

use arl_model::{ModelConfig, RopeAxes};

use super::*;
use crate::backend::cpu::CpuBackend;
use crate::batch::MicroBatch;
use crate::placement::arena::Arena;
use crate::staging::Staging;

fn rope(name: &str, axes: Option<RopeAxes>) -> RopeTable {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
    let mut config = ModelConfig::from_dir(&dir).unwrap();
    config.rope.axes = axes;
    RopeTable::new(&config)
}

/// Sequences of these lengths. On three axes positions repeat, and run ahead of a sequence's length.
fn batch(lengths: &[usize], three: bool) -> MicroBatch {
    let mut batch = MicroBatch { cu_seqlens: vec![0], ..MicroBatch::default() };
    for length in lengths {
        batch.input_ids.extend(vec![1; *length]);
        batch.cu_seqlens.push(batch.input_ids.len() as i32);
    }
    batch.targets = vec![2; batch.input_ids.len()];
    let positions =
        |axis: i32| lengths.iter().flat_map(move |length| (0..*length as i32).map(move |t| t + t % 3 * axis));
    batch.positions = (0..if three { 3 } else { 1 }).flat_map(positions).collect();
    batch
}

/// The bits of cosines and sines of every token of a valid batch, each sequence for itself.
fn direct(rope: &RopeTable, batch: &MicroBatch) -> Vec<u32> {
    let (tokens, half) = (batch.input_ids.len(), rope.half());
    let (mut cos, mut sin) = (vec![0.0; tokens * half], vec![0.0; tokens * half]);
    for sequence in batch.cu_seqlens.windows(2) {
        let (start, end) = (sequence[0] as usize, sequence[1] as usize);
        let axis = if batch.positions.len() == tokens { 0 } else { tokens };
        let positions = [0, axis, 2 * axis].map(|first| &batch.positions[first + start..first + end]);
        let part = start * half..end * half;
        rope.fill_axes(end - start, positions, &mut cos[part.clone()], &mut sin[part]);
    }
    cos.into_iter().chain(sin).map(f32::to_bits).collect()
}

fn ints(backend: &mut CpuBackend, buffer: Buffer) -> Vec<i32> {
    let mut values = vec![0i32; buffer.len];
    backend.read_back(buffer, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

/// The bits that a leaf reads of the tables for every token.
fn read(backend: &mut CpuBackend, angles: Angles, tokens: usize, half: usize) -> Vec<u32> {
    let rows = ints(backend, angles.rows);
    let axes = angles.axes.map(|axes| ints(backend, axes));
    let mut bits = Vec::new();
    for table in [angles.cos, angles.sin] {
        let table = ints(backend, table.view(DType::I32));
        for t in 0..tokens {
            let row = |i: usize| rows[axes.as_ref().map_or(0, |axes| axes[i] as usize) * tokens + t] as usize;
            bits.extend((0..half).map(|i| table[row(i) * half + i] as u32));
        }
    }
    bits
}

#[test]
fn tokens_read_the_angles_of_their_own_sequences_in_bits() {
    let sections = RopeAxes { sections: [1, 1, 2], interleaved: false };
    // Sequences below and above what is long, lengths that come again, and more classes than there is room for.
    let batches: [&[usize]; 7] = [&[3, 8, 5], &[40], &[9, 31], &[9, 10, 12, 9], &[1, 39], &[20, 20], &[33, 4]];
    for name in ["window-bias", "rope-yarn", "rope-linear", "rope-llama3", "rope-dynamic", "rope-longrope"] {
        for axes in [None, Some(sections)] {
            let rope = rope(name, axes);
            let (mut backend, mut staging, mut tables) = Default::default();
            let provide = |backend: &mut CpuBackend, staging: &mut Staging, tables: &mut RotaryTables, three| {
                for lengths in batches {
                    let batch = batch(lengths, three);
                    batch.validate(0, 32, axes.is_some()).unwrap();
                    tables.reserve(backend, &rope, batch.positions().max(40)).unwrap();
                    let mut arena = Arena::new(1 << 16);
                    let inputs = staging.upload(backend, &mut arena, batch.whole(), &rope, None, tables);
                    assert_eq!(inputs.angles.axes.is_some(), three);
                    let tokens = batch.input_ids.len();
                    let actual = read(backend, inputs.angles, tokens, rope.half());
                    assert!(actual == direct(&rope, &batch), "{name} {axes:?} {lengths:?}");
                }
            };
            CpuBackend::reserve(&mut backend, Pool::Step, 1 << 16).unwrap();
            provide(&mut backend, &mut staging, &mut tables, false);
            if axes.is_some() {
                provide(&mut backend, &mut staging, &mut tables, true);
            }
        }
    }
}

#[test]
fn one_position_of_a_long_sequence_takes_one_row() {
    let rope = rope("rope-dynamic", None);
    let (mut backend, mut tables) = (CpuBackend::new(), RotaryTables::default());
    tables.reserve(&mut backend, &rope, 16).unwrap();
    for length in 9..60 {
        let span = Span { sequence_len: length, positions: length - 1..length };
        let (at, offsets) = tables.provide(&mut backend, &rope, &[span]);
        let row = (length - 1).wrapping_add_signed(offsets[0]);
        let (mut cos, mut sin) = (vec![0.0; rope.half()], vec![0.0; rope.half()]);
        rope.fill(length, &[length as i32 - 1], &mut cos, &mut sin);
        for (table, expected) in [(at.cos, cos), (at.sin, sin)] {
            let actual = ints(&mut backend, table.slice(row * rope.half(), rope.half()).view(DType::I32));
            let expected: Vec<i32> = expected.into_iter().map(|x| x.to_bits() as i32).collect();
            assert_eq!(actual, expected, "{length}");
        }
    }
}

#[test]
fn the_tables_of_a_model_whose_lengths_do_not_matter_are_as_large_as_its_longest_sequence() {
    let bytes = |name, positions| table_bytes(&rope(name, None), positions);
    // Heads of 8: 4 frequencies, 2 tables.
    assert_eq!(bytes("window-bias", 1 << 10), 2 * 4 * 4 * 1024);
    assert_eq!(bytes("rope-yarn", 1 << 10), 2 * 4 * 4 * 1024);
    // 8 positions of sequences that are not long, and as many as a micro-batch has of the others.
    assert_eq!(bytes("rope-dynamic", 1 << 10), 2 * 4 * 4 * (1024 + 8));
    assert_eq!(bytes("rope-dynamic", 8), 2 * 4 * 4 * 8);
}
