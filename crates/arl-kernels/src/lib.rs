//! The CUDA kernels of the training step's leaves: device code in `cuda/*.cu`, one family a file. Launches are in
//! `arl-engine`. The same sources run on the host, for tests without a GPU ([`emulation`]).

/// Sizes that kernels and their launches agree on: `cuda/constants.cuh`, by its namespaces.
#[allow(missing_docs, reason = "the file's comments are about groups of constants")]
pub mod constants {
    include!(concat!(env!("OUT_DIR"), "/constants.rs"));
}

/// The kernels for every supported GPU: compiled code for each, and PTX for those to come.
#[cfg(feature = "fatbin")]
pub const FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/arl.fatbin"));

#[cfg(feature = "emulation")]
pub mod emulation;
