//! Compiles the kernels: with `fatbin` by nvcc for GPUs, with `emulation` by the host's C++ compiler for tests.

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=cuda");
    constants();
    println!("cargo::rerun-if-changed=emulation");
    #[cfg(feature = "emulation")]
    emulation();
    #[cfg(feature = "fatbin")]
    fatbin();
}

/// `OUT_DIR/constants.rs`: the module that `cuda/constants.cuh` is in Rust.
fn constants() {
    const INT: &str = "constexpr int ";
    let file = "cuda/constants.cuh";
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| fail(&format!("{file}: {error}")));
    let line_of = |(number, line): (usize, &str)| match line {
        "" | "}" | "#pragma once" => line.replace("#pragma once", ""),
        // What the file is about is said in `lib.rs`.
        _ if number < 3 && line.starts_with("//") => String::new(),
        _ if line.starts_with("// ") => format!("/{line}"),
        _ if line.starts_with("namespace ") => line.replace("namespace ", "pub mod "),
        _ if line.starts_with(INT) => line.replace(INT, "pub const ").replacen(" = ", ": usize = ", 1),
        _ => fail(&format!("{file}:{}: not a namespace, a constant or a comment: {line}", number + 1)),
    };
    let module: Vec<String> = text.lines().enumerate().map(line_of).collect();
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("constants.rs");
    if let Err(error) = std::fs::write(&out, module.join("\n")) {
        fail(&format!("{}: {error}", out.display()));
    }
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

/// `OUT_DIR/arl.fatbin`, by the flags that the check of the kernels uses too; or the file that this check has left, of which
/// ARL_KERNELS_FATBIN is the path.
#[cfg(feature = "fatbin")]
fn fatbin() {
    use std::process::Command;

    println!("cargo::rerun-if-changed=nvcc.flags");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-env-changed=ARL_KERNELS_FATBIN");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("arl.fatbin");
    if let Some(compiled) = std::env::var_os("ARL_KERNELS_FATBIN") {
        if let Err(error) = std::fs::copy(&compiled, &out) {
            fail(&format!("{}: {error}", compiled.display()));
        }
        return;
    }
    let flags = match std::fs::read_to_string("nvcc.flags") {
        Ok(flags) => flags,
        Err(error) => fail(&format!("nvcc.flags: {error}")),
    };
    let nvcc = match std::env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home).join("bin").join("nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let known = Command::new(&nvcc).arg("--list-gpu-code").output().map(|output| output.stdout).unwrap_or_default();
    let known = String::from_utf8_lossy(&known);
    // A compiler of CUDA 12 does not know the newest GPUs; on those, such a build runs from PTX.
    let compiled = |flag: &&str| match flag.split_once("code=sm_") {
        // Of 9.0a the list has 9.0.
        Some((_, number)) => {
            known.lines().any(|code| code.strip_prefix("sm_") == Some(number.trim_end_matches(char::is_alphabetic)))
        }
        None => true,
    };
    let status = Command::new(&nvcc)
        .args(flags.split_whitespace().filter(compiled))
        .args(["-fatbin", "-o"])
        .arg(&out)
        .arg("cuda/kernels.cu")
        // What a build of the addon appends is for candle's kernels.
        .env_remove("NVCC_APPEND_FLAGS")
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
fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1);
}
