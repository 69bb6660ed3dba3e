//! The merge of an adapter into its model: `W + factor B A` in f32, and whole copies in the place of what they were copied
//! from. Memory holds one parameter and one adapter at a time.

use std::path::Path;

use rayon::prelude::*;

use super::files::transposed;
use super::{Adapter, AdapterFile, Lora, LoraConfig, Matrix};
use crate::config::WeightDtype;
use crate::folder::ModelFiles;
use crate::tensors::{Projection, Role};
use crate::weights::{Checkpoint, MAX_SHARD_BYTES, save_model};
use crate::{Error, ErrorCode, Result};

/// Merges the adapter in `adapter` into the model in `model`, and writes the result to `out`, an empty folder or none yet, in
/// Hugging Face's layout. Tensors keep the types of the model's folder, or get `dtype`. Where the head was tied to the embedding
/// and one of them was trained as a whole, the result has both, and its `config.json` says so.
pub fn merge_adapter(model: &Path, adapter: &Path, out: &Path, dtype: Option<WeightDtype>) -> Result<()> {
    let mut files = ModelFiles::read(model)?;
    let (config, asked) = (files.config()?, LoraConfig::from_dir(adapter)?);
    // Names that also hit the vision tower may have been those of a run of text alone.
    let (config, lora) = match Lora::new(&config, &asked) {
        Ok(lora) => (config, lora),
        Err(error) => {
            let text = config.text_alone();
            let lora = Lora::new(&text, &asked).map_err(|_| error)?;
            (text, lora)
        }
    };
    let base = Checkpoint::open(model, &config)?;
    let trained = AdapterFile::open(adapter, &lora)?;
    if lora.model.tie_word_embeddings != config.tie_word_embeddings {
        files.untie()?;
    }
    files.unquantize();
    std::fs::create_dir_all(out).map_err(|error| Error::io(out, &error))?;
    let embedding = lora.table.iter().find(|spec| spec.role == Role::Embedding).map(|spec| spec.name.clone());
    save_model(out, &files, &lora.model, base.format(), dtype, MAX_SHARD_BYTES, |name, values| {
        if trained.has(name) {
            return trained.read_f32(name, values);
        }
        match &embedding {
            Some(embedding) if name == HEAD && config.tie_word_embeddings => base.read_f32(embedding, values)?,
            _ => base.read_f32(name, values)?,
        }
        let spec = lora.table.iter().find(|spec| spec.name == name);
        match spec.and_then(|spec| lora.adapter_of(spec)) {
            Some((adapter, expert, first)) => add(values, &lora, adapter, expert, first, &trained),
            None => Ok(()),
        }
    })
}

const HEAD: &str = "lm_head.weight";

/// `weight += factor B A`, of an expert, and of B the rows from `first` on.
fn add(
    weight: &mut [f32],
    lora: &Lora,
    adapter: &Adapter,
    expert: usize,
    first: usize,
    trained: &AdapterFile,
) -> Result<()> {
    let (mut input, mut output) = adapter.sides(&lora.model);
    let experts = adapter.experts.unwrap_or(1);
    let (mut a, mut b) = (vec![0f32; experts * adapter.rank * input], vec![0f32; experts * output * adapter.rank]);
    trained.read_f32(&adapter.tensor(Matrix::A), &mut a)?;
    trained.read_f32(&adapter.tensor(Matrix::B), &mut b)?;
    if adapter.projection == Projection::Embedding {
        // A row of the weight is a token: A's rows are what B's are elsewhere.
        (input, output) = (output, input);
        (a, b) = (transposed(&b, adapter.rank), a);
    }
    if weight.len() > input * (output - first) {
        let what = format!("`{}` has {} elements, more than {output} x {input}", adapter.module, weight.len());
        return Err(Error::new(ErrorCode::Internal, what));
    }
    let mut magnitudes = vec![0f32; if lora.config.use_dora { output } else { 0 }];
    if lora.config.use_dora {
        trained.read_f32(&adapter.tensor(Matrix::Magnitude), &mut magnitudes)?;
    }
    let a = &a[expert * adapter.rank * input..][..adapter.rank * input];
    let b = &b[(expert * output + first) * adapter.rank..];
    weight.par_chunks_exact_mut(input).zip(b.par_chunks_exact(adapter.rank)).for_each(|(row, b)| {
        let mut delta = vec![0f32; input];
        for (a, b) in a.chunks_exact(input).zip(b) {
            delta.iter_mut().zip(a).for_each(|(delta, a)| *delta += b * a);
        }
        row.iter_mut().zip(delta).for_each(|(weight, delta)| *weight += adapter.factor * delta);
    });
    // `m / |W + factor B A| (W + factor B A)`, by rows.
    weight.par_chunks_exact_mut(input).zip(&magnitudes).for_each(|(row, magnitude)| {
        let mut norm = [0f32];
        Lora::row_norms(row, &mut norm);
        row.iter_mut().for_each(|weight| *weight *= magnitude / norm[0]);
    });
    Ok(())
}
