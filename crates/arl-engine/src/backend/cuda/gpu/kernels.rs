//! This project's kernels on one GPU: loaded once, found by name, launched.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

use arl_model::{Error, Result};
use candle_core::cuda_backend::cudarc;
use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, result};
use cudarc::nvrtc::Ptx;

use super::failed;
use crate::backend::Buffer;
use crate::backend::cuda::device::{Arg, Launch};

/// Names a file with the kernels to load in place of those that this build contains.
const FATBIN: &str = "ARL_FATBIN";

/// Dynamic shared memory that a kernel may use without asking for it.
const USUAL_SHARED_BYTES: usize = 48 << 10;

/// The module of all kernels.
pub(super) struct Kernels {
    module: Arc<CudaModule>,
    /// With the dynamic shared memory that each was allowed so far.
    functions: HashMap<&'static str, (CudaFunction, usize)>,
}

impl Kernels {
    /// Loads the kernels of this build, or those of the file that `ARL_FATBIN` names.
    pub(super) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let bytes = match std::env::var_os(FATBIN) {
            None => arl_kernels::FATBIN.to_vec(),
            Some(file) => std::fs::read(&file).map_err(|error| Error::io(Path::new(&file), &error))?,
        };
        let module = context.load_module(Ptx::from_binary(bytes)).map_err(|error| {
            failed("the kernels cannot be loaded", error)
                .hint("a driver of version 580 or newer is needed; run `arl doctor`")
        })?;
        Ok(Kernels { module, functions: HashMap::new() })
    }

    /// A kernel by its name, allowed the shared memory of this launch.
    fn function(&mut self, launch: &Launch<'_>) -> Result<CudaFunction> {
        let missing = |error| failed(&format!("kernel {}", launch.kernel), error);
        let (function, allowed) = match self.functions.get(launch.kernel) {
            Some((function, allowed)) => (function.clone(), *allowed),
            None => (self.module.load_function(launch.kernel).map_err(missing)?, USUAL_SHARED_BYTES),
        };
        if launch.shared_bytes > allowed {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, launch.shared_bytes as i32).map_err(missing)?;
        }
        self.functions.insert(launch.kernel, (function.clone(), allowed.max(launch.shared_bytes)));
        Ok(function)
    }

    /// Queues a launch whose buffers are at `address`.
    pub(super) fn launch(
        &mut self,
        launch: &Launch<'_>,
        address: impl Fn(Buffer) -> u64,
        stream: &CudaStream,
    ) -> Result<()> {
        let function = self.function(launch)?;
        let mut words: Vec<[u8; 8]> = launch
            .args
            .iter()
            .map(|arg| match *arg {
                Arg::Read(buffer) | Arg::Write(buffer) | Arg::Update(buffer) | Arg::Columns(buffer) => {
                    address(buffer).to_ne_bytes()
                }
                Arg::Null => [0; 8],
                Arg::Long(value) => value.to_ne_bytes(),
                Arg::Int(value) => u64::from(value as u32).to_ne_bytes(),
                Arg::Float(value) => u64::from(value.to_bits()).to_ne_bytes(),
            })
            .collect();
        let mut params: Vec<*mut c_void> = words.iter_mut().map(|word| word.as_mut_ptr().cast()).collect();
        let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
        // SAFETY: the function is of a module that lives as long as `self`; the arguments are of the kernel's kinds, and its
        // accesses within the buffers, as the kernels' tests on the host prove of every launch of the leaves; the driver
        // copies the arguments before it returns.
        let queued = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.threads as u32, 1, 1),
                launch.shared_bytes as u32,
                stream.cu_stream(),
                &mut params,
            )
        };
        queued.map_err(|error| failed(&format!("kernel {}", launch.kernel), error))
    }
}
