//! The mixture of experts.

use arl_engine::backend::{DType, Permutation, Router};

use super::super::draw::TOKENS;
use super::super::trial::{Scene, Trial};

/// Tokens, experts, experts a token.
fn shape(s: &mut Scene) -> (usize, usize, usize) {
    let most = s.draw.scaled(60, 400, TOKENS);
    let tokens = s.draw.extent(8, most);
    if s.draw.as_in_a_step() {
        return (tokens, 128, 8);
    }
    let most = s.draw.scaled(80, 300, 128);
    let experts = s.draw.between(4, most);
    (tokens, experts, s.draw.between(1, experts.min(8)))
}

/// Different experts for each token.
fn choices(s: &mut Scene, tokens: usize, experts: usize, top_k: usize) -> Vec<usize> {
    (0..tokens).flat_map(|_| s.draw.order(experts)[..top_k].to_vec()).collect()
}

/// Logits that are clearly apart, so that the choice does not hang on a rounding.
fn logits(s: &mut Scene, tokens: usize, experts: usize) -> Vec<f64> {
    let step = 6.0 / experts as f64;
    (0..tokens).flat_map(|_| s.draw.order(experts)).map(|rank| step * rank as f64 - 3.0).collect()
}

pub(super) fn router(mut s: Scene) -> Trial {
    let (tokens, experts, top_k) = shape(&mut s);
    let logits = logits(&mut s, tokens, experts);
    let logits = s.put(&logits, DType::F32);
    let balance = s.draw.coin().then(|| {
        let before = s.random_of(2 * experts, DType::F32);
        s.updated("balance", before)
    });
    let op = Router {
        tokens,
        experts,
        top_k,
        normalise: s.draw.coin(),
        probabilities: s.output("probabilities", tokens * experts, DType::F32),
        experts_chosen: s.exact("experts_chosen", tokens * top_k, DType::I32),
        weights: s.output("weights", tokens * top_k, DType::F32),
    };
    let what = format!("{tokens} tokens, {top_k} of {experts}, balance {}", balance.is_some());
    s.trial(what, move |backend| backend.router(&op, logits, balance))
}

/// From the forward pass of the same backend, as in a step.
pub(super) fn router_backward(mut s: Scene) -> Trial {
    let (tokens, experts, top_k) = shape(&mut s);
    // One expert has weight 1 whatever its logit, and the gradient is nothing but rounding.
    let top_k = top_k.max(2);
    let logits = logits(&mut s, tokens, experts);
    let logits = s.put(&logits, DType::F32);
    let op = Router {
        tokens,
        experts,
        top_k,
        normalise: s.draw.coin(),
        probabilities: s.scratch(tokens * experts, DType::F32),
        experts_chosen: s.scratch(tokens * top_k, DType::I32),
        weights: s.scratch(tokens * top_k, DType::F32),
    };
    let d_weights = s.random_of(tokens * top_k, DType::F32);
    let balance = s.draw.coin().then(|| (s.random_of(2 * experts, DType::F32), 0.3));
    let d_logits = s.output("d_logits", tokens * experts, DType::F32);
    let what = format!("{tokens} tokens, {top_k} of {experts}, balance {}", balance.is_some());
    s.trial(what, move |backend| {
        backend.router(&op, logits, None);
        backend.router_backward(&op, d_weights, balance, d_logits);
    })
}

/// Offsets, pairs and rows of choices sorted by expert.
fn sorted(choices: &[usize], experts: usize) -> [Vec<usize>; 3] {
    let mut pairs: Vec<usize> = (0..choices.len()).collect();
    pairs.sort_by_key(|pair| choices[*pair]);
    let offsets = (0..=experts).map(|e| choices.iter().filter(|choice| **choice < e).count()).collect();
    let mut rows = vec![0; pairs.len()];
    pairs.iter().enumerate().for_each(|(row, pair)| rows[*pair] = row);
    [offsets, pairs, rows]
}

pub(super) fn permute(mut s: Scene) -> Trial {
    let (tokens, experts, top_k) = shape(&mut s);
    let choices = choices(&mut s, tokens, experts, top_k);
    let op = Router {
        tokens,
        experts,
        top_k,
        normalise: true,
        probabilities: s.scratch(tokens * experts, DType::F32),
        experts_chosen: s.ints(&choices),
        weights: s.scratch(tokens * top_k, DType::F32),
    };
    let permutation = Permutation {
        offsets: s.exact("offsets", experts + 1, DType::I32),
        pairs: s.exact("pairs", tokens * top_k, DType::I32),
        rows: s.exact("rows", tokens * top_k, DType::I32),
    };
    s.trial(format!("{tokens} tokens, {top_k} of {experts}"), move |backend| backend.permute(&op, &permutation))
}

/// Tokens, experts a token, and the places of their pairs.
fn permutation(s: &mut Scene) -> (usize, usize, Permutation) {
    let (tokens, experts, top_k) = shape(s);
    let choices = choices(s, tokens, experts, top_k);
    let [offsets, pairs, rows] = sorted(&choices, experts).map(|values| s.ints(&values));
    (tokens, top_k, Permutation { offsets, pairs, rows })
}

fn width(s: &mut Scene) -> usize {
    let most = s.draw.scaled(200, 2200, 2048);
    s.draw.extent(8, most)
}

pub(super) fn combine(mut s: Scene) -> Trial {
    let (tokens, top_k, permutation) = permutation(&mut s);
    let width = width(&mut s);
    let x = s.random(tokens * top_k * width);
    let weights = s.draw.coin().then(|| s.random_of(tokens * top_k, DType::F32));
    let out = s.output("out", tokens * width, s.dtype);
    let what = format!("{tokens} tokens, {top_k} rows of {width}, weights {}", weights.is_some());
    s.trial(what, move |backend| backend.combine(x, &permutation, weights, top_k, width, out))
}

pub(super) fn combine_backward(mut s: Scene) -> Trial {
    let (tokens, top_k, permutation) = permutation(&mut s);
    let width = width(&mut s);
    let (d_out, x) = (s.random(tokens * width), s.random(tokens * top_k * width));
    let weights = s.random_of(tokens * top_k, DType::F32);
    let d_x = s.output("d_x", x.len, s.dtype);
    let d_weights = s.output("d_weights", tokens * top_k, DType::F32);
    s.trial(format!("{tokens} tokens, {top_k} rows of {width}"), move |backend| {
        backend.combine_backward(d_out, x, &permutation, weights, top_k, width, d_x, d_weights);
    })
}
