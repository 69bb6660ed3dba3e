//! The classifier pass and the optimizer.

use arl_engine::backend::{AdamW, Buffer, CrossEntropy, DType, Rows, StochasticRounding, split_master};

use super::super::draw::Size;
use super::super::trial::{Scene, Trial};

/// Vocabulary of the Qwen models.
const VOCAB: usize = 151_936;

/// Over f32 logits, as in a step. The gradient has the type that the backend chooses.
pub(super) fn cross_entropy(mut s: Scene) -> Trial {
    let full = s.draw.as_in_a_step() || (s.draw.size == Size::Chip && s.draw.below(4) == 0);
    let most = s.draw.scaled(3000, 40_000, VOCAB);
    let vocab = if full { VOCAB } else { s.draw.extent(64, most) };
    // A block has a row: four rows for each multiprocessor of a large GPU.
    let most = s.draw.scaled(40, if full { 4 } else { 40 }, 512);
    let rows = if s.draw.as_in_a_step() { most } else { s.draw.between(1, most) };
    let values: Vec<f64> = s.draw.values(rows * vocab).iter().map(|x| 3.0 * x).collect();
    let targets: Vec<usize> = (0..rows).map(|_| s.draw.below(vocab)).collect();
    let weights: Vec<f64> = (0..rows).map(|_| s.draw.pick(&[1.0, 1.0, 0.5, 2.0])).collect();
    let training = s.draw.below(3) > 0;
    let logits = s.put(&values, DType::F32);
    if training {
        s.logits(logits, rows, vocab);
    }
    let op = CrossEntropy {
        rows,
        vocab,
        logits,
        targets: s.ints(&targets),
        weights: s.put(&weights, DType::F32),
        scale: 0.25,
        gradient: None,
        nll: s.output("nll", rows, DType::F32),
        correct: s.exact("correct", rows, DType::F32),
        entropy: s.output("entropy", rows, DType::F32),
    };
    let activations = s.dtype;
    s.trial(format!("{rows} rows of {vocab}, gradient {training}"), move |backend| {
        let gradient = training.then(|| {
            let buffer = logits.view(backend.logits_gradient(activations));
            Rows { buffer, stride: buffer.len / rows }
        });
        backend.cross_entropy(&CrossEntropy { gradient, ..op });
    })
}

/// One norm that stays, and one that becomes NaN, because a loss or a balance loss is not finite.
pub(super) fn guard(mut s: Scene) -> Trial {
    let (rows, stride, count) = (s.draw.between(1, 40), s.draw.between(1, 4), s.draw.between(2, 80));
    let (losses, balances) = (s.draw.values(rows * stride), s.draw.values(count));
    let with_balances = s.draw.below(2) == 0;
    let wrong = s.draw.pick(&[f64::INFINITY, f64::NEG_INFINITY, f64::NAN]);
    let (mut wrong_losses, mut wrong_balances) = (losses.clone(), balances.clone());
    if with_balances && s.draw.below(2) == 0 {
        wrong_balances[s.draw.below(count)] = wrong;
    } else {
        wrong_losses[stride * s.draw.below(rows)] = wrong;
    }
    let mut call = |losses: &[f64], balances: &[f64], norm: f64| {
        let losses = Rows { buffer: s.put(losses, DType::F64), stride };
        let balances = with_balances.then(|| s.put(balances, DType::F32));
        let norm = s.put(&[norm], DType::F64);
        (losses, balances, s.updated_exactly("norm_squared", norm))
    };
    let calls = [call(&losses, &balances, 4.0), call(&wrong_losses, &wrong_balances, 9.0)];
    s.trial(format!("{rows} losses {stride} apart, {count} balances {with_balances}, {wrong}"), move |backend| {
        for (losses, balances, norm_squared) in calls {
            backend.guard(losses, balances, norm_squared);
        }
    })
}

/// Weights of the scene's type, and what makes them exact, as results.
fn weights(s: &mut Scene, len: usize) -> (Buffer, Option<Buffer>) {
    let exact = s.draw.values(len);
    match s.dtype {
        DType::Bf16 if s.draw.coin() => {
            let weights = s.put(&exact, DType::Bf16);
            (s.updated_exactly("weights", weights), None)
        }
        DType::Bf16 => {
            let halves: Vec<(u16, u16)> = exact.iter().map(|x| split_master(*x as f32)).collect();
            let high: Vec<f64> =
                halves.iter().map(|(high, _)| f64::from(f32::from_bits(u32::from(*high) << 16))).collect();
            let low: Vec<f64> = halves.iter().map(|(_, low)| f64::from(*low)).collect();
            let (high, low) = (s.put(&high, DType::Bf16), s.put(&low, DType::U16));
            s.updated_master("weights", high, low);
            (high, Some(low))
        }
        DType::F16 => {
            let masters = s.put(&exact, DType::F32);
            (s.output("weights", len, DType::F16), Some(s.updated("masters", masters)))
        }
        dtype => {
            let weights = s.put(&exact, dtype);
            (s.updated("weights", weights), None)
        }
    }
}

pub(super) fn adamw(mut s: Scene) -> Trial {
    let most = s.draw.scaled(20_000, 300_000, 1 << 26);
    let len = s.draw.extent(32, most);
    let (weights, masters) = weights(&mut s, len);
    let bf16_moments = s.draw.coin();
    // Where the parameters' numbers pass 2^32 too.
    let first = s.draw.pick(&[0, 12_345, (1 << 32) - 100]);
    let rounding = StochasticRounding::new(s.draw.below(1000) as u64, 7).from(first);
    let gradients = s.random_of(len, DType::F32);
    let squares: Vec<f64> = s.draw.values(len).iter().map(|x| x * x).collect();
    let moment = |s: &mut Scene, name, values: &[f64]| {
        let buffer = s.put(values, if bf16_moments { DType::Bf16 } else { DType::F32 });
        if bf16_moments { s.updated_exactly(name, buffer) } else { s.updated(name, buffer) }
    };
    let first_moments = s.draw.values(len);
    let moment1 = moment(&mut s, "moment1", &first_moments);
    let moment2 = moment(&mut s, "moment2", &squares);
    let step = s.draw.between(1, 2000) as i32;
    let (beta1, beta2) = (0.9f32, 0.95f32);
    let op = AdamW {
        weights,
        masters,
        rounding,
        gradients,
        moment1,
        moment2,
        learning_rate: s.draw.pick(&[1e-2, 1e-5, 0.0]),
        beta1,
        beta2,
        epsilon: 1e-8,
        weight_decay: s.draw.pick(&[0.0, 0.1]),
        bias_correction1: 1.0 - beta1.powi(step),
        bias_correction2: 1.0 - beta2.powi(step),
        grad_norm_squared: s.put(&[len as f64], DType::F64),
        gradient_scale: s.draw.pick(&[1.0, 1024.0]),
        max_grad_norm: s.draw.pick(&[0.0, 1.0, 1e6]),
    };
    let what = format!(
        "{len} parameters, step {step}, clipped at {}, masters {}, bf16 moments {bf16_moments}",
        op.max_grad_norm,
        masters.is_some()
    );
    s.trial(what, move |backend| backend.adamw(&op))
}
