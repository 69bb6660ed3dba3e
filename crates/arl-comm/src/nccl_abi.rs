//! NCCL's binary interface, as far as it is used: signatures, numbers and the one struct of `nccl.h`. Newer libraries read
//! structs of older versions by the size and version in them.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::NonNull;

/// `ncclComm_t`.
pub(crate) type Handle = *mut c_void;

/// Of `ncclResult_t`.
pub(crate) const SUCCESS: c_int = 0;
pub(crate) const IN_PROGRESS: c_int = 7;

/// `ncclUint8` of `ncclDataType_t`: bytes are all that is ever moved.
pub(crate) const UINT8: c_int = 1;

/// Bytes of an id of a communicator.
pub const ID_BYTES: usize = 128;

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; ID_BYTES]);

/// The oldest version whose interface this is, as NCCL writes it: 2.27.0.
pub(crate) const LEAST_VERSION: c_int = 22_700;

/// `NCCL_CONFIG_UNDEF_INT`: the library decides.
const UNDEFINED: c_int = c_int::MIN;

/// `ncclConfig_t` of 2.27.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
}

impl Config {
    /// Calls return before they are done, and are polled.
    pub(crate) fn not_blocking() -> Self {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: LEAST_VERSION.unsigned_abs(),
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: std::ptr::null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
        }
    }
}

/// `2.27.3` of 22703.
pub(crate) fn version_text(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// NCCL's functions. Those that give a `c_int` give a `ncclResult_t`.
        #[derive(Clone, Copy)]
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// Fails with the name of a function that is missing.
            pub(crate) fn find(symbol: impl Fn(&'static CStr) -> Option<NonNull<c_void>>) -> Result<Self, &'static CStr> {
                Ok(Functions {
                    $($field: {
                        let found = symbol($name).ok_or($name)?;
                        // SAFETY: the symbol is NCCL's function of that name, whose signature `nccl.h` has had since 2.14.
                        unsafe {
                            std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn($($argument),*) -> $result>(found)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    get_version = c"ncclGetVersion": fn(*mut c_int) -> c_int;
    get_unique_id = c"ncclGetUniqueId": fn(*mut UniqueId) -> c_int;
    init_rank = c"ncclCommInitRankConfig": fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
    destroy = c"ncclCommDestroy": fn(Handle) -> c_int;
    abort = c"ncclCommAbort": fn(Handle) -> c_int;
    get_async_error = c"ncclCommGetAsyncError": fn(Handle, *mut c_int) -> c_int;
    get_error_string = c"ncclGetErrorString": fn(c_int) -> *const c_char;
    get_last_error = c"ncclGetLastError": fn(Handle) -> *const c_char;
    group_start = c"ncclGroupStart": fn() -> c_int;
    group_end = c"ncclGroupEnd": fn() -> c_int;
    all_gather = c"ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int;
    broadcast = c"ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    send = c"ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
    receive = c"ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_struct_is_as_long_as_in_c_and_versions_read_as_people_write_them() {
        assert_eq!((size_of::<Config>(), size_of::<UniqueId>()), (72, 128));
        assert_eq!([22_700, 23_203].map(version_text), ["2.27.0", "2.32.3"]);
    }
}
