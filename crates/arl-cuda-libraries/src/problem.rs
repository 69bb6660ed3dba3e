//! What keeps CUDA from being used, in a sentence, and what to do about it. Pure: judges what was found.

use crate::find::{Attempt, NOT_THERE};
use crate::places::{Surroundings, cache_folder};
use crate::report::{Gpu, LibraryReport};
use crate::{CUDNN, library_wheels};

/// The CUDA version of the addon's libraries and kernels, times 1000, as drivers count.
pub const CUDA_VERSION: i32 = 13_000;

/// The oldest driver for it, and the least compute capability that the kernels are made for.
const DRIVER_RELEASE: u32 = 580;
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// What a problem is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// CUDA is not supported on this system.
    System,
    /// There is no driver: most likely, no NVIDIA GPU.
    NoDriver,
    /// The driver is there and does not work.
    Driver,
    /// The driver is too old.
    OldDriver,
    /// There is no GPU that can be used.
    NoGpu,
    /// Libraries were not found.
    Libraries,
}

/// What keeps CUDA from being used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What it is about.
    pub kind: ProblemKind,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// `13.0` of 13000.
pub fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The one command of pip that supplies every library; `arl cuda install` does the same without Python.
pub fn install_command(machine: &dyn Surroundings) -> String {
    let target = cache_folder(machine).map_or(String::new(), |folder| {
        let folder = folder.join("libraries").display().to_string();
        let quoted = if folder.contains(' ') { format!("'{folder}'") } else { folder };
        format!(" --target {quoted}")
    });
    let wheels: Vec<String> = library_wheels().map(|wheel| format!("{}=={}", wheel.name, wheel.version)).collect();
    // No dependencies: the list is whole. `--upgrade`, because pip leaves a folder alone that is there.
    format!("python3 -m pip install --no-deps --upgrade{target} {}", wheels.join(" "))
}

fn problem(kind: ProblemKind, message: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem { kind, message: message.into(), hint: hint.into() }
}

/// Why a GPU of this compute capability cannot be used.
pub fn capability_problem((major, minor): (i32, i32)) -> Option<String> {
    let (least_major, least_minor) = LEAST_CAPABILITY;
    ((major, minor) < LEAST_CAPABILITY).then(|| {
        format!("compute capability {major}.{minor}, and {least_major}.{least_minor} (Ampere) or newer is needed")
    })
}

/// Variables with which cuBLAS computes float32 products in another arithmetic, whatever its caller asks for, and the value
/// that turns it on.
const INEXACT: [(&str, &str); 2] = [("NVIDIA_TF32_OVERRIDE", "1"), ("CUBLAS_EMULATE_SINGLE_PRECISION", "1")];

/// A warning where one of [`INEXACT`] is set.
pub fn inexact_products(machine: &dyn Surroundings) -> Option<String> {
    let set = INEXACT.iter().filter(|(name, on)| machine.variable(name).as_deref() == Some(on));
    let set: Vec<String> = set.map(|(name, on)| format!("{name}={on}")).collect();
    (!set.is_empty()).then(|| {
        format!(
            "{} changes float32 matrix products, so losses differ from other machines'; unset it",
            set.join(" and ")
        )
    })
}

/// A driver that was not found, or that is there and does not open.
pub fn no_driver(driver: &LibraryReport) -> Problem {
    let failure = driver.tried.iter().find(|attempt| attempt.why != NOT_THERE);
    match failure {
        None => problem(
            ProblemKind::NoDriver,
            "no NVIDIA driver (libcuda.so.1)",
            format!(
                "With an NVIDIA GPU: install NVIDIA's driver {DRIVER_RELEASE} or newer (in a container: start it with the GPUs, as `--gpus all` of docker does)."
            ),
        ),
        Some(Attempt { at, why }) => problem(
            ProblemKind::Driver,
            format!("the NVIDIA driver's library does not open: {at}: {why}"),
            format!("Install NVIDIA's driver {DRIVER_RELEASE} or newer again."),
        ),
    }
}

/// What keeps CUDA from being used where the driver answers.
pub fn answered(
    version: i32,
    gpus: &[Gpu],
    libraries: &[LibraryReport],
    machine: &dyn Surroundings,
) -> Option<Problem> {
    if gpus.is_empty() {
        return Some(no_gpu("the NVIDIA driver sees no GPU"));
    }
    if gpus.iter().all(|gpu| gpu.problem.is_some()) {
        let each = gpus
            .iter()
            .map(|gpu| format!("cuda:{} ({}): {}", gpu.ordinal, gpu.name, gpu.problem.as_deref().unwrap_or_default()));
        let message = format!("no GPU that can be used: {}", each.collect::<Vec<_>>().join("; "));
        return Some(problem(ProblemKind::NoGpu, message, "Use another GPU, or the CPU (`--device cpu`)."));
    }
    if version < CUDA_VERSION {
        let (has, needs) = (version_text(version), version_text(CUDA_VERSION));
        return Some(too_old(format!(
            "the NVIDIA driver is too old: it serves CUDA up to {has}, and {needs} is needed"
        )));
    }
    let missing = libraries.iter().filter(|found| found.path.is_none() && found.library != CUDNN);
    let missing: Vec<&str> = missing.map(|found| found.library.soname).collect();
    (!missing.is_empty()).then(|| {
        let message = format!("CUDA libraries are missing: {}", missing.join(", "));
        problem(
            ProblemKind::Libraries,
            message,
            format!("Run `npx arl cuda install`, or with Python `{}`", install_command(machine)),
        )
    })
}

/// A driver that lacks what is needed.
pub fn too_old(message: impl Into<String>) -> Problem {
    problem(ProblemKind::OldDriver, message, format!("Install NVIDIA's driver {DRIVER_RELEASE} or newer."))
}

/// A driver that refuses; `message`: in its words.
pub fn not_working(message: &str) -> Problem {
    problem(
        ProblemKind::Driver,
        format!("the NVIDIA driver does not work: {message}"),
        "Look at `nvidia-smi`; after an update of the driver the machine must be restarted.",
    )
}

/// A system that has no CUDA, or for which no addon with it is made.
pub fn other_system() -> Problem {
    let (system, processor) = (std::env::consts::OS, std::env::consts::ARCH);
    let library = if cfg!(target_env = "musl") { " with musl" } else { "" };
    let message = format!("CUDA is supported on Linux x64 with glibc; this is {system}{library} on {processor}");
    problem(ProblemKind::System, message, "Use the CPU.")
}

/// A driver that works and shows no GPU.
pub fn no_gpu(message: impl Into<String>) -> Problem {
    let hint =
        "Look at `nvidia-smi`; CUDA_VISIBLE_DEVICES must not hide the GPU, and a container must be started with it.";
    problem(ProblemKind::NoGpu, message, hint)
}
