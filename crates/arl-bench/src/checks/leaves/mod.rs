//! Each leaf against the CPU's on random shapes: the table of leaves, and the run over it.

pub(crate) mod attention;
mod delta;
mod gates;
mod moe;
mod norm;
mod products;
mod rows;
mod training;
mod vision;

use arl_engine::backend::{Backend, DType};
use arl_model::{Error, ErrorCode, Result};

use super::draw::{Draw, Size};
use super::reference::WithReference;
use super::trial::{Figures, Scene, Trial};

/// A leaf and how a trial of it is made.
#[derive(Clone, Copy)]
pub(crate) struct Leaf {
    /// Its name in the trait.
    pub(crate) name: &'static str,
    trial: fn(Scene) -> Trial,
}

macro_rules! leaves {
    ($($module:ident::$name:ident,)*) => {
        &[$(Leaf { name: stringify!($name), trial: $module::$name },)*]
    };
}

/// Every leaf of [`Backend`], and of the traits that it contains, that devices compute.
pub(crate) const LEAVES: &[Leaf] = leaves![
    rows::zero,
    rows::copy,
    rows::dequantize,
    products::magnitude,
    products::matmul,
    products::matmul_nf4,
    products::matmul_low_rank,
    products::grouped_matmul,
    products::sum_rows,
    rows::embedding,
    rows::embedding_backward,
    norm::rms_norm,
    norm::add_rms_norm,
    norm::rms_norm_recompute,
    norm::rms_norm_backward,
    rows::add,
    rows::scale,
    norm::norm_rope,
    norm::norm_rope_backward,
    attention::attention,
    attention::attention_backward,
    attention::attention_cached,
    rows::swiglu,
    rows::swiglu_backward,
    rows::gather_rows,
    rows::scatter_rows,
    rows::copy_columns,
    training::cross_entropy,
    products::dot,
    training::guard,
    training::adamw,
    moe::router,
    moe::router_backward,
    moe::permute,
    moe::combine,
    moe::combine_backward,
    vision::layer_norm,
    vision::layer_norm_backward,
    vision::gelu,
    vision::gelu_backward,
    vision::interpolate,
    vision::interpolate_backward,
    vision::add_rows,
    vision::zero_rows,
    gates::split_gates,
    gates::join_gates,
    gates::gate,
    gates::gate_backward,
    gates::add_gated_rows,
    gates::gated_rows_backward,
    delta::causal_conv,
    delta::causal_conv_backward,
    delta::causal_conv_keep,
    delta::causal_conv_step,
    delta::gated_delta,
    delta::gated_delta_backward,
    delta::gated_delta_step,
    delta::gated_norm,
    delta::gated_norm_backward,
];

/// Products that no random shape shows to be wrong; in a type of their own.
const PRODUCTS: [(Leaf, DType); 2] = [
    (Leaf { name: "long_sums", trial: products::long_sums }, DType::Bf16),
    (Leaf { name: "exact_products", trial: products::exact_products }, DType::F32),
];

/// Attention with the heads of hybrids, which have kernels of their own; [`LEAVES`] draw them now and then.
const HEADS_OF_256: [Leaf; 2] = [
    Leaf { name: "attention_of_256", trial: attention::attention_of_256 },
    Leaf { name: "attention_backward_of_256", trial: attention::attention_backward_of_256 },
];

/// The leaves at the very sizes of a step, in bf16, attention's with heads of 256 too, and the [`PRODUCTS`].
pub(crate) fn of_a_step() -> impl Iterator<Item = (Leaf, DType)> {
    LEAVES.iter().chain(&HEADS_OF_256).map(|leaf| (*leaf, DType::Bf16)).chain(PRODUCTS)
}

/// The types of activations.
pub(crate) const TYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

impl Leaf {
    /// Trial number `shape` of this leaf in a type.
    pub(crate) fn trial(&self, shape: usize, dtype: DType, size: Size) -> Trial {
        let name = self.name.bytes().fold(shape as u64, |seed, byte| seed.wrapping_mul(131) ^ u64::from(byte));
        (self.trial)(Scene::new(Draw::new(name, size), dtype))
    }

