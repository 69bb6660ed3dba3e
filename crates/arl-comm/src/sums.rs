//! Sums over ranks. Their order is fixed, so that they have the same bits on every rank, with any library and any network.

/// `out = ((out + parts[0]) + parts[1]) + ...`, element by element, in f32.
///
/// # Panics
/// If a part has another length than `out`.
pub fn add_parts(out: &mut [f32], parts: &[&[f32]]) {
    for part in parts {
        assert_eq!(part.len(), out.len(), "a part of a sum has another length");
        for (sum, value) in out.iter_mut().zip(*part) {
            *sum += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_added_one_after_the_other() {
        let mut out = [1e8f32, 0.0];
        add_parts(&mut out, &[&[3.0, 1.0], &[3.0, 2.0], &[-1e8, 4.0]]);
        // In f32, 1e8 + 3 rounds to 1e8, twice; any other order gives 6 or 8.
        assert_eq!(out, [0.0, 7.0]);
    }

    #[test]
    #[should_panic(expected = "another length")]
    fn parts_are_as_long_as_the_sum() {
        add_parts(&mut [0.0; 2], &[&[1.0]]);
    }
}
