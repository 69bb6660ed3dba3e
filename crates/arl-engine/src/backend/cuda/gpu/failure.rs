//! What the driver reports, as an error with a hint.

use arl_model::{Error, ErrorCode};
use candle_core::cuda_backend::cudarc;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// An error of the driver, by what was tried.
pub(super) fn failed(what: &str, error: DriverError) -> Error {
    let (code, hint) = match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => (
            ErrorCode::Oom,
            "use fewer tokens a micro-batch, recompute block, activation_offloading or optimizer_offload, or free memory that other programs hold",
        ),
        CUresult::CUDA_ERROR_ASSERT => {
            (ErrorCode::Device, "a kernel refused its input: standard error names the check")
        }
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_LAUNCH_FAILED => {
            (ErrorCode::Device, "run it again with ARL_CUDA_SYNC=1, which names the operation that failed")
        }
        _ => (ErrorCode::Device, "run `arl doctor`; if the device is in a bad state, `nvidia-smi` shows it"),
    };
    Error::new(code, format!("{what}: {error:?}")).hint(hint)
}
