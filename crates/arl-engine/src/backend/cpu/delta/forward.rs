//! The forward pass, and the first part of the backward pass: the state before each chunk.

use rayon::prelude::*;

use super::decay::Gates;
use super::head::{Columns, Head, Input, Keys, read};
use super::tiles::{Target, Tiles};
use super::{Shape, Task};
use crate::backend::DeltaHeads;
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::{Workspace, carve};
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::vectorise;

/// What tasks share.
#[derive(Clone, Copy)]
struct Outputs<'a, T> {
    /// `[T, value heads * V]`.
    out: Shared<'a, T>,
    /// `[sequences, value heads, K, V]`.
    states: Option<Shared<'a, f32>>,
}

/// `out` from `qkv` `[T, channels]` and the gates; `states` gets the state after each sequence.
pub(super) fn forward<T: Element>(
    shape: &Shape<'_>,
    qkv: &[T],
    gates: Gates<'_>,
    out: &mut [T],
    mut states: Option<&mut [f32]>,
) {
    let heads = shape.heads;
    assert_eq!(qkv.len(), shape.tokens * heads.channels(), "queries, keys and values of {} tokens", shape.tokens);
    assert_eq!(out.len(), shape.tokens * heads.value_columns(), "gated_delta of {} tokens", shape.tokens);
    let sequences = shape.cu_seqlens.len() - 1;
    assert!(states.as_ref().is_none_or(|states| states.len() == sequences * heads.state()), "a state a sequence");
    if let Some(states) = &mut states {
        // Those of sequences without tokens, which no task has.
        for (pair, state) in shape.cu_seqlens.windows(2).zip(states.chunks_exact_mut(heads.state())) {
            if pair[0] == pair[1] {
                state.fill(0.0);
            }
        }
    }
    let outputs = Outputs { out: Shared::new(out), states: states.map(Shared::new) };
    let tiles = Tiles::new();
    // Each task writes columns and states of its own.
    shape.tasks().into_par_iter().with_max_len(1).for_each(|task| run(shape, tiles, qkv, gates, outputs, &task));
}

fn run<T: Element>(shape: &Shape<'_>, tiles: Tiles, qkv: &[T], gates: Gates<'_>, outputs: Outputs<'_, T>, task: &Task) {
    let DeltaHeads { key_dim, value_dim: width, .. } = shape.heads;
    let (group, size) = (shape.group(), tiles.words(key_dim, width));
    let written = tiles.words(shape.chunk, width);
    let words = Keys::words(shape, tiles) + Head::words(shape, tiles) + written + shape.chunk * width + group * size;
    let mut workspace = Workspace::take(words);
    let mut memory = workspace.floats();
    let (mut keys, mut head) = (Keys::new(shape, tiles, &mut memory), Head::new(shape, tiles, &mut memory));
    let (written, out) = (carve(&mut memory, written), carve(&mut memory, shape.chunk * width));
    let states = carve(&mut memory, group * size);
    let columns = |first| Input { data: qkv, stride: shape.heads.channels(), first };
    for tokens in shape.chunks(task) {
        let (n, start) = (tokens.len(), tokens.start == task.tokens.start);
        let [q, k, _] = shape.columns(task.key_head, 0);
        // SAFETY: nobody writes them.
        unsafe {
            keys.read_keys(shape, tiles, columns(k), &tokens);
            keys.read_queries(shape, tiles, columns(q), &tokens);
        }
        for (member, state) in states.chunks_exact_mut(size).enumerate() {
            let number = task.key_head * group + member;
            let gates = shape.gates(gates, number, &tokens);
            let [.., v] = shape.columns(task.key_head, number);
            head.depend(shape, &keys, gates, true);
            // SAFETY: as above.
            unsafe { read(columns(v), &tokens, width, head.v) }
            head.remember(shape, tiles, &keys, gates, (!start).then_some(&*state));
            tiles.lower((n, width), (head.a, shape.chunk), head.rest, Target::Panels(written, n), false);
            if !start {
                let left = tiles.left(keys.q, key_dim);
                tiles.multiply((n, width, key_dim), left, state, Target::Rows(out, width), false);
                vectorise!({
                    for (row, e) in out.chunks_exact_mut(width).zip(&head.e[..n]) {
                        row.iter_mut().for_each(|x| *x *= e);
                    }
                });
            }
            tiles.lower((n, width), (head.p, shape.chunk), written, Target::Rows(out, width), !start);
            let target = Columns { data: outputs.out, stride: shape.heads.value_columns(), first: number * width };
            // SAFETY: the columns of a value head belong to one task of a sequence.
            unsafe { target.write(&tokens, width, out, |_| 1.0) }
            if tokens.end < task.tokens.end || outputs.states.is_some() {
                head.advance(shape, tiles, &keys, n, written, (state, start));
            }
        }
    }
    if let Some(target) = outputs.states {
        for (member, state) in states.chunks_exact(size).enumerate() {
            let number = task.sequence * shape.heads.value + task.key_head * group + member;
            // SAFETY: each head's state of a sequence belongs to one task.
            let target = unsafe { target.part(number * key_dim * width, key_dim * width) };
            for (first, columns) in tiles.panels(width) {
                let rows = state[first * key_dim..].chunks_exact(tiles.panel());
                for (target, row) in target.chunks_exact_mut(width).zip(rows) {
                    target[first..first + columns].copy_from_slice(&row[..columns]);
                }
            }
        }
    }
}

