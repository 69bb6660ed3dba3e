//! The rule as it is defined, token by token, in f64, and its backward pass: what the chunked form is measured against.

use crate::backend::DeltaHeads;

/// The inputs: `q`, `k` `[T, key, K]` as they come, `v` `[T, value, V]`, `g`, `beta` `[T, value]`.
#[derive(Clone)]
pub(super) struct Inputs {
    pub(super) heads: DeltaHeads,
    pub(super) bounds: Vec<usize>,
    pub(super) q: Vec<f64>,
    pub(super) k: Vec<f64>,
    pub(super) v: Vec<f64>,
    pub(super) g: Vec<f64>,
    pub(super) beta: Vec<f64>,
}

/// What follows: `out` as `v`, and the states `[sequences, value, K, V]`.
pub(super) struct Results {
    pub(super) out: Vec<f64>,
    pub(super) states: Vec<f64>,
}

/// Gradients, laid out as [`Inputs`].
pub(super) struct Gradients {
    pub(super) q: Vec<f64>,
    pub(super) k: Vec<f64>,
    pub(super) v: Vec<f64>,
    pub(super) g: Vec<f64>,
    pub(super) beta: Vec<f64>,
}

fn unit(x: &[f64]) -> (Vec<f64>, f64) {
    let factor = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
    (x.iter().map(|x| x * factor).collect(), factor)
}

fn unit_backward(y: &[f64], factor: f64, d: &[f64]) -> Vec<f64> {
    let along: f64 = y.iter().zip(d).map(|(y, d)| y * d).sum();
    y.iter().zip(d).map(|(y, d)| factor * (d - y * along)).collect()
}

impl Inputs {
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

    pub(super) fn forward(&self) -> Results {
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

    pub(super) fn backward(&self, d_out: &[f64]) -> Gradients {
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
