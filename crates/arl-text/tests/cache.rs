//! The token cache: what is filled is found again, after a kill and while another process runs; packing.
use crate::common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arl_text::{RowState, TextEncoder, TokenCache, Truncation, pack};
use common::property::holds;
use common::{CHATML, encoder, encoder_with, image, vision_encoder};
use proptest::collection::vec;
use proptest::prelude::*;

fn rows(count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| format!(r#"{{"question": "{}", "answer": "{i}"}}"#, "x".repeat(i * 7 % 40)).into_bytes())
        .collect()
}

fn fill(cache: &TokenCache, rows: &[Vec<u8>], which: &[u32]) -> arl_text::FillReport {
    let bytes: Vec<&[u8]> = which.iter().map(|&i| rows[i as usize].as_slice()).collect();
    cache.fill(&bytes, which).unwrap()
}

fn open(dir: &Path, rows: usize, encoder: &Arc<TextEncoder>) -> TokenCache {
    TokenCache::open(dir, "source", rows, Arc::clone(encoder)).unwrap()
}

fn folder_of(dir: &Path) -> PathBuf {
    std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path()
}

#[test]
fn rows_filled_in_any_order_are_found_under_their_index() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let rows = rows(50);
    let cache = open(dir.path(), 50, &encoder);
    let order: Vec<u32> = (0..50).map(|i| i * 17 % 50).collect();
    let first = fill(&cache, &rows, &order[..20]);
    assert_eq!((first.rows, cache.filled()), (20, 20));
    assert_eq!(cache.lengths().iter().filter(|&&n| n > 0).count(), 20);
    fill(&cache, &rows, &order[20..]);
    drop(cache);
    let cache = open(dir.path(), 50, &encoder);
    assert_eq!(cache.filled(), 50);
    for (i, row) in rows.iter().enumerate() {
        let expected = common::sample(&encoder, std::str::from_utf8(row).unwrap());
        assert_eq!(cache.sample(i as u32).unwrap(), (expected.ids.clone(), expected.runs));
        assert_eq!(cache.lengths()[i] as usize, expected.ids.len());
    }
    // Filled again, nothing is encoded or written, and the report is the same.
    let size = std::fs::metadata(folder_of(dir.path()).join("tokens")).unwrap().len();
    assert_eq!(fill(&cache, &rows, &order[..20]), first);
    assert_eq!(std::fs::metadata(folder_of(dir.path()).join("tokens")).unwrap().len(), size);
}

#[test]
fn what_was_noticed_in_rows_is_remembered_and_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    // Without its newline the template's last token is the end of the reply; one before it predicts it.
    let template = CHATML.replace("<|im_end|>\\n", "<|im_end|>");
    let encoder = Arc::new(encoder_with(&template, |options| {
        options.max_length = Some(2);
        options.truncation = Truncation::Left;
    }));
    let rows = rows(6);
    let cache = open(dir.path(), 6, &encoder);
    assert!(cache.notes().is_empty());
    fill(&cache, &rows, &[4, 2]);
    fill(&cache, &rows, &[5, 2]);
    let notes = cache.notes();
    let [note] = notes.as_slice() else { panic!("{notes:?}") };
    assert_eq!((note.kind.name(), note.rows, note.count, note.first_row), ("end token only", 3, 3, 2));
    assert_eq!(note.message(), "only the token that ends a reply is trained of 3 replies");
    drop(cache);
    assert_eq!(open(dir.path(), 6, &encoder).notes(), notes);
}

#[test]
fn dropped_rows_and_problems_are_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder_with(CHATML, |options| {
        options.max_length = Some(60);
        options.truncation = Truncation::Drop;
    }));
    let long = format!(r#"{{"question": "{}", "answer": "a"}}"#, "x".repeat(100)).into_bytes();
    let rows = vec![rows(1).remove(0), long, b"{".to_vec()];
    let cache = open(dir.path(), 4, &encoder);
    let report = fill(&cache, &rows, &[0, 1, 2]);
    assert_eq!((report.rows, report.dropped, report.problems.len()), (1, 1, 1));
    assert_eq!((report.problems[0].row, report.problems[0].reason.as_str()), (2, "not json"));
    drop(cache);
    let cache = open(dir.path(), 4, &encoder);
    use RowState::{Dropped, Missing, Problem, Sample};
    assert_eq!(cache.states(), [Sample, Dropped, Problem, Missing]);
    assert_eq!(cache.filled(), 3);
    assert_eq!(fill(&cache, &rows, &[0, 1, 2]), report);
    assert!(cache.micro_batch(&[1]).is_err());
    assert!(cache.micro_batch(&[4]).is_err());
    assert!(cache.fill(&[b"{}"], &[4]).is_err());
}

