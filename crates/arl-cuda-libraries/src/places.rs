//! Where CUDA's libraries may be, in the order in which they are looked for. A pure function of the environment variables
//! and of which files there are; nothing is opened, and no Python is run.

use std::path::{Path, PathBuf};

/// What the search may know of the machine; tests have one of their own.
pub trait Surroundings {
    /// An environment variable that is set and not empty.
    fn variable(&self, name: &str) -> Option<String>;
    /// The names in a folder, sorted; none where there is no such folder.
    fn names(&self, folder: &Path) -> Vec<String>;
    /// Whether there is a file, or a link to one.
    fn is_file(&self, path: &Path) -> bool;
}

/// The machine that this runs on.
#[derive(Clone, Copy, Debug)]
pub struct Machine;

impl Surroundings for Machine {
    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok().filter(|value| !value.is_empty())
    }

    fn names(&self, folder: &Path) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    fn is_file(&self, path: &Path) -> bool {
        path.is_file()
    }
}

/// A place to look in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where the system's loader looks for a bare SONAME: `LD_LIBRARY_PATH`, then what `ldconfig` listed.
    System,
    /// Folders; a `*` in a part of the path matches any end of a name.
    Folder(PathBuf),
}

/// Places of the driver.
pub fn driver_places(machine: &dyn Surroundings) -> Vec<Place> {
    let mut places = named_folders(machine);
    places.push(Place::System);
    // Where WSL, NixOS, and the containers of GKE and gVisor put it; their loaders need not be configured for it.
    let folders = ["/usr/lib/wsl/lib", "/run/opengl-driver/lib", "/usr/local/nvidia/lib64"];
    places.extend(folders.map(|folder| Place::Folder(folder.into())));
    places
}

/// Places of NVIDIA's libraries. `beside`: folders of `node_modules` that the addon may be installed in.
pub fn library_places(machine: &dyn Surroundings, beside: &[PathBuf]) -> Vec<Place> {
    let mut folders: Vec<PathBuf> = Vec::new();
    for home in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| machine.variable(name)) {
        folders.extend(["lib64", "lib"].map(|lib| Path::new(&home).join(lib)));
    }
    folders.push("/usr/local/cuda/lib64".into());
    folders.extend(python_folders(machine));
    if let Some(cache) = cache_folder(machine) {
        folders.push(cache.join("libraries/nvidia/*/lib"));
        folders.push(cache.join("13.0/lib"));
    }
    folders.extend(beside.iter().map(|modules| modules.join("@arl/cuda-libraries-13/lib")));

    let mut places = named_folders(machine);
    places.push(Place::System);
    for place in folders.into_iter().map(Place::Folder) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// The folders that `ARL_CUDA_LIBRARIES` lists.
fn named_folders(machine: &dyn Surroundings) -> Vec<Place> {
    let list = machine.variable("ARL_CUDA_LIBRARIES").unwrap_or_default();
    list.split(':').filter(|folder| !folder.is_empty()).map(|folder| Place::Folder(folder.into())).collect()
}

/// arl's folder for CUDA in the build cache, where `npm run cuda:toolkit` and the command in the report's hint put libraries, and
/// engines what they have measured.
pub fn cache_folder(machine: &dyn Surroundings) -> Option<PathBuf> {
    if let Some(cache) = machine.variable("ARL_CACHE") {
        return Some(Path::new(&cache).join("cuda"));
    }
    let caches = machine.variable("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.or_else(|| Some(Path::new(&machine.variable("HOME")?).join(".cache")));
    Some(caches?.join("arl/cuda"))
}

/// `nvidia/*/lib` of the Python environments at hand, the nearest first: the one named, the active one, the first of `PATH`,
/// the user's own. Conda also puts libraries straight into its `lib`.
fn python_folders(machine: &dyn Surroundings) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(python) = machine.variable("ARL_PYTHON") {
        let path = Path::new(&python);
        let found = if python.contains('/') { Some(path.to_path_buf()) } else { on_path(machine, &python) };
        folders.extend(found.iter().flat_map(|path| of_interpreter(path)));
    }
    folders.extend(machine.variable("VIRTUAL_ENV").iter().flat_map(|prefix| of_prefix(Path::new(prefix))));
    if let Some(prefix) = machine.variable("CONDA_PREFIX") {
        folders.push(Path::new(&prefix).join("lib"));
        folders.extend(of_prefix(Path::new(&prefix)));
    }
    folders.extend(of_prefix(Path::new(".venv")));
    folders.extend(on_path(machine, "python3").iter().flat_map(|path| of_interpreter(path)));
    let user = machine.variable("PYTHONUSERBASE").map(PathBuf::from);
    let user = user.or_else(|| Some(Path::new(&machine.variable("HOME")?).join(".local")));
    folders.extend(user.iter().flat_map(|prefix| of_prefix(prefix)));
    folders
}

fn on_path(machine: &dyn Surroundings, name: &str) -> Option<PathBuf> {
    let path = machine.variable("PATH")?;
    path.split(':').map(|folder| Path::new(folder).join(name)).find(|file| machine.is_file(file))
}

/// Folders of the environment that holds an interpreter. The path is taken unresolved: in a virtual environment
/// `bin/python` is a link out of it. pyenv's shims mean all of its versions.
fn of_interpreter(python: &Path) -> Vec<PathBuf> {
    let Some(bin) = python.parent() else { return Vec::new() };
    let Some(prefix) = bin.parent() else { return Vec::new() };
    if bin.ends_with("shims") {
        return of_prefix(&prefix.join("versions/*"));
    }
    let mut folders = of_prefix(prefix);
    if prefix == Path::new("/usr") {
        folders.extend(of_prefix(Path::new("/usr/local"))); // where a system's own Python has pip install
    }
    folders
}

fn of_prefix(prefix: &Path) -> Vec<PathBuf> {
    // Debian's Python calls the folder dist-packages.
    ["site-packages", "dist-packages"]
        .map(|packages| prefix.join("lib/python3*").join(packages).join("nvidia/*/lib"))
        .to_vec()
}
