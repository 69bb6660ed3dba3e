//! Safetensors files: what is written reads back, and a file that is damaged in any place is an error that names file and
//! tensor.

use crate::common;

use arl_model::{Checkpoint, Dtype, ErrorCode, SafetensorsFile, SafetensorsWriter, TensorDecl};
use common::{entries, entry, model, refused, write};
use serde_json::json;

#[test]
fn values_that_are_not_finite_are_errors_with_tensor_and_place() {
    let (dir, config) = model("qwen3", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut tensors = entries(&path);
        entry(&mut tensors, "model.embed_tokens.weight").3[(3 * 16 + 5) * 4..][..4].copy_from_slice(&bad.to_le_bytes());
        write(&path, &tensors);
        let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
        let error = checkpoint.read_f32("model.embed_tokens.weight", &mut [0.0; 640]).unwrap_err();
        assert_eq!(error.code, ErrorCode::Weights);
        assert!(
            error.message.contains("`model.embed_tokens.weight`") && error.message.contains("at [3, 5]"),
            "{error}"
        );
    }
}

#[test]
fn a_place_beyond_the_first_window_is_named_rightly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let (rows, columns) = (3000, 1000);
    let mut values = vec![1f32; rows * columns];
    values[2345 * columns + 678] = f32::NAN;
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    write(&path, &[("w".to_owned(), Dtype::F32, vec![rows, columns], bytes)]);
    let file = SafetensorsFile::open(&path).unwrap();
    let error = file.read_f32("w", &mut values).unwrap_err();
    assert!(error.message.contains("at [2345, 678]"), "{error}");
}

#[test]
fn a_file_cut_at_any_byte_is_an_error() {
    let (dir, config) = model("qwen3", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let inside = (header..whole.len()).step_by(97);
    for length in
        (0..header).step_by(7).chain(0..24).chain(header - 3..header + 3).chain(inside).chain([whole.len() - 1])
    {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = refused(dir.path(), &config);
        assert!(error.message.contains("model.safetensors"), "{length}: {error}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    std::fs::write(&path, &longer).unwrap();
    assert!(refused(dir.path(), &config).message.contains("bytes too many"));
    std::fs::write(&path, &whole).unwrap();
    Checkpoint::open(dir.path(), &config).unwrap();
}

#[test]
fn a_lying_header_is_an_error() {
    let (dir, config) = model("qwen3", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*whole.first_chunk().unwrap());
    for lie in [0, 1, length - 1, length + 1, length + 8, whole.len() as u64, 1 << 30, 1 << 40, u64::MAX] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&lie.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        refused(dir.path(), &config);
    }
    // Every byte of the header in turn: either refused, or a change that changes nothing that counts (in a space, or in
    // the free entries).
    let mut survived = 0;
    for at in 8..8 + length as usize {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x15;
        std::fs::write(&path, &bytes).unwrap();
        match Checkpoint::open(dir.path(), &config) {
            Err(error) => assert_eq!(error.code, ErrorCode::Weights),
            Ok(_) => survived += 1,
        }
    }
    assert!(survived < 32, "{survived}");
    for tensor in [
        json!({"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}),
        json!({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}),
        json!({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}),
        json!({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}),
        json!({"dtype": "F32", "shape": [u64::MAX, u64::MAX], "data_offsets": [0, 8]}),
        json!({"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}),
        json!({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}),
        json!({"dtype": "F32", "shape": [2]}),
        json!([]),
        json!(null),
    ] {
        let header = json!({ "w": tensor }).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&[0; 8]);
        std::fs::write(&path, &bytes).unwrap();
        let error = SafetensorsFile::open(&path).expect_err(&header);
        assert!(error.code == ErrorCode::Weights && error.message.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn a_state_file_of_mixed_types_reads_back_and_wrong_sizes_are_caught() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    let tensor =
        |name: &str, dtype, shape: &[usize]| TensorDecl { name: name.to_owned(), dtype, shape: shape.to_vec() };
    let tensors = [tensor("b", Dtype::U16, &[3]), tensor("a", Dtype::F64, &[]), tensor("none", Dtype::F32, &[0, 4])];
    let mut writer = SafetensorsWriter::create(&path, &[("step", "12")], &tensors).unwrap();
    writer.append(&[1, 2, 3]).unwrap();
    writer.append(&[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]).unwrap();
    assert_eq!(writer.append(&[0]).unwrap_err().code, ErrorCode::Internal);
    writer.finish().unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.names(), ["b", "a", "none"]);
    assert_eq!(file.metadata("step"), Some("12"));
    assert_eq!(file.info("a"), Some((Dtype::F64, &[][..])));
    assert_eq!(file.bytes("b").unwrap(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(file.bytes("a").unwrap(), [7, 8, 9, 10, 11, 12, 13, 14]);
    assert!(file.read_f32("b", &mut [0.0; 3]).unwrap_err().message.contains("`b` is U16"));
    assert!(file.bytes("c").unwrap_err().message.contains("no tensor `c`"));
    let writer = SafetensorsWriter::create(&path, &[], &tensors).unwrap();
    assert_eq!(writer.finish().unwrap_err().code, ErrorCode::Internal);
    let twice = [tensor("b", Dtype::U16, &[3]), tensor("b", Dtype::U16, &[3])];
    assert_eq!(SafetensorsWriter::create(&path, &[], &twice).unwrap_err().code, ErrorCode::Internal);
}
