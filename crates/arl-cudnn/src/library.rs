//! The shim over cudnn-frontend. Nothing in it throws; what goes wrong comes back as a text.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::ptr::NonNull;

use super::{Shape, Version};

/// Room for an error's text.
const MESSAGE_BYTES: usize = 4096;

#[repr(C)]
struct RawCudnn {
    _opaque: [u8; 0],
}

#[repr(C)]
struct RawAttention {
    _opaque: [u8; 0],
}

/// Operands, as addresses on the device; 0: a forward pass has none.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Operands {
    /// Queries.
    pub q: u64,
    /// Keys.
    pub k: u64,
    /// Values.
    pub v: u64,
    /// Output.
    pub out: u64,
    /// f32 `[tokens, query_heads]`: log of the sum of the exponentials of a row's scores.
    pub stats: u64,
    /// Gradient of the output.
    pub d_out: u64,
    /// Gradient of the queries.
    pub d_q: u64,
    /// Gradient of the keys.
    pub d_k: u64,
    /// Gradient of the values.
    pub d_v: u64,
    /// i32 `[sequences]`: their lengths, 0 where there is none.
    pub lengths: u64,
    /// i32 `[sequences + 1]` each, in the order of the operands: the first element of every sequence, and what follows the
    /// last.
    pub offsets: [u64; 9],
}

unsafe extern "C" {
    fn arl_cudnn_open(path: *const c_char, message: *mut c_char, message_size: i64) -> i64;
    fn arl_cudnn_create(properties: *const c_char, message: *mut c_char, message_size: i64) -> *mut RawCudnn;
    fn arl_cudnn_destroy(cudnn: *mut RawCudnn);
    fn arl_attention_create(
        cudnn: *mut RawCudnn,
        shape: *const Shape,
        workspace: *mut i64,
        message: *mut c_char,
        message_size: i64,
    ) -> *mut RawAttention;
    fn arl_attention_destroy(attention: *mut RawAttention);
    fn arl_attention_run(
        cudnn: *mut RawCudnn,
        attention: *mut RawAttention,
        operands: *const Operands,
        workspace: u64,
        stream: *mut c_void,
        message: *mut c_char,
        message_size: i64,
    ) -> i32;
}

/// Calls with room for a text, which is returned where the call gives nothing.
fn with_message<T>(call: impl FnOnce(*mut c_char, i64) -> Option<T>) -> Result<T, String> {
    let mut message = [0u8; MESSAGE_BYTES];
    call(message.as_mut_ptr().cast(), MESSAGE_BYTES as i64).ok_or_else(|| {
        let text = CStr::from_bytes_until_nul(&message).unwrap_or_default().to_string_lossy();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    })
}

/// cuDNN on one device. One thread at a time uses it.
#[derive(Debug)]
pub struct Cudnn {
    raw: NonNull<RawCudnn>,
    version: Version,
}

// SAFETY: the library's handle may be used from any thread, one at a time, which `&mut self` of `run` and `plan` has.
unsafe impl Send for Cudnn {}

impl Cudnn {
    /// Opens the library and a handle on the current device. `path` is a file, or a name that the system's loader knows or
    /// that was opened already. Fails with a sentence, also where the version is not one that serves.
    pub fn open(path: &Path) -> Result<Self, String> {
        Self::create(path, None)
    }

    /// As `open`, for a device that need not be there, which `properties` describe as JSON: its plans are never run.
    pub fn describe(path: &Path, properties: &str) -> Result<Self, String> {
        Self::create(path, Some(properties))
    }

    fn create(path: &Path, properties: Option<&str>) -> Result<Self, String> {
        let text = |text: &[u8]| CString::new(text).map_err(|_| "a zero byte in a text".to_string());
        let path = text(path.as_os_str().as_encoded_bytes())?;
        let properties = properties.map(|json| text(json.as_bytes())).transpose()?;
        let version = with_message(|message, size| {
            // SAFETY: texts end in a zero byte, and the message has the size that is passed.
            let version = unsafe { arl_cudnn_open(path.as_ptr(), message, size) };
            (version > 0).then_some(Version(version))
        })?;
        if let Some(reason) = super::version_refusal(version) {
            return Err(reason);
        }
        let raw = with_message(|message, size| {
            let properties = properties.as_ref().map_or(std::ptr::null(), |json| json.as_ptr());
            // SAFETY: as above.
            NonNull::new(unsafe { arl_cudnn_create(properties, message, size) })
        })?;
        Ok(Cudnn { raw, version })
    }

    /// The library's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// A plan for a shape. Fails with the library's words where it has none. Takes up to some seconds on the host.
    pub fn plan(&mut self, shape: &Shape) -> Result<Plan, String> {
        let mut workspace = 0i64;
        let raw = with_message(|message, size| {
            // SAFETY: the handle is open, shape and workspace outlive the call, and the message has the size that is passed.
            let plan = unsafe { arl_attention_create(self.raw.as_ptr(), shape, &raw mut workspace, message, size) };
            NonNull::new(plan)
        })?;
        Ok(Plan { raw, workspace: usize::try_from(workspace).unwrap_or(usize::MAX) })
    }

    /// Queues a plan on a stream of the current device.
    ///
    /// # Safety
    ///
    /// The operands are at the addresses with the shape of the plan, `workspace` has its bytes, the stream is one of the
    /// handle's device, and all of it stays until the stream has passed; and so does the plan.
    pub unsafe fn run(
        &mut self,
        plan: &Plan,
        operands: &Operands,
        workspace: u64,
        stream: *mut c_void,
    ) -> Result<(), String> {
        with_message(|message, size| {
            // SAFETY: handle and plan are open, the operands outlive the call; the rest is the caller's word.
            let status = unsafe {
                let (cudnn, plan) = (self.raw.as_ptr(), plan.raw.as_ptr());
                arl_attention_run(cudnn, plan, operands, workspace, stream, message, size)
            };
            (status == 0).then_some(())
        })
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        // SAFETY: made in `create`, destroyed once.
        unsafe { arl_cudnn_destroy(self.raw.as_ptr()) };
    }
}

/// A plan, to be run by any [`Cudnn`] on the same device, one at a time: it keeps the device's properties, and the handle
/// gives it the stream alone.
#[derive(Debug)]
pub struct Plan {
    raw: NonNull<RawAttention>,
    workspace: usize,
}

// SAFETY: as `Cudnn`.
unsafe impl Send for Plan {}

impl Plan {
    /// Bytes of the device's memory that it works in.
    pub fn workspace(&self) -> usize {
        self.workspace
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `plan`, destroyed once.
        unsafe { arl_attention_destroy(self.raw.as_ptr()) };
    }
}
