//! What only a GPU can show: the leaves, the golden models and whole steps checked against the CPU's, then times. The launcher
//! (`main.rs`) runs this itself on the host; for a GPU it opens this crate's library with CUDA, once NVIDIA's are there.

mod checks;
pub mod entry;
pub mod options;
pub mod parts;
pub mod run;
mod times;
