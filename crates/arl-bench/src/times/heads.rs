//! Attention alone, over heads of each size that tensor cores have: its rates forward and backward next to that of a product.

use arl_engine::backend::Heads;
use serde_json::json;

use super::rate::attention_rates;
use super::{Times, attention, dtype};
use crate::options::word;
use crate::run::Run;

/// As many columns of queries in all sizes; those of 256 are Qwen3-Next's.
const SIZES: [Heads; 3] = [
    Heads { query: 64, key_value: 8, dim: 64 },
    Heads { query: 32, key_value: 4, dim: 128 },
    Heads { query: 16, key_value: 2, dim: 256 },
];
/// Tokens of the one sequence.
const TOKENS: usize = 16_384;

/// Runs the case. No library has heads of 256: where one is asked for it computes the others.
pub(super) fn case(run: &mut Run<'_>, times: &Times, name: &'static str) -> arl_model::Result<()> {
    let (tokens, dtype) = (if run.options.rehearse { 64 } else { TOKENS }, dtype(run));
    let mut sizes = Vec::new();
    for heads in SIZES {
        let choice = if heads.dim == 256 { arl_engine::AttentionChoice::Own } else { attention(run) };
        let (forward, backward) = attention_rates(&mut *run.open()?, choice, heads, tokens, dtype)?;
        let of_gemm = |rate: f64| rate / 1e12 / times.ceilings.gemm_tflops;
        sizes.push(json!({
            "head": heads.dim, "query_heads": heads.query, "key_heads": heads.key_value, "attention": word(choice),
            "forward_tflops": forward / 1e12, "backward_tflops": backward / 1e12,
            "forward_of_measured_gemm": of_gemm(forward), "backward_of_measured_gemm": of_gemm(backward),
        }));
    }
    run.case(json!({
        "case": name, "ok": true, "reached": null, "rehearsal": run.options.rehearse, "tokens": tokens,
        "dtype": format!("{dtype:?}"), "sizes": sizes,
    }))
}
