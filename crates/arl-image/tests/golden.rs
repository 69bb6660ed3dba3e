//! Sizes, pixels and patches are those of transformers with torchvision, to the bit.

use crate::common;

use arl_image::{ImageProcessor, measure, prepare};
use safetensors::SafeTensors;
use serde_json::Value;

fn json(path: &std::path::Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(view: &safetensors::tensor::TensorView<'_>) -> Vec<u32> {
    view.data().chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Compared as bits: -0 is not 0.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn resized_sizes_are_those_of_smart_resize() {
    let Some(path) = common::shared("golden/vision/images/resize.json") else { return };
    let cases = json(&path);
    let (mut resized, mut refused) = (0, 0);
    for case in cases.as_array().unwrap() {
        let number = |key: &str| case[key].as_u64().unwrap();
        let processor = ImageProcessor {
            patch_size: number("factor") as usize / 2,
            min_pixels: number("min_pixels"),
            max_pixels: number("max_pixels"),
            ..common::processor()
        };
        let got = processor.smart_resize(number("height") as u32, number("width") as u32);
        match case["result"].as_array() {
            Some(sizes) => {
                let expected = (sizes[0].as_u64().unwrap() as u32, sizes[1].as_u64().unwrap() as u32);
                assert_eq!(got.unwrap(), expected, "{case}");
                resized += 1;
            }
            None => {
                assert!(got.unwrap_err().message.contains("more than 200 times"), "{case}");
                refused += 1;
            }
        }
    }
    assert_eq!((resized, refused), (54, 0));
}

#[test]
fn pictures_of_every_mode_have_torchvisions_pixels_and_patches() {
    let Some(dir) = common::shared("golden/vision/images") else { return };
    let described = json(&dir.join("images.json"));
    let bytes = std::fs::read(dir.join("images.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut count = 0;
    for case in described["cases"].as_array().unwrap() {
        let (file, kind) = (case["image"].as_str().unwrap(), case["processor"].as_str().unwrap());
        // The settings as the folder of a model has them.
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("preprocessor_config.json"), described["processors"][kind].to_string())
            .unwrap();
        let processor = ImageProcessor::from_dir(folder.path()).unwrap();

        let picture = std::fs::read(dir.join(file)).unwrap();
        let prepared = prepare(&picture, &processor).unwrap();
        let measured = measure(&picture, &processor).unwrap();
        let size = |key: &str| case[key].as_u64().unwrap() as u32;
        assert_eq!((prepared.height, prepared.width), (size("height"), size("width")), "{case}");
        assert_eq!(measured.resized, (prepared.height, prepared.width), "{case}");
        assert_eq!(measured.hash, prepared.hash);
        assert_eq!(processor.tokens(prepared.height, prepared.width) as u32, size("image_tokens"), "{case}");

        let name = |part: &str| format!("{}/{kind}/{part}", file.trim_end_matches(".png"));
        let expected = tensors.tensor(&name("resized")).unwrap();
        assert_eq!(expected.shape(), [prepared.height as usize, prepared.width as usize, 3]);
        assert!(prepared.pixels == expected.data(), "pixels of {case}");

        // What is in front of the patches stays.
        let mut patches = vec![7.0];
        processor.patches(&prepared.pixels, prepared.height as usize, prepared.width as usize, &mut patches);
        assert_eq!(patches.remove(0), 7.0);
        let (first, last) = (tensors.tensor(&name("first")).unwrap(), tensors.tensor(&name("last")).unwrap());
        let len = first.shape().iter().product::<usize>();
        let grid: u64 = case["image_grid_thw"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product();
        assert_eq!(patches.len(), grid as usize * first.shape()[1]);
        assert_eq!(bits(&patches[..len]), floats(&first), "first patches of {case}");
        assert_eq!(bits(&patches[patches.len() - len..]), floats(&last), "last patches of {case}");
        count += 1;
    }
    assert_eq!(count, 6);
}

#[test]
fn the_towers_inputs_are_made_of_their_pictures() {
    let Some(dir) = common::shared("golden/vision") else { return };
    for case in ["qwen2_5-vl", "qwen3-vl", "qwen3_5-vl"] {
        let dir = dir.join(case);
        let processor = ImageProcessor::from_dir(&dir).unwrap();
        let bytes = std::fs::read(dir.join("batch.safetensors")).unwrap();
        let batch = SafeTensors::deserialize(&bytes).unwrap();
        let (mut patches, mut grids) = (Vec::new(), Vec::new());
        for number in 0..3 {
            let picture = std::fs::read(dir.join(format!("image-{number}.png"))).unwrap();
            let prepared = prepare(&picture, &processor).unwrap();
            let (height, width) = (prepared.height as usize, prepared.width as usize);
            processor.patches(&prepared.pixels, height, width, &mut patches);
            grids.extend([1, height / processor.patch_size, width / processor.patch_size].map(|size| size as i64));
        }
        let expected: Vec<i64> = batch
            .tensor("image_grid_thw")
            .unwrap()
            .data()
            .chunks_exact(8)
            .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(grids, expected, "{case}");
        assert!(bits(&patches) == floats(&batch.tensor("pixel_values").unwrap()), "pixel_values of {case}");
    }
}
