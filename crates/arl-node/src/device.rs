//! What the machine can do, for `arl doctor`, the memory check and the benches.

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::cpu::rate::matmul_rate as matmul_rate_of;
use arl_engine::backend::{Backend, DeviceKind};
use napi_derive::napi;

use arl_model::{Error, ErrorCode, Result};

use crate::error::sync;
use crate::memory::host_memory;

/// A device that the engine can run on.
#[napi(object)]
pub struct DeviceInfo {
    /// As the option `device` names it.
    pub device: String,
    /// For people.
    pub name: String,
    /// Compute threads.
    pub threads: u32,
    /// Instruction sets that the engine uses here.
    pub features: Vec<String>,
    /// Memory of the device.
    pub memory_bytes: f64,
    /// Memory that is free, or could be freed.
    pub available_bytes: f64,
}

/// What a run may take of the host's memory, in place of what the system says: `ARL_HOST_GIB`.
const HOST_GIB: &str = "ARL_HOST_GIB";

/// [`HOST_GIB`]'s value in bytes; `None`: there is none.
fn stated_bytes(value: Option<&str>) -> Result<Option<f64>> {
    let Some(value) = value else { return Ok(None) };
    match value.parse::<f64>() {
        Ok(gib) if gib.is_finite() && gib > 0.0 => Ok(Some(gib * f64::from(1 << 30))),
        _ => Err(Error::new(ErrorCode::Config, format!("{HOST_GIB} is `{value}`, which is no number of GiB"))
            .hint("set it to how much of the host's memory a run may take, such as 96, or unset it")),
    }
}

/// The devices of this machine. Never throws because one is missing.
#[napi]
pub fn devices() -> napi::Result<Vec<DeviceInfo>> {
    sync(|| {
        let stated = std::env::var_os(HOST_GIB);
        host(stated_bytes(stated.as_ref().map(|value| value.to_string_lossy()).as_deref())?)
    })
}

/// The processor and its memory, of which a run may take `stated` bytes, or what the system says.
fn host(stated: Option<f64>) -> Result<Vec<DeviceInfo>> {
    let (memory, available) = host_memory();
    let backend = CpuBackend::new();
    Ok(vec![DeviceInfo {
        device: "cpu".into(),
        name: backend.name(),
        threads: rayon::current_num_threads() as u32,
        features: vec![arl_engine::backend::cpu::simd::level().name().to_string()],
        memory_bytes: stated.unwrap_or(memory),
        available_bytes: stated.unwrap_or(available),
    }])
}

/// Measured rate of f32 matrix products `[m, k] x [k, n]` on all cores, in GFLOP/s; takes about `seconds`.
#[napi]
pub fn matmul_rate(m: u32, n: u32, k: u32, seconds: f64) -> napi::Result<f64> {
    sync(|| Ok(matmul_rate_of(m as usize, n as usize, k as usize, seconds)))
}

/// A device as the option `device` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Cpu,
    Cuda(usize),
}

fn parse(device: &str) -> Result<Name> {
    let unknown = || {
        Error::new(ErrorCode::Config, format!("device: `{device}` is not known"))
            .hint("use cpu, cuda, or cuda:0 and on")
    };
    match (device, device.strip_prefix("cuda:")) {
        ("cpu", _) => Ok(Name::Cpu),
        ("cuda", _) => Ok(Name::Cuda(0)),
        (_, Some(ordinal)) => ordinal.parse().map(Name::Cuda).map_err(|_| unknown()),
        _ => Err(unknown()),
    }
}

/// The sort of device that `device` names; whether there is one does not matter.
pub(crate) fn device_kind(device: &str) -> Result<DeviceKind> {
    Ok(match parse(device)? {
        Name::Cpu => DeviceKind::Cpu,
        Name::Cuda(_) => DeviceKind::Cuda,
    })
}

/// Opens a device.
pub(crate) fn backend(device: &str) -> Result<Box<dyn Backend>> {
    match parse(device)? {
        Name::Cpu => Ok(Box::new(CpuBackend::new())),
        #[cfg(feature = "cuda")]
        Name::Cuda(ordinal) => {
            let device = arl_engine::backend::cuda::GpuDevice::open(ordinal)?;
            Ok(Box::new(arl_engine::backend::cuda::CudaBackend::new(device)))
        }
        #[cfg(not(feature = "cuda"))]
        Name::Cuda(_) => Err(Error::new(ErrorCode::Device, format!("device: `{device}` is not part of this addon"))
            .hint("`arl doctor` says what is missing; device cpu works everywhere")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_the_user_states_is_a_number_of_gib_and_counts_for_the_systems() {
        assert_eq!(stated_bytes(None).unwrap(), None);
        let stated = stated_bytes(Some("1.5")).unwrap();
        assert_eq!(stated, Some(1.5 * 1024.0 * 1024.0 * 1024.0));
        let cpu = &host(stated).unwrap()[0];
        assert_eq!((cpu.memory_bytes, cpu.available_bytes), (1_610_612_736.0, 1_610_612_736.0));
        assert!(host(None).unwrap()[0].memory_bytes >= host(None).unwrap()[0].available_bytes);
        for value in ["", "much", "0", "-1", "inf", "NaN"] {
            let error = stated_bytes(Some(value)).unwrap_err();
            assert_eq!(error.code, ErrorCode::Config);
            assert!(error.message.contains(&format!("ARL_HOST_GIB is `{value}`")), "{}", error.message);
        }
    }
}
