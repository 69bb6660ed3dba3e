//! The system's loader: opens libraries for the life of the process and reports which file it took.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

/// An open library. One that was accepted is never closed: its code and data may be in use until the process ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Open(NonNull<c_void>);

/// What the loader keeps of a library (`struct link_map` of `<link.h>`, its first fields).
#[repr(C)]
struct LinkMap {
    address: usize,
    name: *const c_char,
}

/// Opens a library so that its symbols serve every library opened later, which is how the CUDA addon's needs are met.
pub(crate) fn open_globally(path: &Path) -> Result<Open, String> {
    let name = c_path(path)?;
    // SAFETY: `name` is a C string that outlives the call. Initialisers of the library run, as they would if it were linked.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    NonNull::new(handle).map(Open).ok_or_else(last_error)
}

/// As [`open_globally`], but only if `accept` finds nothing wrong with the library. It is opened in a namespace of its own for
/// that: cuDNN opens further libraries that stay when it is closed, and those of the wrong build would serve the right one,
/// which asks for them by the same SONAMEs.
pub(crate) fn open_if(path: &Path, accept: impl FnOnce(Open) -> Result<(), String>) -> Result<Open, String> {
    let name = c_path(path)?;
    // SAFETY: as in `open_globally`.
    let handle = unsafe { libc::dlmopen(libc::LM_ID_NEWLM, name.as_ptr(), libc::RTLD_NOW) };
    let library = NonNull::new(handle).map(Open).ok_or_else(last_error)?;
    let accepted = accept(library);
    // SAFETY: opened above, closed once, and nothing keeps an address in it.
    unsafe { libc::dlclose(library.0.as_ptr()) };
    accepted?;
    open_globally(path)
}

fn c_path(path: &Path) -> Result<CString, String> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| "the path holds a zero byte".to_string())
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

impl Open {
    /// The address of a symbol; `None` where the library has none of that name.
    pub(crate) fn symbol(self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the library is open for the life of the process and `name` is a C string.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }

    /// The file that the library was read from.
    pub(crate) fn file(self) -> Option<String> {
        let mut map: *const LinkMap = std::ptr::null();
        // SAFETY: RTLD_DI_LINKMAP writes one pointer to where the last argument points, and the handle is open.
        let failed = unsafe { libc::dlinfo(self.0.as_ptr(), libc::RTLD_DI_LINKMAP, (&raw mut map).cast()) } != 0;
        if failed || map.is_null() {
            return None;
        }
        // SAFETY: dlinfo gave the loader's own entry of this library, which lives as long as the library is open, and whose
        // name is a C string.
        let name = unsafe { CStr::from_ptr((*map).name) };
        Some(name.to_string_lossy().into_owned()).filter(|name| !name.is_empty())
    }
}
