//! GELU in both of its forms, forward and backward, element by element.

use rayon::prelude::*;

use super::element::Element;
use super::vector::{normal_tail, sigmoid_and_slope, vectorise};
use crate::backend::Gelu;

/// Elements that one task takes.
const BLOCK: usize = 16_384;

/// `2 sqrt(2 / pi)`, and 0.044715 times as much.
const TANH: (f32, f32) = (1.595_769, 0.071_354_814);

/// A form of GELU, so that loops are compiled for each.
trait Form {
    /// `gelu(x)`.
    fn value(x: f32) -> f32;
    /// Its derivative.
    fn slope(x: f32) -> f32;
}

struct Tanh;

impl Form for Tanh {
    /// `x / 2 (1 + tanh(u)) = x sigmoid(2 u)`.
    #[inline(always)]
    fn value(x: f32) -> f32 {
        let (s, _) = sigmoid_and_slope(x * (TANH.0 + TANH.1 * (x * x)));
        x * s
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let squared = x * x;
        let (s, slope) = sigmoid_and_slope(x * (TANH.0 + TANH.1 * squared));
        s + x * slope * (TANH.0 + 3.0 * TANH.1 * squared)
    }
}

struct Erf;

impl Form for Erf {
    /// With the tail `q` of the normal distribution from `|x|` on: `x (1 - q)` above 0, `x q` below.
    #[inline(always)]
    fn value(x: f32) -> f32 {
        let (tail, _) = normal_tail(x.abs());
        x.max(0.0) - x.abs() * tail
    }

    /// The distribution's integral up to `x`, and `x` times its density.
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let (tail, density) = normal_tail(x.abs());
        let below = if x > 0.0 { 1.0 - tail } else { tail };
        below + x * density
    }
}

fn forward<F: Form, T: Element>(x: &[T], out: &mut [T]) {
    assert_eq!(x.len(), out.len(), "gelu of buffers of one length");
    out.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(out, x)| {
        vectorise!({
            for (out, x) in out.iter_mut().zip(x) {
                *out = T::store(F::value(x.load()));
            }
        });
    });
}

fn backward<F: Form, T: Element>(x: &[T], d_x: &mut [T]) {
    assert_eq!(x.len(), d_x.len(), "gelu_backward of buffers of one length");
    d_x.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(d_x, x)| {
        vectorise!({
            for (d, x) in d_x.iter_mut().zip(x) {
                *d = T::store(d.load() * F::slope(x.load()));
            }
        });
    });
}

/// `out = gelu(x)`.
pub(super) fn gelu<T: Element>(kind: Gelu, x: &[T], out: &mut [T]) {
    match kind {
        Gelu::Tanh => forward::<Tanh, T>(x, out),
        Gelu::Erf => forward::<Erf, T>(x, out),
    }
}

/// `d_x`, the gradient of `gelu(x)`, becomes that of `x`.
pub(super) fn gelu_backward<T: Element>(kind: Gelu, x: &[T], d_x: &mut [T]) {
    match kind {
        Gelu::Tanh => backward::<Tanh, T>(x, d_x),
        Gelu::Erf => backward::<Erf, T>(x, d_x),
    }
}
