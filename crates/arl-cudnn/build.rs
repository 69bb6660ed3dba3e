//! Compiles the shim over cudnn-frontend with the C++ compiler of the host.

fn main() {
    println!("cargo::rerun-if-changed=shim");
    #[cfg(feature = "shim")]
    shim();
}

#[cfg(feature = "shim")]
fn shim() {
    use std::path::PathBuf;

    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let include = PathBuf::from(std::env::var_os("CUDA_HOME").unwrap_or_default()).join("include");
    if !include.join("cudnn_frontend.h").is_file() {
        println!(
            "cargo::error=cudnn-frontend's headers are not in `include` of CUDA_HOME: `npm run cuda:toolkit` supplies a \
             toolkit that has them, and `npm run build:cuda` builds with it"
        );
        std::process::exit(1);
    }
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        // It describes graphs; what is fast is cuDNN's.
        .opt_level(1)
        .flag("-isystem")
        .flag(include)
        .flag("-fvisibility=hidden")
        .flag("-ffunction-sections")
        .flag("-fdata-sections")
        .flag("-Wno-missing-field-initializers")
        .file("shim/attention.cpp")
        .compile("arl_cudnn_shim");
}
