//! What cases are to reach. A rate is bound by what the chip does: as a share of the rate of a large bf16 product that the same
//! run has measured, so that a slow clock or a capped power supply moves both. Knows no case.

use serde_json::{Value, json};

use crate::run::Run;

/// A large bf16 product of random values on an H100 SXM and on an H200, in TFLOP/s: the chip that goals are stated for.
pub(super) const REFERENCE_TFLOPS: f64 = 790.0;

/// What model FLOPs are divided by on both: dense bf16 by the data sheet, in TFLOP/s.
pub(super) const PEAK_TFLOPS: f64 = 989.0;

/// A goal of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Goal {
    /// Tokens a second on the reference chip.
    TokensPerS(f64),
    /// Model FLOPs over those of the data sheet, on the reference chip.
    Mfu(f64),
    /// Times the peer's tokens a second in the same run, at no more memory than the peer takes.
    TimesPeer(f64),
    /// A ratio of two times in the same run, and its name.
    AtMost(&'static str, f64),
    /// It fits the memory.
    Fits,
}

impl Goal {
    /// A rate as a share of the product's, for a model of so many FLOPs a token.
    fn share(self, flops_per_token: f64) -> Option<f64> {
        let tflops = match self {
            Goal::TokensPerS(rate) => rate * flops_per_token / 1e12,
            Goal::Mfu(share) => share * PEAK_TFLOPS,
            Goal::TimesPeer(_) | Goal::AtMost(..) | Goal::Fits => return None,
        };
        Some(tflops / REFERENCE_TFLOPS)
    }

    /// As it is stated, for people.
    fn stated(self) -> String {
        match self {
            Goal::TokensPerS(rate) => format!("{rate} tokens/s where a product reaches {REFERENCE_TFLOPS} TFLOP/s"),
            Goal::Mfu(share) => format!("MFU {share} where a product reaches {REFERENCE_TFLOPS} TFLOP/s"),
            Goal::TimesPeer(times) => format!("{times} times the peer"),
            Goal::AtMost(what, most) => format!("{what} at most {most}"),
            Goal::Fits => "fits the memory".into(),
        }
    }
}

/// The goals of a step that reached so many tokens a second, where a product reached `gemm_tflops`.
pub(super) fn of_step(goals: &[Goal], flops_per_token: f64, tokens_per_s: f64, gemm_tflops: f64) -> Vec<Value> {
    let of_gemm = tokens_per_s * flops_per_token / 1e12 / gemm_tflops;
    let lines = goals.iter().filter_map(|goal| {
        if *goal == Goal::Fits {
            return Some(json!({ "what": "fits", "goal": goal.stated(), "reached": true }));
        }
        let mut line = line("of_measured_gemm", Some(of_gemm), ">=", goal.share(flops_per_token)?);
        line["stated_as"] = goal.stated().into();
        Some(line)
    });
    lines.collect()
}

/// The goals for ratios, of which there is one.
pub(super) fn of_ratio(goals: &[Goal], value: f64) -> Vec<Value> {
    let lines = goals.iter().filter_map(|goal| match goal {
        Goal::AtMost(what, most) => Some(line(what, Some(value), "<=", *most)),
        _ => None,
    });
    lines.collect()
}

/// The goals next to the peer: times its tokens a second, and GiB more than it took.
pub(super) fn of_peer(goals: &[Goal], times: f64, more_gib: f64) -> Vec<Value> {
    let Some(least) = times_peer(goals) else { return Vec::new() };
    vec![line("times_the_peer", Some(times), ">=", least), line("gib_over_peer", Some(more_gib), "<=", 0.0)]
}

/// How many times the peer is to be reached, where it is compared with.
pub(super) fn times_peer(goals: &[Goal]) -> Option<f64> {
    goals.iter().find_map(|goal| match goal {
        Goal::TimesPeer(times) => Some(*times),
        _ => None,
    })
}

/// A value next to its bound.
fn line(what: &str, value: Option<f64>, sign: &str, bound: f64) -> Value {
    let reached = value.map(|value| if sign == ">=" { value >= bound } else { value <= bound });
    json!({ "what": what, "value": value, "goal": format!("{sign} {bound:.4}"), "reached": reached })
}

/// Whether all of them were reached; null where there is none, one was not shown, or the device is no GPU.
pub(super) fn reached(run: &Run<'_>, goals: &[Value]) -> Value {
    let unknown = goals.is_empty() || goals.iter().any(|goal| goal["reached"].is_null());
    if run.on_host() || run.options.rehearse || unknown {
        return Value::Null;
    }
    goals.iter().all(|goal| goal["reached"] == true).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_reached_from_its_own_side() {
        assert_eq!(line("mfu", Some(0.5), ">=", 0.5)["reached"], true);
        assert_eq!(line("mfu", Some(0.49), ">=", 0.5)["reached"], false);
        assert_eq!(line("slower", Some(1.2), "<=", 1.25)["reached"], true);
        assert_eq!(line("slower", Some(f64::NAN), "<=", 1.25)["reached"], false);
        assert!(line("peer", None, ">=", 2.0)["reached"].is_null());
    }

    #[test]
    fn a_rate_is_bound_by_the_product_of_the_same_run() {
        // 5 GFLOP a token: 100,000 tokens/s are 500 TFLOP/s.
        let goals = [Goal::TokensPerS(100_000.0), Goal::Mfu(0.5), Goal::TimesPeer(2.0), Goal::Fits];
        let reached = |tokens_per_s, gemm_tflops| -> Vec<Value> {
            let found = of_step(&goals, 5e9, tokens_per_s, gemm_tflops);
            found.into_iter().map(|line| line["reached"].clone()).collect()
        };
        assert_eq!(reached(100_001.0, 790.0), [true, true, true]);
        assert_eq!(reached(98_950.0, 790.0), [false, true, true], "0.5 of 989 TFLOP/s are 98,900 tokens/s");
        assert_eq!(reached(98_000.0, 790.0), [false, false, true]);
        assert_eq!(reached(90_000.0, 700.0), [true, true, true], "a slower clock slows both");
        assert_eq!(reached(100_001.0, 850.0), [false, false, true]);
    }

    #[test]
    fn the_peer_and_ratios_have_goals_of_their_own() {
        let goals = [Goal::Mfu(0.5), Goal::TimesPeer(2.0)];
        let of = |times, more| of_peer(&goals, times, more).iter().all(|line| line["reached"] == true);
        assert!(of(2.0, -1.0) && !of(1.9, -1.0) && !of(2.1, 0.5));
        assert!(of_peer(&goals[..1], 2.0, 0.0).is_empty() && of_ratio(&goals, 1.0).is_empty());
        assert_eq!(of_ratio(&[Goal::AtMost("times", 1.25)], 1.3)[0]["reached"], false);
    }
}
