//! What cuDNN's attention is asked to do, in plain loops: it knows of the sequences, the operands' layouts and the window
//! only what is passed to the library, and fills its workspace with what is no number.

use half::bf16;

use super::packed::{OPERANDS, PackedAttention, PackedShape};
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, Buffer, DType};

/// An operand on its way through the loops.
struct Values {
    values: Vec<f64>,
    offsets: Vec<usize>,
    stride: usize,
}

impl Values {
    /// The first of the `dim` elements of a head of a sequence's token `t`.
    fn at(&self, sequence: usize, t: usize, head: usize, dim: usize) -> usize {
        self.offsets[sequence] + t * self.stride + head * dim
    }
}

fn ints(memory: &mut CpuBackend, buffer: Buffer) -> Vec<usize> {
    let mut values = vec![0i32; buffer.len];
    memory.read_back(buffer, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values.into_iter().map(|value| usize::try_from(value).unwrap()).collect()
}

fn read(memory: &mut CpuBackend, buffer: Buffer) -> Vec<f64> {
    let mut bytes = vec![0u8; buffer.bytes()];
    memory.read_back(buffer, &mut bytes).unwrap();
    match buffer.dtype {
        DType::Bf16 => bytes.chunks_exact(2).map(|x| bf16::from_le_bytes([x[0], x[1]]).to_f64()).collect(),
        DType::F32 => bytes.chunks_exact(4).map(|x| f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]]))).collect(),
        other => panic!("an operand of {other:?}"),
    }
}

fn write(memory: &mut CpuBackend, buffer: Buffer, values: &[f64]) {
    let bytes: Vec<u8> = match buffer.dtype {
        DType::Bf16 => values.iter().flat_map(|x| bf16::from_f64(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
    };
    memory.upload(&bytes, buffer);
}

/// Computes a pass.
pub(super) fn run(memory: &mut CpuBackend, pass: &PackedAttention) {
    let shape = pass.shape;
    memory.upload(&vec![0xff; pass.workspace.bytes()], pass.workspace);
    let lengths = ints(memory, pass.lengths);
    assert_eq!(lengths.len(), shape.sequences);
    let count = if pass.backward { OPERANDS } else { 5 };
    let mut operands: Vec<Values> = (0..count)
        .map(|i| {
            let offsets = ints(memory, pass.offsets[i]);
            assert_eq!(offsets.len(), shape.sequences + 1);
            for s in 0..shape.sequences {
                assert_eq!(offsets[s + 1] - offsets[s], lengths[s] * shape.strides[i], "sequences without gaps");
            }
            Values { values: read(memory, pass.operands[i]), offsets, stride: shape.strides[i] }
        })
        .collect();
    assert!(lengths.iter().all(|length| *length <= shape.max_len) && lengths.iter().sum::<usize>() <= shape.tokens);
    for (s, &length) in lengths.iter().enumerate() {
        for key_head in 0..shape.key_value {
            for head in 0..shape.query / shape.key_value {
                let heads = (key_head * (shape.query / shape.key_value) + head, key_head, head == 0);
                if pass.backward {
                    backward(&shape, &mut operands, s, length, heads);
                } else {
                    forward(&shape, &mut operands, s, length, heads.0, key_head);
                }
            }
        }
    }
    for i in if pass.backward { 6..9 } else { 3..5 } {
        write(memory, pass.operands[i], &operands[i].values);
    }
}

/// The scores of query `i` of a sequence, from the first key that it sees on.
fn scores(shape: &PackedShape, o: &[Values], s: usize, i: usize, head: usize, key_head: usize) -> (usize, Vec<f64>) {
    let first = (i + 1).saturating_sub(shape.window.unwrap_or(i + 1));
    let q = &o[0].values[o[0].at(s, i, head, shape.dim)..][..shape.dim];
    let scale = f64::from(f32::from_bits(shape.scale));
    let score = |j| scale * inner(q, &o[1].values[o[1].at(s, j, key_head, shape.dim)..]);
    (first, (first..=i).map(score).collect())
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn forward(shape: &PackedShape, o: &mut [Values], s: usize, length: usize, head: usize, key_head: usize) {
    let dim = shape.dim;
    for i in 0..length {
        let (first, scores) = scores(shape, o, s, i, head, key_head);
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
        let (out, stats) = (o[3].at(s, i, head, dim), o[4].at(s, i, head, 1));
        o[4].values[stats] = most + total.ln();
        for x in 0..dim {
            let value = |j: usize| o[2].values[o[2].at(s, j, key_head, dim) + x];
            o[3].values[out + x] =
                scores.iter().enumerate().map(|(j, score)| (score - most).exp() / total * value(first + j)).sum();
        }
    }
}

/// `heads`: the query head, its key head, and whether it is the first of that.
fn backward(shape: &PackedShape, o: &mut [Values], s: usize, length: usize, heads: (usize, usize, bool)) {
    let (dim, (head, key_head, new)) = (shape.dim, heads);
    let scale = f64::from(f32::from_bits(shape.scale));
    for t in 0..length {
        let at = o[6].at(s, t, head, dim);
        o[6].values[at..][..dim].fill(0.0);
        for gradient in if new { &mut o[7..9] } else { &mut [] } {
            let at = gradient.at(s, t, key_head, dim);
            gradient.values[at..][..dim].fill(0.0);
        }
    }
    for i in 0..length {
        let (first, scores) = scores(shape, o, s, i, head, key_head);
        let (out, d_out) = (o[3].at(s, i, head, dim), o[5].at(s, i, head, dim));
        let delta = inner(&o[3].values[out..][..dim], &o[5].values[d_out..]);
        let log_sum_exp = o[4].values[o[4].at(s, i, head, 1)];
        for (j, score) in (first..).zip(scores) {
            let p = (score - log_sum_exp).exp();
            let [k, v, d_k, d_v] = [1, 2, 7, 8].map(|n| o[n].at(s, j, key_head, dim));
            let (q, d_q) = (o[0].at(s, i, head, dim), o[6].at(s, i, head, dim));
            let d_score = scale * p * (inner(&o[5].values[d_out..][..dim], &o[2].values[v..]) - delta);
            for x in 0..dim {
                let (query, key, gradient) = (o[0].values[q + x], o[1].values[k + x], o[5].values[d_out + x]);
                o[6].values[d_q + x] += d_score * key;
                o[7].values[d_k + x] += d_score * query;
                o[8].values[d_v + x] += p * gradient;
            }
        }
    }
}
