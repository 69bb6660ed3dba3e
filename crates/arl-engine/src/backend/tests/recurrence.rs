//! The gated delta rule as it is defined, token by token, in f64, and its backward pass: what the chunked form is measured against.

use super::Random;
use crate::backend::{DType, DeltaHeads};

/// The inputs: `q`, `k` `[T, key, K]` as they come, `v` `[T, value, V]`, `g`, `beta` `[T, value]`.
#[derive(Clone)]
pub(in super::super) struct Inputs {
    pub(in super::super) heads: DeltaHeads,
    pub(in super::super) bounds: Vec<usize>,
    pub(in super::super) q: Vec<f64>,
    pub(in super::super) k: Vec<f64>,
    pub(in super::super) v: Vec<f64>,
    pub(in super::super) g: Vec<f64>,
    pub(in super::super) beta: Vec<f64>,
}

/// What follows: `out` as `v`, and the states `[sequences, value, K, V]`.
pub(in super::super) struct Results {
    pub(in super::super) out: Vec<f64>,
    pub(in super::super) states: Vec<f64>,
}

/// Gradients, laid out as [`Inputs`].
pub(in super::super) struct Gradients {
    pub(in super::super) q: Vec<f64>,
    pub(in super::super) k: Vec<f64>,
    pub(in super::super) v: Vec<f64>,
    pub(in super::super) g: Vec<f64>,
    pub(in super::super) beta: Vec<f64>,
}

fn unit(x: &[f64]) -> (Vec<f64>, f64) {
    let factor = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
    (x.iter().map(|x| x * factor).collect(), factor)
}

fn unit_backward(y: &[f64], factor: f64, d: &[f64]) -> Vec<f64> {
    let along: f64 = y.iter().zip(d).map(|(y, d)| y * d).sum();
    y.iter().zip(d).map(|(y, d)| factor * (d - y * along)).collect()
}

/// One head hardly forgets, one forgets at once.
pub(in super::super) fn inputs(random: &mut Random, heads: DeltaHeads, bounds: &[usize]) -> Inputs {
    let tokens = bounds[bounds.len() - 1];
    let mut values = |len: usize| random.values(len, DType::F32);
    let (q, k) = (values(tokens * heads.key_columns()), values(tokens * heads.key_columns()));
    let v = values(tokens * heads.value_columns());
    let mut unit = |len: usize| values(len).into_iter().map(|x| f64::from((x / 3.46 + 0.5) as f32)).collect::<Vec<_>>();
    let (g, beta) = (unit(tokens * heads.value), unit(tokens * heads.value));
    let rate = |head: usize| 10f64.powf(-2.0 + 3.3 * head as f64 / (heads.value as f64 - 1.0).max(1.0));
    let g = g.iter().enumerate().map(|(i, g)| f64::from((-rate(i % heads.value) * g) as f32)).collect();
    Inputs { heads, bounds: bounds.to_vec(), q, k, v, g, beta }
}

impl Inputs {
    pub(in super::super) fn tokens(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }

    /// `[T, channels]`.
    pub(in super::super) fn qkv(&self) -> Vec<f64> {
        let (keys, values) = (self.heads.key_columns(), self.heads.value_columns());
        let row = |t: usize| {
            let [q, k] = [&self.q, &self.k].map(|x| &x[t * keys..(t + 1) * keys]);
            q.iter().chain(k).chain(&self.v[t * values..(t + 1) * values])
        };
        (0..self.tokens()).flat_map(row).copied().collect()
    }

    /// Some of the sequences as inputs of their own.
    pub(in super::super) fn sequence(&self, number: usize) -> Inputs {
        let (first, end) = (self.bounds[number], self.bounds[number + 1]);
        let part = |x: &[f64], width: usize| x[first * width..end * width].to_vec();
        let (keys, values) = (self.heads.key_columns(), self.heads.value_columns());
        Inputs {
            heads: self.heads,
            bounds: vec![0, end - first],
            q: part(&self.q, keys),
            k: part(&self.k, keys),
            v: part(&self.v, values),
            g: part(&self.g, self.heads.value),
            beta: part(&self.beta, self.heads.value),
        }
    }

    fn token(&self, t: usize, head: usize) -> Token {
        let DeltaHeads { key, value, key_dim, value_dim } = self.heads;
        let at = (t * key + head / (value / key)) * key_dim;
        let (q, q_factor) = unit(&self.q[at..at + key_dim]);
        let (k, k_factor) = unit(&self.k[at..at + key_dim]);
        let v = self.v[(t * value + head) * value_dim..][..value_dim].to_vec();
        Token { q, q_factor, k, k_factor, v, g: self.g[t * value + head], beta: self.beta[t * value + head] }
    }

