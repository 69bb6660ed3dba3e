//! How many rows of logits exist at once, where the caller does not say: the more, the less often the head's gradient is read and
//! written, and the larger its products are. On a GPU they take what the memory plan leaves free.

use arl_model::{ModelConfig, Result};

use crate::backend::DeviceKind;
use crate::batch::BatchSize;
use crate::generate::GenerateSize;
use crate::options::EngineOptions;
use crate::plan::plan_memory_of;

/// What is tried, in this order.
const ROWS: [usize; 2] = [8192, 4096];
/// Left for what a plan does not know: the driver's context, fragments.
const MARGIN: usize = (1 << 30) + (512 << 20);

/// The options with `loss_seq_chunk_size` set to the most rows whose plan fits; as they are where the caller chose, or where
/// `memory` (free and total bytes of the device) is not known. The total decides, so that runs on one GPU have equal bits; only
/// where other programs hold so much that it would not fit, it stays as it is.
pub fn with_logits_rows(
    config: &ModelConfig,
    options: &EngineOptions,
    kind: DeviceKind,
    memory: Option<(usize, usize)>,
) -> Result<EngineOptions> {
    let mut options = options.clone();
    let Some((free, total)) = memory.filter(|_| options.loss_seq_chunk_size.is_none()) else { return Ok(options) };
    for rows in ROWS {
        if rows <= kind.default_logits_rows(config.vocab_size) || rows > options.max_batch.tokens.next_power_of_two() {
            continue;
        }
        // What is evaluated must not change the bits of training.
        let training = EngineOptions {
            loss_seq_chunk_size: Some(rows),
            eval_batch: BatchSize::default(),
            generate: GenerateSize::default(),
            ..options.clone()
        };
        let planned = plan_memory_of(config, &training, kind)?.total_bytes;
        if planned.saturating_add(MARGIN) <= total {
            if planned <= free {
                options.loss_seq_chunk_size = Some(rows);
            }
            break;
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_the_most_that_the_gpus_memory_holds_beside_the_rest() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden/window-bias");
        let mut config = ModelConfig::from_dir(&dir).unwrap();
        config.vocab_size = 151_936;
        let of = |tokens| EngineOptions {
            max_batch: BatchSize { tokens, sequences: tokens / 1024, ..BatchSize::default() },
            ..EngineOptions::default()
        };
        let needs = |tokens, rows| {
            let options = EngineOptions { loss_seq_chunk_size: Some(rows), ..of(tokens) };
            plan_memory_of(&config, &options, DeviceKind::Cuda).unwrap().total_bytes
        };
        let chosen = |tokens, free, total| {
            let found = with_logits_rows(&config, &of(tokens), DeviceKind::Cuda, Some((free, total))).unwrap();
            found.loss_seq_chunk_size
        };
        let [most, fewer] = ROWS.map(|rows| needs(16_384, rows));
        assert!(most - fewer > 4 * 4096 * 151_936, "the plan knows the rows");
        assert_eq!(chosen(16_384, usize::MAX, most + MARGIN), Some(8192));
        assert_eq!(chosen(16_384, usize::MAX, most + MARGIN - 1), Some(4096));
        assert_eq!(chosen(16_384, usize::MAX, fewer + MARGIN - 1), None);
        // What is evaluated does not enter, however large: training has the same bits with and without.
        let generate = GenerateSize { prompts: vec![vec![1 << 24]], max_new_tokens: 1 };
        let eval_batch = BatchSize { tokens: 1 << 24, sequences: 64, ..BatchSize::default() };
        let evaluating = EngineOptions { eval_batch, generate, ..of(16_384) };
        assert!(plan_memory_of(&config, &evaluating, DeviceKind::Cuda).unwrap().total_bytes > most + MARGIN);
        let room = Some((usize::MAX, most + MARGIN));
        let same = with_logits_rows(&config, &evaluating, DeviceKind::Cuda, room).unwrap();
        assert_eq!((same.loss_seq_chunk_size, same.eval_batch), (Some(8192), evaluating.eval_batch));
        // Never another number because other programs hold memory; no more than a micro-batch has.
        assert_eq!(chosen(16_384, fewer, usize::MAX), None);
        assert_eq!(chosen(4096, usize::MAX, usize::MAX), Some(4096));
        assert_eq!(chosen(2048, usize::MAX, usize::MAX), None);
        let asked = EngineOptions { loss_seq_chunk_size: Some(77), ..of(16_384) };
        let all = Some((usize::MAX, usize::MAX));
        let same = with_logits_rows(&config, &asked, DeviceKind::Cuda, all).unwrap();
        assert_eq!(same.loss_seq_chunk_size, Some(77));
        let unknown = with_logits_rows(&config, &of(16_384), DeviceKind::Cuda, None).unwrap();
        assert_eq!(unknown.loss_seq_chunk_size, None);
    }
}
