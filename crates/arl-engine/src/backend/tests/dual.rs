//! Forward-mode automatic differentiation in f64. A dual number is a value and its slope along one input; each operation
//! derives both from those of its operands, exactly but for rounding. Knows arithmetic alone, and no leaf's formula.

use std::array;
use std::iter::Sum;
use std::ops::{Add, Div, Mul, Sub};

use super::*;

#[derive(Clone, Copy)]
pub(super) struct Dual {
    value: f64,
    slope: f64,
}

impl From<f64> for Dual {
    fn from(value: f64) -> Self {
        Dual { value, slope: 0.0 }
    }
}

impl<T: Into<Dual>> Add<T> for Dual {
    type Output = Dual;

    fn add(self, other: T) -> Dual {
        let other = other.into();
        Dual { value: self.value + other.value, slope: self.slope + other.slope }
    }
}

impl<T: Into<Dual>> Sub<T> for Dual {
    type Output = Dual;

    fn sub(self, other: T) -> Dual {
        let other = other.into();
        Dual { value: self.value - other.value, slope: self.slope - other.slope }
    }
}

impl<T: Into<Dual>> Mul<T> for Dual {
    type Output = Dual;

    fn mul(self, other: T) -> Dual {
        let other = other.into();
        Dual { value: self.value * other.value, slope: self.slope * other.value + self.value * other.slope }
    }
}

impl<T: Into<Dual>> Div<T> for Dual {
    type Output = Dual;

    fn div(self, other: T) -> Dual {
        let other = other.into();
        let value = self.value / other.value;
        Dual { value, slope: (self.slope - value * other.slope) / other.value }
    }
}

impl Sum for Dual {
    fn sum<I: Iterator<Item = Dual>>(terms: I) -> Dual {
        terms.fold(Dual::from(0.0), |sum, term| sum + term)
    }
}

impl Dual {
    /// A function's value here, by its derivative here.
    fn chain(self, value: f64, derivative: f64) -> Dual {
        Dual { value, slope: derivative * self.slope }
    }

    pub(super) fn exp(self) -> Dual {
        let exp = self.value.exp();
        self.chain(exp, exp)
    }

    pub(super) fn ln(self) -> Dual {
        self.chain(self.value.ln(), 1.0 / self.value)
    }

    pub(super) fn sqrt(self) -> Dual {
        let root = self.value.sqrt();
        self.chain(root, 0.5 / root)
    }

    pub(super) fn tanh(self) -> Dual {
        let tanh = self.value.tanh();
        self.chain(tanh, 1.0 - tanh * tanh)
    }

    /// By its series (Abramowitz and Stegun 7.1.6), term by term in dual numbers; for `|self| < 5`.
    pub(super) fn erf(self) -> Dual {
        let square = self * self;
        let (mut term, mut sum) = (self, self);
        for n in 1..150 {
            term = term * square * (2.0 / f64::from(2 * n + 1));
            sum = sum + term;
        }
        sum * (Dual::from(0.0) - square).exp() * std::f64::consts::FRAC_2_SQRT_PI
    }
}

pub(super) fn dot(a: &[Dual], b: &[Dual]) -> Dual {
    a.iter().zip(b).map(|(a, b)| *a * *b).sum()
}

pub(super) fn mean(x: &[Dual]) -> Dual {
    x.iter().copied().sum::<Dual>() / x.len() as f64
}

/// `f(inputs)`, and the gradients of `sum(f(inputs) * d_out)`: one pass for each element of the inputs.
pub(super) fn differentiate<const N: usize>(
    inputs: [&[f64]; N],
    d_out: &[f64],
    f: impl Fn([&[Dual]; N]) -> Vec<Dual>,
) -> (Vec<f64>, [Vec<f64>; N]) {
    let mut inputs = inputs.map(|values| values.iter().map(|x| Dual::from(*x)).collect::<Vec<_>>());
    let run = |inputs: &[Vec<Dual>; N]| f(inputs.each_ref().map(Vec::as_slice));
    let out: Vec<f64> = run(&inputs).iter().map(|x| x.value).collect();
    assert_eq!(out.len(), d_out.len());
    let gradients = array::from_fn(|input| {
        let len = inputs[input].len();
        let slope = |i: usize| {
            inputs[input][i].slope = 1.0;
            let slope = run(&inputs).iter().zip(d_out).map(|(x, d)| x.slope * d).sum();
            inputs[input][i].slope = 0.0;
            slope
        };
        (0..len).map(slope).collect()
    });
    (out, gradients)
}

#[test]
fn slopes_are_those_of_the_values() {
    type Function = fn(Dual, Dual) -> Dual;
    let functions: [(&str, Function); 9] = [
        ("add", |x, y| x + y),
        ("sub", |x, y| x - y),
        ("mul", |x, y| x * y),
        ("div", |x, y| x / y),
        ("exp", |x, _| x.exp()),
        ("ln", |x, _| x.ln()),
        ("sqrt", |x, _| x.sqrt()),
        ("tanh", |x, _| x.tanh()),
        ("erf", |x, _| x.erf()),
    ];
    for (name, function) in functions {
        for point in [[0.3, -1.7], [1.0, 0.4], [2.5, 3.0]] {
            let (_, [x, y]) = differentiate([&point[..1], &point[1..]], &[1.0], |[x, y]| vec![function(x[0], y[0])]);
            let expected = differences(&point, |point| function(point[0].into(), point[1].into()).value);
            assert_close(name, &[x, y].concat(), &expected, 1e-8);
        }
    }
    let erf = [-0.5, 1.0, 3.0].map(|x| Dual::from(x).erf().value);
    assert_close("erf", &erf, &[-0.520_499_877_813_046_5, 0.842_700_792_949_714_9, 0.999_977_909_503_001_4], 1e-15);
}
