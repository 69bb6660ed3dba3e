//! Random models between random meshes: what a mesh writes has one rank's bytes, and any other mesh reads it, element by element.

use serde_json::{Value, json};

use super::*;

/// Numbers that follow from a seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    fn flag(&mut self) -> bool {
        self.below(2) == 1
    }

    /// A model of small sizes, most of which divide by nothing.
    fn model(&mut self) -> Value {
        let (heads, groups) = (self.of(&[1, 2, 3, 4]), self.of(&[1, 2]));
        let mut model = json!({
            "model_type": self.of(&["qwen2", "qwen3", "qwen3_moe", "qwen3_next"]), "vocab_size": 17 + self.below(30),
            "hidden_size": 4 + 2 * self.below(9), "intermediate_size": 3 + self.below(20), "num_hidden_layers": 1 + self.below(5),
            "num_attention_heads": heads * groups, "num_key_value_heads": heads, "head_dim": 8 * (1 + self.below(2)),
            "tie_word_embeddings": self.flag(), "attention_bias": self.flag(),
        });
        let more = match model["model_type"].as_str().unwrap() {
            "qwen2" => json!({ "hidden_size": 4 * heads * groups }),
            "qwen3" => json!({}),
            kind => {
                let experts = 2 + self.below(5);
                let mut more = json!({
                    "num_experts": experts, "num_experts_per_tok": 1 + self.below(experts),
                    "moe_intermediate_size": 3 + self.below(9), "norm_topk_prob": self.flag(),
                    "mlp_only_layers": if self.flag() { vec![0] } else { Vec::new() }, "decoder_sparse_step": 1,
                });
                if kind == "qwen3_next" {
                    let keys = self.of(&[1, 2, 4]);
                    let delta = json!({
                        "linear_num_key_heads": keys, "linear_num_value_heads": keys * self.of(&[1, 2]),
                        "linear_key_head_dim": 2 * (1 + self.below(4)), "linear_value_head_dim": 2 * (1 + self.below(5)),
                        "shared_expert_intermediate_size": 3 + self.below(9), "attention_bias": false,
                    });
                    more.as_object_mut().unwrap().extend(delta.as_object().unwrap().clone());
                }
                more
            }
        };
        model.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        model
    }

    /// A mesh of at most six ranks.
    fn case(&mut self, dir: &Path, dtype: DType) -> Case {
        loop {
            let mesh = Mesh {
                tp: self.of(&[1, 1, 2, 3]),
                cp: self.of(&[1, 1, 2]),
                ep: self.of(&[1, 2, 3]),
                pp: 1 + self.below(3),
                dp_replicate: self.of(&[1, 1, 2, 3]),
            };
            let case = (mesh, 1 + self.below(4), 1 + self.below(3) as u8);
            let plan = |rank: usize| plan_memory(dir, &options(dtype, case, rank), DeviceKind::Cpu);
            let world = options(dtype, case, 0).place().map_or(usize::MAX, |place| place.world());
            // Gradients of ranks that have the same parameters are given to whatever sums them bucket by bucket.
            let summed = case.2 > 1 || mesh.divides_model();
            if summed && (2..=6).contains(&world) && (0..world).all(|rank| plan(rank).is_ok()) {
                return case;
            }
        }
    }
}

#[test]
fn random_meshes_write_and_read_random_models_as_one_rank_does() {
    let mut numbers = Numbers(0x5eed);
    for number in 0..40 {
        let (model, dtype) = (numbers.model(), numbers.of(&[DType::F32, DType::Bf16]));
        let dir = folder(&model);
        // Else there would be no mesh for it.
        plan_memory(dir.path(), &options(dtype, (ONE, 1, 2), 0), DeviceKind::Cpu).unwrap();
        let cases: Vec<Case> =
            [(ONE, 1, 2)].into_iter().chain((0..3).map(|_| numbers.case(dir.path(), dtype))).collect();
        let mut written = Vec::new();
        for &case in &cases {
            let (state_dir, export) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let steps = write(dir.path(), dtype, case, [state_dir.path(), export.path()]);
            written.push((steps[0].0.clone(), files(export.path()), state_dir));
            let ((first, exported, _), (_, own, _)) = (&written[0], &written[written.len() - 1]);
            let same = steps.iter().all(|(found, ..)| found == first) && own == exported;
            assert!(same, "model {number}, {model}: {case:?}");
        }
        let (_, state_of_one) = &written[0].0;
        for ((_, _, from), writer) in written.iter().zip(&cases) {
            let reader = numbers.of(&cases);
            let read = read_by(dir.path(), dtype, reader, from.path());
            assert!(
                read.iter().all(|state| state == state_of_one),
                "model {number}, {model}: {writer:?} to {reader:?}"
            );
        }
    }
}
