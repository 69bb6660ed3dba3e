//! The report on a machine with a driver and libraries, all made by the C compiler. The process keeps what was opened, so
//! all libraries are there in the whole file; `__test__/cuda.test.ts` has processes in which one is missing.
#![cfg(all(target_os = "linux", target_arch = "x86_64", target_env = "gnu"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use arl_cuda_libraries::problem::ProblemKind;
use arl_cuda_libraries::report::{FreeMemory, Report, driver, report};
use arl_cuda_libraries::{CUDNN, LIBRARIES};
use support::{Only, empty_library, fake_cudnn, fake_driver, fake_libraries};
use tempfile::TempDir;

/// A machine with a driver of its own and all libraries.
fn machine(prefix: &str, variables: &[(&str, &str)]) -> (TempDir, Report) {
    let folder = tempfile::tempdir().unwrap();
    fake_driver(folder.path(), prefix);
    fake_libraries(folder.path());
    empty_library(folder.path(), CUDNN.soname);
    for (name, value) in variables {
        // SAFETY: each test sets variables of its own prefix, before the driver that reads them is opened; nothing else in
        // this process sets any, and the tests of this file run one after the other (`alone`).
        unsafe { std::env::set_var(format!("{prefix}{name}"), value) };
    }
    let found = report(&Only(folder.path().into()), &[], FreeMemory::OfAll);
    (folder, found)
}

/// The GPUs on which the driver in `folder` created contexts since the last call, as bits.
fn contexts(folder: &TempDir) -> u32 {
    let name = std::ffi::CString::new(folder.path().join("libcuda.so.1").to_str().unwrap()).unwrap();
    // SAFETY: C strings; the driver is open, and its function has this type.
    unsafe {
        let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        let function = libc::dlsym(library, c"fake_contexts".as_ptr());
        std::mem::transmute::<*mut libc::c_void, unsafe extern "C" fn() -> u32>(function)()
    }
}

/// Held by each test: setting a variable while another thread reads one is not allowed.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn gpus_are_listed_with_memory_and_capability_and_every_file_is_named() {
    let _alone = alone();
    let (folder, found) = machine("A_", &[("FAKE_CUDA_GPUS", "NVIDIA One,9,0,80,79,0;NVIDIA Two,7,5,16,15,0")]);
    assert_eq!(found.driver_version, Some(13_000));
    let [one, two] = found.gpus.as_slice() else { panic!("{:?}", found.gpus) };
    assert_eq!((one.uuid.len(), two.uuid.ends_with("0002")), (32, true));
    assert_eq!((one.ordinal, one.name.as_str(), one.capability), (0, "NVIDIA One", (9, 0)));
    assert_eq!((one.memory_bytes, one.free_bytes, &one.problem), (80 << 30, 79 << 30, &None));
    assert!(two.problem.as_ref().unwrap().contains("compute capability 7.5"));
    let file = |soname: &str| Some(folder.path().join(soname).display().to_string());
    assert_eq!(found.driver.unwrap().path, file("libcuda.so.1"));
    for library in &found.libraries {
        assert_eq!(library.path, file(library.library.soname));
    }
    assert_eq!(found.libraries.len(), LIBRARIES.len() + 1);
    assert_eq!(found.problem, None);
}

#[test]
fn only_the_gpu_that_is_meant_gets_a_context() {
    let _alone = alone();
    let gpus = "Small,7,5,16,15,0;Full,9,0,80,0,2;One,9,0,80,79,0;Two,9,0,80,78,0";
    let (folder, _) = machine("E_", &[("FAKE_CUDA_GPUS", gpus)]);
    assert_eq!(contexts(&folder), 0b1110, "all that can be used");
    let free = |asked| {
        let found = report(&Only(folder.path().into()), &[], asked);
        assert_eq!(found.gpus.len(), 4);
        found.gpus.iter().map(|gpu| gpu.free_bytes >> 30).collect::<Vec<_>>()
    };
    for (asked, expected, created) in [
        (FreeMemory::OfNone, [0, 0, 0, 0], 0b0000),
        (FreeMemory::of_device("cuda:3"), [0, 0, 0, 78], 0b1000),
        // The first that gives a context.
        (FreeMemory::of_device("auto"), [0, 0, 79, 0], 0b0110),
        (FreeMemory::of_device("cuda"), [0, 0, 79, 0], 0b0110),
    ] {
        assert_eq!((free(asked).as_slice(), contexts(&folder)), (expected.as_slice(), created), "{asked:?}");
    }
}

