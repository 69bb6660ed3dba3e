//! The driver's functions that list the GPUs, and cuDNN's that names its CUDA version. Signatures are those of CUDA's driver
//! API (`cuda.h`) and of cuDNN (`cudnn_graph.h`).

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use crate::open::Open;
use crate::problem::{CUDA_VERSION, version_text};

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const CAPABILITY: [c_int; 2] = [75, 76];

/// `CUresult`: 0 is success.
type Status = c_int;
type Device = c_int;
type Context = *mut c_void;

/// Declares the table of functions, and how it is filled from a library.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*);)*) => {
        /// Functions of the driver.
        pub(crate) struct Driver {
            $($field: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Driver {
            /// The functions of an open driver; the name of the first that it does not have.
            pub(crate) fn of(library: Open) -> Result<Driver, &'static str> {
                Ok(Driver {
                    $($field: {
                        let symbol = library.symbol($symbol).ok_or($symbol.to_str().unwrap_or_default())?;
                        // SAFETY: the driver API's function of this name has this signature in every version since CUDA 11
                        // (the names with a suffix are those of the signatures used here), and a pointer to data and one to
                        // a function are the same on this system.
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> Status>(
                                symbol.as_ptr(),
                            )
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    init = c"cuInit": fn(c_uint);
    driver_version = c"cuDriverGetVersion": fn(*mut c_int);
    error_name = c"cuGetErrorName": fn(Status, *mut *const c_char);
    error_string = c"cuGetErrorString": fn(Status, *mut *const c_char);
    device_count = c"cuDeviceGetCount": fn(*mut c_int);
    device_get = c"cuDeviceGet": fn(*mut Device, c_int);
    device_name = c"cuDeviceGetName": fn(*mut c_char, c_int, Device);
    device_attribute = c"cuDeviceGetAttribute": fn(*mut c_int, c_int, Device);
    device_uuid = c"cuDeviceGetUuid_v2": fn(*mut c_char, Device);
    device_memory = c"cuDeviceTotalMem_v2": fn(*mut usize, Device);
    context_retain = c"cuDevicePrimaryCtxRetain": fn(*mut Context, Device);
    context_release = c"cuDevicePrimaryCtxRelease_v2": fn(Device);
    context_push = c"cuCtxPushCurrent_v2": fn(Context);
    context_pop = c"cuCtxPopCurrent_v2": fn(*mut Context);
    memory_info = c"cuMemGetInfo_v2": fn(*mut usize, *mut usize);
}

/// Refuses a cuDNN that is built for another major version of CUDA: both builds have one SONAME.
pub(crate) fn check_cudnn(library: Open) -> Result<(), String> {
    // Without the function, the engine's own check of the version decides.
    let Some(symbol) = library.symbol(c"cudnnGetCudartVersion") else { return Ok(()) };
    // SAFETY: cuDNN's function of this name takes nothing and returns a `size_t` in every version, and a pointer to data and
    // one to a function are the same on this system.
    let version = unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> usize>(symbol.as_ptr())() };
    let built_for = i32::try_from(version).unwrap_or(0);
    if built_for / 1000 == CUDA_VERSION / 1000 {
        return Ok(());
    }
    Err(format!("it is built for CUDA {}, and {} is needed", version_text(built_for), CUDA_VERSION / 1000))
}

/// A refusal of the driver.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    /// The `CUresult`.
    pub(crate) status: c_int,
    /// Its name and meaning, in the driver's words.
    pub(crate) message: String,
}

impl Driver {
    fn check(&self, call: &str, status: Status) -> Result<(), Refusal> {
        if status == 0 {
            return Ok(());
        }
        let [name, meaning] = [self.error_name, self.error_string].map(|describe| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: a signature of the table; `text` takes a pointer to a constant of the driver, or null.
            unsafe { describe(status, &raw mut text) };
            // SAFETY: not null, so it is a C string that the driver never frees.
            if text.is_null() { "".into() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy() }
        });
        let what = if name.is_empty() { format!("error {status}") } else { format!("{name} ({status}: {meaning})") };
        Err(Refusal { status, message: format!("{call} says {what}") })
    }

    /// The newest CUDA version that the driver can serve, times 1000: 13000 for 13.0. Needs no initialisation.
    pub(crate) fn version(&self) -> Result<i32, Refusal> {
        let mut version = 0;
        // SAFETY: a signature of the table; the pointer is to a local of that type. So it is in every call below.
        self.check("cuDriverGetVersion", unsafe { (self.driver_version)(&raw mut version) })?;
        Ok(version)
    }

    /// Initialises the driver for this process.
    pub(crate) fn init(&self) -> Result<(), Refusal> {
        // SAFETY: a signature of the table; it may be called any number of times.
        self.check("cuInit", unsafe { (self.init)(0) })
    }

    /// The number of GPUs that this process may see.
    pub(crate) fn count(&self) -> Result<i32, Refusal> {
        let mut count = 0;
        // SAFETY: as in `version`.
        self.check("cuDeviceGetCount", unsafe { (self.device_count)(&raw mut count) })?;
        Ok(count)
    }

    /// The handle of GPU `ordinal`.
    pub(crate) fn device(&self, ordinal: i32) -> Result<Device, Refusal> {
        let mut device = 0;
        // SAFETY: as in `version`.
        self.check("cuDeviceGet", unsafe { (self.device_get)(&raw mut device, ordinal) })?;
        Ok(device)
    }

    /// A GPU's name.
    pub(crate) fn name(&self, device: Device) -> Result<String, Refusal> {
        let mut name = [0u8; 256];
        // SAFETY: the driver writes a C string of at most 256 bytes with its end.
        let status = unsafe { (self.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
        self.check("cuDeviceGetName", status)?;
        let text = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy).unwrap_or_default();
        Ok(text.into_owned())
    }

    /// A GPU's compute capability, major and minor.
    pub(crate) fn capability(&self, device: Device) -> Result<(i32, i32), Refusal> {
        let mut parts = [0; 2];
        for (part, attribute) in parts.iter_mut().zip(CAPABILITY) {
            // SAFETY: as in `version`.
            let status = unsafe { (self.device_attribute)(&raw mut *part, attribute, device) };
            self.check("cuDeviceGetAttribute", status)?;
        }
        Ok((parts[0], parts[1]))
    }

    /// A GPU's memory in bytes.
    pub(crate) fn memory(&self, device: Device) -> Result<usize, Refusal> {
        let mut bytes = 0;
        // SAFETY: as in `version`.
        self.check("cuDeviceTotalMem", unsafe { (self.device_memory)(&raw mut bytes, device) })?;
        Ok(bytes)
    }

    /// What tells a GPU, or an instance of one, from all others: 32 digits.
    pub(crate) fn uuid(&self, device: Device) -> Result<String, Refusal> {
        let mut uuid = [0u8; 16];
        // SAFETY: the driver writes 16 bytes.
        self.check("cuDeviceGetUuid", unsafe { (self.device_uuid)(uuid.as_mut_ptr().cast(), device) })?;
        Ok(uuid.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// A GPU's memory that no program holds, in bytes. Only a context can ask, so the primary one is held for the question; what
    /// it takes itself (some hundred MB) is not counted as free, as an engine needs one too.
    pub(crate) fn free_memory(&self, device: Device) -> Result<usize, Refusal> {
        let mut context: Context = std::ptr::null_mut();
        // SAFETY: as in `version`.
        self.check("cuDevicePrimaryCtxRetain", unsafe { (self.context_retain)(&raw mut context, device) })?;
        let found = self.free_memory_in(context);
        // SAFETY: gives back what was retained above, once.
        unsafe { (self.context_release)(device) };
        found
    }

    fn free_memory_in(&self, mut context: Context) -> Result<usize, Refusal> {
        // SAFETY: the context is retained by the caller.
        self.check("cuCtxPushCurrent", unsafe { (self.context_push)(context) })?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: as in `version`.
        let status = unsafe { (self.memory_info)(&raw mut free, &raw mut total) };
        // SAFETY: takes off what was pushed above; `context` receives it.
        unsafe { (self.context_pop)(&raw mut context) };
        self.check("cuMemGetInfo", status)?;
        Ok(free)
    }
}
