//! The three binary interfaces of MPI: what their handles and constants are. Functions have the same signatures in all of
//! them once a handle is an address-sized integer: MPICH's are 32 bits wide, which fit in the same registers and, in
//! memory that is zeroed first, in the same places (little-endian machines).

use std::ffi::{CStr, c_int};
use std::ptr::NonNull;

/// A handle of any of the three.
pub(crate) type Handle = usize;

/// A binary interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abi {
    /// That of MPI 5.0, `libmpi_abi.so.1`.
    Standard,
    /// That of MPICH, Intel MPI and MVAPICH, `libmpi.so.12`.
    Mpich,
    /// That of Open MPI 4 and 5, `libmpi.so.40`.
    OpenMpi,
}

/// The constants that are used, by their names in MPI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constants {
    pub(crate) comm_world: Handle,
    pub(crate) byte: Handle,
    pub(crate) errors_return: Handle,
    pub(crate) status_ignore: usize,
    pub(crate) thread_serialized: c_int,
}

impl Abi {
    /// Tells them apart by the file's name and by symbols that only Open MPI has.
    pub(crate) fn of(file: &str, has: impl Fn(&CStr) -> bool) -> Abi {
        let name = file.rsplit('/').next().unwrap_or(file);
        match () {
            () if name.starts_with("libmpi_abi") => Abi::Standard,
            () if has(c"ompi_mpi_comm_world") => Abi::OpenMpi,
            () => Abi::Mpich,
        }
    }

    /// The constants; `symbol`: the address of a symbol of the library. Fails with the name of one that is missing.
    pub(crate) fn constants(
        self,
        symbol: impl Fn(&'static CStr) -> Option<NonNull<std::ffi::c_void>>,
    ) -> Result<Constants, &'static CStr> {
        let address = |name| symbol(name).map(|found| found.as_ptr().addr()).ok_or(name);
        Ok(match self {
            // `mpi_abi.h` of MPI 5.0.
            Abi::Standard => Constants {
                comm_world: 0x101,
                byte: 0x247,
                errors_return: 0x143,
                status_ignore: 0,
                thread_serialized: 2048,
            },
            // `mpi.h` of MPICH.
            Abi::Mpich => Constants {
                comm_world: 0x4400_0000,
                byte: 0x4c00_010d,
                errors_return: 0x5400_0001,
                status_ignore: 1,
                thread_serialized: 2,
            },
            // `mpi.h` of Open MPI: predefined handles are addresses of objects in the library.
            Abi::OpenMpi => Constants {
                comm_world: address(c"ompi_mpi_comm_world")?,
                byte: address(c"ompi_mpi_byte")?,
                errors_return: address(c"ompi_mpi_errors_return")?,
                status_ignore: 0,
                thread_serialized: 2,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_known_by_its_name_and_its_symbols() {
        let ompi = |name: &CStr| name == c"ompi_mpi_comm_world";
        assert_eq!(Abi::of("/opt/lib/libmpi_abi.so.1", |_| false), Abi::Standard);
        assert_eq!(Abi::of("libmpi.so.12", |_| false), Abi::Mpich);
        assert_eq!(Abi::of("libmpi.so.40", ompi), Abi::OpenMpi);
        assert_eq!(Abi::of("/any/name.so", ompi), Abi::OpenMpi);
    }

    #[test]
    fn a_missing_symbol_is_named() {
        assert_eq!(Abi::OpenMpi.constants(|_| None).unwrap_err(), c"ompi_mpi_comm_world");
        assert_eq!(Abi::Mpich.constants(|_| None).map(|found| found.byte), Ok(0x4c00_010d));
    }
}
