//! Magnitudes of weights with an adapter against sums in f64.

use super::*;
use crate::backend::Magnitude;

#[test]
fn norms_scales_and_gradients_are_the_reference() {
    let mut random = Random(63);
    for dtype in TYPES {
        // Rows that are read in packs, and others; with gaps; more rows than a block of the gradient takes.
        for (count, n, k, rank, gap) in [(3, 5, 7, 2, 0), (70, 33, 130, 3, 5), (200, 64, 256, 4, 8)] {
            let mut fixture = Fixture::new();
            let [weight, a, b] = [n * k, rank * k, n * rank].map(|len| random.values(len, dtype));
            let (factor, what) = (0.75, format!("{dtype:?} {count} {n} {k}"));
            let norms: Vec<f64> = (0..n)
                .map(|o| {
                    let low = |c: usize| (0..rank).map(|j| b[o * rank + j] * a[j * k + c]).sum::<f64>();
                    (0..k).map(|c| (weight[o * k + c] + factor * low(c)).powi(2)).sum::<f64>().sqrt()
                })
                .collect();
            let out = fixture.poisoned(n, DType::F32);
            let [w, a, b] = [&weight, &a, &b].map(|values| fixture.put(values, dtype));
            fixture.backend.magnitude(&Magnitude::Norms { weight: w, a, b, factor: factor as f32, out });
            assert_close(&format!("norms {what}"), &fixture.get(out), &norms, 1e-6);

            let stride = n + gap;
            let norms: Vec<f64> = norms.iter().map(|norm| round(*norm, DType::F32)).collect();
            let magnitude = random.values(n, DType::F32);
            let bias = random.values(n, dtype);
            let [x, d_out] = [0, 0].map(|_| random.values(count * stride, dtype));
            let (norms_buffer, magnitude_buffer) =
                (fixture.put(&norms, DType::F32), fixture.put(&magnitude, DType::F32));
            let bias_buffer = fixture.put(&bias, dtype);
            for with_bias in [false, true] {
                let scaled = fixture.put(&x, dtype);
                fixture.backend.magnitude(&Magnitude::Rescale {
                    x: rows(scaled, stride),
                    rows: count,
                    magnitude: magnitude_buffer,
                    norms: norms_buffer,
                    bias: with_bias.then_some(bias_buffer),
                });
                let expected: Vec<f64> = (0..x.len())
                    .map(|place| {
                        let column = place % stride;
                        if column >= n {
                            return x[place];
                        }
                        let added = if with_bias { bias[column] } else { 0.0 };
                        added + magnitude[column] / norms[column] * (x[place] - added)
                    })
                    .collect();
                assert_close(&format!("scaled {what}"), &fixture.get(scaled), &expected, bound(dtype, 1.0) + 1e-6);
            }

            let before = random.values(n, DType::F32);
            let out = fixture.put(&before, DType::F32);
            let [d, y] = [&d_out, &x].map(|values| fixture.put(values, dtype));
            let (d, y) = (rows(d, stride), rows(y, stride));
            fixture.backend.magnitude(&Magnitude::Gradient { d_out: d, x: y, rows: count, norms: norms_buffer, out });
            let expected: Vec<f64> = (0..n)
                .map(|o| {
                    let products = (0..count).map(|row| d_out[row * stride + o] * x[row * stride + o]);
                    before[o] + products.sum::<f64>() / norms[o]
                })
                .collect();
            assert_close(&format!("gradient {what}"), &fixture.get(out), &expected, 1e-5);
        }
    }
}
