//! How far a case is from what transformers computed, by kinds, and the bounds on it.

use arl_engine::backend::DType;

/// How far from transformers' f32 a type of weights and activations may be.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// Logits and routers' logits, tensor by tensor: `|a - b| / |b|`. `None`: by [`COSINE`] and [`NORM`].
    pub(super) forward: Option<f64>,
    /// The same of gradients.
    pub(super) gradients: Option<f64>,
    /// Negative log-likelihoods: `|a - b| / |b|`.
    pub(super) nll: f64,
    /// A loss of the curve.
    pub(super) curve: f64,
    /// A gradient norm of the curve: `|a - b| / |b|`.
    pub(super) norms: f64,
    /// Trained weights: `|a - b| / |b|`, tensor by tensor.
    pub(super) trained: f64,
}

/// Most that the cosine of all tensors of a kind may be below 1 in bf16, and that their norm may differ. A single tensor tells
/// nothing: a rounding may send a token to another expert.
const COSINE: f64 = 1e-3;
const NORM: f64 = 1e-2;

impl Bounds {
    /// `experts`: whether layers have a router.
    pub(super) fn of(dtype: DType, experts: bool) -> Self {
        match dtype {
            DType::F32 => Bounds {
                forward: Some(1e-4),
                gradients: Some(1e-4),
                nll: 1e-4,
                curve: 1e-4,
                norms: 1e-3,
                trained: 1e-3,
            },
            // f16 keeps 11 bits: weights and activations are rounded by up to 2^-12 at some twenty places of the forward pass,
            // which makes 5e-3, and at as many of the backward pass. A loss of some 4 nats may be 4 times the first apart; but
            // where rounding makes a router choose another expert for one of some 40 tokens, by 4 nats of that one. Trained
            // weights ten times, as in f32, for AdamW makes a whole step of a gradient that is nothing but rounding.
            DType::F16 => {
                let curve = if experts { 0.1 } else { 2e-2 };
                // That token's own logits are then of another size of error: in `qwen3-moe` of the shared cases one token of 128,
                // whose second and third experts' logits are 9e-4 apart, makes 7.9e-3, and all the others together 1.4e-3.
                let forward = if experts { None } else { Some(5e-3) };
                Bounds { forward, gradients: Some(1e-2), nll: 5e-3, curve, norms: 10.0 * curve, trained: 5e-2 }
            }
            // Beside the two above, about twice what the roundings of bf16 do on the CPU.
            _ => Bounds { forward: None, gradients: None, nll: 2e-3, curve: 2e-2, norms: 0.15, trained: 5e-2 },
        }
    }
}

/// A tensor's name, what was computed, and what it should be.
pub(super) type Compared = (String, Vec<f32>, Vec<f32>);

/// The figures of the tensors of a kind.
pub(super) fn figures_of(
    kind: &'static str,
    of_cosine: &'static str,
    tensors: &[Compared],
    bound: Option<f64>,
) -> Vec<Figure> {
    if let Some(bound) = bound {
        let mut figure = Figure::new(kind, bound);
        tensors.iter().for_each(|(name, a, b)| figure.note(name, difference(a, b)));
        return vec![figure];
    }
    if tensors.is_empty() {
        return Vec::new();
    }
    let pairs = || tensors.iter().flat_map(|(_, a, b)| a.iter().zip(b).map(|(&a, &b)| (f64::from(a), f64::from(b))));
    let sum = |f: fn(f64, f64) -> f64| pairs().map(|(a, b)| f(a, b)).sum::<f64>();
    let (of_a, of_b) = (sum(|a, _| a * a).sqrt(), sum(|_, b| b * b).sqrt());
    let (mut norm, mut cosine) = (Figure::new(kind, NORM), Figure::new(of_cosine, COSINE));
    norm.note("all", (of_a - of_b).abs() / of_b);
    cosine.note("all", 1.0 - sum(|a, b| a * b) / (of_a * of_b));
    vec![norm, cosine]
}

/// The worst figure of one kind, where it is, and the bound on it.
pub struct Figure {
    kind: &'static str,
    worst: f64,
    place: String,
    bound: f64,
    /// What rounding alone does, where that is beyond the bound.
    rounding: f64,
    /// A place is beyond the bound, and beyond what rounding does there.
    failed: bool,
}

impl Figure {
    pub(super) fn new(kind: &'static str, bound: f64) -> Self {
        Figure { kind, worst: 0.0, place: String::new(), bound, rounding: 0.0, failed: false }
    }

    pub(super) fn note(&mut self, place: &str, value: f64) {
        self.note_beside(place, value, 0.0);
    }

    /// Notes a value at a place where rounding alone does so much; three times that is allowed there.
    pub(super) fn note_beside(&mut self, place: &str, value: f64, rounding: f64) {
        // A NaN is worse than anything.
        let value = if value.is_nan() { f64::INFINITY } else { value };
        let failed = value > self.bound.max(3.0 * rounding);
        if rounding > self.bound / 3.0 {
            self.rounding = self.rounding.max(rounding);
        }
        if (failed, value) > (self.failed, self.worst) {
            (self.worst, self.place) = (value, place.to_owned());
        }
        self.failed |= failed;
    }

    pub(super) fn failed(&self) -> bool {
        self.failed
    }
}

/// What a case came to.
pub struct Outcome {
    /// The folder's name.
    pub name: String,
    /// By kind.
    pub figures: Vec<Figure>,
}

impl Outcome {
    /// Whether every figure is within its bound.
    pub fn passed(&self) -> bool {
        !self.figures.iter().any(Figure::failed)
    }

    /// One line.
    pub fn line(&self) -> String {
        let mut line = format!("{} {}:", if self.passed() { "ok    " } else { "FAILED" }, self.name);
        for figure in &self.figures {
            line += &format!("  {} {:.1e}", figure.kind, figure.worst);
            if figure.rounding > 0.0 {
                line += &format!(" (rounding alone {:.1e})", figure.rounding);
            }
            if figure.failed {
                line += &format!(" > {:.0e} at {}", figure.bound, figure.place);
            }
        }
        line
    }
}

pub(super) fn difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let square = |x: f64| x * x;
    let error: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}
