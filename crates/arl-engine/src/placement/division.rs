//! How a mesh divides a model: which part of each parameter a rank has, and which ranks have the same. Pure; knows roles, shapes
//! and places of ranks.

use std::ops::Range;

use arl_model::{
    Block, Error, ErrorCode, Mixer, Mlp, ModelConfig, NF4_BLOCK, Projection, Result, Role, Slice, TensorSpec,
};

use crate::mesh::{Axis, Place};
use crate::options::EngineOptions;
use crate::pipeline_parallel::layers_of_stage;
use crate::placement::{Placement, Tensor};

impl Place {
    /// The experts of a layer, of so many, that this rank has.
    pub(crate) fn experts(&self, experts: usize) -> Range<usize> {
        let each = experts / self.mesh.ep;
        let first = self.index(Axis::Expert) * each;
        first..first + each
    }

    /// The ranks that have the same part of a parameter as this one.
    pub(crate) fn axis_of(&self, role: Role) -> Axis {
        match role {
            role if self.mesh.tp > 1 && is_cut(role) => Axis::SameTensor,
            role if self.mesh.ep > 1 && is_expert(role) => Axis::SameExperts,
            _ => Axis::Stage,
        }
    }

    /// What this rank has of a parameter; none: nothing. `layers`: those of its stage; `tied`: the head is the embedding.
    pub(crate) fn slice(&self, spec: &TensorSpec, layers: &Range<usize>, tied: bool) -> Option<Slice> {
        let (first, last) = (self.is_first_stage(), self.is_last_stage());
        let here = match spec.block {
            Block::Embedding => first || tied && last,
            Block::FinalNorm | Block::Head => last,
            block => block.layer().map_or(first, |layer| layers.contains(&layer)),
        };
        let slice = match self.axis_of(spec.role) {
            Axis::SameTensor => spec.slice(self.index(Axis::Tensor), self.mesh.tp),
            Axis::SameExperts => spec.slice(self.index(Axis::Expert), self.mesh.ep),
            _ => Some(Slice::whole(&spec.shape)),
        };
        slice.filter(|slice| here && slice.elements() > 0)
    }
}

/// Whether tensor parallelism cuts a parameter: what leads into heads and channels, and out of them. The expert of every token is
/// left whole, because its tokens are divided already.
fn is_cut(role: Role) -> bool {
    let attention = matches!(role, Role::QWeight | Role::KWeight | Role::VWeight | Role::OWeight);
    let biases = matches!(role, Role::QBias | Role::KBias | Role::VBias);
    let mlp = matches!(role, Role::Gate | Role::Up | Role::Down);
    let projections = matches!(role, Role::InProjQkv | Role::InProjZ | Role::InProjB | Role::InProjA | Role::OutProj);
    let adapters = match role {
        Role::LoraA(projection) => has_columns_cut(projection),
        Role::LoraB(projection) | Role::LoraMagnitude(projection) => has_rows_cut(projection),
        _ => false,
    };
    let delta = matches!(role, Role::Conv1d | Role::ALog | Role::DtBias);
    attention || biases || mlp || projections || delta || adapters
}

/// Whether tensor parallelism cuts the columns of a layer: then it cuts those of its A.
fn has_columns_cut(projection: Projection) -> bool {
    matches!(projection, Projection::Output | Projection::Down | Projection::OutProj)
}

/// Whether it cuts the rows of a layer: then it cuts those of its B, and its magnitudes.
fn has_rows_cut(projection: Projection) -> bool {
    use Projection::{Gate, InProjA, InProjB, InProjQkv, InProjZ, Key, Query, Up, Value};
    matches!(projection, Query | Key | Value | Gate | Up | InProjQkv | InProjZ | InProjB | InProjA)
}

fn is_expert(role: Role) -> bool {
    let adapted = |projection| matches!(projection, Projection::ExpertsGateUp | Projection::ExpertsDown);
    match role {
        Role::LoraA(projection) | Role::LoraB(projection) => adapted(projection),
        role => matches!(role, Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_)),
    }
}