/// The states before chunks of the backward pass, shared by tasks that each have heads of their own.
#[derive(Clone, Copy)]
pub(super) struct Before<'a> {
    pub(super) data: Shared<'a, f32>,
    /// Words of one state: panels `[K, V]`.
    pub(super) size: usize,
}

impl<'a> Before<'a> {
    /// The state of a member of the task's group before chunk `number`, which is not the first of its sequence. No two have one
    /// place: the chunks of a sequence of `n` tokens but the first are at most `n / chunk`.
    ///
    /// # Safety
    /// Nothing else holds it while the result lives.
    pub(super) unsafe fn state(&self, shape: &Shape<'_>, task: &Task, number: usize, member: usize) -> &'a mut [f32] {
        let place = task.tokens.start / shape.chunk + number - 1;
        let head = task.key_head * shape.group() + member;
        // SAFETY: the caller's promise.
        unsafe { self.data.part((place * shape.heads.value + head) * self.size, self.size) }
    }
}

/// Computes the states before each chunk of a task but the first.
///
/// # Safety
/// No other thread touches the task's columns of `qkv` or its states.
pub(super) unsafe fn states_before<T: Element>(
    shape: &Shape<'_>,
    tiles: Tiles,
    qkv: Shared<'_, T>,
    gates: Gates<'_>,
    (keys, head, written): (&mut Keys<'_>, &mut Head<'_>, &mut [f32]),
    before: Before<'_>,
    task: &Task,
) {
    let (group, width) = (shape.group(), shape.heads.value_dim);
    let columns = |first| Columns { data: qkv, stride: shape.heads.channels(), first };
    let count = shape.chunks(task).len();
    for (number, tokens) in shape.chunks(task).enumerate().take(count - 1) {
        let n = tokens.len();
        // SAFETY: the caller's promise, here and below.
        unsafe { keys.read_keys(shape, tiles, columns(shape.columns(task.key_head, 0)[1]), &tokens) }
        for member in 0..group {
            let number_of_head = task.key_head * group + member;
            let gates = shape.gates(gates, number_of_head, &tokens);
            head.depend(shape, keys, gates, false);
            // SAFETY: as above; the two states are apart.
            let (old, new) = unsafe {
                read(columns(shape.columns(task.key_head, number_of_head)[2]), &tokens, width, head.v);
                let old = (number > 0).then(|| before.state(shape, task, number, member));
                (old, before.state(shape, task, number + 1, member))
            };
            head.remember(shape, tiles, keys, gates, old.as_deref());
            tiles.lower((n, width), (head.a, shape.chunk), head.rest, Target::Panels(written, n), false);
            if let Some(old) = &old {
                new.copy_from_slice(old);
            }
            head.advance(shape, tiles, keys, n, written, (new, old.is_none()));
        }
    }
}
