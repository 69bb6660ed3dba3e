//! The memory plan of the models that are measured, against sums worked out by hand.

use crate::common;

use std::path::{Path, PathBuf};

use arl_engine::backend::{DType, DeviceKind, Heads, attention_library_scratch};
use arl_engine::{
    AttentionChoice, BatchSize, EngineOptions, LoraOptions, MemoryPlan, Nf4Options, Recompute, plan_memory,
};
use arl_model::{ErrorCode, LoraConfig};

const TOKENS: usize = 16_384;
const SEQUENCES: usize = 8;

/// A model's sizes, as its `config.json` says.
struct Sizes {
    vocab: usize,
    hidden: usize,
    layers: usize,
    query: usize,
    key_value: usize,
    dim: usize,
    width: usize,
    /// Qwen2 has biases on queries, keys and values, Qwen3 norms of queries and keys.
    biases: bool,
    tied: bool,
}

const MODELS: [(&str, Sizes); 5] = [
    (
        "qwen2.5-0.5b",
        Sizes {
            vocab: 151_936,
            hidden: 896,
            layers: 24,
            query: 14,
            key_value: 2,
            dim: 64,
            width: 4864,
            biases: true,
            tied: true,
        },
    ),
    (
        "qwen3-0.6b",
        Sizes {
            vocab: 151_936,
            hidden: 1024,
            layers: 28,
            query: 16,
            key_value: 8,
            dim: 128,
            width: 3072,
            biases: false,
            tied: true,
        },
    ),
    (
        "qwen3-1.7b",
        Sizes {
            vocab: 151_936,
            hidden: 2048,
            layers: 28,
            query: 16,
            key_value: 8,
            dim: 128,
            width: 6144,
            biases: false,
            tied: true,
        },
    ),
    (
        "qwen3-4b",
        Sizes {
            vocab: 151_936,
            hidden: 2560,
            layers: 36,
            query: 32,
            key_value: 8,
            dim: 128,
            width: 9728,
            biases: false,
            tied: true,
        },
    ),
    (
        "qwen3-8b",
        Sizes {
            vocab: 151_936,
            hidden: 4096,
            layers: 36,
            query: 32,
            key_value: 8,
            dim: 128,
            width: 12_288,
            biases: false,
            tied: false,
        },
    ),
];

/// The folder of a model's configuration; `None` where it is not there.
fn config(name: &str) -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/bench/configs").join(name);
    if !dir.join("config.json").exists() {
        println!("SKIPPED: the plans of the measured models, whose configurations are not here");
        return None;
    }
    Some(dir)
}

