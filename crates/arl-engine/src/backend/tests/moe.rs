//! The mixture of experts.

use super::*;
use crate::backend::{Permutation, Router};

fn softmax(logits: &[f64]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|x| x.exp()).sum();
    logits.iter().map(|x| x.exp() / total).collect()
}

/// Experts by falling probability, the lower index first among equals.
fn order(logits: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    order
}

fn weights(logits: &[f64], chosen: &[usize], normalise: bool) -> Vec<f64> {
    let probabilities = softmax(logits);
    let picked: Vec<f64> = chosen.iter().map(|expert| probabilities[*expert]).collect();
    let total = if normalise { picked.iter().sum() } else { 1.0 };
    picked.iter().map(|p| p / total).collect()
}

fn router(fixture: &mut Fixture, tokens: usize, experts: usize, top_k: usize, normalise: bool) -> Router {
    Router {
        tokens,
        experts,
        top_k,
        normalise,
        probabilities: fixture.poisoned(tokens * experts, DType::F32),
        experts_chosen: fixture.poisoned(tokens * top_k, DType::I32),
        weights: fixture.poisoned(tokens * top_k, DType::F32),
    }
}

const SHAPES: [(usize, usize, usize); 6] = [(1, 1, 1), (3, 4, 1), (5, 4, 4), (9, 33, 8), (20, 300, 40), (700, 64, 8)];

#[test]
fn the_router_chooses_the_most_probable() {
    let mut random = Random(60);
    for normalise in [false, true] {
        for (tokens, experts, top_k) in SHAPES {
            let mut fixture = Fixture::new();
            let logits = random.values(tokens * experts, DType::F32);
            let before = random.values(2 * experts, DType::F32);
            let op = router(&mut fixture, tokens, experts, top_k, normalise);
            let (logits_buffer, balance) = (fixture.put(&logits, DType::F32), fixture.put(&before, DType::F32));
            fixture.backend.router(&op, logits_buffer, Some(balance));
            let mut balance_expected = before;
            let (mut chosen, mut expected) = (Vec::new(), Vec::new());
            for logits in logits.chunks(experts) {
                let row = &order(logits)[..top_k];
                chosen.extend(row.iter().map(|x| *x as f64));
                expected.extend(weights(logits, row, normalise));
                for expert in row {
                    balance_expected[*expert] += 1.0;
                }
                for (expert, p) in softmax(logits).iter().enumerate() {
                    balance_expected[experts + expert] += p;
                }
            }
            assert_eq!(fixture.get(op.experts_chosen), chosen);
            assert_close("weights", &fixture.get(op.weights), &expected, 1e-6);
            let probabilities: Vec<f64> = logits.chunks(experts).flat_map(softmax).collect();
            assert_close("probabilities", &fixture.get(op.probabilities), &probabilities, 1e-6);
            assert_close("balance", &fixture.get(balance), &balance_expected, 2e-6);
        }
    }
}

#[test]
fn the_lower_index_wins_among_equals() {
    let mut fixture = Fixture::new();
    let op = router(&mut fixture, 2, 5, 3, false);
    let logits = fixture.put(&[1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 3.0, 2.0, 2.0], DType::F32);
    fixture.backend.router(&op, logits, None);
    assert_eq!(fixture.get(op.experts_chosen), [0.0, 1.0, 2.0, 2.0, 1.0, 3.0]);
}

/// Rows are found by what the router chose, before anyone sees that a loss is not finite.
#[test]
fn logits_that_are_not_numbers_still_choose_experts_that_there_are() {
    let mut fixture = Fixture::new();
    let op = router(&mut fixture, 3, 5, 3, true);
    let mut logits = [0.5; 15];
    logits[1] = f64::NAN;
    logits[7] = f64::INFINITY;
    logits[10..].fill(f64::NEG_INFINITY);
    let logits = fixture.put(&logits, DType::F32);
    fixture.backend.router(&op, logits, None);
    assert_eq!(fixture.get(op.experts_chosen), [0.0, 1.0, 2.0].repeat(3));
}

#[test]
fn the_routers_gradient_is_the_derivative() {
    let mut random = Random(61);
    for normalise in [false, true] {
        for (tokens, experts, top_k) in [(1, 1, 1), (3, 4, 1), (5, 4, 4), (9, 33, 8), (3, 200, 5)] {
            for balanced in [false, true] {
                let mut fixture = Fixture::new();
                let logits = random.values(tokens * experts, DType::F32);
                let d_weights = random.values(tokens * top_k, DType::F32);
                let (counts, factor) = (random.values(2 * experts, DType::F32), 0.3_f32);
                let chosen: Vec<Vec<usize>> =
                    logits.chunks(experts).map(|logits| order(logits)[..top_k].to_vec()).collect();
                let expected = differences(&logits, |logits| {
                    let rows = logits.chunks(experts).zip(&chosen).zip(d_weights.chunks(top_k));
                    rows.map(|((logits, chosen), d)| {
                        let own = inner(&weights(logits, chosen, normalise), d);
                        let balance = f64::from(factor) * inner(&softmax(logits), &counts);
                        own + if balanced { balance } else { 0.0 }
                    })
                    .sum()
                });
                let op = router(&mut fixture, tokens, experts, top_k, normalise);
                let logits = fixture.put(&logits, DType::F32);
                fixture.backend.router(&op, logits, None);
                let d_weights = fixture.put(&d_weights, DType::F32);
                let counts = fixture.put(&counts, DType::F32);
                let d_logits = fixture.poisoned(tokens * experts, DType::F32);
                fixture.backend.router_backward(&op, d_weights, balanced.then_some((counts, factor)), d_logits);
                let scale = expected.iter().fold(0.0_f64, |a, b| a.max(b.abs())).max(0.1);
                for (actual, expected) in fixture.get(d_logits).iter().zip(&expected) {
                    assert!((actual - expected).abs() <= 2e-6 * scale, "{actual} instead of {expected}");
                }
            }
        }
    }
}

