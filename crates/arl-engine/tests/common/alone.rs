//! What rank 0 computes alone with a model that a mesh divides: for tests of each way of dividing.

use arl_engine::backend::DeviceKind;
use arl_engine::{
    BatchSize, EngineOptions, GenerateOptions, GenerateSize, Mesh, MicroBatchStats, Weights, plan_memory,
};

use super::ranks::{Cpu, mesh_step, on_mesh, state, uneven_steps};
use super::{batch, difference, model};

/// Prompts, and new tokens of each.
const PROMPTS: [&[i32]; 2] = [&[1, 2, 3], &[7, 9, 4, 2, 5]];
const NEW_TOKENS: usize = 6;

/// Figures of held-out rows, replies, and logits.
#[derive(Debug, PartialEq)]
struct Found {
    figures: Vec<MicroBatchStats>,
    replies: Vec<Vec<i32>>,
    logits: Vec<f32>,
}

/// `options` with room for what is evaluated and generated here.
pub fn with_room(options: EngineOptions) -> EngineOptions {
    EngineOptions {
        eval_batch: BatchSize { tokens: 33, sequences: 3, ..BatchSize::default() },
        generate: GenerateSize {
            prompts: vec![PROMPTS.iter().map(|prompt| prompt.len()).collect()],
            max_new_tokens: NEW_TOKENS,
        },
        ..options
    }
}

/// The others give rank 0 their weights meanwhile.
fn compute(engine: &mut Cpu, rank: usize) -> Option<Found> {
    if rank > 0 {
        engine.serve_weights().unwrap();
        return None;
    }
    let batches = [batch(&[9, 4], 3), batch(&[21, 5, 7], 4)];
    let mut figures = engine.evaluate(&batches).unwrap();
    figures.extend(engine.evaluate_sequences(&batches[1]).unwrap());
    let prompts = PROMPTS.map(<[i32]>::to_vec);
    let replies = engine.generate(&prompts, &GenerateOptions::greedy(NEW_TOKENS)).unwrap();
    // A failure of rank 0's own ends nothing for the others.
    assert!(engine.generate(&[vec![-1]], &GenerateOptions::greedy(1)).is_err());
    engine.end_serving().unwrap();
    Some(Found { figures, replies, logits: Vec::new() })
}

/// [`compute`], and logits, for which nothing is planned.
fn inspect(engine: &mut Cpu, rank: usize, found: Option<Found>) -> Option<Found> {
    if rank > 0 {
        engine.serve_weights().unwrap();
        let alone = engine.evaluate_sequences(&batch(&[9], 3)).unwrap_err();
        assert!(alone.message.contains("only rank 0 may"), "{alone}");
        return None;
    }
    let logits = engine.inspect(&batch(&[7], 5)).unwrap().logits;
    engine.end_serving().unwrap();
    found.map(|found| Found { logits, ..found })
}

/// The relative differences of figures, and a tenth of that of logits, which show what AdamW makes of rounding as weights do.
fn apart(found: &Found, one: &Found) -> Vec<f64> {
    let figures = found.figures.iter().zip(&one.figures).flat_map(|(a, b)| {
        assert_eq!((a.tokens, a.target_tokens, a.target_weight), (b.tokens, b.target_tokens, b.target_weight));
        let pairs = [(a.loss_sum, b.loss_sum), (a.entropy_sum, b.entropy_sum)];
        pairs.map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() / b.abs() })
    });
    assert_eq!(found.figures.len(), one.figures.len());
    figures.chain([difference(&found.logits, &one.logits) / 10.0]).collect()
}

/// On a mesh rank 0 computes alone before a step and behind one, and all train on: what it finds has the bits of one rank where weights
/// have, and is within `bound` behind a step; the steps have the bits of a run in which it computes nothing alone; and of the memory
/// that is planned nothing more is needed.
pub fn expect_alone(folder: &str, base: &EngineOptions, weights: Weights, (data, mesh): (usize, Mesh), bound: f64) {
    let what = format!("{folder} {:?} {data} x {mesh:?}, zero {}", base.dtype, base.zero);
    let run = |data: usize, mesh: Mesh, computes: bool| {
        let options = EngineOptions { mesh, ..base.clone() };
        on_mesh(folder, &options, data, weights, |engine, rank| {
            let mut found = Vec::new();
            for step in &uneven_steps()[..2] {
                if computes {
                    found.push(compute(engine, rank));
                }
                mesh_step(engine, step, rank, data, mesh);
            }
            if base.eval_batch.tokens > 0 {
                let planned = EngineOptions { data_parallel: Some(data), rank, ..options.clone() };
                let plan = plan_memory(&model(folder), &planned, DeviceKind::Cpu).unwrap();
                assert_eq!(engine.memory(), plan, "{what}: rank {rank}");
            }
            let state = state(engine);
            if computes {
                let last = found.pop().unwrap();
                found.push(inspect(engine, rank, last));
            }
            (found, state)
        })
    };
    let one = run(1, Mesh::default(), true).remove(0).0;
    let several = run(data, mesh, true);
    let trained = run(data, mesh, false);
    assert!(several.iter().zip(&trained).all(|(a, b)| a.1 == b.1), "{what}: training differs");
    let found: Vec<&Found> = several[0].0.iter().flatten().collect();
    let one: Vec<&Found> = one.iter().flatten().collect();
    assert_eq!(found[0], one[0], "{what}");
    assert_eq!(found[1].replies, one[1].replies, "{what}");
    assert_ne!(one[0].figures, one[1].figures);
    let apart = apart(found[1], one[1]);
    assert!(apart.iter().all(|apart| *apart <= bound), "{what}: {apart:?} apart");
}
