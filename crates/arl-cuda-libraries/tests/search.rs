//! Where libraries are looked for, in which order, and what is kept of a search; nothing real is touched.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::path::{Path, PathBuf};

use arl_cuda_libraries::find::{Attempt, NOT_THERE, find};
use arl_cuda_libraries::places::{Place, driver_places, library_places};
use support::Paper;

const SONAME: &str = "libcublas.so.13";

/// What `find` opens on a machine with these variables and files, where the system's own folders have nothing.
fn opened(variables: &[(&'static str, &str)], files: &[&str]) -> Option<PathBuf> {
    let machine = Paper::new(variables, files);
    let places = library_places(&machine, &[PathBuf::from("/app/node_modules")]);
    find(SONAME, &places, &machine, |path| {
        if path == Path::new(SONAME) {
            return Err(format!("{SONAME}: cannot open shared object file: No such file or directory"));
        }
        Ok(path.to_path_buf())
    })
    .opened
}

#[test]
fn every_place_is_searched() {
    let home = ("HOME", "/home/me");
    for (variables, file) in [
        (vec![("ARL_CUDA_LIBRARIES", "/none:/mine")], "/mine/libcublas.so.13"),
        (vec![("CUDA_HOME", "/opt/cuda")], "/opt/cuda/lib64/libcublas.so.13"),
        (vec![("CUDA_PATH", "/opt/cuda")], "/opt/cuda/lib/libcublas.so.13"),
        (vec![], "/usr/local/cuda/lib64/libcublas.so.13"),
        (vec![("VIRTUAL_ENV", "/venv")], "/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13"),
        (vec![("CONDA_PREFIX", "/conda")], "/conda/lib/libcublas.so.13"),
        (vec![("CONDA_PREFIX", "/conda")], "/conda/lib/python3.9/site-packages/nvidia/cublas/lib/libcublas.so.13"),
        (vec![("ARL_PYTHON", "/other/bin/python")], "/other/lib/python3.9/site-packages/nvidia/x/lib/libcublas.so.13"),
        (vec![home], "/home/me/.local/lib/python3.11/site-packages/nvidia/cu13/lib/libcublas.so.13"),
        (vec![("PYTHONUSERBASE", "/base")], "/base/lib/python3.11/site-packages/nvidia/cu13/lib/libcublas.so.13"),
        (vec![home], "/home/me/.cache/arl/cuda/libraries/nvidia/cu13/lib/libcublas.so.13"),
        (vec![home], "/home/me/.cache/arl/cuda/13.0/lib/libcublas.so.13"),
        (vec![home, ("XDG_CACHE_HOME", "/xdg")], "/xdg/arl/cuda/13.0/lib/libcublas.so.13"),
        (vec![home, ("ARL_CACHE", "/cache")], "/cache/cuda/13.0/lib/libcublas.so.13"),
        (vec![], "/app/node_modules/@arl/cuda-libraries-13/lib/libcublas.so.13"),
    ] {
        assert_eq!(opened(&variables, &[file]).as_deref(), Some(Path::new(file)), "{variables:?}");
    }
}

#[test]
fn the_first_python_of_the_path_is_searched_without_running_it() {
    for (python, library) in [
        ("/py/bin/python3", "/py/lib/python3.13/site-packages/nvidia/cu13/lib/libcublas.so.13"),
        ("/usr/bin/python3", "/usr/lib/python3/dist-packages/nvidia/cu13/lib/libcublas.so.13"),
        ("/usr/bin/python3", "/usr/local/lib/python3.11/dist-packages/nvidia/cu13/lib/libcublas.so.13"),
        ("/pyenv/shims/python3", "/pyenv/versions/3.11.7/lib/python3.11/site-packages/nvidia/cu13/lib/libcublas.so.13"),
    ] {
        let bin = Path::new(python).parent().unwrap().display().to_string();
        let found = opened(&[("PATH", &format!("/empty:{bin}:/later"))], &[python, library]);
        assert_eq!(found.as_deref(), Some(Path::new(library)));
    }
}

#[test]
fn what_is_named_comes_first_and_what_was_installed_for_arl_last() {
    let variables =
        [("ARL_CUDA_LIBRARIES", "/mine"), ("CUDA_HOME", "/opt/cuda"), ("VIRTUAL_ENV", "/venv"), ("HOME", "/me")];
    let mut files = vec![
        "/mine/libcublas.so.13",
        "/opt/cuda/lib64/libcublas.so.13",
        "/usr/local/cuda/lib64/libcublas.so.13",
        "/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13",
        "/me/.cache/arl/cuda/libraries/nvidia/cu13/lib/libcublas.so.13",
        "/me/.cache/arl/cuda/13.0/lib/libcublas.so.13",
    ];
    while !files.is_empty() {
        assert_eq!(opened(&variables, &files).as_deref(), Some(Path::new(files[0])));
        files.remove(0);
    }
    assert_eq!(opened(&variables, &files), None);
}

#[test]
fn the_system_is_asked_after_the_named_folders_and_before_all_others() {
    let machine = Paper::new(&[("ARL_CUDA_LIBRARIES", "/mine"), ("CUDA_HOME", "/opt/cuda")], &[]);
    let places = library_places(&machine, &[]);
    assert_eq!(places[..3], [Place::Folder("/mine".into()), Place::System, Place::Folder("/opt/cuda/lib64".into())]);
    let driver = driver_places(&machine);
    assert_eq!(driver[..2], [Place::Folder("/mine".into()), Place::System]);
    for folder in ["/usr/lib/wsl/lib", "/run/opengl-driver/lib", "/usr/local/nvidia/lib64"] {
        assert!(driver.contains(&Place::Folder(folder.into())), "{folder}");
    }
}

#[test]
fn a_file_that_does_not_open_is_told_and_the_search_goes_on() {
    let machine = Paper::new(
        &[("ARL_CUDA_LIBRARIES", "/none:/broken:/good")],
        &["/broken/libcublas.so.13", "/good/libcublas.so.13"],
    );
    let places = library_places(&machine, &[]);
    let search = find(SONAME, &places, &machine, |path| {
        if path.starts_with("/broken") { Err("file too short".to_string()) } else { Ok(path.to_path_buf()) }
    });
    assert_eq!(search.opened.as_deref(), Some(Path::new("/good/libcublas.so.13")));
    let tried = [("/none", NOT_THERE), ("/broken/libcublas.so.13", "file too short")];
    assert_eq!(search.tried, tried.map(|(at, why)| Attempt { at: at.into(), why: why.into() }));
}

#[test]
fn a_library_of_the_system_that_lacks_another_is_not_told_as_absent() {
    let machine = Paper::default();
    let message = "libcublasLt.so.13: cannot open shared object file: No such file or directory";
    let search = find(SONAME, &[Place::System], &machine, |_| Err::<(), _>(message.to_string()));
    assert_eq!(search.tried, [Attempt { at: "the system's folders".into(), why: message.into() }]);
}
