//! AdamW.

use super::*;
use crate::backend::{AdamW, StochasticRounding, join_master, rounding, split_master};

struct Rates {
    learning_rate: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    max_grad_norm: f64,
}

const RATES: Rates =
    Rates { learning_rate: 3e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };

/// torch's formula in f64.
fn reference(rates: &Rates, step: i32, norm: f64, w: &mut [f64], g: &[f64], m: &mut [f64], v: &mut [f64]) {
    let clip = (rates.max_grad_norm / (norm + 1e-6)).min(1.0);
    let clip = if rates.max_grad_norm == 0.0 { 1.0 } else { clip };
    let (c1, c2) = (1.0 - rates.beta1.powi(step), 1.0 - rates.beta2.powi(step));
    for i in 0..w.len() {
        let g = g[i] * clip;
        w[i] *= 1.0 - rates.learning_rate * rates.weight_decay;
        m[i] = rates.beta1 * m[i] + (1.0 - rates.beta1) * g;
        v[i] = rates.beta2 * v[i] + (1.0 - rates.beta2) * g * g;
        w[i] -= rates.learning_rate / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + rates.epsilon);
    }
}

fn op(fixture: &mut Fixture, rates: &Rates, step: i32, len: usize, norm_squared: f64) -> AdamW {
    AdamW {
        weights: fixture.poisoned(0, DType::F32),
        masters: None,
        rounding: StochasticRounding::default(),
        gradients: fixture.poisoned(0, DType::F32),
        moment1: fixture.put(&vec![0.0; len], DType::F32),
        moment2: fixture.put(&vec![0.0; len], DType::F32),
        learning_rate: rates.learning_rate as f32,
        beta1: rates.beta1 as f32,
        beta2: rates.beta2 as f32,
        epsilon: rates.epsilon as f32,
        weight_decay: rates.weight_decay as f32,
        bias_correction1: (1.0 - rates.beta1.powi(step)) as f32,
        bias_correction2: (1.0 - rates.beta2.powi(step)) as f32,
        grad_norm_squared: fixture.put(&[norm_squared], DType::F64),
        gradient_scale: 1.0,
        max_grad_norm: rates.max_grad_norm as f32,
    }
}

fn split(values: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let pairs = values.iter().map(|x| split_master(*x as f32));
    pairs.map(|(high, low)| (f64::from(f32::from_bits(u32::from(high) << 16)), f64::from(low))).unzip()
}

