//! The classifier pass.

use super::*;
use crate::backend::CrossEntropy;

struct Row {
    nll: f64,
    correct: f64,
    entropy: f64,
    probabilities: Vec<f64>,
}

fn reference(logits: &[f64], target: usize) -> Row {
    let max = logits.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let total: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let log_sum_exp = max + total.ln();
    let probabilities: Vec<f64> = logits.iter().map(|x| (x - log_sum_exp).exp()).collect();
    let terms = probabilities.iter().map(|p| if *p > 0.0 { -p * p.ln() } else { 0.0 });
    Row {
        nll: log_sum_exp - logits[target],
        correct: if logits.iter().position(|x| *x == max) == Some(target) { 1.0 } else { 0.0 },
        entropy: terms.sum(),
        probabilities,
    }
}

struct Pass {
    /// Or their gradient.
    logits: Vec<f64>,
    nll: Vec<f64>,
    correct: Vec<f64>,
    entropy: Vec<f64>,
}

const SCALE: f32 = 0.25;

fn run(logits: &[f64], vocab: usize, targets: &[usize], weights: &[f64], dtype: DType, gradient: bool) -> Pass {
    pass(&mut Fixture::new(), logits, vocab, targets, weights, dtype, gradient.then_some(dtype))
}

/// The pass over logits of `dtype`; the gradient, if any, is of type `gradient`.
fn pass(
    fixture: &mut Fixture,
    logits: &[f64],
    vocab: usize,
    targets: &[usize],
    weights: &[f64],
    dtype: DType,
    gradient: Option<DType>,
) -> Pass {
    let count = targets.len();
    let logits = fixture.put(logits, dtype);
    let gradient = gradient.map(|dtype| {
        let stride = vocab * logits.dtype.bytes() / dtype.bytes();
        rows(logits.view(dtype), stride)
    });
    let op = CrossEntropy {
        rows: count,
        vocab,
        logits,
        targets: fixture.ints(targets),
        weights: fixture.put(weights, DType::F32),
        scale: SCALE,
        gradient,
        nll: fixture.poisoned(count, DType::F32),
        correct: fixture.poisoned(count, DType::F32),
        entropy: fixture.poisoned(count, DType::F32),
    };
    fixture.backend.cross_entropy(&op);
    let logits = match gradient {
        None => fixture.get(logits),
        // The rows without what is between them.
        Some(rows) => {
            let all = fixture.get(rows.buffer);
            all.chunks(rows.stride).flat_map(|row| &row[..vocab]).copied().collect()
        }
    };
    Pass { logits, nll: fixture.get(op.nll), correct: fixture.get(op.correct), entropy: fixture.get(op.entropy) }
}

/// Asserts that a row of gradients of `dtype` is `weight * SCALE * (probabilities - one_hot(target))`.
#[track_caller]
fn assert_gradient(actual: &[f64], row: &Row, target: usize, weight: f64, dtype: DType) {
    let factor = weight * f64::from(SCALE);
    for (i, (actual, p)) in actual.iter().zip(&row.probabilities).enumerate() {
        let expected = factor * (p - if i == target { 1.0 } else { 0.0 });
        let allowed = bound(dtype, 1.0).max(2e-6) * expected.abs() + 1e-7 * factor + least(dtype);
        assert!((actual - expected).abs() <= allowed, "{i}: {actual} instead of {expected}");
    }
}

#[test]
fn loss_accuracy_entropy_and_gradient_are_the_reference() {
    let mut random = Random(40);
    for dtype in TYPES {
        for (rows, vocab, size) in
            [(0, 4, 1.0), (1, 1, 1.0), (3, 2, 1.0), (5, 33, 3.0), (3, 1024, 1.0), (4, 16_384, 4.0), (2, 50_003, 2.0)]
        {
            let logits: Vec<f64> = random.values(rows * vocab, dtype).iter().map(|x| round(size * x, dtype)).collect();
            let mut targets: Vec<usize> = (0..rows).map(|_| random.below(vocab)).collect();
            if let Some(first) = targets.first_mut() {
                // One row is right.
                let row = &logits[..vocab];
                *first = (0..vocab).reduce(|a, b| if row[b] > row[a] { b } else { a }).unwrap();
            }
            let weights: Vec<f64> = (0..rows).map(|row| [1.0, 0.5, 0.0, 2.0][row % 4]).collect();
            let pass = run(&logits, vocab, &targets, &weights, dtype, true);
            for row in 0..rows {
                let logits = &logits[row * vocab..][..vocab];
                let expected = reference(logits, targets[row]);
                // One part in a million, or the rounding of the greatest logit where the loss is near 0.
                assert!((pass.nll[row] - expected.nll).abs() <= 1e-6 * expected.nll + 1e-7, "{row}: {}", pass.nll[row]);
                assert_eq!(pass.correct[row], expected.correct);
                assert!((pass.entropy[row] - expected.entropy).abs() <= 1e-6 * expected.entropy + 1e-7);
                assert_gradient(&pass.logits[row * vocab..][..vocab], &expected, targets[row], weights[row], dtype);
            }
            let kept = run(&logits, vocab, &targets, &weights, dtype, false);
            assert_eq!(kept.logits, logits, "without a gradient, the logits are left");
            assert_eq!(kept.nll, pass.nll);
        }
    }
}

