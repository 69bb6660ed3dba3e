//! The settings of a checkpoint in every spelling, and what is wrong with them.

use crate::common;

use arl_image::{ImageProcessor, MAX_PIXELS};
use arl_model::{Error, ErrorCode};
use serde_json::{Value, json};

/// A folder with these files.
fn folder(files: &[(&str, &Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

fn read(content: &Value) -> Result<ImageProcessor, Error> {
    ImageProcessor::from_dir(folder(&[("preprocessor_config.json", content)]).path())
}

/// As Qwen2.5-VL-3B-Instruct was released.
fn qwen2_5() -> Value {
    json!({"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"})
}

/// As Qwen3-VL-4B-Instruct was released.
fn qwen3() -> Value {
    json!({"size": {"longest_edge": 16_777_216, "shortest_edge": 65_536}, "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"})
}

#[test]
fn the_released_files_are_read() {
    let old = read(&qwen2_5()).unwrap();
    assert_eq!((old.patch_size, old.temporal_patch_size, old.merge_size, old.factor()), (14, 2, 2, 28));
    assert_eq!((old.min_pixels, old.max_pixels), (3136, 12_845_056));
    assert_eq!((old.mean[2], old.std[0]), (0.408_210_73, 0.268_629_54));
    let new = read(&qwen3()).unwrap();
    assert_eq!((new.patch_size, new.factor()), (16, 32));
    assert_eq!((new.min_pixels, new.max_pixels, new.mean, new.std), (65_536, 16_777_216, [0.5; 3], [0.5; 3]));
}

#[test]
fn what_a_file_lacks_is_as_the_released_models_have_it() {
    assert_eq!(read(&json!({})).unwrap(), read(&qwen2_5()).unwrap());
    assert_eq!(read(&json!({"patch_size": 16})).unwrap(), read(&qwen3()).unwrap());
    assert_eq!(read(&json!({"size": null, "do_resize": null, "patch_size": 16})).unwrap(), read(&qwen3()).unwrap());
}

#[test]
fn bounds_have_three_spellings_and_the_top_level_counts_most() {
    let bounds = |content: Value| read(&content).map(|processor| (processor.min_pixels, processor.max_pixels)).unwrap();
    assert_eq!(bounds(json!({"min_pixels": 784, "max_pixels": 2000})), (784, 2000));
    assert_eq!(bounds(json!({"size": {"min_pixels": 784, "max_pixels": 2000}})), (784, 2000));
    assert_eq!(bounds(json!({"size": {"shortest_edge": 784, "longest_edge": 2000}})), (784, 2000));
    let both = json!({"size": {"shortest_edge": 1, "longest_edge": 9000}, "min_pixels": 784});
    assert_eq!(bounds(both), (784, 9000));
    assert_eq!(bounds(json!({"max_pixels": 5000})), (3136, 5000));
}

#[test]
fn a_processors_file_that_nests_the_settings_counts_more() {
    let nested = json!({"processor_class": "Qwen3VLProcessor", "image_processor": qwen3()});
    let both = folder(&[("processor_config.json", &nested), ("preprocessor_config.json", &qwen2_5())]);
    assert_eq!(ImageProcessor::from_dir(both.path()).unwrap(), read(&qwen3()).unwrap());
    let alone = folder(&[("processor_config.json", &nested)]);
    assert_eq!(ImageProcessor::from_dir(alone.path()).unwrap(), read(&qwen3()).unwrap());
    // An older one does not nest them.
    let old = json!({"processor_class": "Qwen2_5_VLProcessor"});
    let both = folder(&[("processor_config.json", &old), ("preprocessor_config.json", &qwen2_5())]);
    assert_eq!(ImageProcessor::from_dir(both.path()).unwrap(), read(&qwen2_5()).unwrap());
    let error = ImageProcessor::from_dir(
        folder(&[("processor_config.json", &json!({"image_processor": {"do_resize": false}}))]).path(),
    );
    let message = error.unwrap_err().message;
    assert!(message.contains("processor_config.json: `image_processor.do_resize` is false"), "{message}");
}

#[test]
fn one_number_stands_for_all_channels() {
    let processor = read(&json!({"image_mean": 0.25, "image_std": 0.125})).unwrap();
    assert_eq!((processor.mean, processor.std), ([0.25; 3], [0.125; 3]));
}

#[test]
fn what_is_wrong_or_not_built_is_refused_with_its_key() {
    let cases = [
        (json!({"do_resize": false}), "`do_resize` is false: images would keep their size, which is not implemented"),
        (json!({"do_rescale": false}), "`do_rescale` is false"),
        (json!({"do_normalize": false}), "`do_normalize` is false"),
        (json!({"do_center_crop": true}), "`do_center_crop` is true"),
        (json!({"do_resize": 1}), "`do_resize` must be true or false, but is 1"),
        (json!({"resample": 2}), "`resample` is 2: images would be resized by another filter than bicubic (3)"),
        (json!({"rescale_factor": 1.0}), "`rescale_factor` is 1.0"),
        (json!({"image_processor_type": "CLIPImageProcessor"}), "`image_processor_type` is \"CLIPImageProcessor\""),
        (json!({"patch_size": 0}), "`patch_size` must be an integer from 1 to 256, but is 0"),
        (json!({"patch_size": 14.5}), "`patch_size` must be an integer"),
        (json!({"merge_size": "2"}), "`merge_size` must be an integer from 1 to 16, but is \"2\""),
        (json!({"size": 224}), "`size` must be an object, but is 224"),
        (json!({"size": {"height": 224, "width": 224}}), "`size.shortest_edge` is missing"),
        (json!({"size": {"shortest_edge": 3136}}), "`size.longest_edge` is missing"),
        (
            json!({"size": {"shortest_edge": -1, "longest_edge": 5}}),
            "`size.shortest_edge` must be an integer from 1 to",
        ),
        (json!({"size": {"shortest_edge": 10, "longest_edge": 5}}), "`size` asks for at least 10 and at most 5 pixels"),
        (json!({"min_pixels": 2_000_000_000}), "`min_pixels` must be an integer from 1 to"),
        (json!({"image_mean": [0.5, 0.5]}), "`image_mean` must be three numbers, or one, but is [0.5,0.5]"),
        (json!({"image_std": [0.5, 0.0, 0.5]}), "`image_std` must be three numbers above 0, or one"),
        (json!([]), "must be a JSON object"),
    ];
    for (content, says) in cases {
        let error = read(&content).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config, "{content}");
        assert!(error.message.contains("preprocessor_config.json: ") && error.message.contains(says), "{error}");
    }
    let accepted = json!({"do_resize": true, "do_rescale": true, "do_normalize": true, "do_convert_rgb": true, "resample": 3,
        "rescale_factor": 0.00392156862745098, "do_center_crop": false});
    assert!(read(&accepted).is_ok());
}

#[test]
fn a_folder_without_the_file_is_named_and_so_is_what_is_no_json() {
    let empty = tempfile::tempdir().unwrap();
    let error = ImageProcessor::from_dir(empty.path()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Config);
    assert!(error.message.contains("no preprocessor_config.json"), "{error}");
    assert!(error.hint.starts_with("Copy it"), "{error}");
    let path = empty.path().join("preprocessor_config.json");
    std::fs::write(&path, "{\"patch_size\": 14,").unwrap();
    assert!(ImageProcessor::from_dir(empty.path()).unwrap_err().message.contains("no JSON"));
    std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert!(ImageProcessor::from_dir(empty.path()).unwrap_err().message.contains("Git LFS"));
}

#[test]
fn other_bounds_replace_the_models() {
    let processor = read(&qwen3()).unwrap();
    let bounds = |min, max| processor.clone().with_bounds(min, max);
    let other = bounds(Some(1024), Some(1_000_000)).unwrap();
    assert_eq!((other.min_pixels, other.max_pixels), (1024, 1_000_000));
    assert_eq!(bounds(None, None).unwrap(), processor);
    assert_eq!(bounds(None, Some(65_536)).unwrap().min_pixels, 65_536);
    let error = bounds(None, Some(65_535)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Config);
    assert_eq!(error.message, "min_pixels 65536 is above max_pixels 65535");
    for wrong in [0, MAX_PIXELS + 1] {
        assert!(bounds(Some(wrong), None).unwrap_err().message.starts_with("min_pixels must be from 1 to"));
        assert!(bounds(None, Some(wrong)).unwrap_err().message.starts_with("max_pixels must be from 1 to"));
    }
}

#[test]
fn the_fingerprint_changes_with_every_setting() {
    let one = common::processor();
    let others = [
        ImageProcessor { patch_size: 3, ..one.clone() },
        ImageProcessor { temporal_patch_size: 1, ..one.clone() },
        ImageProcessor { merge_size: 1, ..one.clone() },
        ImageProcessor { min_pixels: 17, ..one.clone() },
        ImageProcessor { max_pixels: 4097, ..one.clone() },
        ImageProcessor { mean: [0.5, 0.5, 0.500_000_06], ..one.clone() },
        ImageProcessor { std: [0.5, 0.499_999_97, 0.5], ..one.clone() },
    ];
    for other in &others {
        assert_ne!(other.fingerprint(), one.fingerprint(), "{other:?}");
    }
    assert_eq!(one.fingerprint(), common::processor().fingerprint());
}
