//! Compiles the kernels: with `fatbin` by nvcc for GPUs, with `emulation` by the host's C++ compiler for tests.

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=emulation");
    #[cfg(feature = "emulation")]
    emulation();
}

/// One static library of all kernels and the fibers that run them.
#[cfg(feature = "emulation")]
fn emulation() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .define("ARL_EMULATION", None)
        // A kernel's loops and sums are in the order in which they are written, on the host as on a GPU.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        // The file's own directory comes first for each include.
        .flag("-Wno-unknown-pragmas")
        .file("emulation/kernels.cpp")
        .compile("arl_kernels_emulation");
}
