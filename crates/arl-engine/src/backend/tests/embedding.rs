//! Rows by index.

use super::*;

#[test]
fn rows_are_gathered_in_either_type() {
    let mut random = Random(20);
    for (from, to) in [(DType::F32, DType::F32), (DType::Bf16, DType::F32), (DType::F32, DType::Bf16)] {
        for (vocab, width, tokens) in [(1, 1, 1), (7, 3, 0), (50, 33, 300)] {
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
        for (vocab, width, tokens) in [(1, 1, 5), (7, 3, 0), (50, 33, 300), (1000, 8, 2000), (130, 5, 131)] {
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
        let (count, width, divisor) = (90, 17, 3);
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
}

#[test]
#[should_panic(expected = "twice")]
fn rows_scattered_twice_are_refused() {
    let mut fixture = Fixture::new();
    let (x, rows) = (fixture.put(&[1.0, 2.0], DType::F32), fixture.ints(&[1, 1]));
    let out = fixture.poisoned(2, DType::F32);
    fixture.backend.scatter_rows(x, rows, 1, out);
}