    /// The states after each token of a head, each with what the token wrote and what its key met; and the outputs.
    fn states(&self, tokens: std::ops::Range<usize>, head: usize) -> Vec<Passed> {
        let DeltaHeads { key_dim, value_dim, .. } = self.heads;
        let mut state = vec![0.0; key_dim * value_dim];
        let mut passed = Vec::new();
        for t in tokens {
            let token = self.token(t, head);
            state.iter_mut().for_each(|x| *x *= token.g.exp());
            let decayed = state.clone();
            let met: Vec<f64> =
                (0..value_dim).map(|j| (0..key_dim).map(|i| state[i * value_dim + j] * token.k[i]).sum()).collect();
            let written: Vec<f64> = (0..value_dim).map(|j| token.beta * (token.v[j] - met[j])).collect();
            for i in 0..key_dim {
                for j in 0..value_dim {
                    state[i * value_dim + j] += token.k[i] * written[j];
                }
            }
            passed.push(Passed { decayed, state: state.clone(), met, written });
        }
        passed
    }

    pub(in super::super) fn forward(&self) -> Results {
        let DeltaHeads { value, key_dim, value_dim, .. } = self.heads;
        let scale = 1.0 / (key_dim as f64).sqrt();
        let mut results = Results { out: vec![0.0; self.v.len()], states: Vec::new() };
        for pair in self.bounds.windows(2) {
            for head in 0..value {
                let mut last = vec![0.0; key_dim * value_dim];
                for (t, passed) in (pair[0]..).zip(self.states(pair[0]..pair[1], head)) {
                    let token = self.token(t, head);
                    for j in 0..value_dim {
                        let sum: f64 = (0..key_dim).map(|i| passed.state[i * value_dim + j] * token.q[i]).sum();
                        results.out[(t * value + head) * value_dim + j] = scale * sum;
                    }
                    last = passed.state;
                }
                results.states.extend(last);
            }
        }
        results
    }

    pub(in super::super) fn backward(&self, d_out: &[f64]) -> Gradients {
        let DeltaHeads { key, value, key_dim, value_dim } = self.heads;
        let scale = 1.0 / (key_dim as f64).sqrt();
        let zeros = |x: &[f64]| vec![0.0; x.len()];
        let mut to = Gradients {
            q: zeros(&self.q),
            k: zeros(&self.k),
            v: zeros(&self.v),
            g: zeros(&self.g),
            beta: zeros(&self.beta),
        };
        for pair in self.bounds.windows(2) {
            for head in 0..value {
                let mut d_state = vec![0.0; key_dim * value_dim];
                for (t, passed) in (pair[0]..pair[1]).zip(self.states(pair[0]..pair[1], head)).rev() {
                    let token = self.token(t, head);
                    let d_out = &d_out[(t * value + head) * value_dim..][..value_dim];
                    let at = |i: usize, j: usize| i * value_dim + j;
                    let mut d_q = vec![0.0; key_dim];
                    for i in 0..key_dim {
                        for j in 0..value_dim {
                            d_q[i] += scale * passed.state[at(i, j)] * d_out[j];
                            d_state[at(i, j)] += scale * token.q[i] * d_out[j];
                        }
                    }
                    let mut d_k = vec![0.0; key_dim];
                    let mut d_written = vec![0.0; value_dim];
                    for i in 0..key_dim {
                        for j in 0..value_dim {
                            d_written[j] += d_state[at(i, j)] * token.k[i];
                            d_k[i] += d_state[at(i, j)] * passed.written[j];
                        }
                    }
                    for (j, d_written) in d_written.iter().enumerate() {
                        to.beta[t * value + head] += d_written * (token.v[j] - passed.met[j]);
                        to.v[(t * value + head) * value_dim + j] = token.beta * d_written;
                    }
                    for i in 0..key_dim {
                        for j in 0..value_dim {
                            let d_met = -token.beta * d_written[j];
                            d_k[i] += passed.decayed[at(i, j)] * d_met;
                            d_state[at(i, j)] += token.k[i] * d_met;
                        }
                    }
                    for (d, x) in d_state.iter_mut().zip(&passed.decayed) {
                        to.g[t * value + head] += *d * x;
                        *d *= token.g.exp();
                    }
                    let first = (t * key + head / (value / key)) * key_dim;
                    for (i, d) in unit_backward(&token.q, token.q_factor, &d_q).into_iter().enumerate() {
                        to.q[first + i] += d;
                    }
                    for (i, d) in unit_backward(&token.k, token.k_factor, &d_k).into_iter().enumerate() {
                        to.k[first + i] += d;
                    }
                }
            }
        }
        to
    }
}

struct Token {
    q: Vec<f64>,
    q_factor: f64,
    k: Vec<f64>,
    k_factor: f64,
    v: Vec<f64>,
    g: f64,
    beta: f64,
}

struct Passed {
    decayed: Vec<f64>,
    state: Vec<f64>,
    met: Vec<f64>,
    written: Vec<f64>,
}
