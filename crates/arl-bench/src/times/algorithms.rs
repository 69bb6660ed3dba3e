//! The algorithms of matrix products that a device chose while an engine warmed up, next to the first ones that its library
//! proposed. Knows nothing of how they are chosen.

use arl_engine::backend::Backend;
use serde_json::{Value, json};

/// For each product that was measured: its place among the proposals, and milliseconds of the first one and of the chosen one.
/// Null where nothing was chosen.
pub(super) fn chosen(backend: &mut dyn Backend) -> Value {
    let text = backend.matmul_algorithms().and_then(|algorithms| algorithms.chosen());
    text.and_then(|text| serde_json::from_str(&text).ok()).map_or(Value::Null, |saved| beside_first(&saved))
}

fn beside_first(saved: &Value) -> Value {
    let line = |(product, choice): (&String, &Value)| {
        let milliseconds = |name: &str| Some(choice[name].as_u64()? as f64 / 1e6);
        let (first, chosen) = (milliseconds("first_ns")?, milliseconds("chosen_ns")?);
        Some(json!({ "product": product, "proposal": choice["proposal"], "first_ms": first, "chosen_ms": chosen }))
    };
    saved["choices"].as_object().map_or(Value::Null, |choices| choices.iter().filter_map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_beside_the_first_proposal() {
        let saved = json!({ "format": 1, "choices": {
            "nt 4096x1024x1024": { "algorithm": "00", "proposal": 3, "first_ns": 2_500_000, "chosen_ns": 2_000_000 },
            "nt 4096x1024x1024 add": { "algorithm": "00", "proposal": 3, "first_ns": null, "chosen_ns": null },
        } });
        let expected = json!({ "product": "nt 4096x1024x1024", "proposal": 3, "first_ms": 2.5, "chosen_ms": 2.0 });
        assert_eq!(beside_first(&saved), json!([expected]));
        assert_eq!(beside_first(&json!({})), Value::Null);
    }
}
