//! Sums over many rows come out in the same bits each time. (Kernels on the host run their threads in other orders on
//! each launch.)

use super::*;
use crate::backend::{Heads, NormRope};

#[test]
fn sums_have_the_same_bits_each_time() {
    let mut random = Random(90);
    for dtype in TYPES {
        let (tokens, heads) = (150, Heads { query: 3, key_value: 1, dim: 64 });
        let width = 5 * heads.dim;
        let mut f = Fixture::new();
        let mut put = |f: &mut Fixture, len: usize, dtype: DType| {
            let values = random.values(len, dtype);
            f.put(&values, dtype)
        };
        let (x, d_out) = (put(&mut f, tokens * width, dtype), put(&mut f, tokens * width, dtype));
        let (weight, inverse_rms) = (put(&mut f, width, dtype), put(&mut f, tokens, DType::F32));
        let norm = (put(&mut f, heads.dim, dtype).into(), put(&mut f, heads.dim, dtype).into(), 1e-6);
        let (cos, sin) =
            (put(&mut f, tokens * heads.dim / 2, DType::F32), put(&mut f, tokens * heads.dim / 2, DType::F32));
        let terms = put(&mut f, 20_000, DType::F32);
        let angles = f.angles(cos, sin, tokens);
        let op = NormRope { heads, rotary: heads.dim, tokens, norm: Some(norm), angles };
        let mut run = || {
            let (d_x, d_qkv) = (f.poisoned(x.len, dtype), f.poisoned(x.len, dtype));
            f.backend.copy(x, d_x);
            f.backend.copy(d_out, d_qkv);
            let sums = f.put(&vec![1.0; 2 * (width + heads.dim)], DType::F32);
            let (d_weight, d_bias) = (sums.slice(0, width), sums.slice(width, width));
            let d_norm = (sums.slice(2 * width, heads.dim), sums.slice(2 * width + heads.dim, heads.dim));
            let product = f.put(&[1.0], DType::F64);
            f.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, d_x, d_weight);
            f.backend.sum_rows(rows(x, width), tokens, width, d_bias);
            f.backend.norm_rope_backward(&op, x, d_qkv, Some(d_norm));
            f.backend.dot(terms, terms, product);
            [d_x, d_qkv, sums, product].map(|buffer| f.bytes(buffer))
        };
        let first = run();
        for _ in 0..3 {
            assert!(run() == first, "{dtype:?}");
        }
    }
}

#[test]
fn leaves_of_vision_towers_have_the_same_bits_each_time() {
    for dtype in TYPES {
        let run = || {
            let mut f = Fixture::new();
            let results = vision::results(&mut f, dtype);
            results.into_iter().map(|(_, buffer)| f.bytes(buffer)).collect::<Vec<_>>()
        };
        let first = run();
        for _ in 0..3 {
            assert!(run() == first, "{dtype:?}");
        }
    }
}
