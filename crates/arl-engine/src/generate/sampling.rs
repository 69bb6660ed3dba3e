//! Which token follows: the most probable one, or one that is drawn.

/// How text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Most new tokens of a sequence.
    pub max_new_tokens: usize,
    /// A sequence ends before the first of these.
    pub stop_ids: Vec<i32>,
    /// 0: the most probable token always, the first among equals. Else tokens are drawn from
    /// `softmax(logits / temperature)`.
    pub temperature: f32,
    /// What is drawn depends on this, the prompt's index and the place in the sequence alone.
    pub seed: u64,
}

/// The token that follows; see [`GenerateOptions`].
pub(super) fn next_token(logits: &[f32], options: &GenerateOptions, prompt: usize, place: usize) -> i32 {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = i;
        }
    }
    if options.temperature == 0.0 {
        return best as i32;
    }
    let weight = |logit: f32| (f64::from(logit - logits[best]) / f64::from(options.temperature)).exp();
    let sum: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    let mut left = uniform(options.seed, prompt as u64, place as u64) * sum;
    for (i, &logit) in logits.iter().enumerate() {
        left -= weight(logit);
        if left < 0.0 {
            return i as i32;
        }
    }
    best as i32
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
