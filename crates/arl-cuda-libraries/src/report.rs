//! The report: what was found, from which file, what was tried, and the GPUs. Making it opens the libraries, so that the CUDA
//! addon can be loaded after it.

use std::path::PathBuf;

use crate::Library;
use crate::find::Attempt;
use crate::places::Surroundings;
use crate::problem::Problem;

/// A library and where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryReport {
    /// Which one.
    pub library: Library,
    /// The file that it was opened from.
    pub path: Option<String>,
    /// What was tried before.
    pub tried: Vec<Attempt>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The driver's number of it.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// What tells it from all others on all machines, in hex; an instance of a GPU has its own.
    pub uuid: String,
    /// Its compute capability, major and minor.
    pub capability: (i32, i32),
    /// Its memory in bytes.
    pub memory_bytes: u64,
    /// Its memory that no program holds, in bytes; 0 where the driver was not asked or did not answer.
    pub free_bytes: u64,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// What there is of CUDA.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The driver's library; `None` on systems without CUDA.
    pub driver: Option<LibraryReport>,
    /// The newest CUDA version that the driver serves, times 1000.
    pub driver_version: Option<i32>,
    /// The GPUs that this process may see.
    pub gpus: Vec<Gpu>,
    /// What the addon and the engine open; looked for only where there is a driver.
    pub libraries: Vec<LibraryReport>,
    /// The first thing that keeps CUDA from being used; `None`: nothing does.
    pub problem: Option<Problem>,
    /// Environment variables that change results; `None`: none of them is set.
    pub warning: Option<String>,
}

/// Which GPUs are asked for their free memory. Asking creates a context, which takes a part of a second and some hundred MB,
/// and which a GPU in exclusive use refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreeMemory {
    /// None of them.
    OfNone,
    /// The first that can be used.
    OfFirst,
    /// The one with this number.
    Of(u32),
    /// All of them.
    OfAll,
}

impl FreeMemory {
    /// Of the GPU that the option `device` means.
    pub fn of_device(device: &str) -> Self {
        let ordinal = device.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        ordinal.map_or(FreeMemory::OfFirst, FreeMemory::Of)
    }

    /// Whether GPU `ordinal` is asked, where those in `before` were listed before it.
    #[cfg(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu"))]
    fn asks(self, ordinal: u32, before: &[Gpu]) -> bool {
        match self {
            FreeMemory::OfNone => false,
            FreeMemory::OfFirst => before.iter().all(|gpu| gpu.problem.is_some()),
            FreeMemory::Of(wanted) => wanted == ordinal,
            FreeMemory::OfAll => true,
        }
    }
}

/// Finds, opens and asks everything. `beside`: folders of `node_modules` that the addon may be installed in.
pub fn report(machine: &dyn Surroundings, beside: &[PathBuf], free: FreeMemory) -> Report {
    system::report(machine, beside, free)
}

/// The driver alone, without asking it anything: quick where there is none.
pub fn driver(machine: &dyn Surroundings) -> Option<LibraryReport> {
    system::driver(machine).map(|(found, _)| found)
}

#[cfg(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu"))]
mod system {
    use std::path::{Path, PathBuf};

    use super::{FreeMemory, Gpu, LibraryReport, Report};
    use crate::find::find;
    use crate::gpu::{Driver, Refusal, check_cudnn};
    use crate::open::{Open, open_globally, open_if};
    use crate::places::{Surroundings, driver_places, library_places};
    use crate::problem::{answered, capability_problem, inexact_products, no_driver, no_gpu, not_working, too_old};
    use crate::{CUDNN, DRIVER, LIBRARIES, Library, NVRTC, NVRTC_BUILTINS};

    /// `CUDA_ERROR_NO_DEVICE`.
    const NO_DEVICE: i32 = 100;

    pub(super) fn driver(machine: &dyn Surroundings) -> Option<(LibraryReport, Option<Open>)> {
        let search = find(DRIVER.soname, &driver_places(machine), machine, open_globally);
        let path = search.opened.map(|open| open.file().unwrap_or_else(|| DRIVER.soname.into()));
        Some((LibraryReport { library: DRIVER, path, tried: search.tried }, search.opened))
    }

