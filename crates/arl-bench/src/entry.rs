//! The ways into a run: from the launcher's own process, and by one C function of the library with CUDA.

#[cfg(feature = "cuda")]
use std::ffi::{CStr, c_char, c_int};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
#[cfg(feature = "cuda")]
use std::path::PathBuf;

use arl_engine::backend::Backend;
use arl_engine::backend::cpu::CpuBackend;
use arl_model::{Error, ErrorCode, Result};
use serde_json::{Map, Value};

use crate::options::Options;
use crate::run::Run;

/// The name of the library's C function. It takes a C string, the JSON of [`request`], and returns the exit code.
pub const FUNCTION: &std::ffi::CStr = c"arl_bench_run";

/// What the C function takes: the words of the command, the launcher's folder, and what is known of the machine.
pub fn request(options: &Options, machine: &Map<String, Value>) -> String {
    let home = options.home.to_string_lossy();
    serde_json::json!({ "words": options.command, "home": home, "machine": machine }).to_string()
}

/// Opens a device of this build by its name.
pub fn open(device: &str) -> Result<Box<dyn Backend>> {
    match (device, device.strip_prefix("cuda:")) {
        ("cpu", _) => Ok(Box::new(CpuBackend::new())),
        #[cfg(feature = "emulation")]
        ("emulated", _) => {
            use arl_engine::backend::cuda::{CudaBackend, EmulatedDevice};
            // It is used where `--attention` asks for it.
            Ok(Box::new(CudaBackend::new(EmulatedDevice::with_library())))
        }
        #[cfg(feature = "cuda")]
        (_, Some(ordinal)) => {
            use arl_engine::backend::cuda::{CudaBackend, GpuDevice};
            Ok(Box::new(CudaBackend::new(GpuDevice::open(ordinal.parse().unwrap_or(0))?)))
        }
        _ => Err(Error::new(ErrorCode::Device, format!("device `{device}` is not part of this build"))),
    }
}

/// Runs all that is asked for on `device`; the exit code. Failures are printed to standard error.
pub fn run(options: Options, machine: Map<String, Value>, device: &str) -> i32 {
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let mut out = std::io::stdout();
        Run::new(options, machine, &|| open(device), &mut out).all()
    }));
    let message = match ended {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => error.to_string(),
        // The panic printed its message itself.
        Err(_) => "a defect of this program stopped it".into(),
    };
    // Where standard error is closed, the exit code says it.
    let _ = writeln!(std::io::stderr(), "gpu: {message}");
    1
}

/// The library's C function: a run on the device that the request's machine names.
///
/// # Safety
/// `request` is a C string.
#[cfg(feature = "cuda")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn arl_bench_run(request: *const c_char) -> c_int {
    // SAFETY: as the caller vouches.
    let text = unsafe { CStr::from_ptr(request) }.to_string_lossy();
    let parsed = serde_json::from_str::<Value>(&text).map_err(|error| error.to_string()).and_then(|request| {
        let words = request["words"].as_array().map_or(&[] as &[Value], Vec::as_slice);
        let words: Vec<String> = words.iter().filter_map(Value::as_str).map(str::to_string).collect();
        let home = PathBuf::from(request["home"].as_str().unwrap_or_default());
        let machine = request["machine"].as_object().cloned().unwrap_or_default();
        Ok((Options::parse(&words, home)?, machine))
    });
    match parsed {
        Ok((options, machine)) => {
            let device =
                machine.get("ordinal").and_then(Value::as_u64).map_or("cuda:0".into(), |n| format!("cuda:{n}"));
            run(options, machine, &device)
        }
        Err(error) => {
            // Where standard error is closed, the exit code says it.
            let _ = writeln!(std::io::stderr(), "gpu: {error}");
            2
        }
    }
}
