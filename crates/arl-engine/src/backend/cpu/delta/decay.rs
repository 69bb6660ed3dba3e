//! How much each token forgets and writes, and what follows of it within a chunk: the decay between two tokens, and the
//! inverse of the matrix by which the tokens' writes depend on each other. Knows scalars of one head, no keys or values.

use rayon::prelude::*;

use crate::backend::cpu::element::Element;
use crate::backend::cpu::memory::Shared;

/// Above this softplus is its argument, as in torch.
const LINEAR: f32 = 20.0;
/// A decay below this counts as none left: it is far below a rounding, and products of subnormal numbers are slow.
const FORGOTTEN: f32 = 1e-30;
/// Columns of a block of the inverse, and rows that are computed together.
const COLUMNS: usize = 16;
const ROWS: usize = 8;

/// `[heads, T]` each, in f32.
#[derive(Clone, Copy)]
pub(super) struct Gates<'a> {
    /// Logarithm of the decay, at most 0.
    pub(super) g: &'a [f32],
    /// Strength of the write, from 0 to 1.
    pub(super) beta: &'a [f32],
}

/// The parameters of the gates, `[heads]` each.
pub(super) struct Rates<'a> {
    pub(super) a_log: &'a [f32],
    pub(super) dt_bias: &'a [f32],
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f32) -> f32 {
    if x > LINEAR { x } else { x.exp().ln_1p() }
}

/// `g = -exp(a_log) softplus(a + dt_bias)` and `beta = sigmoid(b)` from rows `b`, `a` that are `stride` apart.
pub(super) fn gates<T: Element>(rates: &Rates<'_>, (rows, stride): (&[T], usize), g: &mut [f32], beta: &mut [f32]) {
    let count = rates.a_log.len();
    let tokens = g.len() / count;
    let heads = g.par_chunks_mut(tokens.max(1)).zip(beta.par_chunks_mut(tokens.max(1)));
    heads.enumerate().for_each(|(head, (g, beta))| {
        let (rate, bias) = (rates.a_log[head].exp(), rates.dt_bias[head]);
        for (t, (g, beta)) in g.iter_mut().zip(beta).enumerate() {
            *g = -rate * softplus(rows[t * stride + count + head].load() + bias);
            *beta = sigmoid(rows[t * stride + head].load());
        }
    });
}

/// `rows` become their own gradient, from those of the gates; those of `a_log` and `dt_bias` are added to.
pub(super) fn gates_backward<T: Element>(
    rates: &Rates<'_>,
    gates: Gates<'_>,
    (d_g, d_beta): (&[f32], &[f32]),
    (rows, stride): (&mut [T], usize),
    (d_a_log, d_dt_bias): (&mut [f32], &mut [f32]),
) {
    let count = rates.a_log.len();
    let tokens = gates.g.len() / count;
    let rows = Shared::new(rows);
    let sums: Vec<(f64, f64)> = (0..count)
        .into_par_iter()
        .map(|head| {
            let (rate, bias) = (rates.a_log[head].exp(), rates.dt_bias[head]);
            let (mut of_log, mut of_bias) = (0.0, 0.0);
            for t in 0..tokens {
                let at = head * tokens + t;
                // SAFETY: each (token, head) belongs to one task, and the two elements are apart.
                let [b, a] = [head, count + head].map(|column| unsafe { &mut rows.part(t * stride + column, 1)[0] });
                let x = a.load() + bias;
                let slope = if x > LINEAR { 1.0 } else { sigmoid(x) };
                let d_a = d_g[at] * -rate * slope;
                of_log += f64::from(d_g[at] * gates.g[at]);
                of_bias += f64::from(d_a);
                *a = T::store(d_a);
                *b = T::store(d_beta[at] * gates.beta[at] * (1.0 - gates.beta[at]));
            }
            (of_log, of_bias)
        })
        .collect();
    for (head, (of_log, of_bias)) in sums.into_iter().enumerate() {
        d_a_log[head] += of_log as f32;
        d_dt_bias[head] += of_bias as f32;
    }
}

/// `d[i, j] = e^(g_(j+1) + ... + g_i)` for `j <= i`, else 0: row `i` from the row before it, so that nothing overflows where a
/// head forgets at once, and no difference of large sums is formed. `e[i] = e^(g_0 + ... + g_i)`. The rows of `d` are `stride` apart.
#[inline(always)]
pub(super) fn decay(g: &[f32], (d, stride): (&mut [f32], usize), e: &mut [f32]) {
    let mut whole = 1.0_f32;
    for (i, g) in g.iter().enumerate() {
        let factor = f64::from(*g).exp() as f32;
        whole = kept(whole * factor);
        e[i] = whole;
        let (before, row) = d.split_at_mut(i * stride);
        if i > 0 {
            for (x, before) in row[..i].iter_mut().zip(&before[(i - 1) * stride..]) {
                *x = kept(before * factor);
            }
        }
        row[i] = 1.0;
        row[i + 1..stride].fill(0.0);
    }
}

#[inline(always)]
fn kept(x: f32) -> f32 {
    if x < FORGOTTEN { 0.0 } else { x }
}

/// The inverse of `I + m`, where `m` is strictly lower-triangular, `[n, n]`: a block of columns after the other by forward
/// substitution. Rows are `stride` apart, a multiple of 16, and `m` and `inverse` have `stride` of them.
#[inline(always)]
pub(super) fn invert(m: &[f32], inverse: &mut [f32], n: usize, stride: usize) {
    for column in (0..n).step_by(COLUMNS) {
        for row in inverse.chunks_exact_mut(stride).take(column) {
            row[column..column + COLUMNS].fill(0.0);
        }
        for first in (column..n).step_by(ROWS) {
            let mut sums = [[0.0_f32; COLUMNS]; ROWS];
            for j in column..first {
                let (x, _) = inverse[j * stride + column..].as_chunks::<COLUMNS>();
                for (i, sum) in sums.iter_mut().enumerate() {
                    let factor = m[(first + i) * stride + j];
                    for (sum, x) in sum.iter_mut().zip(&x[0]) {
                        *sum = factor.mul_add(*x, *sum);
                    }
                }
            }
            for (i, sum) in sums.iter_mut().enumerate().take(n - first) {
                let row = first + i;
                for j in first..row {
                    let factor = m[row * stride + j];
                    for (sum, x) in sum.iter_mut().zip(&inverse[j * stride + column..]) {
                        *sum = factor.mul_add(*x, *sum);
                    }
                }
                for (lane, (x, sum)) in inverse[row * stride + column..].iter_mut().zip(&*sum).enumerate() {
                    *x = if row == column + lane { 1.0 - sum } else { -sum };
                }
            }
        }
    }
}
