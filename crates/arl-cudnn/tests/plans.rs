//! cuDNN itself makes a plan for every case that this project has, on a machine without a GPU: the device is described to
//! it, and the driver is one of the tests' own. Its kernels are compiled, and none of them runs.
#![cfg(feature = "shim")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

use arl_cudnn::{Cudnn, ENGINE_BYTES, Pass, Plan, Shape, Type, backward_workspace};

/// An NVIDIA H100, as cuDNN describes devices to itself.
const H100: &str = r#"{"maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536,
    "multiProcessorCount": 132, "smCountOrigin": 0, "warpSize": 32, "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448,
    "oversizedSharedMemoryPerBlock": 0,
    "memoryBusWidth": 5120, "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048, "pciDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": 84987740160,
    "smClockRateKHz": 1980000, "memClockRateKHz": 2619000, "l2CacheSize": 52428800, "cudaDeviceId": 0, "deviceVer": 900,
    "driverVer": 13000, "deviceName": "NVIDIA H100 80GB HBM3"}"#;

/// The driver's notes are one for all tests, and so is the library.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Where cuDNN is, and where the tests' driver writes the name of the kernel that was loaded last.
struct Machine {
    cudnn: PathBuf,
    loaded: *const c_char,
}

// SAFETY: what it points to is read under `ONE_AT_A_TIME`, which every test holds.
unsafe impl Send for Machine {}
// SAFETY: as above.
unsafe impl Sync for Machine {}

fn open(path: &Path) -> *mut c_void {
    let name = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a C string, and libraries that do nothing when they are loaded.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    assert!(!library.is_null(), "{path:?} does not open");
    library
}

static MACHINE: LazyLock<Option<Machine>> = LazyLock::new(|| {
    let cudnn = PathBuf::from(std::env::var_os("CUDA_HOME")?).join("lib64/libcudnn.so.9");
    if !cudnn.exists() {
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let driver = folder.path().join("libcuda.so.1");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver.c");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let made = Command::new(compiler)
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"])
        .args([&driver, &source])
        .status()
        .unwrap();
    assert!(made.success());
    // cuDNN's search for `libcuda.so.1` finds the tests', and NVRTC's for its own second library, which it looks for in the
    // system's folders alone, that of the toolkit.
    let driver = open(&driver);
    open(&cudnn.with_file_name("libnvrtc-builtins.so.13.0"));
    // SAFETY: the library is open, and the name a C string.
    let loaded = unsafe { libc::dlsym(driver, c"arl_loaded_kernel".as_ptr()).cast::<c_char>() };
    assert!(!loaded.is_null());
    Some(Machine { cudnn, loaded: loaded.cast_const() })
});

/// Runs `test` with cuDNN for a described device and what names the kernel that was loaded last, or says that it is skipped.
fn with_cudnn(test: impl FnOnce(&mut Cudnn, &dyn Fn() -> String)) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(machine) = MACHINE.as_ref() else {
        println!("SKIPPED: cuDNN's plans: there is no cuDNN in CUDA_HOME");
        return;
    };
    let mut cudnn = Cudnn::describe(&machine.cudnn, H100).unwrap();
    // SAFETY: the driver ends the name with a zero byte, and writes only within `plan`.
    let loaded = || unsafe { CStr::from_ptr(machine.loaded) }.to_str().unwrap().to_string();
    test(&mut cudnn, &loaded);
}

/// The strides of the training step: rotated queries and keys in one row, values in the product's, gradients of queries in
/// the row of all three, those of keys and values by themselves.
fn shape(pass: Pass, dtype: Type, dim: i64, query_heads: i64, key_value_heads: i64, window: i64) -> Shape {
    let (q, kv) = (query_heads * dim, key_value_heads * dim);
    Shape {
        pass,
        dtype,
        capability: 90,
        deterministic: 0,
        scale: 1.0 / (dim as f32).sqrt(),
        sequences: 8,
        max_len: 4096,
        tokens: 16_384,
        query_heads,
        key_value_heads,
        dim,
        window,
        q_stride: q + kv,
        k_stride: q + kv,
        v_stride: q + 2 * kv,
        out_stride: q,
        d_out_stride: q,
        d_q_stride: q + 2 * kv,
        d_k_stride: kv,
        d_v_stride: kv,
    }
}

