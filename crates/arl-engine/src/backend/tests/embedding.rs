//! Rows by index.

use super::*;

#[test]
fn rows_are_gathered_in_either_type() {
    let mut random = Random(20);
    let pairs = TYPES.into_iter().flat_map(|from| TYPES.map(|to| (from, to)));
    for (from, to) in pairs.filter(|(from, to)| meet(&[*from, *to])) {
        for (vocab, width, tokens) in [(1, 1, 1), (7, 3, 0), (50, 33, 300), (40, 64, 19), (9, 1048, 21)] {
            let mut fixture = Fixture::new();
            let table = random.values(vocab * width, from);
            let ids: Vec<usize> = (0..tokens).map(|_| random.below(vocab)).collect();
            let expected: Vec<f64> =
                ids.iter().flat_map(|id| &table[id * width..][..width]).map(|x| round(*x, to)).collect();
            let (table, ids) = (fixture.put(&table, from), fixture.ints(&ids));
            let out = fixture.poisoned(tokens * width, to);
            fixture.backend.embedding(ids, table, width, out);
            assert_eq!(fixture.get(out), expected);
        }
    }
}

#[test]
fn the_tables_gradient_takes_every_token_and_is_added() {
    let mut random = Random(21);
    for dtype in TYPES {
        let wide = [(11, 516, 90), (9, 1030, 40)];
        let narrow = [(1, 1, 5), (7, 3, 0), (50, 33, 300), (1000, 8, 2000), (130, 5, 131)];
        for (vocab, width, tokens) in narrow.into_iter().chain(wide) {
            let mut fixture = Fixture::new();
            let d_out = random.values(tokens * width, dtype);
            let mut expected = random.values(vocab * width, DType::F32);
            let table_gradient = fixture.put(&expected, DType::F32);
            // Repeated ids at both ends of the table.
            let ids: Vec<usize> =
                (0..tokens).map(|t| if t % 5 == 0 { vocab - 1 } else { random.below(vocab.min(60)) }).collect();
            for (t, id) in ids.iter().enumerate() {
                for i in 0..width {
                    expected[id * width + i] += d_out[t * width + i];
                }
            }
            let (ids, d_out) = (fixture.ints(&ids), fixture.put(&d_out, dtype));
            fixture.backend.embedding_backward(ids, d_out, width, table_gradient);
            assert_close("table_gradient", &fixture.get(table_gradient), &expected, 1e-5);
        }
    }
}

#[test]
fn the_rows_of_one_id_are_added_one_by_one_in_the_order_of_the_tokens() {
    let mut random = Random(23);
    for dtype in TYPES {
        for (vocab, width, tokens) in [(1, 12, 203), (3, 7, 130), (70, 8, 400)] {
            let mut fixture = Fixture::new();
            let d_out = random.values(tokens * width, dtype);
            let mut expected = random.values(vocab * width, DType::F32);
            let table_gradient = fixture.put(&expected, DType::F32);
            let ids: Vec<usize> = (0..tokens).map(|_| random.below(vocab)).collect();
            for (id, d_out) in ids.iter().zip(d_out.chunks(width)) {
                for (sum, d_out) in expected[id * width..][..width].iter_mut().zip(d_out) {
                    *sum = f64::from(*sum as f32 + *d_out as f32);
                }
            }
            let (ids, d_out) = (fixture.ints(&ids), fixture.put(&d_out, dtype));
            fixture.backend.embedding_backward(ids, d_out, width, table_gradient);
            assert_eq!(fixture.get(table_gradient), expected, "each sum is rounded as it is made");
        }
    }
}