    /// `shapes` trials in each type, each twice on the device and once on the CPU. Fails on the first that differs.
    pub(crate) fn check(
        &self,
        device: &mut dyn Backend,
        shapes: usize,
        types: &[DType],
        size: Size,
    ) -> Result<Figures> {
        let mut worst = Figures::default();
        let mut both = WithReference::new(device)?;
        for (shape, dtype) in (0..shapes).flat_map(|shape| types.iter().map(move |dtype| (shape, *dtype))) {
            let trial = self.trial(shape, dtype, size);
            let actual = both.compare(&trial, dtype, &mut worst)?;
            if both.repeat(&trial)? != actual {
                let what = format!("{}: a second run gives other bits", trial.what);
                return Err(Error::new(ErrorCode::Internal, what));
            }
        }
        Ok(worst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arl_engine::backend::Pool;
    use arl_engine::backend::cpu::CpuBackend;
    use arl_engine::backend::profile::ProfileBackend;

    #[test]
    fn every_leaf_of_the_trait_is_in_the_table() {
        let leaves = |source: &'static str, of: &str| source.split_once(of).unwrap().1.split("\n    fn ").skip(1);
        let all = leaves(include_str!("../../../../arl-engine/src/backend/mod.rs"), "pub trait Backend");
        let of_vision = leaves(include_str!("../../../../arl-engine/src/backend/vision.rs"), "pub trait Vision");
        let of_gates = leaves(include_str!("../../../../arl-engine/src/backend/gates.rs"), "pub trait Gates");
        let of_delta = leaves(include_str!("../../../../arl-engine/src/backend/delta.rs"), "pub trait DeltaRule");
        let names = all.chain(of_vision).chain(of_gates).chain(of_delta).filter(|item| {
            let signature = item.split('{').next().unwrap_or(item).split(';').next().unwrap_or(item);
            signature.contains("&mut self") && !signature.contains("->")
        });
        let others = ["expect_attention", "upload", "queue_read", "transfer", "record", "wait", "discard"];
        let here = |name: &&str| !others.contains(name);
        let names: Vec<&str> = names.filter_map(|item| item.split('(').next()).filter(here).collect();
        assert_eq!(names, LEAVES.iter().map(|leaf| leaf.name).collect::<Vec<_>>());
    }

    #[test]
    fn a_trial_calls_the_leaf_that_it_is_named_after() {
        for leaf in LEAVES {
            let trial = leaf.trial(0, DType::Bf16, Size::Host);
            let mut backend = ProfileBackend::new(Box::new(CpuBackend::new()));
            backend.reserve(Pool::Step, trial.bytes()).unwrap();
            backend.enable().unwrap();
            trial.run(&mut backend).unwrap();
            let called = backend.take().unwrap().leaves;
            let own = |name: &str| name == leaf.name || name.starts_with(&format!("{} ", leaf.name));
            assert!(called.iter().any(|(name, _)| own(name)), "{} calls {called:?}", leaf.name);
        }
    }

    #[test]
    fn a_byte_that_is_no_result_and_a_leaf_that_does_nothing_are_found() {
        for leaf in LEAVES.iter().filter(|leaf| leaf.name != "zero") {
            let trial = leaf.trial(0, DType::F32, Size::Host);
            let mut cpu = CpuBackend::new();
            cpu.reserve(Pool::Step, trial.bytes()).unwrap();
            let expected = trial.run(&mut cpu).unwrap();
            let compare = |image: &[u8]| trial.compare(image, false, &expected, &mut Figures::default());
            compare(&expected).unwrap();
            let mut touched = expected.clone();
            // Before the first buffer.
            touched[5] ^= 1;
            assert!(compare(&touched).unwrap_err().message.contains("no result and was changed"), "{}", leaf.name);
            let nothing = trial.run(&mut arl_engine::backend::plan::PlanBackend::default()).unwrap();
            assert!(compare(&nothing).is_err(), "{}", leaf.name);
        }
    }

    #[test]
    fn the_kernels_on_the_host_are_the_cpus_leaves() {
        use arl_engine::backend::cuda::{CudaBackend, EmulatedDevice};
        for leaf in LEAVES {
            let mut device = CudaBackend::new(EmulatedDevice::default());
            leaf.check(&mut device, 2, &TYPES, Size::Host).unwrap();
        }
    }

    #[test]
    fn shapes_are_many_and_repeatable() {
        for leaf in LEAVES {
            let described = |shape| leaf.trial(shape, DType::F32, Size::Host).what;
            let shapes: std::collections::BTreeSet<String> = (0..20).map(described).collect();
            assert!(shapes.len() > 15, "{}: {shapes:?}", leaf.name);
            assert_eq!(described(7), described(7));
        }
    }
}
