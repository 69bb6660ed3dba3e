//! A machine for tests: variables and files as the test says, and libraries made by the C compiler.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use arl_cuda_libraries::places::{Machine, Surroundings};
use arl_cuda_libraries::{CUDNN, LIBRARIES};

/// A machine on which nothing is real.
#[derive(Default)]
pub(crate) struct Paper {
    pub(crate) variables: HashMap<&'static str, String>,
    pub(crate) files: HashSet<PathBuf>,
}

impl Paper {
    pub(crate) fn new(variables: &[(&'static str, &str)], files: &[&str]) -> Paper {
        Paper {
            variables: variables.iter().map(|(name, value)| (*name, (*value).to_string())).collect(),
            files: files.iter().map(PathBuf::from).collect(),
        }
    }
}

impl Surroundings for Paper {
    fn variable(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned()
    }

    fn names(&self, folder: &Path) -> Vec<String> {
        let below = self.files.iter().filter_map(|file| file.strip_prefix(folder).ok());
        let mut names: Vec<String> =
            below.filter_map(|rest| Some(rest.components().next()?.as_os_str().to_str()?.to_string())).collect();
        names.sort();
        names.dedup();
        names
    }

    fn is_file(&self, path: &Path) -> bool {
        self.files.contains(path)
    }
}

/// The real files, and of the variables only `ARL_CUDA_LIBRARIES`: folders with `:` between them.
pub(crate) struct Only(pub(crate) PathBuf);

impl Surroundings for Only {
    fn variable(&self, name: &str) -> Option<String> {
        (name == "ARL_CUDA_LIBRARIES").then(|| self.0.display().to_string())
    }

    fn names(&self, folder: &Path) -> Vec<String> {
        Machine.names(folder)
    }

    fn is_file(&self, path: &Path) -> bool {
        Machine.is_file(path)
    }
}

fn compile(folder: &Path, soname: &str, source: &Path, define: &str) {
    let output = folder.join(soname);
    let status = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()))
        .args(["-shared", "-fPIC", "-x", "c", define])
        .arg(source)
        .arg(format!("-Wl,-soname,{soname}"))
        .arg("-o")
        .arg(&output)
        .status()
        .unwrap();
    assert!(status.success(), "{soname} does not compile");
}

/// Puts a driver into `folder` that reads its answers from variables that begin with `prefix`.
pub(crate) fn fake_driver(folder: &Path, prefix: &str) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake/libcuda.c");
    compile(folder, "libcuda.so.1", &source, &format!("-DFAKE_PREFIX=\"{prefix}\""));
}

/// Puts an empty library of that name into `folder`.
pub(crate) fn empty_library(folder: &Path, soname: &str) {
    compile(folder, soname, Path::new("/dev/null"), "-DEMPTY");
}

/// Puts a cuDNN into `folder` that says which CUDA it is built for. As in the real one, a second library knows the answer,
/// which it opens by a SONAME that all builds share, and which stays when it is closed.
pub(crate) fn fake_cudnn(folder: &Path, cudart: i32) {
    let source = folder.join("cudnn.c");
    std::fs::write(
        &source,
        r#"
        #include <dlfcn.h>
        #ifdef CUDART
        unsigned long graph(void) { return CUDART; }
        #else
        unsigned long cudnnGetCudartVersion(void) {
            void *library = dlopen("libcudnn_graph.so.9", RTLD_NOW | RTLD_NOLOAD);
            if (!library) library = dlopen(GRAPH, RTLD_NOW | RTLD_NODELETE);
            return ((unsigned long (*)(void))dlsym(library, "graph"))();
        }
        #endif
        "#,
    )
    .unwrap();
    let graph = "libcudnn_graph.so.9";
    compile(folder, graph, &source, &format!("-DCUDART={cudart}"));
    compile(folder, CUDNN.soname, &source, &format!("-DGRAPH=\"{}\"", folder.join(graph).display()));
}

/// Puts all of NVIDIA's libraries into `folder`, empty.
pub(crate) fn fake_libraries(folder: &Path) {
    for library in LIBRARIES {
        empty_library(folder, library.soname);
    }
}
