//! The gated delta rule, the convolution before it, and the gated norm behind it.

use arl_engine::backend::{Buffer, CausalConv, DType, DeltaHeads, DeviceKind, GatedDelta, GatedNorm, Rows, Sequences};

use super::super::draw::TOKENS;
use super::super::trial::{Scene, Trial};

const EPSILON: f32 = 1e-6;

/// The convolution over rows that are put into the scene by `rows`, which gets their number and width.
fn conv(s: &mut Scene, rows: impl FnOnce(&mut Scene, usize, usize) -> Rows) -> (CausalConv, String) {
    let most = s.draw.scaled(300, 900, TOKENS);
    let bounds = s.draw.sequences(most);
    let tokens = bounds[bounds.len() - 1];
    let most = s.draw.scaled(200, 1100, 8192);
    let channels = s.draw.extent(8, most);
    let taps = s.draw.between(1, 4);
    let max_len = bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let what = format!("sequences {bounds:?}, {channels} channels, {taps} taps");
    let op = CausalConv {
        sequences: Sequences { cu_seqlens: s.ints(&bounds), count: bounds.len() - 1, max_len },
        tokens,
        channels,
        taps,
        x: rows(s, tokens, channels),
        weight: s.anywhere(channels * taps),
    };
    (op, what)
}

/// Rows with something between them, which is read.
fn apart(s: &mut Scene, rows: usize, width: usize) -> Rows {
    let stride = width + s.draw.pick(&[0, 8, 3]);
    Rows { buffer: s.random(rows * stride), stride }
}

pub(super) fn causal_conv(mut s: Scene) -> Trial {
    let (op, what) = conv(&mut s, apart);
    let out = s.output("out", op.tokens * op.channels, s.dtype);
    s.trial(what, move |backend| backend.causal_conv(&op, out))
}

pub(super) fn causal_conv_backward(mut s: Scene) -> Trial {
    let dtype = s.dtype;
    let (op, what) = conv(&mut s, |s, tokens, channels| s.matrix("d_x", tokens, channels, 8, dtype, false));
    let (d_out, before) = (s.anywhere(op.tokens * op.channels), s.random_of(op.weight.len, DType::F32));
    let d_weight = s.updated("d_weight", before);
    s.trial(what, move |backend| backend.causal_conv_backward(&op, d_out, d_weight))
}

pub(super) fn causal_conv_keep(mut s: Scene) -> Trial {
    let (op, what) = conv(&mut s, apart);
    let op = CausalConv { taps: op.taps.max(2), weight: s.random(op.channels * op.taps.max(2)), ..op };
    let inputs = s.exact("inputs", op.sequences.count * (op.taps - 1) * op.channels, s.dtype);
    s.trial(what, move |backend| backend.causal_conv_keep(&op, inputs))
}

pub(super) fn causal_conv_step(mut s: Scene) -> Trial {
    let (op, _) = conv(&mut s, apart);
    // One new token each, of as many sequences as there are tokens.
    let before = s.anywhere(op.tokens * (op.taps - 1) * op.channels);
    let inputs = s.updated_exactly("inputs", before);
    let out = s.output("out", op.tokens * op.channels, s.dtype);
    let what = format!("{} sequences, {} channels, {} taps", op.tokens, op.channels, op.taps);
    s.trial(what, move |backend| backend.causal_conv_step(&op, inputs, out))
}

/// Key heads, value heads, and the elements of each; those of released models in a step.
fn heads(s: &mut Scene) -> DeltaHeads {
    if s.draw.as_in_a_step() {
        return DeltaHeads { key: 16, value: 32, key_dim: 128, value_dim: 128 };
    }
    let (key, group) = (s.draw.between(1, 2), s.draw.between(1, 2));
    let most = s.draw.scaled(4, 6, 6);
    let dims = [(16, 16), (12, 20), (32, 40), (64, 64), (128, 128), (128, 128)];
    let (key_dim, value_dim) = s.draw.pick(&dims[..most]);
    DeltaHeads { key, value: key * group, key_dim, value_dim }
}

/// The rule over sequences of these bounds; queries, keys and values, and the rows of the gates, are put into the scene by others.
fn rule(
    s: &mut Scene,
    heads: DeltaHeads,
    bounds: &[usize],
    qkv: impl FnOnce(&mut Scene, usize) -> Buffer,
    gates: impl FnOnce(&mut Scene, usize, usize) -> Rows,
) -> (GatedDelta, String) {
    let (tokens, count) = (bounds[bounds.len() - 1], bounds.len() - 1);
    let room = [DeviceKind::Cpu, DeviceKind::Cuda]
        .map(|kind| GatedDelta::backward_scratch(kind, heads, tokens, count))
        .into_iter()
        .fold(0, usize::max);
    let max_len = bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let op = GatedDelta {
        heads,
        sequences: Sequences { cu_seqlens: s.ints(bounds), count, max_len },
        tokens,
        qkv: qkv(s, tokens * heads.channels()),
        gates: gates(s, tokens, 2 * heads.value),
        a_log: s.anywhere(heads.value),
        dt_bias: s.anywhere(heads.value),
        scratch: s.scratch(room, DType::F32),
    };
    (op, format!("sequences {bounds:?}, {heads:?}"))
}

