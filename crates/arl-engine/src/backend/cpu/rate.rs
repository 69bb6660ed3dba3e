//! How fast this machine multiplies matrices: the yardstick of the training step.

use std::time::Instant;

use super::super::Layout;
use super::gemm::{Elements, ElementsMut, MatMut, MatRef, matmul};

/// GFLOP/s of the fastest of the products `[m, k] [k, n]` in f32 that fit in about `seconds`, on rayon's current pool.
pub fn matmul_rate(m: usize, n: usize, k: usize, seconds: f64) -> f64 {
    let a: Vec<f32> = (0..m * k).map(|i| (i % 17) as f32 - 8.0).collect();
    let b: Vec<f32> = (0..k * n).map(|i| (i % 13) as f32 - 6.0).collect();
    let mut c = vec![0f32; m * n];
    let begin = Instant::now();
    let mut fastest = f64::INFINITY;
    let mut rounds = 0;
    while rounds < 2 || begin.elapsed().as_secs_f64() < seconds {
        let start = Instant::now();
        matmul(
            Layout::Nn,
            m,
            n,
            k,
            MatRef { data: Elements::F32(&a), stride: k },
            MatRef { data: Elements::F32(&b), stride: n },
            MatMut { data: ElementsMut::F32(&mut c), stride: n },
            false,
            None,
        );
        fastest = fastest.min(start.elapsed().as_secs_f64());
        rounds += 1;
    }
    2.0 * (m * n * k) as f64 / fastest / 1e9
}