#[test]
fn a_micro_batch_shifts_targets_within_each_sample() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let rows: Vec<Vec<u8>> =
        vec![br#"{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}"#.to_vec(), br#"{"input_ids": [4, 5]}"#.to_vec()];
    let cache = open(dir.path(), 2, &encoder);
    fill(&cache, &rows, &[0, 1]);
    let batch = cache.micro_batch(&[1, 0]).unwrap();
    assert_eq!(batch.input_ids, [4, 5, 1, 2, 3]);
    assert_eq!(batch.targets, [5, -100, -100, 3, -100]);
    assert_eq!(batch.positions, [0, 1, 0, 1, 2]);
    assert_eq!(batch.cu_seqlens, [0, 2, 5]);
    assert_eq!(batch.weights, None);
}

#[test]
fn weights_lie_beside_the_targets_that_they_weigh() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let row = br#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}"#;
    let plain = br#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
    let cache = open(dir.path(), 2, &encoder);
    fill(&cache, &[row.to_vec(), plain.to_vec()], &[0, 1]);
    for order in [[0, 1], [1, 0]] {
        let batch = cache.micro_batch(&order).unwrap();
        let weights = batch.weights.clone().unwrap();
        assert_eq!(weights.len(), batch.targets.len());
        let scored: Vec<(i32, f32)> =
            batch.targets.iter().zip(&weights).filter(|(t, _)| **t != -100).map(|(t, w)| (*t, *w)).collect();
        let first = [(97, 0.5), (258, 0.5), (98, 1.0), (258, 1.0)];
        let second = [(97, 1.0), (258, 1.0)];
        let expected = if order[0] == 0 { [&first[..], &second].concat() } else { [&second[..], &first].concat() };
        assert_eq!(scored, expected);
    }
}

#[test]
fn cut_off_anywhere_the_cache_keeps_what_is_whole_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(vision_encoder(CHATML, |_| {}));
    let with_images =
        br#"{"question": "<image>q<image>", "answer": "a", "images": ["https://h.example/x", "y"]}"#.to_vec();
    let rows: Vec<Vec<u8>> =
        rows(12).into_iter().enumerate().map(|(i, row)| if i % 3 == 1 { with_images.clone() } else { row }).collect();
    let images = |i: usize| if i % 3 == 1 { vec![image(i as u8, 1, 2), image(99, 2, 1)] } else { vec![] };
    let images: Vec<_> = (0..12).map(images).collect();
    let all: Vec<u32> = (0..12).collect();
    let fill = |cache: &TokenCache, rows: &[Vec<u8>], which: &[u32]| {
        let bytes: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
        cache.fill_with_images(&bytes, which, &images).unwrap();
    };
    let cache = open(dir.path(), 12, &encoder);
    fill(&cache, &rows, &all);
    let expected: Vec<_> = all.iter().map(|&i| cache.micro_batch(&[i]).unwrap()).collect();
    assert_eq!(expected.iter().map(|batch| batch.images.len()).sum::<usize>(), 8);
    drop(cache);
    let folder = folder_of(dir.path());
    let names = ["tokens", "index"];
    let whole = names.map(|name| std::fs::read(folder.join(name)).unwrap());
    let sizes = [whole[0].len(), whole[1].len()];
    let place = (0..2usize).prop_flat_map(|file| (Just(file), 0..sizes[file]));
    // Bits that are flipped in the byte at that place; none: the file ends there.
    let flipped = prop_oneof![Just(None), (1..=u8::MAX).prop_map(Some)];
    holds(200, (place, flipped), |((file, at), flipped)| {
        let mut files = whole.clone();
        match flipped {
            None => files[file].truncate(at),
            Some(bits) => files[file][at] ^= bits,
        }
        for (name, bytes) in names.iter().zip(&files) {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
        let cache = open(dir.path(), 12, &encoder);
        let kept = cache.filled();
        for i in 0..12 {
            if cache.states()[i as usize] == RowState::Sample {
                prop_assert_eq!(&cache.micro_batch(&[i]).unwrap(), &expected[i as usize]);
            }
        }
        fill(&cache, &rows, &all);
        prop_assert_eq!(cache.filled(), 12, "kept {}", kept);
        // What was appended is found again next time: it follows what was kept, not what was damaged.
        drop(cache);
        let cache = open(dir.path(), 12, &encoder);
        prop_assert_eq!(cache.filled(), 12, "kept {}", kept);
        for (i, expected) in expected.iter().enumerate() {
            prop_assert_eq!(&cache.micro_batch(&[i as u32]).unwrap(), expected);
        }
        Ok(())
    });
}

