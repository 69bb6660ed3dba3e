//! Where parameters are in a device's memory. All of them are in the weights' arena; those that are trained are in the
//! optimizer's arena too, whose places gradients, moments and masters share. In both, decayed parameters come first, and
//! what one matrix product takes together is adjacent. Knows names and shapes, no values.

pub(crate) mod arena;
pub(crate) mod cut;
pub(crate) mod divided;
pub(crate) mod division;
mod freeze;
pub(crate) mod quantized;
pub(crate) mod shards;
pub(crate) mod store;
pub(crate) mod whole;

use std::collections::HashMap;

use arl_model::{Block, Lora, ModelConfig, Projection, Result, Role, Slice, TensorSpec, tensor_table};

use arena::ALIGNMENT;
use cut::Cut;
use freeze::{check_products, freeze};
use quantized::{Quantized, is_linear};

use crate::mesh::{Axis, Place};
use crate::pipeline_parallel::layers_of_stage;

/// Elements between which parameters begin, at most two bytes each.
const STEP: usize = ALIGNMENT / 2;

/// A parameter, or several side by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Param {
    /// First element in the weights' arena; of one in NF4, counted over those.
    pub(crate) offset: usize,
    /// Elements.
    pub(crate) len: usize,
    /// First element in the array of weights: that of the arena, but where ranks divide weights and parts take turns in one place
    /// ([`shards`]).
    pub(crate) weight: usize,
    /// First element in the optimizer's arena; none: frozen.
    pub(crate) trained: Option<usize>,
    /// First element in the array of gradients, of a trained one: that of the arena, but where buckets take turns in one place
    /// ([`cut`]).
    pub(crate) gradient: usize,
    /// Whether it is in NF4.
    pub(crate) quantized: bool,
    /// Whether it is f32 in a weights' arena of 16 bits, two elements of which each of its own takes.
    pub(crate) wide: bool,
    /// The ranks that have the same of it: they add its gradients, and divide what is divided.
    pub(crate) axis: Axis,
}

impl Param {
    /// `len` elements from `start` on.
    pub(crate) fn part(self, start: usize, len: usize) -> Self {
        let trained = self.trained.map(|first| first + start);
        let (before, gradient) = (start * width(self.wide), self.gradient + start);
        Param { offset: self.offset + before, len, weight: self.weight + before, trained, gradient, ..self }
    }
}

/// A parameter of the table, what this rank has of it, and the place of that.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Of the whole parameter.
    pub(crate) spec: TensorSpec,
    pub(crate) slice: Slice,
    pub(crate) param: Param,
    /// The first stage has it too, and counts for both: an embedding that is the head as well.
    pub(crate) copied: bool,
}

/// Elements that are contiguous in both arenas and are updated alike, gaps between parameters included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First element in the weights' arena.
    pub(crate) weights: usize,
    /// First element in the optimizer's arena.
    pub(crate) optimizer: usize,
    /// First element in this rank's own moments and masters: that of the arena, but where ranks divide them.
    pub(crate) own: usize,
    pub(crate) len: usize,
    pub(crate) decay: bool,
    /// f32 in a weights' arena of 16 bits ([`Param::wide`]).
    pub(crate) wide: bool,
    /// Of the vision tower, which steps without images leave as it is.
    pub(crate) vision: bool,
}

impl Run {
    /// `len` elements from `start` on.
    pub(crate) fn part(self, start: usize, len: usize) -> Self {
        let (optimizer, own) = (self.optimizer + start, self.own + start);
        Run { weights: self.weights + start * width(self.wide), optimizer, own, len, ..self }
    }
}

/// Elements of the weights' arena that an element of a parameter takes.
fn width(wide: bool) -> usize {
    if wide { 2 } else { 1 }
}

/// The places of an adapter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdapterPlace {
    /// `[rank, input]`.
    pub(crate) a: Param,
    /// `[output, rank]`.
    pub(crate) b: Param,
    /// `[output]`, of DoRA.
    pub(crate) magnitude: Option<Param>,
    pub(crate) rank: usize,
    /// On `B A`.
    pub(crate) factor: f32,
    /// Among all adapters of the model.
    pub(crate) number: u32,
}