/// What rounding its logits does to a row: the log of a sum of exponentials moves no farther than the farthest logit, and the
/// target's own logit moves too; a probability changes by a factor of as much.
#[test]
fn logits_of_16_bits_are_as_far_from_f32_ones_as_their_rounding() {
    let mut random = Random(43);
    const VOCAB: usize = 5003;
    for (dtype, unit) in [(DType::Bf16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))] {
        for size in [1.0, 8.0, 40.0] {
            let logits: Vec<f64> =
                random.values(VOCAB, DType::F32).iter().map(|x| round(size * x, DType::F32)).collect();
            let target = random.below(VOCAB);
            let exact = run(&logits, VOCAB, &[target], &[1.0], DType::F32, true);
            let rounded = run(&logits, VOCAB, &[target], &[1.0], dtype, true);
            let greatest = logits.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
            let farthest = 2.0 * unit * greatest;
            let apart = (rounded.nll[0] - exact.nll[0]).abs();
            assert!(0.0 < apart && apart <= farthest + 1e-6 * exact.nll[0], "{dtype:?}: {apart:e} of {farthest:e}");
            assert!((rounded.entropy[0] - exact.entropy[0]).abs() <= 2.0 * farthest * (VOCAB as f64).ln());
            for (at, (rounded, exact)) in rounded.logits.iter().zip(&exact.logits).enumerate() {
                let p = exact / f64::from(SCALE) + if at == target { 1.0 } else { 0.0 };
                let allowed =
                    f64::from(SCALE) * p * (farthest.exp_m1() + 1e-5) + unit * rounded.abs() + least(dtype) + 1e-7;
                assert!((rounded - exact).abs() <= allowed, "{dtype:?} {at}: {rounded:e}, {exact:e}");
            }
        }
    }
}

/// A fixture whose backend writes gradients of 16 bits over f32 logits; `None` where it does not.
fn narrowing() -> Option<Fixture> {
    let fixture = Fixture::new();
    if NARROW.iter().all(|dtype| fixture.backend.logits_gradient(*dtype) == *dtype) {
        return Some(fixture);
    }
    println!("SKIPPED: {} writes f32 gradients", fixture.backend.name());
    None
}

#[test]
fn a_gradient_of_16_bits_lies_at_the_beginning_of_its_rows_f32_logits() {
    let mut random = Random(42);
    let Some(mut fixture) = narrowing() else { return };
    for (rows, vocab) in [(0, 4), (1, 1), (5, 33), (3, 1024), (3, 16_392), (2, 120_008), (2, 131_075)] {
        let logits: Vec<f64> = random.values(rows * vocab, DType::F32).iter().map(|x| 4.0 * x).collect();
        let logits: Vec<f64> = logits.iter().map(|x| round(*x, DType::F32)).collect();
        let targets: Vec<usize> = (0..rows).map(|row| [vocab - 1, 0, vocab / 2][row % 3]).collect();
        let weights: Vec<f64> = (0..rows).map(|row| [1.0, 0.5, 0.0, 2.0][row % 4]).collect();
        let plain = run(&logits, vocab, &targets, &weights, DType::F32, false);
        for dtype in NARROW {
            let got = pass(&mut fixture, &logits, vocab, &targets, &weights, DType::F32, Some(dtype));
            assert_eq!((&got.nll, &got.correct, &got.entropy), (&plain.nll, &plain.correct, &plain.entropy));
            for row in 0..rows {
                let expected = reference(&logits[row * vocab..][..vocab], targets[row]);
                let actual = &got.logits[row * vocab..][..vocab];
                assert_gradient(actual, &expected, targets[row], weights[row], dtype);
            }
        }
    }
}