/// Bounds of the sequences of a rule: fewer tokens than of other leaves, because its scratch, which is compared too, is large.
fn rule_bounds(s: &mut Scene) -> Vec<usize> {
    let most = s.draw.scaled(150, 700, TOKENS / 4);
    s.draw.sequences(most)
}

pub(super) fn gated_delta(mut s: Scene) -> Trial {
    let (heads, bounds) = (heads(&mut s), rule_bounds(&mut s));
    let (op, what) = rule(&mut s, heads, &bounds, Scene::anywhere, apart);
    let out = s.output("out", op.tokens * heads.value_columns(), s.dtype);
    let states = s.output("states", op.sequences.count * heads.state(), DType::F32);
    s.trial(what, move |backend| backend.gated_delta(&op, out, Some(states)))
}

pub(super) fn gated_delta_backward(mut s: Scene) -> Trial {
    let dtype = s.dtype;
    let (heads, bounds) = (heads(&mut s), rule_bounds(&mut s));
    let in_place = |s: &mut Scene, len: usize| {
        let before = s.anywhere(len);
        s.updated("d_qkv", before)
    };
    let gates = |s: &mut Scene, rows: usize, width: usize| s.matrix("d_gates", rows, width, 8, dtype, false);
    let (op, what) = rule(&mut s, heads, &bounds, in_place, gates);
    let d_out = s.anywhere(op.tokens * heads.value_columns());
    let [of_log, of_bias] = [(); 2].map(|()| s.random_of(heads.value, DType::F32));
    let (d_a_log, d_dt_bias) = (s.updated("d_a_log", of_log), s.updated("d_dt_bias", of_bias));
    s.trial(what, move |backend| backend.gated_delta_backward(&op, d_out, d_a_log, d_dt_bias))
}

pub(super) fn gated_delta_step(mut s: Scene) -> Trial {
    let heads = heads(&mut s);
    let most = s.draw.scaled(6, 40, 64);
    // One new token each.
    let bounds: Vec<usize> = (0..=s.draw.between(1, most)).collect();
    let (op, _) = rule(&mut s, heads, &bounds, Scene::anywhere, apart);
    let before = s.random_of(op.tokens * heads.state(), DType::F32);
    let states = s.updated("states", before);
    let out = s.output("out", op.tokens * heads.value_columns(), s.dtype);
    s.trial(format!("{} sequences, {heads:?}", op.tokens), move |backend| backend.gated_delta_step(&op, states, out))
}

/// The norm; its gate is put into the scene by `rows`, which gets the number of tokens and a token's columns.
fn norm(s: &mut Scene, rows: impl FnOnce(&mut Scene, usize, usize) -> Rows) -> (GatedNorm, String) {
    let most = s.draw.scaled(60, 400, TOKENS);
    let (tokens, heads) = (s.draw.extent(1, most), s.draw.between(1, 32));
    let dim = s.draw.pick(&[128, 128, 64, 20, 200]);
    let op = GatedNorm {
        tokens,
        heads,
        x: s.anywhere(tokens * heads * dim),
        gate: rows(s, tokens, heads * dim),
        weight: s.anywhere(dim),
        epsilon: EPSILON,
    };
    (op, format!("{tokens} tokens, {heads} heads of {dim}"))
}

pub(super) fn gated_norm(mut s: Scene) -> Trial {
    let (op, what) = norm(&mut s, apart);
    let out = s.output("out", op.x.len, s.dtype);
    s.trial(what, move |backend| backend.gated_norm(&op, out))
}

pub(super) fn gated_norm_backward(mut s: Scene) -> Trial {
    let dtype = s.dtype;
    let (op, what) = norm(&mut s, |s, tokens, width| s.matrix("d_gate", tokens, width, 8, dtype, false));
    let (before, of_weight) = (s.anywhere(op.x.len), s.random_of(op.weight.len, DType::F32));
    let (d, d_weight) = (s.updated("d_x", before), s.updated("d_weight", of_weight));
    s.trial(what, move |backend| backend.gated_norm_backward(&op, d, d_weight))
}
