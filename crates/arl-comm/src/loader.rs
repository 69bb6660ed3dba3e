//! The system's loader: opens a library for the life of the process, and finds its functions. Imports nothing of the crate.

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

/// A library that is open for the life of the process.
#[cfg(unix)]
#[derive(Clone, Copy)]
pub(crate) struct Opened(NonNull<c_void>);

/// No library is ever opened here.
#[cfg(not(unix))]
#[derive(Clone, Copy)]
pub(crate) enum Opened {}

#[cfg(unix)]
impl Opened {
    /// Opens a library by name or path; fails with what the loader says. Globally, because Open MPI's plug-ins find MPI's own
    /// symbols that way.
    pub(crate) fn open(name: &str) -> Result<Self, String> {
        Self::open_as(name, libc::RTLD_GLOBAL)
    }

    /// As [`Opened::open`], but its symbols serve no other library.
    pub(crate) fn open_alone(name: &str) -> Result<Self, String> {
        Self::open_as(name, libc::RTLD_LOCAL)
    }

    fn open_as(name: &str, scope: std::ffi::c_int) -> Result<Self, String> {
        let path = std::ffi::CString::new(name).map_err(|_| "the name holds a zero byte".to_string())?;
        // SAFETY: `path` is a C string.
        let opened = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | scope) };
        NonNull::new(opened).map(Opened).ok_or_else(loader_error)
    }

    /// The address of a symbol; `None`: the library has none of that name.
    pub(crate) fn symbol(self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the library stays open for the life of the process, and `name` is a C string.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }
}

#[cfg(unix)]
fn loader_error() -> String {
    // SAFETY: the result is null or a C string that is valid until this thread's next call of the loader.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "the loader gave no reason".into();
    }
    // SAFETY: not null, and copied before the next call of the loader.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

#[cfg(not(unix))]
impl Opened {
    /// Refuses: MPI's binary interfaces are known for Linux and macOS alone.
    pub(crate) fn open(_name: &str) -> Result<Self, String> {
        Err("several ranks need Linux or macOS".into())
    }

    /// Refuses, as [`Opened::open`].
    pub(crate) fn open_alone(name: &str) -> Result<Self, String> {
        Self::open(name)
    }

    /// There is no library to find anything in.
    pub(crate) fn symbol(self, _name: &CStr) -> Option<NonNull<c_void>> {
        match self {}
    }
}