#[test]
fn what_is_not_finite_shows_in_a_gradient_of_16_bits() {
    let Some(mut fixture) = narrowing() else { return };
    let mut rows = vec![0.5; 3 * 2000];
    rows[1700] = f64::NAN;
    rows[2000..4000].fill(f64::NEG_INFINITY);
    for dtype in NARROW {
        let got = pass(&mut fixture, &rows, 2000, &[3, 3, 3], &[1.0; 3], DType::F32, Some(dtype));
        assert!(got.nll[0].is_nan() && got.nll[1].is_nan() && got.nll[2].is_finite());
        assert_eq!(got.correct, [0.0; 3]);
        assert!(got.logits[..4000].iter().all(|x| x.is_nan()));
        assert!(got.logits[4000..].iter().all(|x| x.is_finite()));
    }
}

#[test]
fn many_small_probabilities_are_not_lost_beside_a_great_one() {
    const VOCAB: usize = 151_936;
    // At either end: whether it comes before the others or after them, a sum must hold both.
    for (target, ahead) in [0, VOCAB - 1].into_iter().flat_map(|target| [9.0, 12.0].map(|ahead| (target, ahead))) {
        let mut logits = vec![0.0; VOCAB];
        logits[target] = ahead;
        let expected = reference(&logits, target);
        let got = run(&logits, VOCAB, &[target], &[1.0], DType::F32, false);
        assert!((got.nll[0] - expected.nll).abs() <= 1e-6 * expected.nll + 1e-7, "{} {}", got.nll[0], expected.nll);
        assert!((got.entropy[0] - expected.entropy).abs() <= 1e-6 * expected.entropy + 1e-7);
        assert_eq!(got.correct, [1.0]);
    }
}

#[test]
fn the_gradient_is_the_derivative_of_the_loss() {
    let mut random = Random(41);
    let logits = random.values(40, DType::F32);
    let expected = differences(&logits, |logits| f64::from(SCALE) * 0.7 * reference(logits, 11).nll);
    let pass = run(&logits, 40, &[11], &[0.7], DType::F32, true);
    assert_close("d_logits", &pass.logits, &expected, 1e-6);
}

#[test]
fn the_first_of_equal_logits_is_the_prediction() {
    let mut logits = vec![0.0; 3000];
    for i in [1500, 1501, 2900] {
        logits[i] = 5.0;
    }
    for (target, correct) in [(1500, 1.0), (1501, 0.0), (2900, 0.0), (0, 0.0)] {
        assert_eq!(run(&logits, 3000, &[target], &[1.0], DType::F32, false).correct, [correct]);
    }
    assert_eq!(run(&vec![-3.0; 50], 50, &[0], &[1.0], DType::F32, false).correct, [1.0]);
}

#[test]
fn rising_and_extreme_logits_neither_overflow_nor_vanish() {
    for logits in [
        (0..5000).map(|i| f64::from(i) * 0.125).collect::<Vec<_>>(),
        (0..5000).map(|i| f64::from(-i) * 0.125).collect(),
        (0..5000).map(|i| if i == 4000 { 3e4 } else { -3e4 }).collect(),
        (0..5000).map(|i| if i < 2500 { f64::NEG_INFINITY } else { 1.0 }).collect(),
    ] {
        let pass = run(&logits, 5000, &[4000], &[1.0], DType::F32, true);
        let expected = reference(&logits, 4000);
        assert!((pass.nll[0] - expected.nll).abs() <= 1e-6 * expected.nll + 1e-7, "{} {}", pass.nll[0], expected.nll);
        assert!((pass.entropy[0] - expected.entropy).abs() <= 2e-6 * expected.entropy + 1e-7);
        assert!(pass.logits.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn what_is_not_finite_shows_in_the_loss() {
    for bad in [f64::NAN, f64::INFINITY] {
        let mut logits = vec![0.5; 2000];
        logits[1700] = bad;
        let pass = run(&logits, 2000, &[3], &[1.0], DType::F32, true);
        assert!(!pass.nll[0].is_finite(), "{bad}");
    }
    let pass = run(&[f64::NEG_INFINITY; 8], 8, &[3], &[1.0], DType::F32, true);
    assert!(pass.nll[0].is_nan());
}