/// The places of a model's parameters.
#[derive(Clone, Debug)]
pub(crate) struct Placement {
    /// Every parameter of the table of which this rank has something, in the order of the arenas.
    pub(crate) tensors: Vec<Tensor>,
    /// Every parameter of the table, in an order that all ranks have; empty where a rank has all of them.
    whole: Vec<TensorSpec>,
    /// Of this rank.
    pub(crate) place: Place,
    /// The head is the embedding.
    pub(crate) tied: bool,
    /// Elements of the weights' arena; those between parameters are zero and stay zero.
    pub(crate) weights: usize,
    /// Elements of the optimizer's arena.
    pub(crate) optimizer: usize,
    /// What the optimizer updates, in the order of the arenas: all that is decayed, then the rest.
    pub(crate) runs: Vec<Run>,
    /// By layers: where its decayed parameters end in the weights' arena.
    pub(crate) layer_ends: Vec<usize>,
    /// The lowest layer, of any stage, that the backward pass has to reach; the number of layers where it need not enter any.
    pub(crate) lowest_layer: usize,
    /// The frozen weights that are in NF4.
    pub(crate) quantized: Quantized,
    places: HashMap<(Block, Role), Param>,
    adapters: HashMap<(Block, Projection), AdapterPlace>,
}

/// Whether a parameter follows the one before it in the table without a gap, because one matrix product takes both.
fn continues(before: Option<&TensorSpec>, spec: &TensorSpec) -> bool {
    match spec.role {
        Role::KWeight | Role::VWeight | Role::KBias | Role::VBias | Role::Up | Role::ExpertUp(_) | Role::SharedUp => {
            true
        }
        Role::InProjZ | Role::InProjB | Role::InProjA | Role::VisionUpWeight | Role::VisionUpBias => true,
        // A rank's first expert need not be the model's.
        Role::ExpertGate(_) => before.is_some_and(|before| matches!(before.role, Role::ExpertUp(_))),
        Role::ExpertDown(_) => before.is_some_and(|before| matches!(before.role, Role::ExpertDown(_))),
        // Which layers have an adapter is the run's choice.
        Role::LoraA(projection) => before.is_some_and(|before| {
            let same = |other: Projection| other.product() == projection.product();
            before.block == spec.block && matches!(before.role, Role::LoraA(other) if same(other))
        }),
        _ => false,
    }
}

impl Placement {
    /// The places of a configuration's parameters on a rank of a mesh; those whose names match a pattern of `frozen` are not trained.
    /// `nf4`: linear layers are in NF4, and not trained either.
    ///
    /// # Errors
    /// `ARL_CONFIG` for a pattern that matches nothing, for a part of what one product computes, and for a model of
    /// which nothing would be trained.
    pub(crate) fn new(config: &ModelConfig, frozen: &[String], nf4: bool, place: &Place) -> Result<Self> {
        let mut table = tensor_table(config);
        freeze(&mut table, frozen)?;
        check_products(&table)?;
        table.iter_mut().filter(|spec| nf4 && is_linear(spec)).for_each(|spec| spec.trainable = false);
        Ok(Self::of(table, config, nf4, false, place))
    }

    /// The places of an adapted model's parameters. `nf4`: linear layers that are frozen are in NF4. `narrow`: weights are of 16 bits,
    /// and magnitudes f32 all the same.
    ///
    /// # Errors
    /// `ARL_CONFIG` where a part of what one product computes is trained.
    pub(crate) fn adapted(lora: &Lora, nf4: bool, narrow: bool, place: &Place) -> Result<Self> {
        check_products(&lora.table)?;
        let mut placement = Self::of(lora.table.clone(), &lora.model, nf4, narrow, place);
        for (adapter, number) in lora.adapters.iter().zip(0..) {
            let (block, projection) = (adapter.block, adapter.projection);
            let place = AdapterPlace {
                a: placement.one(block, Role::LoraA(projection)),
                b: placement.one(block, Role::LoraB(projection)),
                magnitude: placement.span(block, Role::LoraMagnitude(projection), Role::LoraMagnitude(projection)),
                rank: adapter.rank,
                factor: adapter.factor,
                number,
            };
            placement.adapters.insert((block, projection), place);
        }
        Ok(placement)
    }