/// Refuses a mesh that does not divide a model evenly, and what cannot be had together with one.
pub(crate) fn check(config: &ModelConfig, options: &EngineOptions) -> Result<()> {
    let mesh = options.mesh;
    if mesh.dp_replicate > 1 && options.zero < 3 {
        let what = format!("dp_replicate_size {} cannot be combined with zero {}", mesh.dp_replicate, options.zero);
        return Err(Error::new(ErrorCode::Config, what)
            .hint("set zero to 3: with less every rank has all weights, and there is nothing to replicate"));
    }
    if !mesh.divides_model() {
        return Ok(());
    }
    check_sizes(config, options)?;
    let sizes = [("tp_size", mesh.tp), ("ep_size", mesh.ep), ("pp_size", mesh.pp)];
    let named: Vec<String> =
        sizes.iter().filter(|(_, size)| *size > 1).map(|(name, size)| format!("{name} {size}")).collect();
    let named = named.join(" and ");
    let alone = |what: &str, hint: &str| {
        Err(Error::new(ErrorCode::Config, format!("{what} cannot be combined with {named}")).hint(hint))
    };
    if options.inference_only {
        return alone("an engine for inference only", "these divide training; set them to 1");
    }
    if options.zero == 0 {
        return alone(
            "zero 0",
            "set zero to 1 or 2: moments and masters are divided among ranks with the same weights",
        );
    }
    if options.zero > 2 && mesh.pp > 1 {
        return alone("zero 3", "set zero to 2: each micro-batch would gather the weights of its stage again");
    }
    Ok(())
}

/// Refuses to cut blocks of weights in 4 bits: they are quantized as one rank does it.
pub(crate) fn check_blocks(placement: &Placement) -> Result<()> {
    let whole = |run: &Range<usize>| run.start.is_multiple_of(NF4_BLOCK) && run.end.is_multiple_of(NF4_BLOCK);
    let is_cut = |tensor: &&Tensor| {
        let Tensor { spec, slice, param, .. } = tensor;
        param.quantized && param.len < spec.elements() && !slice.runs(0..param.len).iter().all(whole)
    };
    let Some(Tensor { spec, slice, .. }) = placement.tensors.iter().find(is_cut) else { return Ok(()) };
    let rows: usize = slice.rows.iter().map(Range::len).sum();
    let what = format!(
        "load_in_4bit with tp_size {} gives a rank {rows} x {} of `{}`, which are no whole blocks of {NF4_BLOCK}",
        placement.place.mesh.tp,
        slice.columns.len(),
        spec.name
    );
    Err(Error::new(ErrorCode::Config, what).hint("take a smaller tp_size, or leave load_in_4bit out"))
}

/// Refuses a mesh that does not divide heads, columns, experts or layers evenly.
fn check_sizes(config: &ModelConfig, options: &EngineOptions) -> Result<()> {
    let mesh = options.mesh;
    let refused = |what: String, hint: &str| Err(Error::new(ErrorCode::Config, what).hint(hint));
    let mut counts = Vec::new();
    for layer in &config.layers {
        match layer.mixer {
            Mixer::Attention { .. } => counts.push((config.num_key_value_heads, "key heads")),
            Mixer::Delta(delta) => counts.push((delta.linear_num_key_heads, "key heads of the delta rule")),
        }
        if let Mlp::Dense { intermediate } = layer.mlp {
            counts.push((intermediate, "columns of intermediate_size"));
        }
    }
    if let Some((count, what)) = counts.into_iter().find(|(count, _)| !count.is_multiple_of(mesh.tp)) {
        let what = format!("tp_size is {}, and does not divide the {count} {what}", mesh.tp);
        return refused(what, "take a divisor of both, or set cp_size or dp_size instead");
    }
    let experts = config.layers.iter().filter_map(|layer| match layer.mlp {
        Mlp::Moe(moe) => Some(moe.num_experts),
        Mlp::Dense { .. } => None,
    });
    let experts: Vec<usize> = experts.collect();
    if mesh.ep > 1 && experts.is_empty() {
        return refused(format!("ep_size is {}, and the model has no experts", mesh.ep), "set ep_size to 1");
    }
    if let Some(count) = experts.iter().find(|count| !count.is_multiple_of(mesh.ep)) {
        let what = format!("ep_size is {}, and does not divide the {count} experts of a layer", mesh.ep);
        return refused(what, "take a divisor");
    }
    if mesh.pp > config.layers.len() {
        let what = format!("pp_size is {}, and the model has {} layers", mesh.pp, config.layers.len());
        return refused(what, "each stage has a layer at least");
    }
    let added = config.vision.as_ref().map_or(0, |vision| vision.deepstack_visual_indexes.len());
    let first = layers_of_stage(config, mesh.pp, 0).len();
    if first < added {
        let what = format!("pp_size is {}, and the first of its stages has {first} layers", mesh.pp);
        return refused(what, &format!("rows of images are added to the first {added} layers: take fewer stages"));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