#[test]
fn files_of_an_older_format_are_filled_again() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    fill(&open(dir.path(), 3, &encoder), &rows(3), &[0, 1, 2]);
    for name in ["tokens", "index"] {
        let path = folder_of(dir.path()).join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[8], 3, "the version behind the magic");
        bytes[8] -= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let cache = open(dir.path(), 3, &encoder);
    assert_eq!(cache.filled(), 0);
    fill(&cache, &rows(3), &[0, 1, 2]);
    drop(cache);
    assert_eq!(open(dir.path(), 3, &encoder).filled(), 3);
}

#[test]
fn data_that_changes_underneath_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let cache = open(dir.path(), 1, &encoder);
    fill(&cache, &rows(1), &[0]);
    let path = folder_of(dir.path()).join("tokens");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(cache.sample(0).unwrap_err().code, arl_model::ErrorCode::State);
}

#[test]
fn another_key_source_or_encoder_is_another_cache() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let cache = open(dir.path(), 3, &encoder);
    fill(&cache, &rows(3), &[0, 1, 2]);
    drop(cache);
    assert_eq!(TokenCache::open(dir.path(), "other", 3, Arc::clone(&encoder)).unwrap().filled(), 0);
    assert_eq!(open(dir.path(), 4, &encoder).filled(), 0);
    let other = Arc::new(encoder_with(CHATML, |options| options.max_length = Some(99)));
    assert_eq!(open(dir.path(), 3, &other).filled(), 0);
    assert_eq!(open(dir.path(), 3, &encoder).filled(), 3);
}

#[test]
fn two_at_a_time_do_not_share_files() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let rows = rows(3);
    let first = open(dir.path(), 3, &encoder);
    fill(&first, &rows, &[0]);
    let second = open(dir.path(), 3, &encoder);
    assert!(!first.is_private() && second.is_private());
    fill(&second, &rows, &[2, 1]);
    fill(&first, &rows, &[1]);
    assert_eq!((first.filled(), second.filled()), (2, 2));
    assert_eq!(first.sample(1).unwrap(), second.sample(1).unwrap());
    drop(second);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    drop(first);
    assert_eq!(open(dir.path(), 3, &encoder).filled(), 2);
}

#[test]
fn filled_from_many_threads_at_once_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let rows = rows(60);
    let cache = open(dir.path(), 60, &encoder);
    std::thread::scope(|scope| {
        for part in 0..4 {
            let (cache, rows) = (&cache, &rows);
            // The parts overlap.
            let which: Vec<u32> = (0..60).filter(|i| i % 4 == part || i % 5 == 0).collect();
            scope.spawn(move || fill(cache, rows, &which));
        }
    });
    assert_eq!(cache.filled(), 60);
    cache.sync().unwrap();
    drop(cache);
    assert_eq!(open(dir.path(), 60, &encoder).filled(), 60);
}

#[test]
fn packing_uses_each_sample_once_within_the_bound_and_is_the_same_every_time() {
    holds(200, vec(1..=100u32, 0..200), |lengths| {
        let groups = pack(&lengths, 100).unwrap();
        let sum = |group: &[u32]| group.iter().map(|&i| lengths[i as usize]).sum::<u32>();
        let mut seen = BTreeSet::new();
        for group in &groups {
            prop_assert!(sum(group) <= 100, "{group:?}");
            prop_assert!(group.windows(2).all(|pair| pair[0] < pair[1]), "{group:?}");
            prop_assert!(group.iter().all(|&i| seen.insert(i)), "{groups:?}");
        }
        prop_assert_eq!(seen.len(), lengths.len());
        prop_assert_eq!(&groups, &pack(&lengths, 100).unwrap());
        // Best fit leaves at most one group half empty.
        prop_assert!(groups.iter().filter(|group| sum(group) <= 50).count() <= 1, "{groups:?}");
        Ok(())
    });
    assert_eq!(pack(&[60, 50, 40, 50], 100).unwrap(), [vec![0, 2], vec![1, 3]]);
    assert!(pack(&[1, 101], 100).unwrap_err().message.contains("sample 1"));
    assert!(pack(&[1, 0], 100).unwrap_err().message.contains("sample 1"));
    assert!(pack(&[], 100).unwrap().is_empty());
}

#[test]
fn the_cache_packs_its_own_rows_and_names_one_that_is_too_long() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let rows: Vec<Vec<u8>> =
        [3, 2, 4].iter().map(|&n| format!(r#"{{"input_ids": [{}]}}"#, vec!["1"; n].join(", ")).into_bytes()).collect();
    let cache = open(dir.path(), 4, &encoder);
    fill(&cache, &rows, &[0, 1, 2]);
    // Positions in the call, not rows.
    assert_eq!(cache.pack(&[2, 0, 1], 6).unwrap(), [vec![0, 2], vec![1]]);
    assert!(cache.pack(&[1, 2], 3).unwrap_err().message.contains("row 2"));
    assert!(cache.pack(&[3], 6).unwrap_err().message.contains("row 3"));
}