#[test]
fn rows_may_begin_at_any_element() {
    let mut random = Random(24);
    for dtype in TYPES {
        let (vocab, width, tokens) = (12, 32, 50);
        let mut fixture = Fixture::new();
        let ids: Vec<usize> = (0..=tokens).map(|_| random.below(vocab)).collect();
        let table = random.values(1 + vocab * width, dtype);
        let d_out = random.values(1 + tokens * width, dtype);
        let gathered: Vec<f64> = ids[1..].iter().flat_map(|id| &table[1 + id * width..][..width]).copied().collect();
        let mut added = vec![0.0; vocab * width];
        for (id, d_out) in ids[1..].iter().zip(d_out[1..].chunks(width)) {
            for (sum, d_out) in added[id * width..][..width].iter_mut().zip(d_out) {
                *sum += d_out;
            }
        }
        let ids = fixture.ints(&ids).slice(1, tokens);
        let table = fixture.put(&table, dtype).slice(1, vocab * width);
        let d_out = fixture.put(&d_out, dtype).slice(1, tokens * width);
        let out = fixture.poisoned(1 + tokens * width, dtype).slice(1, tokens * width);
        fixture.backend.embedding(ids, table, width, out);
        assert_eq!(fixture.get(out), gathered);
        let table_gradient = fixture.put(&vec![0.0; 1 + vocab * width], DType::F32).slice(1, vocab * width);
        fixture.backend.embedding_backward(ids, d_out, width, table_gradient);
        assert_close("table_gradient", &fixture.get(table_gradient), &added, 1e-6);
    }
}

#[test]
#[should_panic(expected = "outside the vocabulary")]
fn an_id_outside_the_table_is_refused() {
    let mut fixture = Fixture::new();
    let (ids, d_out) = (fixture.ints(&[3]), fixture.put(&[1.0], DType::F32));
    let table_gradient = fixture.put(&[0.0; 3], DType::F32);
    fixture.backend.embedding_backward(ids, d_out, 1, table_gradient);
}

#[test]
fn rows_are_gathered_by_pairs_and_scattered_back() {
    let mut random = Random(22);
    for dtype in TYPES {
        for width in [17, 24] {
            gather_and_scatter(&mut random, dtype, width);
        }
    }
}

fn gather_and_scatter(random: &mut Random, dtype: DType, width: usize) {
    let (count, divisor) = (90, 3);
    let mut fixture = Fixture::new();
    let x = random.values(count / divisor * width, dtype);
    let mut order: Vec<usize> = (0..count).collect();
    for i in (1..count).rev() {
        order.swap(i, random.below(i + 1));
    }
    let expected: Vec<f64> = order.iter().flat_map(|row| x[row / divisor * width..][..width].to_vec()).collect();
    let (x, rows) = (fixture.put(&x, dtype), fixture.ints(&order[..80]));
    let out = fixture.poisoned(80 * width, dtype);
    fixture.backend.gather_rows(x, rows, divisor, width, out);
    assert_eq!(fixture.get(out), expected[..80 * width]);

    let target = fixture.put(&vec![7.0; count * width], dtype);
    fixture.backend.scatter_rows(out, rows, width, target);
    let mut scattered = vec![7.0; count * width];
    for (row, x) in order[..80].iter().zip(expected.chunks(width)) {
        scattered[row * width..][..width].copy_from_slice(x);
    }
    assert_eq!(fixture.get(target), scattered, "rows that are not named are left");
}

#[test]
fn columns_of_rows_are_copied_and_the_others_left() {
    let mut random = Random(23);
    for dtype in TYPES {
        let (rows, columns, wide, narrow) = (70, 5, 19, 7);
        let mut fixture = Fixture::new();
        let x = random.values(rows * wide, dtype);
        let source = fixture.put(&x, dtype);
        let target = fixture.put(&vec![7.0; rows * narrow], dtype);
        // From column 11 to column 2, so that the buffers end within the last row.
        let from = Rows { buffer: source.slice(11, (rows - 1) * wide + columns), stride: wide };
        let to = Rows { buffer: target.slice(2, (rows - 1) * narrow + columns), stride: narrow };
        fixture.backend.copy_columns(from, to, rows, columns);
        let mut expected = vec![7.0; rows * narrow];
        for r in 0..rows {
            expected[r * narrow + 2..][..columns].copy_from_slice(&x[r * wide + 11..][..columns]);
        }
        assert_eq!(fixture.get(target), expected);
    }
}

#[test]
#[should_panic(expected = "twice")]
fn rows_scattered_twice_are_refused() {
    let mut fixture = Fixture::new();
    let (x, rows) = (fixture.put(&[1.0, 2.0], DType::F32), fixture.ints(&[1, 1]));
    let out = fixture.poisoned(2, DType::F32);
    fixture.backend.scatter_rows(x, rows, 1, out);
}
