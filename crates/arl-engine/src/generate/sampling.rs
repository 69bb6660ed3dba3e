//! Which token follows: the most probable one, or one that is drawn.

/// How text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most new tokens of a sequence.
    pub max_new_tokens: usize,
    /// A sequence ends before the first of these.
    pub stop_ids: Vec<i32>,
    /// 0: the most probable token always, the first among equals. Above 0, tokens are drawn from
    /// `softmax(logits / temperature)`.
    pub temperature: f32,
    /// Draw from this many of the most probable tokens, and from those as probable as the last of them; 0: from all.
    pub top_k: usize,
    /// Draw from the fewest most probable tokens whose probabilities, after `top_k`, sum to this or more; 1: from all.
    pub top_p: f32,
    /// A drawn token depends on this seed, the prompt's index and the position in the sequence alone.
    pub seed: u64,
}

impl GenerateOptions {
    /// The most probable token always, until `max_new_tokens`.
    pub const fn greedy(max_new_tokens: usize) -> Self {
        Self { max_new_tokens, stop_ids: Vec::new(), temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// The token that follows; see [`GenerateOptions`].
pub(super) fn next_token(logits: &[f32], options: &GenerateOptions, prompt: usize, place: usize) -> i32 {
    let best = most_probable(logits);
    if options.temperature == 0.0 {
        return best as i32;
    }
    let weights = weights(logits, logits[best], options);
    let mut left = uniform(options.seed, prompt as u64, place as u64) * weights.iter().sum::<f64>();
    for (i, &weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return i as i32;
        }
    }
    best as i32
}

fn most_probable(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = i;
        }
    }
    best
}

/// Each token's probability times a constant; 0 for tokens that `top_k` or `top_p` leaves out. Filters in the order of
/// transformers: temperature, `top_k`, `top_p`. `highest`: the greatest logit.
fn weights(logits: &[f32], highest: f32, options: &GenerateOptions) -> Vec<f64> {
    let temperature = f64::from(options.temperature);
    let mut weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit - highest) / temperature).exp()).collect();
    if options.top_k > 0 && options.top_k < weights.len() {
        let mut sorted = weights.clone();
        let (_, &mut least, _) = sorted.select_nth_unstable_by(options.top_k - 1, |a, b| b.total_cmp(a));
        weights.iter_mut().filter(|weight| **weight < least).for_each(|weight| *weight = 0.0);
    }
    if options.top_p < 1.0 {
        keep_nucleus(&mut weights, f64::from(options.top_p));
    }
    weights
}

/// Zeroes all but the greatest weights that together hold a share of `top_p`; of equal weights the first count as greater.
fn keep_nucleus(weights: &mut [f64], top_p: f64) {
    let sum: f64 = weights.iter().sum();
    // All weights below this bound together hold less than the share that is left out, so they need no sorting.
    let bound = (1.0 - top_p) * sum / weights.len() as f64;
    let mut sorted: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] >= bound).collect();
    sorted.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    let mut kept = vec![0.0; weights.len()];
    let mut share = 0.0;
    for i in sorted {
        kept[i] = weights[i];
        share += weights[i];
        if share >= top_p * sum {
            break;
        }
    }
    weights.copy_from_slice(&kept);
}

/// A number in `[0, 1)` that belongs to its arguments (SplitMix64; Steele, Lea and Flood, 2014).
fn uniform(seed: u64, prompt: u64, place: u64) -> f64 {
    let mix = |mut x: u64| {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    (mix(mix(mix(seed) ^ prompt) ^ place) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn() -> GenerateOptions {
        GenerateOptions { temperature: 1.0, seed: 7, ..GenerateOptions::greedy(1) }
    }

    fn logits(n: u64) -> Vec<f32> {
        (0..n).map(|i| (8.0 * uniform(3, i, n) - 4.0) as f32).collect()
    }

    /// The distribution as transformers' processors define it, one after the other, each by sorting all tokens.
    fn plain(logits: &[f32], options: &GenerateOptions) -> Vec<f64> {
        let softmax = |scores: &[f64]| {
            let sum: f64 = scores.iter().map(|score| score.exp()).sum();
            scores.iter().map(|score| score.exp() / sum).collect::<Vec<_>>()
        };
        let mut scores: Vec<f64> = logits.iter().map(|&l| f64::from(l) / f64::from(options.temperature)).collect();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        if options.top_k > 0 && options.top_k < order.len() {
            let least = scores[order[options.top_k - 1]];
            scores.iter_mut().for_each(|score| {
                if *score < least {
                    *score = f64::NEG_INFINITY
                }
            });
        }
        let probabilities = softmax(&scores);
        for (rank, &i) in order.iter().enumerate().skip(1) {
            if order[..rank].iter().map(|&j| probabilities[j]).sum::<f64>() >= f64::from(options.top_p) {
                scores[i] = f64::NEG_INFINITY;
            }
        }
        softmax(&scores)
    }

    #[test]
    fn drawn_tokens_follow_the_plain_distribution() {
        for (temperature, top_k, top_p) in [
            (1.0, 0, 1.0),
            (0.6, 0, 1.0),
            (1.7, 5, 1.0),
            (1.0, 0, 0.8),
            (0.7, 20, 0.95),
            (1.3, 4, 0.5),
            (1.0, 1, 1.0),
            (1.0, 0, 1e-6),
        ] {
            let options = GenerateOptions { temperature, top_k, top_p, ..drawn() };
            let logits = logits(30);
            let expected = plain(&logits, &options);
            let weights = weights(&logits, logits[most_probable(&logits)], &options);
            let sum: f64 = weights.iter().sum();
            for (weight, expected) in weights.iter().zip(&expected) {
                assert!((weight / sum - expected).abs() < 1e-6, "{options:?}: {} instead of {expected}", weight / sum);
                assert_eq!(*weight == 0.0, *expected == 0.0, "{options:?}");
            }
            let draws = 20_000;
            let mut counts = vec![0.0; logits.len()];
            (0..draws).for_each(|place| counts[next_token(&logits, &options, 0, place) as usize] += 1.0);
            for (count, p) in counts.iter().zip(&expected) {
                let deviation = (f64::from(draws as u32) * p * (1.0 - p)).sqrt();
                assert!(
                    (count - f64::from(draws as u32) * p).abs() <= 5.0 * deviation,
                    "{options:?}: {count} draws, p {p}"
                );
                assert!(*p > 0.0 || *count == 0.0, "{options:?}: drew a token that is left out");
            }
        }
    }

    #[test]
    fn equal_logits_stay_together_in_top_k_and_in_order_in_top_p() {
        let equal = [1.0f32; 6];
        let kept = |top_k, top_p| {
            let options = GenerateOptions { top_k, top_p, ..drawn() };
            weights(&equal, 1.0, &options).iter().map(|&weight| weight > 0.0).collect::<Vec<_>>()
        };
        assert_eq!(kept(2, 1.0), [true; 6]);
        assert_eq!(kept(0, 0.4), [true, true, true, false, false, false]);
    }

    #[test]
    fn large_vocabularies_have_the_plain_nucleus() {
        let logits = logits(3000);
        for top_p in [0.1, 0.5, 0.9, 0.999] {
            let options = GenerateOptions { top_p, temperature: 0.8, ..drawn() };
            let kept = weights(&logits, logits[most_probable(&logits)], &options);
            let expected = plain(&logits, &options);
            assert!(kept.iter().zip(&expected).all(|(kept, expected)| (*kept > 0.0) == (*expected > 0.0)), "{top_p}");
        }
    }
}
