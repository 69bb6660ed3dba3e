//! What the kernels' tests over both devices cannot reach: how a task is cut.

use super::backward::{PART, Results, in_parts};
use super::forward::{Inputs, forward};
use super::{Matrix, Shape};
use crate::backend::Heads;

#[test]
fn where_a_sequence_is_cut_and_how_many_threads_there_are_changes_no_bit() {
    let heads = Heads { query: 2, key_value: 1, dim: 16 };
    let (tokens, width) = (900, 4 * 16);
    let mut noise = 1u32;
    let mut values = |len: usize| -> Vec<f32> {
        let mut next = || {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            noise as i32 as f32 / 2_147_483_648.0
        };
        (0..len).map(|_| next()).collect()
    };
    let (qkv, d_out) = (values(tokens * width), values(tokens * 32));
    let columns = |head: usize| Matrix { data: &qkv[head * 16..], stride: width };
    let inputs = Inputs { q: columns(0), k: columns(2), v: columns(3) };
    for (causal, window) in [(true, usize::MAX), (true, 500), (true, 1), (false, usize::MAX)] {
        let shape = Shape { heads, causal, window, scale: 0.25, tokens, cu_seqlens: &[0, 40, 900] };
        let (mut out, mut log_sum_exp) = (vec![0.0; tokens * 32], vec![0.0; 2 * tokens]);
        forward(&shape, inputs, &mut out, 32, &mut log_sum_exp);
        let rows = |data| Matrix { data, stride: 32 };
        let results = Results { out: rows(&out), d_out: rows(&d_out), log_sum_exp: &log_sum_exp };
        let gradients = |size: usize, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut d_qkv, mut scratch) = (vec![f32::NAN; tokens * width], vec![f32::NAN; 2 * tokens * 17]);
            pool.install(|| in_parts(&shape, inputs, &results, &mut d_qkv, &mut scratch, size));
            d_qkv.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let whole = gradients(3 * PART, 1);
        assert!(gradients(PART, 1) == whole && gradients(PART, 3) == whole, "causal {causal}, window {window}");
        assert!(whole.iter().all(|x| f32::from_bits(*x).is_finite()));
    }
}