#[test]
fn twenty_steps_follow_the_reference_in_f32_and_with_masters_of_either_kind() {
    let mut random = Random(50);
    for max_grad_norm in [0.0, 0.5, 1e9] {
        let rates = Rates { max_grad_norm, ..RATES };
        let len = 20_003;
        let start = random.values(len, DType::F32);
        let (mut w, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
        let mut fixture = Fixture::new();
        let mut whole = op(&mut fixture, &rates, 1, len, 0.0);
        whole.weights = fixture.put(&start, DType::F32);
        let mut halves = op(&mut fixture, &rates, 1, len, 0.0);
        let (high, low) = split(&start);
        halves.weights = fixture.put(&high, DType::Bf16);
        halves.masters = Some(fixture.put(&low, DType::U16));
        let mut rounded = op(&mut fixture, &rates, 1, len, 0.0);
        rounded.weights = fixture.poisoned(len, DType::F16);
        rounded.masters = Some(fixture.put(&start, DType::F32));
        for step in 1..=20 {
            let g = random.values(len, DType::F32);
            let squared = inner(&g, &g);
            reference(&rates, step, squared.sqrt(), &mut w, &g, &mut m, &mut v);
            let gradients = fixture.put(&g, DType::F32);
            let grad_norm_squared = fixture.put(&[squared], DType::F64);
            for op in [&mut whole, &mut halves, &mut rounded] {
                op.gradients = gradients;
                op.grad_norm_squared = grad_norm_squared;
                op.bias_correction1 = (1.0 - rates.beta1.powi(step)) as f32;
                op.bias_correction2 = (1.0 - rates.beta2.powi(step)) as f32;
                fixture.backend.adamw(op);
            }
        }
        let weights = fixture.get(whole.weights);
        // Twenty roundings of weights below 1.75, and what the rounding of the rates to f32 does to the change.
        for ((actual, expected), start) in weights.iter().zip(&w).zip(&start) {
            let allowed = 20.0 * 6e-8 * 1.75 + 2e-5 * (expected - start).abs();
            assert!((actual - expected).abs() <= allowed, "{actual} instead of {expected} from {start}");
        }
        assert_close("moment1", &fixture.get(whole.moment1), &m, 2e-6);
        assert_close("moment2", &fixture.get(whole.moment2), &v, 5e-6);
        let (high, low) = (fixture.get(halves.weights), fixture.get(halves.masters.unwrap()));
        let joined: Vec<f64> = high
            .iter()
            .zip(low)
            .map(|(high, low)| f64::from(join_master(half::bf16::from_f64(*high).to_bits(), low as u16)))
            .collect();
        assert_eq!(joined, weights, "a split master is the f32 master, bit for bit");
        assert_eq!(fixture.get(rounded.masters.unwrap()), weights);
        let expected: Vec<f64> = weights.iter().map(|x| round(*x, DType::F16)).collect();
        assert_eq!(fixture.get(rounded.weights), expected);
    }
}

#[test]
fn each_step_of_the_formula_is_rounded_to_f32_wherever_the_parameters_begin() {
    let mut random = Random(51);
    let (skipped, len) = (1, 9_001);
    for start in [0, skipped] {
        let mut fixture = Fixture::new();
        let mut arrays = [0, 1, 2, 3].map(|_| random.values(skipped + len, DType::F32));
        arrays[3].iter_mut().for_each(|v| *v = v.abs());
        let [w, g, m, v] = &arrays;
        let (high, low) = split(w);
        let op = op(&mut fixture, &RATES, 3, 0, inner(g, g));
        let whole = AdamW {
            weights: fixture.put(w, DType::F32).slice(start, len),
            gradients: fixture.put(g, DType::F32).slice(start, len),
            moment1: fixture.put(m, DType::F32).slice(start, len),
            moment2: fixture.put(v, DType::F32).slice(start, len),
            ..op
        };
        let halves = AdamW {
            weights: fixture.put(&high, DType::Bf16).slice(start, len),
            masters: Some(fixture.put(&low, DType::U16).slice(start, len)),
            moment1: fixture.put(m, DType::F32).slice(start, len),
            moment2: fixture.put(v, DType::F32).slice(start, len),
            ..whole
        };
        // The gradients of a loss that was scaled, and their norm.
        let scale = 65536.0;
        let scaled: Vec<f64> = g.iter().map(|g| g * scale).collect();
        let rounded = AdamW {
            weights: fixture.poisoned(skipped + len, DType::F16).slice(start, len),
            masters: Some(fixture.put(w, DType::F32).slice(start, len)),
            gradients: fixture.put(&scaled, DType::F32).slice(start, len),
            moment1: fixture.put(m, DType::F32).slice(start, len),
            moment2: fixture.put(v, DType::F32).slice(start, len),
            gradient_scale: scale as f32,
            grad_norm_squared: fixture.put(&[inner(&scaled, &scaled)], DType::F64),
            ..whole
        };
        for op in [&whole, &halves, &rounded] {
            fixture.backend.adamw(op);
        }

        let clip = (1.0 / (inner(g, g).sqrt() + 1e-6)) as f32;
        let mut expected = [vec![], vec![], vec![]];
        for i in start..start + len {
            let [w, g, m, v] = [w, g, m, v].map(|x| x[i] as f32);
            let g = g * clip;
            let m = m + (1.0 - op.beta1) * (g - m);
            let v = v * op.beta2 + (1.0 - op.beta2) * g * g;
            let w = w * op.keep() - op.step_size() * m / (v.sqrt() * op.root_correction() + op.epsilon);
            [w, m, v].iter().zip(&mut expected).for_each(|(x, array)| array.push(f64::from(*x)));
        }
        for op in [&whole, &halves, &rounded] {
            assert_eq!(fixture.get(op.moment1), expected[1]);
            assert_eq!(fixture.get(op.moment2), expected[2]);
        }
        assert_eq!(fixture.get(whole.weights), expected[0]);
        assert_eq!(fixture.get(rounded.masters.unwrap()), expected[0]);
        let narrow: Vec<f64> = expected[0].iter().map(|x| round(*x, DType::F16)).collect();
        assert_eq!(fixture.get(rounded.weights), narrow);
        let (high, low) = split(&expected[0]);
        assert_eq!((fixture.get(halves.weights), fixture.get(halves.masters.unwrap())), (high, low));
    }
}

#[test]
fn weights_without_masters_are_the_f32_update_rounded_by_the_bits_of_their_places() {
    let mut random = Random(52);
    let (skipped, len) = (1, 40_003);
    // Also where the parameters' numbers pass 2^32.
    for (start, first) in [(0, 0), (skipped, 77), (0, u64::from(u32::MAX) - 1000)] {
        let mut fixture = Fixture::new();
        let arrays = [DType::Bf16, DType::F32, DType::F32, DType::F32].map(|dtype| random.values(skipped + len, dtype));
        let [w, g, m, v] = &arrays;
        let v: Vec<f64> = v.iter().map(|v| v.abs()).collect();
        let rounding = StochasticRounding { first, ..StochasticRounding::new(3, 9) };
        let op = op(&mut fixture, &RATES, 3, 0, inner(g, g));
        let whole = AdamW {
            weights: fixture.put(w, DType::F32).slice(start, len),
            gradients: fixture.put(g, DType::F32).slice(start, len),
            moment1: fixture.put(m, DType::F32).slice(start, len),
            moment2: fixture.put(&v, DType::F32).slice(start, len),
            ..op
        };
        let rounded = AdamW {
            weights: fixture.put(w, DType::Bf16).slice(start, len),
            rounding,
            moment1: fixture.put(m, DType::F32).slice(start, len),
            moment2: fixture.put(&v, DType::F32).slice(start, len),
            ..whole
        };
        // In pieces it is the same.
        let pieces = AdamW {
            weights: fixture.put(w, DType::Bf16).slice(start, len),
            moment1: fixture.put(m, DType::F32).slice(start, len),
            moment2: fixture.put(&v, DType::F32).slice(start, len),
            ..rounded
        };
        fixture.backend.adamw(&whole);
        fixture.backend.adamw(&rounded);
        for (from, to) in [(0, 1000), (1000, 1003), (1003, len)] {
            let part = |buffer: Buffer| buffer.slice(from, to - from);
            fixture.backend.adamw(&AdamW {
                weights: part(pieces.weights),
                rounding: rounding.from(from),
                gradients: part(pieces.gradients),
                moment1: part(pieces.moment1),
                moment2: part(pieces.moment2),
                ..pieces
            });
        }
        let exact = fixture.get(whole.weights);
        let expected = exact.iter().enumerate().map(|(i, x)| rounding.round(*x as f32, i));
        let expected: Vec<f64> = expected.map(|bits| bf16::from_bits(bits).to_f64()).collect();
        assert_eq!(fixture.get(rounded.weights), expected);
        assert_eq!(fixture.get(pieces.weights), expected);
        assert_eq!(fixture.get(rounded.moment1), fixture.get(whole.moment1));
        assert_eq!(fixture.get(rounded.moment2), fixture.get(whole.moment2));
        let nearest: Vec<f64> = exact.iter().map(|x| round(*x, DType::Bf16)).collect();
        assert_ne!(expected, nearest);
    }
}

#[test]
fn bf16_moments_are_those_of_f32_rounded_by_the_bits_of_their_places() {
    let mut random = Random(53);
    let (skipped, len) = (1, 20_003);
    for (start, first) in [(0, 0), (skipped, 77), (0, u64::from(u32::MAX) - 1000)] {
        let mut fixture = Fixture::new();
        let arrays = [DType::Bf16, DType::F32, DType::Bf16, DType::Bf16];
        let [w, g, m, v] = arrays.map(|dtype| random.values(skipped + len, dtype));
        let v: Vec<f64> = v.iter().map(|v| v.abs()).collect();
        let rounding = StochasticRounding { first, ..StochasticRounding::new(3, 9) };
        let base = AdamW {
            gradients: fixture.put(&g, DType::F32).slice(start, len),
            rounding,
            ..op(&mut fixture, &RATES, 3, 0, inner(&g, &g))
        };
        let (high, low) = split(&w);
        for (dtype, values, masters) in [
            (DType::F32, &w, None),
            (DType::Bf16, &w, None),
            (DType::Bf16, &high, Some((&low, DType::U16))),
            (DType::F16, &w, Some((&w, DType::F32))),
        ] {
            let mut update = |moments| {
                let op = AdamW {
                    weights: fixture.put(values, dtype).slice(start, len),
                    masters: masters.map(|(values, dtype)| fixture.put(values, dtype).slice(start, len)),
                    moment1: fixture.put(&m, moments).slice(start, len),
                    moment2: fixture.put(&v, moments).slice(start, len),
                    ..base
                };
                // In pieces it is the same.
                for (from, to) in [(0, 1000), (1000, 1003), (1003, len)] {
                    let part = |buffer: Buffer| buffer.slice(from, to - from);
                    fixture.backend.adamw(&AdamW {
                        weights: part(op.weights),
                        masters: op.masters.map(part),
                        rounding: rounding.from(from),
                        gradients: part(op.gradients),
                        moment1: part(op.moment1),
                        moment2: part(op.moment2),
                        ..op
                    });
                }
                let buffers = [Some(op.moment1), Some(op.moment2), Some(op.weights), op.masters];
                buffers.map(|buffer| buffer.map_or(vec![], |buffer| fixture.get(buffer)))
            };
            let (exact, kept) = (update(DType::F32), update(DType::Bf16));
            for moment in [0, 1] {
                let by_place = |(i, x): (usize, &f64)| {
                    let bits = rounding::round(*x as f32, rounding.of_moments(i)[moment]);
                    bf16::from_bits(bits).to_f64()
                };
                let expected: Vec<f64> = exact[moment].iter().enumerate().map(by_place).collect();
                assert_eq!(kept[moment], expected, "moment {moment} of {dtype:?}");
                let nearest: Vec<f64> = exact[moment].iter().map(|x| round(*x, DType::Bf16)).collect();
                assert_ne!(expected, nearest);
            }
            assert_eq!(kept[2..], exact[2..], "{dtype:?} weights are updated by moments that are not rounded yet");
        }
    }
}

#[test]
fn nothing_changes_where_the_norm_is_not_finite() {
    for norm_squared in [f64::NAN, f64::INFINITY] {
        let mut fixture = Fixture::new();
        let mut op = op(&mut fixture, &RATES, 1, 5, norm_squared);
        op.weights = fixture.put(&[1.0, 2.0, 3.0, 4.0, 5.0], DType::F32);
        op.gradients = fixture.put(&[f64::NAN, 1.0, 1.0, 1.0, 1.0], DType::F32);
        fixture.backend.adamw(&op);
        assert_eq!(fixture.get(op.weights), [1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(fixture.get(op.moment1), [0.0; 5]);
        assert_eq!(fixture.get(op.moment2), [0.0; 5]);
    }
}

#[test]
fn a_split_master_joins_to_the_same_bits() {
    for bits in (0..=u32::MAX).step_by(9973) {
        let (high, low) = split_master(f32::from_bits(bits));
        assert_eq!(join_master(high, low).to_bits(), bits);
    }
}

#[test]
fn three_clipped_steps_are_those_of_torch() {
    // torch 2 on a CPU: AdamW(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1) after clip_grad_norm_(1.0).
    let expected = [1.493_801_116_943_359_4, -0.245_164_737_105_369_57, 0.743_186_056_613_922_1];
    let mut fixture = Fixture::new();
    let mut op = op(&mut fixture, &RATES, 1, 3, 0.0);
    op.weights = fixture.put(&[1.5, -0.25, 0.75], DType::F32);
    for (step, g) in [(1, [0.5, -1.0, 2.0]), (2, [0.1, 0.2, -0.3]), (3, [-0.7, 0.0, 1.0])] {
        op.gradients = fixture.put(&g, DType::F32);
        op.grad_norm_squared = fixture.put(&[0.0], DType::F64);
        fixture.backend.dot(op.gradients, op.gradients, op.grad_norm_squared);
        op.bias_correction1 = (1.0 - RATES.beta1.powi(step)) as f32;
        op.bias_correction2 = (1.0 - RATES.beta2.powi(step)) as f32;
        fixture.backend.adamw(&op);
    }
    for (actual, expected) in fixture.get(op.weights).iter().zip(expected) {
        assert!((actual - expected).abs() <= 2.5e-7, "{actual} instead of {expected}");
    }
}
