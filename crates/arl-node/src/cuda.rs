//! What there is of CUDA, for the loader and `arl doctor`: the report of `arl-cuda-libraries`, and what this addon can run on.

use std::path::PathBuf;

use arl_cuda_libraries::places::{Machine, cache_folder};
use arl_cuda_libraries::problem::{ProblemKind, version_text};
use arl_cuda_libraries::report::{FreeMemory, Gpu, LibraryReport, Report, driver, report};
use arl_cuda_libraries::{CUDNN, library_wheels};
use napi_derive::napi;

use crate::device::backend;
use crate::error::sync;

/// A place in which a library was not found, or from which it did not open.
#[napi(object)]
pub struct CudaAttempt {
    /// The file, the folder, or the system's search.
    pub at: String,
    /// Why it did not serve.
    pub why: String,
}

/// A library and where it was found.
#[napi(object)]
pub struct CudaLibrary {
    /// What it is, for people.
    pub name: String,
    /// The name under which it is asked for.
    pub soname: String,
    /// Whether CUDA cannot be used without it.
    pub needed: bool,
    /// The file that it was opened from; absent: it was not.
    pub path: Option<String>,
    /// What was tried before.
    pub tried: Vec<CudaAttempt>,
}

/// A GPU.
#[napi(object)]
pub struct CudaDevice {
    /// As the option `device` names it.
    pub device: String,
    /// Its name.
    pub name: String,
    /// What tells it from all others, on all machines.
    pub uuid: String,
    /// Its compute capability, such as `9.0`.
    pub capability: String,
    /// Its memory.
    pub memory_bytes: f64,
    /// Its memory that no program holds; 0 where it could not be asked.
    pub available_bytes: f64,
    /// Why it cannot be used; absent: it can.
    pub problem: Option<String>,
}

/// What keeps CUDA from being used.
#[napi(object)]
pub struct CudaProblem {
    /// What it is about.
    #[napi(ts_type = "'system' | 'noDriver' | 'driver' | 'oldDriver' | 'noGpu' | 'libraries'")]
    pub kind: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// What there is of CUDA.
#[napi(object)]
pub struct CudaReport {
    /// The driver's library; absent on systems without CUDA.
    pub driver: Option<CudaLibrary>,
    /// The newest CUDA version that the driver serves, such as `13.0`.
    pub driver_version: Option<String>,
    /// The GPUs that this process may see.
    pub devices: Vec<CudaDevice>,
    /// NVIDIA's libraries; looked for only where there is a driver.
    pub libraries: Vec<CudaLibrary>,
    /// The first thing that keeps CUDA from being used; absent: nothing does.
    pub problem: Option<CudaProblem>,
    /// Environment variables that change results; absent: none of them is set.
    pub warning: Option<String>,
}

/// Finds and opens the driver and NVIDIA's libraries, so that the CUDA addon can be loaded after it, and lists the GPUs.
/// `folders`: folders of `node_modules` that the addon may be installed in. `device`, as the option names it, or `all`: the
/// GPU whose free memory is asked for, which takes a context on it; absent: none. Never throws because something is missing.
#[napi]
pub fn cuda_report(folders: Vec<String>, device: Option<String>) -> napi::Result<CudaReport> {
    let folders: Vec<PathBuf> = folders.into_iter().map(PathBuf::from).collect();
    let free = match device.as_deref() {
        None => FreeMemory::OfNone,
        Some("all") => FreeMemory::OfAll,
        Some(device) => FreeMemory::of_device(device),
    };
    sync(|| Ok(report(&Machine, &folders, free).into()))
}

/// The driver's library alone, without asking it anything; null on systems without CUDA.
#[napi]
pub fn cuda_driver() -> napi::Result<Option<CudaLibrary>> {
    sync(|| Ok(driver(&Machine).map(Into::into)))
}

/// A wheel of NVIDIA's libraries: the one file for Linux x64 with this hash.
#[napi(object)]
pub struct CudaWheel {
    /// The project in the Python package index.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The SHA-256 of the file, in hex.
    pub sha256: String,
}

/// The wheels of NVIDIA's libraries, pinned.
#[napi]
pub fn cuda_wheels() -> Vec<CudaWheel> {
    let own = |wheel: arl_cuda_libraries::Wheel| CudaWheel {
        name: wheel.name.into(),
        version: wheel.version.into(),
        sha256: wheel.sha256.into(),
    };
    library_wheels().map(own).collect()
}

/// arl's folder for CUDA in the build cache; null where no environment variable says where caches are.
#[napi]
pub fn cuda_folder() -> Option<String> {
    cache_folder(&Machine).map(|folder| folder.display().to_string())
}

/// What this addon's engine can run on.
#[napi]
pub fn backends() -> Vec<&'static str> {
    if cfg!(feature = "cuda") { vec!["cpu", "cuda"] } else { vec!["cpu"] }
}

/// Opens CUDA device `ordinal` as a run would, and gives it back; says what it is. Throws `ARL_DEVICE` where that fails, and
/// where this addon is the CPU one.
#[napi]
pub fn cuda_runtime(ordinal: u32) -> napi::Result<String> {
    sync(|| Ok(backend(&format!("cuda:{ordinal}"))?.name()))
}

impl From<LibraryReport> for CudaLibrary {
    fn from(found: LibraryReport) -> Self {
        let tried = found.tried.into_iter().map(|attempt| CudaAttempt { at: attempt.at, why: attempt.why });
        CudaLibrary {
            name: found.library.name.into(),
            soname: found.library.soname.into(),
            needed: found.library != CUDNN,
            path: found.path,
            tried: tried.collect(),
        }
    }
}

impl From<Gpu> for CudaDevice {
    fn from(gpu: Gpu) -> Self {
        let (major, minor) = gpu.capability;
        CudaDevice {
            device: format!("cuda:{}", gpu.ordinal),
            name: gpu.name,
            uuid: gpu.uuid,
            capability: format!("{major}.{minor}"),
            memory_bytes: gpu.memory_bytes as f64,
            available_bytes: gpu.free_bytes as f64,
            problem: gpu.problem,
        }
    }
}

impl From<Report> for CudaReport {
    fn from(report: Report) -> Self {
        CudaReport {
            driver: report.driver.map(Into::into),
            driver_version: report.driver_version.map(version_text),
            devices: report.gpus.into_iter().map(Into::into).collect(),
            libraries: report.libraries.into_iter().map(Into::into).collect(),
            problem: report.problem.map(|problem| CudaProblem {
                kind: kind_text(problem.kind).into(),
                message: problem.message,
                hint: problem.hint,
            }),
            warning: report.warning,
        }
    }
}

fn kind_text(kind: ProblemKind) -> &'static str {
    match kind {
        ProblemKind::System => "system",
        ProblemKind::NoDriver => "noDriver",
        ProblemKind::Driver => "driver",
        ProblemKind::OldDriver => "oldDriver",
        ProblemKind::NoGpu => "noGpu",
        ProblemKind::Libraries => "libraries",
    }
}