    fn of(table: Vec<TensorSpec>, config: &ModelConfig, nf4: bool, narrow: bool, place: &Place) -> Self {
        let layers = config.layers.len();
        let of_stage = layers_of_stage(config, place.mesh.pp, place.index(Axis::Pipeline));
        let lowest = |spec: &TensorSpec| match spec.block {
            Block::Embedding => 0,
            block if block.is_vision() => 0,
            block => block.layer().unwrap_or(layers),
        };
        let mut placement = Placement {
            tensors: Vec::with_capacity(table.len()),
            whole: Vec::new(),
            place: *place,
            tied: table.iter().all(|spec| spec.role != Role::LmHead),
            weights: 0,
            optimizer: 0,
            runs: Vec::new(),
            layer_ends: vec![0; layers],
            lowest_layer: table.iter().filter(|spec| spec.trainable).map(lowest).min().unwrap_or(layers).min(layers),
            quantized: Quantized::default(),
            places: HashMap::with_capacity(table.len()),
            adapters: HashMap::new(),
        };
        // The tower first, as in the forward pass: offloaded updates are made just before it, and before each layer.
        let (seeing, text) = table.into_iter().partition::<Vec<_>, _>(|spec| spec.block.is_vision());
        let table = seeing.into_iter().chain(text);
        let (decayed, others) = table.partition::<Vec<_>, _>(|spec| spec.decay);
        // What different ranks have the same of is apart, so that few buckets are made of it.
        let by_axis = |specs: Vec<TensorSpec>| -> Vec<TensorSpec> {
            let (copies, cut): (Vec<_>, Vec<_>) =
                specs.into_iter().partition(|spec| place.axis_of(spec.role) == Axis::Stage);
            copies.into_iter().chain(cut).collect()
        };
        // Magnitudes apart from the others, so that these are updated together.
        let is_wide = |spec: &TensorSpec| narrow && matches!(spec.role, Role::LoraMagnitude(_));
        let (wide, decayed) = decayed.into_iter().partition::<Vec<_>, _>(is_wide);
        for specs in [decayed, by_axis(wide), by_axis(others)] {
            for spec in specs {
                placement.whole.extend(place.mesh.divides_model().then(|| spec.clone()));
                let Some(slice) = place.slice(&spec, &of_stage, placement.tied) else { continue };
                if nf4 && is_linear(&spec) && !spec.trainable {
                    let axis = place.axis_of(spec.role);
                    let param = Param { axis, ..placement.quantized.place(slice.elements()) };
                    placement.add(spec, slice, param);
                } else {
                    let wide = is_wide(&spec);
                    placement.place(spec, slice, wide);
                }
            }
            placement.align();
        }
        placement
    }

    fn align(&mut self) {
        self.weights = self.weights.next_multiple_of(STEP);
        self.optimizer = self.optimizer.next_multiple_of(STEP);
    }

    fn place(&mut self, spec: TensorSpec, slice: Slice, wide: bool) {
        if !continues(self.tensors.last().map(|before| &before.spec), &spec) {
            self.align();
        }
        let (len, axis) = (slice.elements(), self.place.axis_of(spec.role));
        let trained = spec.trainable.then_some(self.optimizer);
        let (offset, gradient) = (self.weights, self.optimizer);
        let param = Param { offset, len, weight: offset, trained, gradient, quantized: false, wide, axis };
        // Runs go on to the next multiple in both arenas.
        self.weights += if wide { len.next_multiple_of(STEP) * width(wide) } else { len };
        if let (Some(layer), true) = (spec.block.layer(), spec.decay && !wide) {
            self.layer_ends[layer] = self.weights;
        }
        if let Some(first) = param.trained {
            self.optimizer += len;
            let run = Run {
                weights: param.offset,
                optimizer: first,
                own: first,
                len: len.next_multiple_of(STEP),
                decay: spec.decay,
                vision: spec.block.is_vision(),
                wide,
            };
            self.extend_runs(run, len);
        }
        self.add(spec, slice, param);
    }

    fn add(&mut self, spec: TensorSpec, slice: Slice, param: Param) {
        self.places.insert((spec.block, spec.role), param);
        let copied = spec.block == Block::Embedding && !self.place.is_first_stage();
        self.tensors.push(Tensor { spec, slice, param, copied });
    }

