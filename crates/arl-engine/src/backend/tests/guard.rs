//! The guard over an update.

use super::*;

#[test]
fn a_loss_or_balance_that_is_not_finite_spoils_the_norm_and_nothing_else_does() {
    let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    for (count, experts) in [(1, 0), (3, 5), (700, 300)] {
        let run = |damage: &dyn Fn(&mut [f64], &mut [f64])| {
            let mut fixture = Fixture::new();
            // Sums of losses, of right predictions and of entropies.
            let mut losses = vec![1e300; 3 * count];
            let mut balances = vec![2.5; experts];
            damage(&mut losses, &mut balances);
            let losses = fixture.put(&losses, DType::F64);
            let balances = (experts > 0).then(|| fixture.put(&balances, DType::F32));
            let norm = fixture.put(&[42.0], DType::F64);
            fixture.backend.guard(rows(losses, 3), balances, norm);
            fixture.get(norm)[0]
        };
        assert_eq!(run(&|_, _| ()), 42.0);
        for value in bad {
            for i in [0, count - 1, count / 2] {
                assert!(run(&|losses, _| losses[3 * i] = value).is_nan(), "{value} at {i} of {count}");
                // An entropy may be undefined where a loss is not.
                assert_eq!(run(&|losses, _| losses[3 * i + 2] = value), 42.0);
            }
            for i in (0..experts).step_by(299.min(experts.max(2) - 1)) {
                assert!(run(&|_, balances| balances[i] = value).is_nan(), "{value} at {i} of {experts}");
            }
        }
    }
}

#[test]
fn a_norm_that_is_not_finite_stays_so() {
    let mut fixture = Fixture::new();
    let losses = fixture.put(&[1.0; 3], DType::F64);
    let norm = fixture.put(&[f64::INFINITY], DType::F64);
    fixture.backend.guard(rows(losses, 3), None, norm);
    assert_eq!(fixture.get(norm), [f64::INFINITY]);
}

#[test]
fn a_queued_read_is_what_the_buffers_held_when_it_was_queued() {
    let mut fixture = Fixture::new();
    let (a, b) = (fixture.put(&[1.0, 2.0], DType::F32), fixture.put(&[3.0], DType::F64));
    fixture.backend.queue_read(&[a, b]);
    fixture.backend.zero(a);
    let mut read = [0; 16];
    assert!(fixture.backend.read_arrived());
    fixture.backend.finish_read(&mut read).unwrap();
    let expected = [1f32.to_le_bytes(), 2f32.to_le_bytes()].concat();
    assert_eq!(read, *[expected, 3f64.to_le_bytes().to_vec()].concat());
}
