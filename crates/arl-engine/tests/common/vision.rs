//! Small models that see, drawn at random, and batches with images.

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, IGNORED, Images, Kind, LossScaling, MicroBatch, Recompute, Weights};
use serde_json::{Value, json};

use super::options;

/// One of each kind: DeepStack; a hybrid decoder; windows.
pub const SEEING: [&str; 3] = ["qwen3_vl", "qwen3_5", "qwen2_5_vl"];

/// Those with experts: DeepStack and a dense layer; a hybrid decoder with a shared expert.
pub const SEEING_EXPERTS: [&str; 2] = ["qwen3_vl_moe", "qwen3_5_moe"];

/// The token of a merged patch.
pub const IMAGE: i32 = 40;

/// Tokens of text are below this.
const TEXT: usize = 40;

/// Numbers of a patch: three colours, two frames, 2 x 2 pixels.
const PATCH: usize = 24;

/// A kind without its experts.
fn dense(name: &str) -> &str {
    name.strip_suffix("_moe").unwrap_or(name)
}

fn vision(name: &str) -> Value {
    let mut config = json!({
        "depth": 3, "hidden_size": 24, "in_channels": 3, "initializer_range": 0.3, "intermediate_size": 20,
        "num_heads": 3, "out_hidden_size": 32, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "model_type": format!("{name}_vision"),
    });
    match dense(name) {
        "qwen2_5_vl" => {
            config["hidden_act"] = "silu".into();
            config["window_size"] = 8.into();
            config["fullatt_block_indexes"] = json!([1]);
            config["tokens_per_second"] = 4.into();
        }
        _ => {
            config["hidden_act"] = "gelu_pytorch_tanh".into();
            config["num_position_embeddings"] = 25.into();
        }
    }
    if dense(name) == "qwen3_vl" {
        config["deepstack_visual_indexes"] = json!([0, 2]);
    }
    config
}