#[test]
fn a_cudnn_of_another_cuda_is_passed_over_and_leaves_nothing_open() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    fake_driver(folder.path(), "F_");
    fake_libraries(folder.path());
    let [old, new] = ["12", "13"].map(|name| folder.path().join(name));
    for (place, cudart) in [(&old, 12_090), (&new, 13_000)] {
        std::fs::create_dir(place).unwrap();
        fake_cudnn(place, cudart);
    }
    let places = [folder.path(), &old, &new].map(|place| place.display().to_string()).join(":");
    let found = report(&Only(places.into()), &[], FreeMemory::OfNone);
    let cudnn = found.libraries.iter().find(|found| found.library == CUDNN).unwrap();
    let [old, new] = [old, new].map(|place| place.join(CUDNN.soname).display().to_string());
    assert_eq!(cudnn.path.as_ref(), Some(&new));
    let refused = cudnn.tried.iter().find(|attempt| attempt.at == old).unwrap();
    assert_eq!(refused.why, "it is built for CUDA 12.9, and 13 is needed");
    let name = std::ffi::CString::new(old).unwrap();
    // SAFETY: a C string; nothing is loaded.
    let still_open = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
    assert!(still_open.is_null(), "opening it by its SONAME would give this one");
}

#[test]
fn what_nvrtc_and_the_engine_look_for_by_name_is_open_afterwards() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    fake_driver(folder.path(), "N_");
    fake_libraries(folder.path());
    empty_library(folder.path(), CUDNN.soname);
    // A release of its own, so that no other test opens it.
    let builtins = "libnvrtc-builtins.so.13.77";
    empty_library(folder.path(), builtins);
    let is_open = |soname: &str| {
        let name = std::ffi::CString::new(soname).unwrap();
        // SAFETY: a C string; nothing is loaded.
        !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) }.is_null()
    };
    assert!(!is_open(builtins));
    report(&Only(folder.path().into()), &[], FreeMemory::OfAll);
    assert!(is_open(builtins) && is_open(CUDNN.soname));
}

#[test]
fn what_the_driver_refuses_is_told_in_its_own_words() {
    let _alone = alone();
    let (_folder, none) = machine("B_", &[("FAKE_CUDA_INIT", "100")]);
    let problem = none.problem.unwrap();
    assert_eq!(problem.kind, ProblemKind::NoGpu);
    assert!(problem.message.contains("cuInit says CUDA_ERROR_NO_DEVICE (100: a fake error)"), "{}", problem.message);
    assert_eq!(none.driver_version, Some(13_000), "what it said before is kept");

    let (_folder, broken) = machine("C_", &[("FAKE_CUDA_INIT", "999")]);
    let problem = broken.problem.unwrap();
    assert_eq!(problem.kind, ProblemKind::Driver);
    assert!(problem.message.contains("CUDA_ERROR_UNKNOWN (999"), "{}", problem.message);
}

#[test]
fn a_gpu_that_gives_no_context_is_listed_with_the_reason() {
    let _alone = alone();
    let (_folder, found) = machine("D_", &[("FAKE_CUDA_GPUS", "Full,8,9,24,0,2")]);
    let reason = found.gpus[0].problem.clone().unwrap();
    assert!(reason.contains("cuDevicePrimaryCtxRetain says CUDA_ERROR_OUT_OF_MEMORY"), "{reason}");
    assert_eq!(found.problem.unwrap().kind, ProblemKind::NoGpu);
}

#[test]
fn a_library_that_is_no_driver_is_told_as_too_old_for_what_it_lacks() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    empty_library(folder.path(), "libcuda.so.1");
    let problem = report(&Only(folder.path().into()), &[], FreeMemory::OfAll).problem.unwrap();
    assert_eq!(problem.message, "the NVIDIA driver is too old: it has no `cuInit`");
}

#[test]
fn a_damaged_driver_is_told_with_the_loaders_reason() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libcuda.so.1"), "not a library").unwrap();
    let found = driver(&Only(folder.path().into())).unwrap();
    let first = &found.tried[0];
    assert_eq!(first.at, folder.path().join("libcuda.so.1").display().to_string());
    assert!(first.why.contains("file too short") || first.why.contains("invalid ELF header"), "{}", first.why);
}
