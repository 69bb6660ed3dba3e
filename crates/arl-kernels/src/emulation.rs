//! Kernels on the host: looks one up by name, checks that a launch gives it what it takes, and runs it.
//! Knows nothing of what kernels compute; see `emulation/cuda.h` for what it shows and what it cannot.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

/// What an element of a kernel's buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// f32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE 754's 16-bit float.
    F16,
    /// f64.
    F64,
    /// i32.
    I32,
    /// u16.
    U16,
    /// A byte.
    U8,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// A buffer, and whether the kernel may write it; null where an optional one is left out.
    Pointer {
        /// Its first element.
        address: *mut u8,
        /// What it holds; `None` for null.
        element: Option<Element>,
        /// Whether the kernel may write to it.
        written: bool,
    },
    /// `int`.
    I32(i32),
    /// `long long`.
    I64(i64),
    /// `float`.
    F32(f32),
}

impl Value {
    /// Whether a parameter of this kind (see `kind` in `emulation/cuda.h`) takes the value.
    fn fits(self, kind: u8) -> bool {
        match self {
            Value::I32(_) => kind == b'4',
            Value::I64(_) => kind == b'8',
            Value::F32(_) => kind == b'5',
            Value::Pointer { element: None, .. } => kind.is_ascii_alphabetic(),
            Value::Pointer { element: Some(element), written, .. } => {
                let letter = match element {
                    Element::F32 => b'f',
                    Element::Bf16 => b'h',
                    Element::F16 => b'g',
                    Element::F64 => b'd',
                    Element::I32 => b'i',
                    Element::U16 => b'u',
                    Element::U8 => b'b',
                };
                let of_bytes = kind.eq_ignore_ascii_case(&b'b');
                (of_bytes || kind.eq_ignore_ascii_case(&letter)) && written == kind.is_ascii_uppercase()
            }
        }
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
}

#[repr(C)]
struct Kernel {
    _opaque: [u8; 0],
}

// SAFETY: these are defined in `emulation/emulation.cpp` with these types.
unsafe extern "C" {
    fn arl_emulation_find(name: *const c_char) -> *const Kernel;
    fn arl_emulation_next(kernel: *const Kernel) -> *const Kernel;
    fn arl_emulation_name(kernel: *const Kernel) -> *const c_char;
    fn arl_emulation_signature(kernel: *const Kernel) -> *const c_char;
    fn arl_emulation_launch(
        kernel: *const Kernel,
        grid: *const c_uint,
        threads: *const c_uint,
        shared_bytes: usize,
        args: *mut *mut c_void,
        order: c_uint,
        error: *mut c_char,
        error_room: usize,
    ) -> c_int;
}

/// The names of all kernels.
pub fn kernels() -> Vec<String> {
    let mut names = Vec::new();
    let mut kernel = std::ptr::null();
    loop {
        // SAFETY: null begins the list, and each other pointer came from it.
        kernel = unsafe { arl_emulation_next(kernel) };
        if kernel.is_null() {
            return names;
        }
        // SAFETY: the name of a registered kernel is a string literal.
        let name = unsafe { CStr::from_ptr(arl_emulation_name(kernel)) };
        names.push(name.to_string_lossy().into_owned());
    }
}

/// Runs kernel `name` to its end. `order` 0 runs threads and blocks ascending, 1 descending, more shuffled.
///
/// Fails where there is no such kernel, the arguments are not what it takes, or its threads wait for each other forever.
///
/// # Safety
/// Every pointer is valid for all that the kernel reads or writes through it, and nothing else uses that memory
/// meanwhile.
pub unsafe fn launch(name: &str, shape: Shape, args: &[Value], order: u32) -> Result<(), String> {
    let c_name = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: a string that ends in zero.
    let kernel = unsafe { arl_emulation_find(c_name.as_ptr()) };
    if kernel.is_null() {
        return Err(format!("there is no kernel {name}"));
    }
    // SAFETY: the kernel is registered; its signature is a static string.
    let signature = unsafe { CStr::from_ptr(arl_emulation_signature(kernel)) }.to_bytes();
    if signature.len() != args.len() {
        return Err(format!("{name} takes {} arguments, not {}", signature.len(), args.len()));
    }
    for (i, (arg, kind)) in args.iter().zip(signature).enumerate() {
        if !arg.fits(*kind) {
            return Err(format!("argument {i} of {name} is of kind `{}`, not {arg:?}", char::from(*kind)));
        }
    }
    let mut words: Vec<[u8; 8]> = args
        .iter()
        .map(|arg| match *arg {
            Value::Pointer { address, .. } => (address.expose_provenance() as u64).to_ne_bytes(),
            Value::I64(value) => value.to_ne_bytes(),
            Value::I32(value) => u64::from(value as u32).to_ne_bytes(),
            Value::F32(value) => u64::from(value.to_bits()).to_ne_bytes(),
        })
        .collect();
    let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|word| word.as_mut_ptr().cast()).collect();
    let mut error = [0; 200];
    // SAFETY: kernel and arguments fit each other as checked above; each word outlives the call (on a little-endian host a
    // 32-bit value is in a word's first half); the caller guarantees the buffers.
    let failed = unsafe {
        arl_emulation_launch(
            kernel,
            shape.grid.as_ptr(),
            shape.threads.as_ptr(),
            shape.shared_bytes,
            pointers.as_mut_ptr(),
            order,
            error.as_mut_ptr(),
            error.len(),
        )
    };
    if failed == 0 {
        return Ok(());
    }
    // SAFETY: the callee ends the message with zero, within the array.
    let message = unsafe { CStr::from_ptr(error.as_ptr()) };
    Err(format!("{name}: {}", message.to_string_lossy()))
}
