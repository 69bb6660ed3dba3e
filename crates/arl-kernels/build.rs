//! Compiles the kernels: with `fatbin` by nvcc for GPUs, with `emulation` by the host's C++ compiler for tests.

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=emulation");
    #[cfg(feature = "emulation")]
    emulation();
    #[cfg(feature = "fatbin")]
    fatbin();
}

/// One static library of all kernels and the fibers that run them.
#[cfg(feature = "emulation")]
fn emulation() {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .define("ARL_EMULATION", None)
        // Sums and products are rounded where they are written.
        .flag("-ffp-contract=off")
        // Buffers are read as packs of their elements.
        .flag("-fno-strict-aliasing")
        .flag("-Wno-unknown-pragmas")
        .file("emulation/kernels.cpp")
        .compile("arl_kernels_emulation");
}

/// `OUT_DIR/arl.fatbin`, by the flags that the check of the kernels uses too.
#[cfg(feature = "fatbin")]
fn fatbin() {
    use std::path::PathBuf;
    use std::process::Command;

    println!("cargo::rerun-if-changed=nvcc.flags");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let flags = match std::fs::read_to_string("nvcc.flags") {
        Ok(flags) => flags,
        Err(error) => fail(&format!("nvcc.flags: {error}")),
    };
    let nvcc = match std::env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home).join("bin").join("nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("arl.fatbin");
    let status = Command::new(&nvcc)
        .args(flags.split_whitespace())
        .args(["-fatbin", "-o"])
        .arg(&out)
        .arg("cuda/kernels.cu")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("nvcc ended with {status}")),
        Err(error) => fail(&format!(
            "{}: {error}. The kernels need NVIDIA's compiler: `npm run cuda:toolkit` supplies it, and \
             `npm run build:cuda` builds with it; or set CUDA_HOME to a toolkit 13.0",
            nvcc.display()
        )),
    }
}

/// Ends the build with a sentence.
#[cfg(feature = "fatbin")]
fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1);
}
