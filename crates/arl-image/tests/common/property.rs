//! Claims about generated values. A failure shows the smallest value that the claim fails on, and the seed.
#![allow(clippy::panic, reason = "a claim that fails is a test that fails")]

use std::fmt::Debug;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestCaseResult, TestRunner};

/// The seed of every claim, so that a test has the same values each time; `PROPTEST_RNG_SEED` replaces it.
const SEED: u64 = 20_261_122;

/// Tries `claim` on `cases` values of `strategy`, on ten times as many in `npm run test:long`; `PROPTEST_CASES` replaces
/// the number.
pub(crate) fn holds<S: Strategy<Value: Debug>>(cases: u32, strategy: S, claim: impl Fn(S::Value) -> TestCaseResult) {
    let given = Config::default();
    let seed = match given.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => SEED,
    };
    let long = std::env::var_os("ARL_LONG").is_some_and(|value| value == "1");
    let cases = match std::env::var_os("PROPTEST_CASES") {
        Some(_) => given.cases,
        None if long => 10 * cases,
        None => cases,
    };
    let config = Config { cases, rng_seed: RngSeed::Fixed(seed), failure_persistence: None, ..given };
    if let Err(error) = TestRunner::new(config).run(&strategy, claim) {
        panic!("{error}\nof {cases} values with PROPTEST_RNG_SEED={seed}");
    }
}
