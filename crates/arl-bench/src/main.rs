//! The launcher: starts on every machine. On the host it runs everything itself; for a GPU it finds the driver and NVIDIA's
//! libraries, opens them, and hands over to the library with CUDA next to it.

use std::ffi::{CStr, CString, c_char, c_int};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use arl_bench::options::{HELP, Options};
use arl_bench::parts::NO_CUDA;
use arl_bench::{entry, parts};
use arl_cuda_libraries::places::Machine;
use arl_cuda_libraries::problem::version_text;
use arl_cuda_libraries::report::{FreeMemory, Report, report};
use serde_json::{Map, Value, json};

/// The exit code of a wrong option.
const WRONG_OPTION: u8 = 2;

/// The library with CUDA, next to the launcher.
const LIBRARY: &str = "libarl_bench.so";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let folder = std::env::current_exe().ok().and_then(|file| file.parent().map(Path::to_path_buf));
    match Options::parse(&words, folder.clone().unwrap_or_default()) {
        Err(message) => {
            print_error(&message);
            ExitCode::from(WRONG_OPTION)
        }
        Ok(options) if options.help => print(HELP),
        Ok(options) if options.list => print(&Options::names().join("\n")),
        Ok(options) if options.keep_going && options.part.is_none() => match std::env::current_exe() {
            Ok(program) => code(parts::run(&options, &program)),
            Err(error) => {
                print_error(&format!("this program's own file is not known: {error}"));
                ExitCode::FAILURE
            }
        },
        Ok(options) if options.count => code(entry::run(options, Map::new(), "none")),
        Ok(options) if options.device.starts_with("cuda") => on_gpu(&options, &folder.unwrap_or_default()),
        Ok(options) => {
            let device = options.device.clone();
            code(entry::run(options, Map::new(), &device))
        }
    }
}

fn print(text: &str) -> ExitCode {
    // A reader that has gone, as `head` does, is no failure.
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::SUCCESS
}

fn print_error(message: &str) {
    // Where standard error is closed, the exit code says it.
    let _ = writeln!(std::io::stderr(), "gpu: {message}");
}

fn code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// Hands over to the library with CUDA, or says what is missing.
fn on_gpu(options: &Options, folder: &Path) -> ExitCode {
    let found = report(&Machine, &[], FreeMemory::of_device(&options.device));
    if let Some(warning) = &found.warning {
        print_error(warning);
    }
    let run = match &found.problem {
        Some(problem) => Err(format!("{}. {}", problem.message, problem.hint)),
        None => machine(options, &found).and_then(|machine| {
            let request = CString::new(entry::request(options, &machine)).map_err(|error| error.to_string())?;
            Ok((open(&folder.join(LIBRARY))?, request))
        }),
    };
    match run {
        // SAFETY: the function has this signature by the name under which it was found (`entry::FUNCTION`), its library is
        // open for the life of the process, and the request is a C string that outlives the call.
        Ok((function, request)) => code(unsafe { function(request.as_ptr()) }),
        Err(message) => {
            print_error(&format!("CUDA cannot be used: {message}"));
            ExitCode::from(NO_CUDA)
        }
    }
}

/// What is known of the machine, and the GPU that is asked for.
fn machine(options: &Options, found: &Report) -> Result<Map<String, Value>, String> {
    let wanted = options.device.strip_prefix("cuda:").and_then(|n| n.parse::<u32>().ok());
    let gpu = match wanted {
        Some(ordinal) => found.gpus.iter().find(|gpu| gpu.ordinal == ordinal),
        None => found.gpus.iter().find(|gpu| gpu.problem.is_none()),
    };
    let gpu = gpu.ok_or_else(|| format!("there is no {}", options.device))?;
    if let Some(problem) = &gpu.problem {
        return Err(format!("cuda:{} ({}): {problem}", gpu.ordinal, gpu.name));
    }
    let libraries = found.libraries.iter().filter_map(|found| found.path.clone());
    let machine = json!({
        "ordinal": gpu.ordinal, "gpu": gpu.name, "driver": found.driver_version.map(version_text),
        "driver_release": release(), "libraries": libraries.collect::<Vec<_>>(),
    });
    Ok(machine.as_object().cloned().unwrap_or_default())
}

/// The driver's release, such as `580.95.05`, as its kernel module reports it.
fn release() -> Option<String> {
    Some(std::fs::read_to_string("/sys/module/nvidia/version").ok()?.trim().to_string())
}

type Function = unsafe extern "C" fn(*const c_char) -> c_int;

/// Opens the library, for the life of the process, and finds its function.
fn open(file: &Path) -> Result<Function, String> {
    let path = CString::new(file.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: a C string that outlives the call. What the library needs is open already, under the names it asks for.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err(format!("{} does not open: {}", file.display(), last_error()));
    }
    // SAFETY: the library is open, and the name is a C string.
    let function = unsafe { libc::dlsym(library, entry::FUNCTION.as_ptr()) };
    if function.is_null() {
        return Err(format!("{} is not this launcher's library: {}", file.display(), last_error()));
    }
    // SAFETY: not null; a pointer to data and one to a function are the same on this system, and `entry` has the signature.
    Ok(unsafe { std::mem::transmute::<*mut libc::c_void, Function>(function) })
}

fn last_error() -> String {
    // SAFETY: no arguments; the result is null or a C string that is valid until this thread's next call of the loader.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "the loader gave no reason".into();
    }
    // SAFETY: not null, and copied before the next call of the loader.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}