struct Sorted {
    permutation: Permutation,
    rows: Vec<usize>,
}

fn sort(fixture: &mut Fixture, random: &mut Random, tokens: usize, experts: usize, top_k: usize) -> Sorted {
    let op = router(fixture, tokens, experts, top_k, true);
    let logits = random.values(tokens * experts, DType::F32);
    let logits = fixture.put(&logits, DType::F32);
    fixture.backend.router(&op, logits, None);
    let permutation = Permutation {
        offsets: fixture.poisoned(experts + 1, DType::I32),
        pairs: fixture.poisoned(tokens * top_k, DType::I32),
        rows: fixture.poisoned(tokens * top_k, DType::I32),
    };
    fixture.backend.permute(&op, &permutation);
    let chosen = fixture.get(op.experts_chosen);
    let mut pairs: Vec<usize> = (0..chosen.len()).collect();
    pairs.sort_by(|a, b| chosen[*a].total_cmp(&chosen[*b]));
    assert_eq!(fixture.get(permutation.pairs), pairs.iter().map(|x| *x as f64).collect::<Vec<_>>());
    let offsets: Vec<f64> =
        (0..=experts).map(|e| chosen.iter().filter(|x| (**x as usize) < e).count() as f64).collect();
    assert_eq!(fixture.get(permutation.offsets), offsets);
    let mut rows = vec![0; pairs.len()];
    for (row, pair) in pairs.iter().enumerate() {
        rows[*pair] = row;
    }
    assert_eq!(fixture.get(permutation.rows), rows.iter().map(|x| *x as f64).collect::<Vec<_>>());
    Sorted { permutation, rows }
}

#[test]
fn pairs_are_sorted_by_expert_and_combined_by_token() {
    let mut random = Random(62);
    for dtype in TYPES {
        for ((tokens, experts, top_k), width) in SHAPES.into_iter().zip([1, 1100, 2056, 64, 7, 40]) {
            let mut fixture = Fixture::new();
            let sorted = sort(&mut fixture, &mut random, tokens, experts, top_k);
            let x = random.values(tokens * top_k * width, dtype);
            let weights = random.values(tokens * top_k, DType::F32);
            let combined = |weight: &dyn Fn(usize) -> f64| -> Vec<f64> {
                let pairs = |t: usize| t * top_k..(t + 1) * top_k;
                let value = |t: usize, i: usize| pairs(t).map(|p| weight(p) * x[sorted.rows[p] * width + i]).sum();
                (0..tokens).flat_map(|t| (0..width).map(move |i| (t, i))).map(|(t, i)| value(t, i)).collect()
            };
            let x_buffer = fixture.put(&x, dtype);
            let out = fixture.poisoned(tokens * width, dtype);
            fixture.backend.combine(x_buffer, &sorted.permutation, None, top_k, width, out);
            assert_close("plain sums", &fixture.get(out), &combined(&|_| 1.0), bound(dtype, 2.0).max(5e-7));
            let weights_buffer = fixture.put(&weights, DType::F32);
            let out = fixture.poisoned(tokens * width, dtype);
            fixture.backend.combine(x_buffer, &sorted.permutation, Some(weights_buffer), top_k, width, out);
            assert_close("weighted", &fixture.get(out), &combined(&|p| weights[p]), bound(dtype, 2.0).max(5e-7));

            let d_out = random.values(tokens * width, dtype);
            let (mut d_x, mut d_weights) = (vec![0.0; x.len()], vec![0.0; weights.len()]);
            for (pair, row) in sorted.rows.iter().enumerate() {
                let d = &d_out[pair / top_k * width..][..width];
                d_weights[pair] = inner(d, &x[row * width..][..width]);
                for (d_x, d) in d_x[row * width..].iter_mut().zip(d) {
                    *d_x = weights[pair] * d;
                }
            }
            let d_out = fixture.put(&d_out, dtype);
            let actual_x = fixture.poisoned(x.len(), dtype);
            let actual_weights = fixture.poisoned(weights.len(), DType::F32);
            let permutation = &sorted.permutation;
            fixture.backend.combine_backward(
                d_out,
                x_buffer,
                permutation,
                weights_buffer,
                top_k,
                width,
                actual_x,
                actual_weights,
            );
            assert_close("d_x", &fixture.get(actual_x), &d_x, bound(dtype, 2.0));
            assert_close("d_weights", &fixture.get(actual_weights), &d_weights, 2e-6);
        }
    }
}
