//! The CUDA kernels of the training step's leaves: device code in `cuda/*.cu`, one family a file. Launches are in
//! `arl-engine`. The same sources run on the host, for tests without a GPU ([`emulation`]).

/// The kernels for every supported GPU: compiled code for each, and PTX for those to come.
#[cfg(feature = "fatbin")]
pub const FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/arl.fatbin"));

#[cfg(feature = "emulation")]
pub mod emulation;