fn bytes_of(plan: &[(&'static str, usize)], name: &str) -> usize {
    plan.iter().find(|(category, _)| *category == name).map_or(0, |(_, bytes)| *bytes)
}

/// A figure of the plan against one worked out here: they may differ by the gaps between buffers alone.
#[track_caller]
fn assert_near(what: &str, planned: usize, expected: usize, gaps: usize) {
    assert!(planned >= expected && planned - expected <= gaps, "{what}: {planned} planned, {expected} by hand");
}

impl Sizes {
    fn q(&self) -> usize {
        self.query * self.dim
    }

    fn kv(&self) -> usize {
        self.key_value * self.dim
    }

    fn parameters(&self) -> usize {
        let (h, q, kv) = (self.hidden, self.q(), self.kv());
        let attention = h * (q + 2 * kv) + q * h + if self.biases { q + 2 * kv } else { 2 * self.dim };
        let layer = attention + 3 * h * self.width + 2 * h;
        self.layers * layer + h + self.vocab * h * if self.tied { 1 } else { 2 }
    }

    /// Bytes that a layer keeps of a token in bf16.
    fn kept(&self, recompute: Recompute) -> usize {
        let (h, q, kv, w) = (self.hidden, self.q(), self.kv(), self.width);
        // The input.
        let block = 2 * h;
        // Queries, keys and values, what attention gives, the stream after it; two factors and the log-sum-exp in f32.
        let mlp = block + 2 * (q + 2 * kv) + 2 * q + 2 * h + 4 * (2 + self.query);
        // Gate and up.
        let norms = mlp + 2 * 2 * w;
        // Both normed inputs, the rotated queries and keys, what SwiGLU gives.
        let off = norms + 2 * (2 * h + q + kv + w);
        match recompute {
            Recompute::Block => block,
            Recompute::Mlp => mlp,
            Recompute::Norms => norms,
            Recompute::Off => off,
        }
    }

    /// Bytes of the residual stream, the final norm and its factor, in bf16.
    fn stream(&self) -> usize {
        2 * 2 * self.hidden + 4
    }
}

fn plan(dir: &Path, options: &EngineOptions) -> MemoryPlan {
    plan_memory(dir, options, DeviceKind::Cuda).unwrap()
}

fn options(recompute: Recompute) -> EngineOptions {
    EngineOptions {
        dtype: DType::Bf16,
        recompute,
        max_batch: BatchSize { tokens: TOKENS, sequences: SEQUENCES, ..BatchSize::default() },
        ..EngineOptions::default()
    }
}

#[test]
fn a_gpus_plan_is_the_sum_worked_out_by_hand() {
    for (name, sizes) in MODELS {
        let Some(dir) = config(name) else { return };
        let parameters = sizes.parameters();
        // Each tensor begins at a multiple of 32 elements.
        let gap = 32 * (10 * sizes.layers + 4);
        for recompute in [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block] {
            let plan = plan(&dir, &options(recompute));
            let of = |category| bytes_of(&plan.categories, category);
            assert_near("weights", of("weights"), 2 * parameters, 2 * gap);
            assert_near("master weights", of("master weights"), 2 * parameters, 2 * gap);
            assert_near("gradients", of("gradients"), 4 * parameters, 4 * gap);
            assert_near("moments", of("moments"), 8 * parameters, 8 * gap);
            let activations = TOKENS * (sizes.layers * sizes.kept(recompute) + sizes.stream());
            assert_near(name, of("activations"), activations, 64 * 20 * (sizes.layers + 1));
            assert_eq!(plan.total_bytes, plan.categories.iter().map(|(_, bytes)| bytes).sum::<usize>());
            assert_eq!(plan.host_bytes, 0);
            // The logits of as many targets as make 1.2 GiB in f32, and their rows.
            let rows = (1200 << 20) / (4 * sizes.vocab);
            let logits = rows * (4 * sizes.vocab + 2 * sizes.hidden);
            let workspace = of("workspace") + of("logits chunk");
            assert!(workspace >= logits.min(TOKENS * 2 * sizes.width), "{name}: {workspace}");
        }
    }
}

#[test]
fn a_librarys_attention_shares_the_memory_of_the_backward_pass() {
    for (name, sizes) in MODELS {
        let Some(dir) = config(name) else { return };
        let heads = Heads { query: sizes.query, key_value: sizes.key_value, dim: sizes.dim };
        let scratch = 4 * attention_library_scratch(heads, TOKENS, SEQUENCES);
        for recompute in [Recompute::Norms, Recompute::Block] {
            let with = |attention, dtype| plan(&dir, &EngineOptions { attention, dtype, ..options(recompute) });
            let own = with(AttentionChoice::Own, DType::Bf16).total_bytes;
            let auto = with(AttentionChoice::Auto, DType::Bf16);
            assert!((own..=own + scratch).contains(&auto.total_bytes), "{name} {recompute:?}: {auto:?}");
            // Beside the layers' activations: the library's scratch, the gradients of attention's output and of queries, keys
            // and values, and that of the residual stream.
            let (q, kv) = (sizes.query * sizes.dim, sizes.key_value * sizes.dim);
            let needed = scratch + TOKENS * 2 * (q + q + 2 * kv);
            let workspace = bytes_of(&auto.categories, "workspace");
            assert!(
                workspace + bytes_of(&auto.categories, "logits chunk") >= needed,
                "{name}: {workspace}, not {needed}"
            );
            assert_eq!(auto, with(AttentionChoice::Cudnn, DType::Bf16));
            let f32 = |attention| with(attention, DType::F32);
            assert_eq!(f32(AttentionChoice::Auto), f32(AttentionChoice::Own));
        }
    }
}

#[test]
fn stochastic_rounding_saves_the_second_half_of_bf16_weights_and_of_moments() {
    for (name, sizes) in MODELS {
        let Some(dir) = config(name) else { return };
        let rounded = EngineOptions { stochastic_rounding: true, ..options(Recompute::Norms) };
        let (parameters, gap) = (sizes.parameters(), 32 * (10 * sizes.layers + 4));
        let (here, exact) = (plan(&dir, &rounded), plan(&dir, &options(Recompute::Norms)));
        // 2 bytes of the weight, 4 of the gradient, 8 of the moments.
        for (category, bytes) in [("weights", 2), ("master weights", 0), ("gradients", 4), ("moments", 8)] {
            assert_near(category, bytes_of(&here.categories, category), bytes * parameters, bytes * gap);
        }
        assert_near(name, exact.total_bytes - here.total_bytes, 2 * parameters, 2 * gap + 64);
        let offloaded = plan(&dir, &EngineOptions { optimizer_offload: true, ..rounded.clone() });
        assert_near(name, offloaded.host_bytes, 8 * parameters, 8 * gap + 64);
        let smallest = plan(&dir, &EngineOptions { bf16_moments: true, ..rounded.clone() });
        assert_near(name, here.total_bytes - smallest.total_bytes, 4 * parameters, 4 * gap + 128);
        assert_near(name, bytes_of(&smallest.categories, "moments"), 4 * parameters, 4 * gap);
        let offloaded = plan(&dir, &EngineOptions { bf16_moments: true, optimizer_offload: true, ..rounded });
        assert_near(name, offloaded.host_bytes, 4 * parameters, 4 * gap + 64);
        assert_eq!(bytes_of(&offloaded.categories, "optimizer slots"), 3 * (16 << 20) * (2 + 2));
    }
}

#[test]
fn in_f16_the_masters_are_whole_beside_the_weights() {
    for (name, sizes) in MODELS {
        let Some(dir) = config(name) else { return };
        let f16 = EngineOptions { dtype: DType::F16, ..options(Recompute::Norms) };
        let (parameters, gap) = (sizes.parameters(), 32 * (10 * sizes.layers + 4));
        let here = plan(&dir, &f16);
        // 2 bytes to compute with, 4 of the master, 4 of the gradient, 8 of the moments.
        for (category, bytes) in [("weights", 2), ("master weights", 4), ("gradients", 4), ("moments", 8)] {
            assert_near(category, bytes_of(&here.categories, category), bytes * parameters, bytes * gap);
        }
        let bf16 = plan(&dir, &options(Recompute::Norms));
        assert_near(name, here.total_bytes - bf16.total_bytes, 2 * parameters, 2 * gap + 64);
        let offloaded = plan(&dir, &EngineOptions { optimizer_offload: true, ..f16 });
        assert_near(name, bytes_of(&offloaded.host_categories, "master weights"), 4 * parameters, 4 * gap);
        assert_eq!(bytes_of(&offloaded.categories, "master weights"), 0);
    }
}

#[test]
fn offloading_leaves_three_inputs_of_layers_and_three_pieces_of_the_optimizer_on_the_device() {
    for (name, sizes) in MODELS {
        let Some(dir) = config(name) else { return };
        let recompute = Recompute::Block;
        let offloaded = EngineOptions { activation_offloading: true, optimizer_offload: true, ..options(recompute) };
        let plan = plan(&dir, &offloaded);
        let input = TOKENS * 2 * sizes.hidden;
        let activations = 3 * input + TOKENS * sizes.stream();
        assert_near(name, bytes_of(&plan.categories, "activations"), activations, 64 * 20);
        assert_eq!(bytes_of(&plan.categories, "moments") + bytes_of(&plan.categories, "master weights"), 0);
        // Two moments in f32 and 16 bits of the master.
        assert_eq!(bytes_of(&plan.categories, "optimizer slots"), 3 * (16 << 20) * (4 + 4 + 2));
        let categories = plan.categories.iter().map(|(_, bytes)| bytes).sum::<usize>();
        assert_eq!(plan.total_bytes, categories, "{name}");
        assert_near(
            name,
            bytes_of(&plan.host_categories, "activations"),
            (sizes.layers - 3) * input,
            64 * sizes.layers,
        );
        let gap = 32 * (10 * sizes.layers + 4);
        let parameters = sizes.parameters();
        assert_near(name, bytes_of(&plan.host_categories, "moments"), 8 * parameters, 8 * gap);
        assert_near(name, bytes_of(&plan.host_categories, "master weights"), 2 * parameters, 2 * gap);
    }
}

#[test]
fn eight_billion_parameters_fit_on_80_gigabytes_with_both_offloads() {
    let Some(dir) = config("qwen3-8b") else { return };
    let all = options(Recompute::Block);
    assert!(plan(&dir, &all).total_bytes > 80_000_000_000);
    let offloaded = EngineOptions { activation_offloading: true, optimizer_offload: true, ..all };
    let plan = plan(&dir, &offloaded);
    assert!(plan.total_bytes < 80_000_000_000, "{plan:?}");
}

#[test]
fn adapters_of_eight_billion_parameters_fit_on_24_gigabytes_and_in_4_bits_on_12() {
    let Some(dir) = config("qwen3-8b") else { return };
    let text = r#"{ "target_modules": "all-linear", "r": 16 }"#;
    let lora = LoraConfig::from_json(text, Path::new("adapter_config.json")).unwrap();
    let adapted = EngineOptions {
        max_batch: BatchSize { tokens: 4096, sequences: SEQUENCES, ..BatchSize::default() },
        lora: Some(LoraOptions { config: lora, seed: 0 }),
        ..options(Recompute::Block)
    };
    let in_4_bits = EngineOptions { load_in_4bit: Some(Nf4Options { nested: true }), ..adapted.clone() };
    let (whole, quarter) = (plan(&dir, &adapted), plan(&dir, &in_4_bits));
    assert!(whole.total_bytes < 24_000_000_000, "{whole:?}");
    assert!(quarter.total_bytes < 12_000_000_000, "{quarter:?}");
    // One tile, where gate and up together have 200 MB of weights in bf16; none on the CPU.
    let workspace = |plan: &MemoryPlan| bytes_of(&plan.categories, "workspace");
    assert!(workspace(&quarter) - workspace(&whole) <= 32 << 20, "{quarter:?} {whole:?}");
    let [whole, quarter] = [&adapted, &in_4_bits].map(|options| plan_memory(&dir, options, DeviceKind::Cpu).unwrap());
    assert_eq!(workspace(&quarter), workspace(&whole));
}

#[test]
fn sizes_that_the_kernels_do_not_have_are_refused_by_name_on_a_gpu_alone() {
    let text = std::fs::read_to_string(common::model("window-bias").join("config.json")).unwrap();
    for (key, size, message) in [
        ("head_dim", 258, "head_dim is 258; at most 256 is possible"),
        ("hidden_size", 8194, "hidden_size is 8194; at most 8192 is possible"),
    ] {
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config[key] = size.into();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = plan_memory(dir.path(), &options(Recompute::Norms), DeviceKind::Cuda).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
        assert!(error.message.contains(message), "{}", error.message);
        plan_memory(dir.path(), &options(Recompute::Norms), DeviceKind::Cpu).unwrap();
    }
    let f32 = EngineOptions { dtype: DType::F32, ..options(Recompute::Norms) };
    for (key, size, options, message) in [
        ("linear_key_head_dim", 144, &f32, "linear_key_head_dim is 144; in float32 at most 128 is possible"),
        ("linear_conv_kernel_dim", 5, &options(Recompute::Norms), "linear_conv_kernel_dim is 5; in 16 bits at most 4"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = common::hybrid_config("qwen3_5_text", serde_json::json!({ key: size }));
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = plan_memory(dir.path(), options, DeviceKind::Cuda).unwrap_err();
        assert!(error.message.contains(message), "{}", error.message);
        plan_memory(dir.path(), options, DeviceKind::Cpu).unwrap();
        if key == "linear_key_head_dim" {
            plan_memory(dir.path(), &self::options(Recompute::Norms), DeviceKind::Cuda).unwrap();
        }
    }
}