    pub(super) fn report(machine: &dyn Surroundings, beside: &[PathBuf], free: FreeMemory) -> Report {
        let Some((driver, opened)) = driver(machine) else { return Report::default() };
        let Some(opened) = opened else {
            let problem = Some(no_driver(&driver));
            return Report { driver: Some(driver), problem, ..Report::default() };
        };
        let mut report = Report {
            driver: Some(driver),
            libraries: libraries(machine, beside),
            warning: inexact_products(machine),
            ..Report::default()
        };
        report.problem = match ask(opened, free, &mut report) {
            Ok(version) => answered(version, &report.gpus, &report.libraries, machine),
            Err(Trouble::Symbol(name)) => Some(too_old(format!("the NVIDIA driver is too old: it has no `{name}`"))),
            Err(Trouble::Refused(Refusal { status: NO_DEVICE, message })) => {
                Some(no_gpu(format!("the NVIDIA driver sees no GPU: {message}")))
            }
            Err(Trouble::Refused(Refusal { message, .. })) => Some(not_working(&message)),
        };
        report
    }

    fn libraries(machine: &dyn Surroundings, beside: &[PathBuf]) -> Vec<LibraryReport> {
        let places = library_places(machine, beside);
        let open = |library: Library| {
            let open = |path: &Path| if library == CUDNN { open_if(path, check_cudnn) } else { open_globally(path) };
            let search = find(library.soname, &places, machine, open);
            let path = search.opened.map(|open| open.file().unwrap_or_else(|| library.soname.into()));
            if library == NVRTC
                && let Some(path) = &path
            {
                open_builtins(Path::new(path), machine);
            }
            LibraryReport { library, path, tried: search.tried }
        };
        LIBRARIES.into_iter().chain([CUDNN]).map(open).collect()
    }

    /// Opens NVRTC's second library, which it asks for by name when it compiles the first kernel (cuDNN's attention), and
    /// looks for in the system's folders alone. Where that fails, NVRTC says so when it is needed.
    fn open_builtins(nvrtc: &Path, machine: &dyn Surroundings) {
        let Some(folder) = nvrtc.parent() else { return };
        for name in machine.names(folder) {
            if name.starts_with(NVRTC_BUILTINS) {
                let _ = open_globally(&folder.join(name));
            }
        }
    }

    enum Trouble {
        Symbol(&'static str),
        Refused(Refusal),
    }

    impl From<Refusal> for Trouble {
        fn from(refusal: Refusal) -> Self {
            Trouble::Refused(refusal)
        }
    }

    /// Asks the driver for its version and the GPUs; what it answered before a failure stays in the report.
    fn ask(library: Open, free: FreeMemory, report: &mut Report) -> Result<i32, Trouble> {
        let driver = Driver::of(library).map_err(Trouble::Symbol)?;
        let version = driver.version()?;
        report.driver_version = Some(version);
        driver.init()?;
        for ordinal in 0..driver.count()? {
            let asked = free.asks(ordinal as u32, &report.gpus);
            report.gpus.push(gpu(&driver, ordinal, asked)?);
        }
        Ok(version)
    }

    fn gpu(driver: &Driver, ordinal: i32, ask_free: bool) -> Result<Gpu, Refusal> {
        let device = driver.device(ordinal)?;
        let capability = driver.capability(device)?;
        let mut gpu = Gpu {
            ordinal: ordinal as u32,
            name: driver.name(device)?,
            uuid: driver.uuid(device)?,
            capability,
            memory_bytes: driver.memory(device)? as u64,
            free_bytes: 0,
            problem: capability_problem(capability),
        };
        if ask_free && gpu.problem.is_none() {
            match driver.free_memory(device) {
                Ok(bytes) => gpu.free_bytes = bytes as u64,
                Err(refusal) => gpu.problem = Some(refusal.message),
            }
        }
        Ok(gpu)
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu")))]
mod system {
    use std::path::PathBuf;

    use super::{FreeMemory, LibraryReport, Report};
    use crate::places::Surroundings;
    use crate::problem::other_system;

    pub(super) fn driver(_machine: &dyn Surroundings) -> Option<(LibraryReport, Option<()>)> {
        None
    }

    pub(super) fn report(_machine: &dyn Surroundings, _beside: &[PathBuf], _free: FreeMemory) -> Report {
        Report { problem: Some(other_system()), ..Report::default() }
    }
}
