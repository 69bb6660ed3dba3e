//! Looks for one library in places, in their order, until one opens; keeps what was tried. What opening is, the caller says.

use std::path::{Path, PathBuf};

use crate::places::{Place, Surroundings};

/// A place in which a library was not found, or from which it did not open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The file, the folder, or the system's search.
    pub at: String,
    /// Why it did not serve.
    pub why: String,
}

/// What became of a search.
#[derive(Debug)]
pub struct Search<H> {
    /// What `open` gave, of the first place that served.
    pub opened: Option<H>,
    /// All places before it.
    pub tried: Vec<Attempt>,
}

/// What is said of a place that does not have the file.
pub const NOT_THERE: &str = "not there";

/// Opens `soname` from the first of `places` where that works. `open` takes a path, or a bare SONAME for the system's search,
/// and gives the loader's message where it fails.
pub fn find<H>(
    soname: &str,
    places: &[Place],
    machine: &dyn Surroundings,
    mut open: impl FnMut(&Path) -> Result<H, String>,
) -> Search<H> {
    let mut tried = Vec::new();
    for place in places {
        let files = match place {
            Place::System => vec![PathBuf::from(soname)],
            Place::Folder(folder) => {
                let files = existing(&folder.join(soname), machine);
                if files.is_empty() {
                    tried.push(Attempt { at: folder.display().to_string(), why: NOT_THERE.into() });
                }
                files
            }
        };
        for file in files {
            match open(&file) {
                Ok(handle) => return Search { opened: Some(handle), tried },
                Err(message) => {
                    let system = *place == Place::System;
                    let at = if system { "the system's folders".into() } else { file.display().to_string() };
                    // The loader names what it lacks: the library itself, or one that it needs in turn.
                    let absent = system && message.starts_with(&format!("{soname}: cannot open shared object file"));
                    tried.push(Attempt { at, why: if absent { NOT_THERE.into() } else { message } });
                }
            }
        }
    }
    Search { opened: None, tried }
}

/// The files that a path means; a part that ends in `*` matches every name that begins so.
fn existing(pattern: &Path, machine: &dyn Surroundings) -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::new()];
    for part in pattern.components() {
        let text = part.as_os_str().to_string_lossy();
        let Some(start) = text.strip_suffix('*') else {
            for path in &mut paths {
                path.push(part);
            }
            continue;
        };
        let children = |path: &PathBuf| {
            let names = machine.names(path).into_iter().filter(|name| name.starts_with(start));
            names.map(|name| path.join(name)).collect::<Vec<_>>()
        };
        paths = paths.iter().flat_map(children).collect();
    }
    paths.retain(|path| machine.is_file(path));
    paths
}
