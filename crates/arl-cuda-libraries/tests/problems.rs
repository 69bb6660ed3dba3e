//! What is said, and what is advised, about each thing that keeps CUDA from being used.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use arl_cuda_libraries::find::{Attempt, NOT_THERE};
use arl_cuda_libraries::problem::{
    Problem, ProblemKind, answered, capability_problem, inexact_products, install_command, no_driver,
};
use arl_cuda_libraries::report::{Gpu, LibraryReport};
use arl_cuda_libraries::{CUDNN, DRIVER, LIBRARIES, LIBRARY_WHEELS, library_wheels};
use support::Paper;

fn gpu(ordinal: u32, capability: (i32, i32)) -> Gpu {
    let problem = capability_problem(capability);
    Gpu {
        ordinal,
        name: "a GPU".into(),
        uuid: String::new(),
        capability,
        memory_bytes: 8 << 30,
        free_bytes: 7 << 30,
        problem,
    }
}

/// All libraries, found but for those in `without`.
fn libraries(without: &[&str]) -> Vec<LibraryReport> {
    let all = LIBRARIES.into_iter().chain([CUDNN]);
    let path = |soname: &str| (!without.contains(&soname)).then(|| format!("/lib/{soname}"));
    all.map(|library| LibraryReport { library, path: path(library.soname), tried: Vec::new() }).collect()
}

fn judged(version: i32, gpus: &[Gpu], without: &[&str]) -> Option<Problem> {
    answered(version, gpus, &libraries(without), &Paper::new(&[("HOME", "/home/me")], &[]))
}

fn driver(tried: &[(&str, &str)]) -> LibraryReport {
    let tried = tried.iter().map(|(at, why)| Attempt { at: (*at).into(), why: (*why).into() });
    LibraryReport { library: DRIVER, path: None, tried: tried.collect() }
}

#[test]
fn nothing_is_wrong_where_one_gpu_can_be_used() {
    assert_eq!(judged(13_000, &[gpu(0, (7, 5)), gpu(1, (8, 0))], &[]), None);
    assert_eq!(judged(13_020, &[gpu(0, (12, 0))], &[CUDNN.soname]), None, "cuDNN may be absent");
}

#[test]
fn a_small_compute_capability_is_refused_by_name() {
    let problem = judged(13_000, &[gpu(0, (7, 5)), gpu(1, (6, 1))], &[]).unwrap();
    assert_eq!(problem.kind, ProblemKind::NoGpu);
    assert_eq!(
        problem.message,
        "no GPU that can be used: cuda:0 (a GPU): compute capability 7.5, and 8.0 (Ampere) or newer is needed; \
         cuda:1 (a GPU): compute capability 6.1, and 8.0 (Ampere) or newer is needed"
    );
    assert_eq!(judged(13_000, &[], &[]).unwrap().kind, ProblemKind::NoGpu);
}

#[test]
fn an_old_driver_is_told_with_the_release_that_is_needed() {
    let problem = judged(12_040, &[gpu(0, (9, 0))], &[]).unwrap();
    assert_eq!(problem.kind, ProblemKind::OldDriver);
    assert_eq!(problem.message, "the NVIDIA driver is too old: it serves CUDA up to 12.4, and 13.0 is needed");
    assert_eq!(problem.hint, "Install NVIDIA's driver 580 or newer.");
}

#[test]
fn missing_libraries_are_named_with_the_command_that_supplies_them() {
    let problem = judged(13_000, &[gpu(0, (9, 0))], &["libcurand.so.10", "libcublas.so.13"]).unwrap();
    assert_eq!(problem.kind, ProblemKind::Libraries);
    assert_eq!(problem.message, "CUDA libraries are missing: libcurand.so.10, libcublas.so.13");
    assert!(
        problem.hint.starts_with(
            "Run `npx arl cuda install`, or with Python `python3 -m pip install --no-deps --upgrade --target \
             /home/me/.cache/arl/cuda/libraries nvidia-"
        ),
        "{}",
        problem.hint
    );
}

#[test]
fn every_wheel_is_pinned_by_version_and_hash() {
    let wheels: Vec<_> = library_wheels().collect();
    assert_eq!(wheels.len(), LIBRARY_WHEELS.lines().count());
    for wheel in wheels {
        assert!(wheel.name.starts_with("nvidia-"), "{wheel:?}");
        assert!(wheel.version.split('.').all(|part| part.parse::<u32>().is_ok()), "{wheel:?}");
        assert!(wheel.sha256.len() == 64 && wheel.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()), "{wheel:?}");
    }
}

#[test]
fn variables_that_change_float32_products_are_warned_of() {
    let warning = |variables| inexact_products(&Paper::new(variables, &[]));
    assert_eq!(warning(&[("NVIDIA_TF32_OVERRIDE", "0"), ("CUDA_HOME", "1")]), None);
    let both = warning(&[("NVIDIA_TF32_OVERRIDE", "1"), ("CUBLAS_EMULATE_SINGLE_PRECISION", "1")]).unwrap();
    assert!(both.starts_with("NVIDIA_TF32_OVERRIDE=1 and CUBLAS_EMULATE_SINGLE_PRECISION=1 changes float32"), "{both}");
}

#[test]
fn a_folder_with_a_space_is_quoted_in_the_command() {
    let command = install_command(&Paper::new(&[("ARL_CACHE", "/my cache")], &[]));
    assert!(command.contains(" --target '/my cache/cuda/libraries' "), "{command}");
}

#[test]
fn no_driver_and_a_driver_that_does_not_open_are_two_things() {
    let absent = no_driver(&driver(&[("the system's folders", NOT_THERE), ("/usr/lib/wsl/lib", NOT_THERE)]));
    assert_eq!((absent.kind, absent.message.as_str()), (ProblemKind::NoDriver, "no NVIDIA driver (libcuda.so.1)"));
    let broken = no_driver(&driver(&[("/mine/libcuda.so.1", "file too short"), ("the system's folders", NOT_THERE)]));
    assert_eq!(broken.kind, ProblemKind::Driver);
    assert_eq!(broken.message, "the NVIDIA driver's library does not open: /mine/libcuda.so.1: file too short");
}