/// Asserts that a plan needs no more than the engine has for it.
fn assert_fits(plan: &Plan, shape: &Shape) {
    let [tokens, query, key_value, dim, d_q] =
        [shape.tokens, shape.query_heads, shape.key_value_heads, shape.dim, shape.d_q_stride].map(|size| size as usize);
    let room = match shape.pass {
        Pass::Forward => ENGINE_BYTES,
        Pass::Backward => backward_workspace(tokens, query, key_value, dim, d_q),
    };
    assert!(plan.workspace() <= room, "{} bytes for {shape:?}", plan.workspace());
}

fn kernel_of(pass: Pass, dim: i64) -> (&'static str, String) {
    let pass = if pass == Pass::Forward { "flash_fprop_wgmma_f16" } else { "flash_bprop_wgmma_f16" };
    (pass, format!("x{dim}_"))
}

#[test]
fn every_head_size_grouping_and_window_has_a_plan_in_both_passes() {
    with_cudnn(|cudnn, loaded| {
        for (dim, group, window) in [64, 128]
            .into_iter()
            .flat_map(|dim| [1, 2, 4, 7, 8].map(|group| (dim, group, 0)))
            .chain([(64, 7, 1024), (128, 4, 1024), (128, 1, 1)])
        {
            for (pass, deterministic) in [(Pass::Forward, 0), (Pass::Backward, 0), (Pass::Backward, 1)] {
                let shape = Shape { deterministic, ..shape(pass, Type::Bf16, dim, 2 * group, 2, window) };
                let plan = cudnn.plan(&shape).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
                assert_fits(&plan, &shape);
                let (kind, size) = kernel_of(pass, dim);
                let kernel = loaded();
                assert!(kernel.contains(kind) && kernel.contains(&size), "{kernel} for {shape:?}");
            }
        }
    });
}

#[test]
fn halves_one_sequence_and_many_have_plans_too() {
    with_cudnn(|cudnn, _| {
        for (pass, deterministic) in [(Pass::Forward, 0), (Pass::Backward, 0), (Pass::Backward, 1)] {
            let usual = Shape { deterministic, ..shape(pass, Type::Bf16, 128, 8, 2, 0) };
            let shapes = [
                Shape { dtype: Type::F16, ..usual },
                Shape { sequences: 1, max_len: 128, tokens: 1024, ..usual },
                Shape { sequences: 1, max_len: 131_072, tokens: 131_072, ..usual },
                Shape { sequences: 256, max_len: 512, tokens: 65_536, ..usual },
            ];
            for shape in shapes {
                let plan = cudnn.plan(&shape).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
                assert_fits(&plan, &shape);
            }
        }
    });
}

#[test]
fn the_backward_workspace_does_not_grow_with_the_longest_sequence() {
    with_cudnn(|cudnn, _| {
        let usual = shape(Pass::Backward, Type::Bf16, 64, 14, 2, 0);
        let bytes = |cudnn: &mut Cudnn, shape: Shape| cudnn.plan(&shape).unwrap().workspace();
        let padded = Shape { sequences: 64, max_len: 16_384, ..usual };
        // What comes in addition to the graph's tensors has a few bytes a sequence and head.
        assert!(bytes(cudnn, padded) - bytes(cudnn, usual) < 1 << 16);
    });
}

#[test]
fn what_cudnn_has_no_plan_for_is_refused_in_words() {
    with_cudnn(|cudnn, _| {
        let usual = shape(Pass::Backward, Type::Bf16, 64, 8, 2, 0);
        for (shape, words) in [
            (Shape { query_heads: 7, ..usual }, "must be a factor"),
            (Shape { dim: 512, ..usual }, "hidden_dim"),
            (Shape { q_stride: usual.q_stride + 1, ..usual }, "stride"),
            (Shape { capability: 80, deterministic: 1, ..usual }, "not supported for bprop thd on SM8X"),
        ] {
            let error = cudnn.plan(&shape).unwrap_err();
            assert!(error.contains(words), "{shape:?}: {error}");
        }
    });
}

#[test]
fn a_library_that_is_not_there_and_a_device_that_is_none_are_errors() {
    with_cudnn(|_, _| {
        let machine = MACHINE.as_ref().unwrap();
        let error = Cudnn::describe(&machine.cudnn, "{}").unwrap_err();
        assert!(!error.is_empty());
        // The tests' driver has no device.
        let error = Cudnn::open(&machine.cudnn).unwrap_err();
        assert!(error.contains("cudnnCreate"), "{error}");
    });
}