    /// Every parameter of the model, in the same order on all ranks.
    pub(crate) fn table(&self) -> Vec<&TensorSpec> {
        match self.whole.as_slice() {
            [] => self.tensors.iter().map(|tensor| &tensor.spec).collect(),
            whole => whole.iter().collect(),
        }
    }

    /// Adds a trained parameter of `len` elements to the last run if it is as far behind it in both arenas, else to a new one.
    fn extend_runs(&mut self, next: Run, len: usize) {
        let alike = |run: &Run| (run.decay, run.vision, run.wide) == (next.decay, next.vision, next.wide);
        let behind = |run: &Run| run.weights + (next.optimizer - run.optimizer) * width(run.wide) == next.weights;
        match self.runs.last_mut().filter(|run| alike(run) && behind(run)) {
            Some(run) => run.len = (next.optimizer + len - run.optimizer).next_multiple_of(STEP),
            None => self.runs.push(next),
        }
    }

    /// Places the gradients of every trained parameter, and all weights where they are divided, where a cut has them.
    pub(crate) fn cut(&mut self, cut: &Cut) {
        self.move_params(|param| {
            param.gradient = param.trained.map_or(0, |first| cut.gradient(first));
            param.weight = cut.weights.as_ref().map_or(param.weight, |shards| shards.place(*param));
        });
        cut.weights.iter().for_each(|shards| self.quantized.divide(&shards.quantized));
    }

    fn move_params(&mut self, move_one: impl Fn(&mut Param)) {
        self.tensors.iter_mut().for_each(|tensor| move_one(&mut tensor.param));
        self.places.values_mut().for_each(&move_one);
        for adapter in self.adapters.values_mut() {
            move_one(&mut adapter.a);
            move_one(&mut adapter.b);
            adapter.magnitude.iter_mut().for_each(&move_one);
        }
    }

    /// A block's parameters from the first of `first`'s role to the last of `last`'s, which are side by side.
    pub(crate) fn span(&self, block: Block, first: Role, last: Role) -> Option<Param> {
        let (first, last) = (self.places.get(&(block, first))?, self.places.get(&(block, last))?);
        Some(Param { len: last.offset + last.len - first.offset, ..*first })
    }

    /// The adapter of a block's layer.
    pub(crate) fn adapter(&self, block: Block, projection: Projection) -> Option<AdapterPlace> {
        self.adapters.get(&(block, projection)).copied()
    }

    /// Whether a block, on any rank, has something to train.
    pub(crate) fn trains(&self, block: Block) -> bool {
        self.table().into_iter().any(|spec| spec.block == block && spec.trainable)
    }

    /// A parameter that every such block has.
    pub(crate) fn one(&self, block: Block, role: Role) -> Param {
        self.span(block, role, role).unwrap_or_default()
    }

    /// The elements between parameters that updates run over.
    pub(crate) fn gaps(&self) -> Vec<Param> {
        let mut gaps = Vec::new();
        let mut trained =
            self.tensors.iter().filter_map(|tensor| tensor.param.trained.map(|at| (at, tensor.param.len)));
        let mut next = trained.next();
        for run in &self.runs {
            let (mut at, end) = (run.optimizer, run.optimizer + run.len);
            while at < end {
                let start = next.map_or(end, |(start, _)| start.min(end));
                if start > at {
                    let Run { weights: offset, len, wide, .. } = run.part(at - run.optimizer, start - at);
                    let param =
                        Param { offset, len, weight: offset, trained: Some(at), gradient: at, ..Param::default() };
                    gaps.push(Param { wide, ..param });
                }
                at = start;
                if let Some((start, len)) = next.filter(|&(start, _)| start < end) {
                    at = start + len;
                    next = trained.next();
                }
            }
        }
        gaps
    }

    /// First element and length, in the optimizer's arena, of the runs of trained parameters that are in none of `of`.
    pub(crate) fn all_but(&self, of: &[Param]) -> Vec<(usize, usize)> {
        let mut left_out: Vec<(usize, usize)> =
            of.iter().filter_map(|param| param.trained.map(|first| (first, param.len))).collect();
        left_out.sort_unstable();
        let mut rest = Vec::new();
        let mut at = 0;
        for (first, len) in left_out.into_iter().chain([(self.optimizer, 0)]) {
            if first > at {
                rest.push((at, first - at));
            }
            at = first + len;
        }
        rest
    }
}

#[cfg(test)]
mod tests;
