//! Random weights as Hugging Face initialises them: normal for matrices, zero for biases, norms that change nothing; and adapters as
//! PEFT does. Each number is a function of the seed, the tensor's name and its place, and so the same in any order and on any
//! number of threads.

use std::f64::consts::TAU;

use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::tensors::{Projection, Role, TensorSpec};

/// The least rate of decay that is drawn.
const LEAST_RATE: f64 = 0.01;
/// Pairs of numbers that are drawn as one task.
const PAIRS_A_TASK: usize = 8192;

/// Fills `out`, as long as the tensor has elements, with its initial values.
pub fn init_f32(config: &ModelConfig, spec: &TensorSpec, seed: u64, out: &mut [f32]) {
    match spec.role {
        Role::Norm | Role::DtBias => return out.fill(1.0),
        role if role.is_vision_norm() => return out.fill(1.0),
        Role::ALog => return log_uniform(spec, seed, out),
        role if role.is_norm() => return out.fill(1.0 - config.norm_offset),
        _ => {}
    }
    // Of an adapter of the look-up A is zero, and B is drawn.
    let embedding = matches!(spec.role, Role::LoraA(Projection::Embedding) | Role::LoraB(Projection::Embedding));
    if spec.role.is_bias() || matches!((spec.role, embedding), (Role::LoraB(_), false) | (Role::LoraA(_), true)) {
        out.fill(0.0);
        return;
    }
    if matches!(spec.role, Role::LoraMagnitude(_)) {
        // Until the weights are there whose norms they are.
        return out.fill(1.0);
    }
    if matches!(spec.role, Role::LoraA(_)) {
        return uniform(spec, seed, out);
    }
    let experts = matches!(spec.role, Role::Router | Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_));
    // transformers takes 0 for "not given" everywhere but in experts and routers.
    let tower = config.vision.as_ref().filter(|_| spec.block.is_vision());
    let deviation = match tower.map_or(config.initializer_range, |vision| vision.initializer_range) {
        _ if embedding => 1.0,
        0.0 if !experts => 0.02,
        deviation => deviation,
    };
    let stream = mix(seed ^ mix(hash(&spec.name)));
    out.par_chunks_mut(2 * PAIRS_A_TASK).enumerate().for_each(|(task, out)| {
        for (pair, values) in out.chunks_mut(2).enumerate() {
            let pair = task * PAIRS_A_TASK + pair;
            for (value, normal) in values.iter_mut().zip(normal_pair(stream, pair as u64)) {
                *value = (deviation * normal) as f32;
            }
        }
    });
    if let (Role::Embedding, Some(row)) = (spec.role, config.padding_idx)
        && let Some(row) = out.chunks_exact_mut(config.hidden_size).nth(row)
    {
        row.fill(0.0);
    }
}

/// A, as torch's `kaiming_uniform_` with `a = sqrt(5)` draws it: between -1 and 1 over the root of its columns.
fn uniform(spec: &TensorSpec, seed: u64, out: &mut [f32]) {
    let bound = 1.0 / (spec.shape.last().copied().unwrap_or(1) as f64).sqrt();
    let stream = mix(seed ^ mix(hash(&spec.name)));
    out.par_chunks_mut(2 * PAIRS_A_TASK).enumerate().for_each(|(task, out)| {
        for (place, value) in out.iter_mut().enumerate() {
            let counter = (task * 2 * PAIRS_A_TASK + place) as u64;
            *value = (bound * (2.0 * unit(stream, counter) - 1.0)) as f32;
        }
    });
}

/// The logarithm of what is uniform from 0.01 to 16: the delta rule's rates of decay.
fn log_uniform(spec: &TensorSpec, seed: u64, out: &mut [f32]) {
    let stream = mix(seed ^ mix(hash(&spec.name)));
    for (value, counter) in out.iter_mut().zip(0..) {
        *value = (LEAST_RATE + (16.0 - LEAST_RATE) * unit(stream, counter)).ln() as f32;
    }
}

/// From 0 to 1, half a step away from both.
fn unit(stream: u64, counter: u64) -> f64 {
    ((draw(stream, counter) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Two independent normal numbers from two uniform ones (Box and Muller, 1958).
fn normal_pair(stream: u64, pair: u64) -> [f64; 2] {
    // Half a step away from zero, whose logarithm is infinite.
    let radius = (-2.0 * unit(stream, 2 * pair).ln()).sqrt();
    let (sin, cos) = (TAU * unit(stream, 2 * pair + 1)).sin_cos();
    [radius * cos, radius * sin]
}

/// The number at a place of a SplitMix64 stream (Steele, Lea and Flood, 2014).
fn draw(stream: u64, counter: u64) -> u64 {
    mix(stream.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// SplitMix64's output function.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::draw;

    #[test]
    fn the_generator_is_split_mix_64() {
        // The published first outputs for the seed 1234567.
        assert_eq!([draw(1_234_567, 0), draw(1_234_567, 1)], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
