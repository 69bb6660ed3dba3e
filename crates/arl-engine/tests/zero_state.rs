//! What ranks that divide moments write: a model and an adapter with the bytes of one rank's, and states that any number of ranks
//! reads.

use crate::common;
use crate::common::ranks;

use std::collections::BTreeMap;
use std::path::Path;

use arl_engine::backend::DType;
use arl_engine::{EngineOptions, Recompute, Weights};
use arl_model::ErrorCode;
use common::options;
use ranks::{Cpu, on_ranks, state, step, uneven_steps, with_adapters};

/// The files of a folder, by name.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().display().to_string(), std::fs::read(&path).unwrap())).collect()
}

#[test]
fn a_model_that_ranks_write_together_has_the_bytes_of_one_that_a_rank_writes() {
    for (name, dtype) in [("window-bias", DType::F32), ("moe-top1", DType::Bf16), ("qwen2-window", DType::F16)] {
        let frozen =
            if name == "moe-top1" { vec!["*embed*".to_owned(), "model.layers.0.*".to_owned()] } else { vec![] };
        let base = EngineOptions { frozen, ..options(dtype, Recompute::Norms, 33) };
        let export = |size: usize, zero: u8, export_type| {
            let dir = tempfile::tempdir().unwrap();
            let options = EngineOptions { zero, ..base.clone() };
            on_ranks(name, &options, size, Weights::Checkpoint, |engine, rank| {
                step(engine, &uneven_steps()[0], rank, size);
                engine.export_model(dir.path(), export_type).unwrap();
            });
            files(dir.path())
        };
        for export_type in [None, Some(arl_model::WeightDtype::Bf16)] {
            let one = export(1, 0, export_type);
            assert!(one["model.safetensors"].len() > 1000);
            for (size, zero) in [(2, 1), (3, 2), (4, 2), (3, 3)] {
                assert!(export(size, zero, export_type) == one, "{name}: {size} ranks, zero {zero}");
            }
        }
    }
}

#[test]
fn an_adapter_that_ranks_have_in_pieces_is_written_as_one_rank_writes_it() {
    let export = |size: usize, zero: u8| {
        let dir = tempfile::tempdir().unwrap();
        let options =
            EngineOptions { zero, ..with_adapters("window-bias", options(DType::Bf16, Recompute::Norms, 33)) };
        on_ranks("window-bias", &options, size, Weights::Checkpoint, |engine, rank| {
            step(engine, &uneven_steps()[0], rank, size);
            if zero > 0 || rank == 0 {
                engine.export_adapter(dir.path(), Some("base")).unwrap();
            }
        });
        files(dir.path())
    };
    let one = export(1, 0);
    assert!(one.contains_key("adapter_model.safetensors"));
    assert!(export(2, 2) == one && export(3, 1) == one && export(2, 3) == one);
}

/// A state saved by `size` ranks after a step.
fn saved(name: &str, base: &EngineOptions, size: usize, zero: u8) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    on_ranks(name, &EngineOptions { zero, ..base.clone() }, size, Weights::Checkpoint, |engine, rank| {
        step(engine, &uneven_steps()[0], rank, size);
        if zero > 0 || rank == 0 {
            engine.save_state(dir.path()).unwrap();
        }
    });
    dir
}

/// What comes of a saved state after another step on `size` ranks.
fn resumed(name: &str, base: &EngineOptions, size: usize, zero: u8, from: &Path) -> (String, Vec<u32>) {
    let options = EngineOptions { zero, ..base.clone() };
    let mut all = on_ranks(name, &options, size, Weights::Restored, |engine, rank| {
        engine.restore_state(from).unwrap();
        (step(engine, &uneven_steps()[2], rank, size), state(engine))
    });
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    all.remove(0)
}

#[test]
fn any_number_of_ranks_resumes_what_any_other_has_saved() {
    for (name, dtype) in [("window-bias", DType::F16), ("moe-top1", DType::Bf16), ("qwen2-window", DType::F32)] {
        let base = options(dtype, Recompute::Norms, 33);
        let one = {
            let from = saved(name, &base, 1, 0);
            assert!(files(from.path()).keys().eq(["engine.safetensors"]));
            resumed(name, &base, 1, 0, from.path())
        };
        for (size, zero) in [(1, 0), (2, 1), (3, 2), (4, 2), (3, 3)] {
            let from = saved(name, &base, size, zero);
            if zero > 0 {
                assert_eq!(files(from.path()).len(), size);
                let largest = files(from.path()).values().map(Vec::len).max().unwrap();
                let all: usize = files(from.path()).values().map(Vec::len).sum();
                assert!(largest < all / size * 3 / 2, "no rank writes much more than its share: {largest} of {all}");
            }
            for (other, divided) in [(1, 0), (2, 0), (2, 2), (3, 1), (4, 2), (2, 3), (4, 3)] {
                let found = resumed(name, &base, other, divided, from.path());
                assert!(found == one, "{name}: {size} ranks, zero {zero} -> {other}, zero {divided}");
            }
        }
    }
}