fn text(name: &str) -> Value {
    let mut config = json!({
        "attention_bias": false, "head_dim": 8, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.1,
        "intermediate_size": 24, "max_position_embeddings": 512, "model_type": format!("{name}_text"),
        "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "vocab_size": 48,
    });
    let mut rope = json!({ "rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 1, 1] });
    match dense(name) {
        "qwen2_5_vl" => {
            config["use_sliding_window"] = false.into();
            config["sliding_window"] = Value::Null;
            config["max_window_layers"] = 80.into();
        }
        "qwen3_5" => {
            config["head_dim"] = 16.into();
            config["layer_types"] = json!(["linear_attention", "full_attention", "linear_attention"]);
            for (key, size) in [
                ("linear_conv_kernel_dim", 4),
                ("linear_key_head_dim", 8),
                ("linear_num_key_heads", 2),
                ("linear_num_value_heads", 4),
                ("linear_value_head_dim", 8),
            ] {
                config[key] = size.into();
            }
            rope["partial_rotary_factor"] = 0.5.into();
            rope["mrope_interleaved"] = true.into();
        }
        _ => rope["mrope_interleaved"] = true.into(),
    }
    config["rope_parameters"] = rope;
    if name != dense(name) {
        for (key, value) in [
            ("num_experts", json!(4)),
            ("num_experts_per_tok", json!(2)),
            ("moe_intermediate_size", json!(16)),
            ("output_router_logits", json!(true)),
            ("router_aux_loss_coef", json!(0.05)),
        ] {
            config[key] = value;
        }
    }
    if name == "qwen3_vl_moe" {
        config["mlp_only_layers"] = json!([1]);
    } else if name == "qwen3_5_moe" {
        config["shared_expert_intermediate_size"] = json!(12);
    }
    config
}

/// A folder with a model's configuration; it has no weights.
pub fn folder(name: &str) -> tempfile::TempDir {
    let class = match name {
        "qwen3_vl" => "Qwen3VLForConditionalGeneration",
        "qwen3_5" => "Qwen3_5ForConditionalGeneration",
        "qwen3_vl_moe" => "Qwen3VLMoeForConditionalGeneration",
        "qwen3_5_moe" => "Qwen3_5MoeForConditionalGeneration",
        _ => "Qwen2_5_VLForConditionalGeneration",
    };
    let config = json!({
        "architectures": [class], "dtype": "float32", "model_type": name, "tie_word_embeddings": name == "qwen3_vl",
        "image_token_id": IMAGE, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43,
        "text_config": text(name), "vision_config": vision(name),
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// An engine on a model, drawn from the same seed.
pub fn open(name: &str, options: &EngineOptions) -> Engine<CpuBackend> {
    let dir = folder(name);
    Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Random(7), options).unwrap()
}

/// Options with room for the largest of the batches.
pub fn room(dtype: DType, recompute: Recompute, batches: &[MicroBatch]) -> EngineOptions {
    let mut size = batches[0].size();
    for batch in batches {
        let other = batch.size();
        size.tokens = size.tokens.max(other.tokens);
        size.sequences = size.sequences.max(other.sequences);
        size.patches = size.patches.max(other.patches);
        size.images = size.images.max(other.images);
    }
    // With the usual scale the first steps of these models are skipped in f16.
    let loss_scaling = LossScaling { initial: 64.0, ..LossScaling::default() };
    EngineOptions { max_batch: size, loss_scaling, ..options(dtype, recompute, 1) }
}

/// Sequences of random text, each with images of these heights and widths in patches. What follows the last image is trained.
pub fn batch(sequences: &[&[(u32, u32)]], seed: u64) -> MicroBatch {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut batch = MicroBatch { cu_seqlens: vec![0], ..MicroBatch::default() };
    let mut positions = [Vec::new(), Vec::new(), Vec::new()];
    let mut images = Images::default();
    for sequence in sequences {
        let (mut next, start) = (0, batch.input_ids.len());
        let mut add = |token: usize, at: [i32; 3]| {
            batch.input_ids.push(token as i32);
            positions.iter_mut().zip(at).for_each(|(axis, at)| axis.push(at));
        };
        for _ in 0..3 + random(4) {
            add(random(TEXT), [next; 3]);
            next += 1;
        }
        for &(height, width) in *sequence {
            images.grids.push([1, height, width]);
            images
                .pixel_values
                .extend((0..(height * width) as usize * PATCH).map(|_| random(201) as f32 / 100.0 - 1.0));
            add(42, [next; 3]);
            next += 1;
            let (rows, columns) = (height as i32 / 2, width as i32 / 2);
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                add(IMAGE as usize, [next, next + row, next + column]);
            }
            next += rows.max(columns);
            add(43, [next; 3]);
            next += 1;
        }
        let words = 5 + random(4);
        for _ in 0..words {
            add(random(TEXT), [next; 3]);
            next += 1;
        }
        let first = batch.input_ids.len() - words;
        let end = batch.input_ids.len();
        batch
            .targets
            .extend((start..end).map(|t| if t + 1 >= first && t + 1 < end { batch.input_ids[t + 1] } else { IGNORED }));
        batch.cu_seqlens.push(end as i32);
    }
    batch.positions = positions.concat();
    batch.images = (!images.grids.is_empty()).then_some(images);
    batch
}

/// The sequences of a batch, each a batch of its own.
pub fn split(batch: &MicroBatch) -> Vec<MicroBatch> {
    let tokens = batch.input_ids.len();
    let (mut pixel, mut image) = (0, 0);
    let part = |ends: &[i32]| {
        let range = ends[0] as usize..ends[1] as usize;
        let input_ids = batch.input_ids[range.clone()].to_vec();
        let mut merged = input_ids.iter().filter(|&&id| id == IMAGE).count();
        let mut images = Images::default();
        while merged > 0 {
            let grid = batch.images.as_ref().unwrap().grids[image];
            let numbers = (grid[1] * grid[2]) as usize * PATCH;
            images.pixel_values.extend(&batch.images.as_ref().unwrap().pixel_values[pixel..pixel + numbers]);
            images.grids.push(grid);
            (pixel, image, merged) = (pixel + numbers, image + 1, merged - (grid[1] * grid[2]) as usize / 4);
        }
        MicroBatch {
            targets: batch.targets[range.clone()].to_vec(),
            positions: (0..3).flat_map(|axis| batch.positions[axis * tokens..][range.clone()].to_vec()).collect(),
            cu_seqlens: vec![0, range.len() as i32],
            weights: None,
            images: (!images.grids.is_empty()).then_some(images),
            input_ids,
        }
    };
    batch.cu_seqlens.windows(2).map(part).collect()
}

/// A batch as a model that is trained on text alone takes it: positions of text have one axis.
pub fn of_text(batch: &MicroBatch) -> MicroBatch {
    MicroBatch { positions: batch.positions[..batch.input_ids.len()].to_vec(), ..batch.clone() }
}

/// Two micro-batches with images, of which one has a sequence without, and one without any.
pub fn batches() -> Vec<MicroBatch> {
    vec![batch(&[&[(4, 6)], &[], &[(2, 2), (8, 4)]], 1), batch(&[&[], &[]], 2), batch(&[&[(6, 10)]], 3)]
}

/// [`room`] in f32.
pub fn f32_room(batches: &[MicroBatch]) -> EngineOptions {
    room(DType::F32, Recompute::Norms, batches)
}

/// Names of the tower's tensors, and of the others.
pub fn names(engine: &Engine<CpuBackend>) -> (Vec<String>, Vec<String>) {
    engine.tensor_names().into_iter().partition(|name| name.starts_with("model.visual."))
}

/// Tensors in bits.
pub fn bits(engine: &mut Engine<CpuBackend>, names: &[String], kind: Kind) -> Vec<Vec<u32>> {
    let read = |name: &String| engine.read_tensor(name, kind).unwrap().into_iter().map(f32::to_bits).collect();
    names.iter().map(read).collect()
}
