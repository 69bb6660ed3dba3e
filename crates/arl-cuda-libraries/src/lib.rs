//! What CUDA needs at run time: finds and opens the driver and NVIDIA's libraries of CUDA 13, and lists the GPUs. Works, and
//! says why not, on every machine. Knows neither the engine nor napi.

pub mod find;
#[cfg(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu"))]
mod gpu;
#[cfg(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu"))]
mod open;
pub mod places;
pub mod problem;
pub mod report;

/// A library that is opened by its SONAME.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Library {
    /// What it is, for people.
    pub name: &'static str,
    /// The name under which the addon asks for it.
    pub soname: &'static str,
}

/// The driver; it comes with the GPU's driver package and never with CUDA.
pub const DRIVER: Library = Library { name: "driver", soname: "libcuda.so.1" };

/// Compiles kernels at run time.
pub const NVRTC: Library = Library { name: "NVRTC", soname: "libnvrtc.so.13" };

/// How the name of a library that NVRTC loads begins without which it compiles nothing; its release follows.
pub const NVRTC_BUILTINS: &str = "libnvrtc-builtins.so.";

/// What the CUDA addon asks for, in the order in which they must be opened: cuBLAS needs cuBLASLt.
pub const LIBRARIES: [Library; 5] = [
    Library { name: "cudart", soname: "libcudart.so.13" },
    NVRTC,
    Library { name: "cuRAND", soname: "libcurand.so.10" },
    Library { name: "cuBLASLt", soname: "libcublasLt.so.13" },
    Library { name: "cuBLAS", soname: "libcublas.so.13" },
];

/// What the engine takes for attention where it is there.
pub const CUDNN: Library = Library { name: "cuDNN", soname: "libcudnn.so.9" };

/// What several GPUs exchange buffers with; asked for by name when ranks are joined.
pub const NCCL: Library = Library { name: "NCCL", soname: "libnccl.so.2" };

/// The wheels that hold [`LIBRARIES`] and [`CUDNN`], as pip takes them (`scripts/cuda-toolkit.mjs` reads the same file): a line
/// each, `NAME==VERSION --hash=sha256:HEX`.
pub const LIBRARY_WHEELS: &str = include_str!("../libraries.txt");

/// A wheel of [`LIBRARY_WHEELS`]: the one file for Linux x64 with this hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wheel {
    /// The project in the Python package index.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The SHA-256 of the file, in hex.
    pub sha256: &'static str,
}

/// [`LIBRARY_WHEELS`], parsed. A line of another form is left out; a test counts them.
pub fn library_wheels() -> impl Iterator<Item = Wheel> {
    LIBRARY_WHEELS.lines().filter_map(|line| {
        let (requirement, sha256) = line.split_once(" --hash=sha256:")?;
        let (name, version) = requirement.split_once("==")?;
        Some(Wheel { name, version, sha256 })
    })
}