#[test]
fn adapters_and_frozen_parameters_are_resumed_by_another_number_of_ranks() {
    let base = options(DType::Bf16, Recompute::Norms, 33);
    let frozen = vec!["*embed*".to_owned(), "model.layers.0.*".to_owned()];
    for options in [with_adapters("qwen2-window", base.clone()), EngineOptions { frozen, ..base }] {
        let whole = saved("qwen2-window", &options, 1, 0);
        let one = resumed("qwen2-window", &options, 1, 0, whole.path());
        for zero in [2, 3] {
            let pieces = saved("qwen2-window", &options, 3, zero);
            for (other, divided) in [(2, 1), (1, 0), (2, 3)] {
                let found = resumed("qwen2-window", &options, other, divided, pieces.path());
                assert!(found == one, "zero {zero} -> {other} ranks, zero {divided}");
            }
        }
    }
}

#[test]
fn pieces_that_are_missing_or_do_not_fit_are_named_and_nothing_changes() {
    let base = options(DType::F32, Recompute::Norms, 33);
    let from = saved("window-bias", &base, 3, 2);
    let place = |rank: usize| from.path().join(format!("state-0000{rank}-of-00003.safetensors"));
    let mut engine = common::open("window-bias", &base);
    let before = state(&mut engine);
    let refused = |engine: &mut Cpu| {
        let error = engine.restore_state(from.path()).unwrap_err();
        assert!(state(engine) == before);
        error
    };
    let third = std::fs::read(place(3)).unwrap();
    std::fs::remove_file(place(3)).unwrap();
    let error = refused(&mut engine);
    assert!(error.message.contains("state-00003-of-00003.safetensors"), "{error}");
    // A piece twice, and another not at all.
    std::fs::copy(place(2), place(3)).unwrap();
    let error = refused(&mut engine);
    assert_eq!(error.code, ErrorCode::State);
    assert!(error.message.contains("none of its files has elements "), "{error}");
    std::fs::write(place(3), &third).unwrap();
    engine.restore_state(from.path()).unwrap();
    // Of another model, and of another type.
    let mut other = common::open("qwen2-window", &base);
    let error = other.restore_state(from.path()).unwrap_err();
    assert!(error.code == ErrorCode::State && error.message.contains("another model"), "{error}");
    let mut narrow = common::open("window-bias", &options(DType::Bf16, Recompute::Norms, 33));
    let error = narrow.restore_state(from.path()).unwrap_err();
    assert!(error.message.contains("another dtype"), "{error}");
}

#[test]
fn a_rank_that_cannot_write_ends_the_save_of_all() {
    let base = EngineOptions { zero: 2, ..options(DType::F32, Recompute::Norms, 33) };
    let dir = tempfile::tempdir().unwrap();
    // The place of the second rank's file is taken by a folder.
    std::fs::create_dir(dir.path().join("state-00002-of-00003.safetensors.partial")).unwrap();
    let errors =
        on_ranks("window-bias", &base, 3, Weights::Checkpoint, |engine, _| engine.save_state(dir.path()).unwrap_err());
    assert_eq!(
        errors.iter().map(|error| error.code).collect::<Vec<_>>(),
        [ErrorCode::Interrupted, ErrorCode::Io, ErrorCode::Interrupted]
    );
    assert!(errors[0].message.contains("rank 1 failed"), "{}", errors[0]);
    // What has no folder is not shared.
    let elsewhere = dir.path().join("file");
    std::fs::write(&elsewhere, "").unwrap();
    let errors = on_ranks("window-bias", &base, 2, Weights::Checkpoint, |engine, _| {
        engine.export_model(&elsewhere, None).unwrap_err()
    });
    assert_eq!(errors.iter().map(|error| error.code).collect::<Vec<_>>(), [ErrorCode::Io, ErrorCode::Interrupted]);
}
