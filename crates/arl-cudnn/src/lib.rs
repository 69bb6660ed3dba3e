//! Attention by NVIDIA's cuDNN: for which versions and GPUs it serves packed sequences, and, with the feature `shim`, plans
//! for shapes and their way onto a stream. Knows nothing of buffers, models or this project's own kernels.

#[cfg(feature = "shim")]
mod library;

#[cfg(feature = "shim")]
pub use self::library::{Cudnn, Operands, Plan};

/// The first version whose backward pass takes packed sequences with fewer key heads than query heads.
const LEAST_VERSION: Version = Version(90600);
/// Versions whose backward pass is known to be wrong.
const WRONG_VERSIONS: [Version; 2] = [Version(91000), Version(91001)];

/// A version of cuDNN, as it says it itself: 91501 is 9.15.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i64);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

/// Why a version is not used, in a sentence; `None`: it is.
pub fn version_refusal(version: Version) -> Option<String> {
    if version < LEAST_VERSION {
        return Some(format!(
            "cuDNN is {version}, and {LEAST_VERSION} is the first whose attention serves packed sequences"
        ));
    }
    WRONG_VERSIONS.contains(&version).then(|| format!("cuDNN {version} has attention that is known to be wrong"))
}

/// Why a GPU of this compute capability is not used, in a sentence; `None`: it is.
pub fn capability_refusal((major, minor): (i32, i32)) -> Option<String> {
    // Others' packed sequences take a workspace that grows with the longest sequence times their number, or none at all.
    (!matches!(major, 9 | 10)).then(|| {
        format!("cuDNN's attention serves packed sequences on compute capability 9.0 and 10.x, and this GPU has {major}.{minor}")
    })
}

/// The type of queries, keys, values and their gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Type {
    /// bfloat16.
    Bf16 = 0,
    /// IEEE half.
    F16 = 1,
}

/// Which pass a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Pass {
    /// Writes `out` and the statistics.
    Forward = 0,
    /// Writes the gradients of queries, keys and values.
    Backward = 1,
}

/// What a plan is made for: causal attention within packed sequences. Strides are in elements, from one token to the next.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Shape {
    /// Forward or backward.
    pub pass: Pass,
    /// Of the operands.
    pub dtype: Type,
    /// The GPU's, as 90.
    pub capability: i32,
    /// Whether the backward pass adds in an order that is always the same: equal inputs give equal bits (1; else 0).
    pub deterministic: i32,
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// Most sequences.
    pub sequences: i64,
    /// Most tokens of a sequence.
    pub max_len: i64,
    /// Most tokens of all sequences together; of the backward pass alone.
    pub tokens: i64,
    /// Query heads.
    pub query_heads: i64,
    /// Key and value heads; a divisor of `query_heads`.
    pub key_value_heads: i64,
    /// Elements of a head.
    pub dim: i64,
    /// Keys that a query sees, itself included; 0: all before it.
    pub window: i64,
    /// Of the queries.
    pub q_stride: i64,
    /// Of the keys.
    pub k_stride: i64,
    /// Of the values.
    pub v_stride: i64,
    /// Of the output.
    pub out_stride: i64,
    /// Of the output's gradient; of the backward pass alone, as those that follow.
    pub d_out_stride: i64,
    /// Of the queries' gradient.
    pub d_q_stride: i64,
    /// Of the keys' gradient.
    pub d_k_stride: i64,
    /// Of the values' gradient.
    pub d_v_stride: i64,
}

/// Whether the engine asks for the deterministic backward pass. That has a plan for every case, from cuDNN 9.25 on in the
/// workspace of the other one; until a GPU has shown that its numbers are right, and how fast it is, the other one is taken.
pub const DETERMINISTIC_BACKWARD: bool = false;

/// Bytes of workspace that a plan of the forward pass may need at most; and one of the backward pass, besides what grows
/// with the tokens.
pub const ENGINE_BYTES: usize = 1 << 20;

/// Bytes of workspace that a plan of the backward pass may need at most. `d_q_stride`: elements from one token of the
/// queries' gradient to the next; those of keys and values have no gaps.
pub fn backward_workspace(
    tokens: usize,
    query_heads: usize,
    key_value_heads: usize,
    dim: usize,
    d_q_stride: usize,
) -> usize {
    // In f32: sums of the queries' gradient, laid out as that is; where query heads share a key head, sums of the keys' and
    // of the values' for each query head; and one number a query and head.
    let shared = if query_heads > key_value_heads { 2 * query_heads * dim } else { 0 };
    tokens * (d_q_stride + shared + query_heads) * size_of::<f32>() + ENGINE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_without_grouped_packed_backward_and_known_wrong_ones_are_refused_by_name() {
        for version in [90600, 90700, 91002, 91501, 100_000] {
            assert_eq!(version_refusal(Version(version)), None, "{version}");
        }
        for (version, name) in [(90501, "9.5.1"), (91000, "9.10.0"), (91001, "9.10.1")] {
            let reason = version_refusal(Version(version)).unwrap();
            assert!(reason.contains(name), "{reason}");
        }
    }

    #[test]
    fn gpus_whose_packed_attention_takes_padding_are_refused_with_their_capability() {
        assert_eq!((capability_refusal((9, 0)), capability_refusal((10, 0))), (None, None));
        for capability in [(8, 0), (8, 9), (12, 0)] {
            let reason = capability_refusal(capability).unwrap();
            assert!(reason.ends_with(&format!("{}.{}", capability.0, capability.1)), "{reason}");
        }
    }
}
