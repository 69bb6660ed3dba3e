//! The machine's memory: all of it, and what is free or could be freed. Imports nothing of the crate.

/// Bytes of memory in all, and those that are available; 0 where the system does not say.
#[cfg(target_os = "linux")]
pub(crate) fn host_memory() -> (f64, f64) {
    let (memory, available) = (meminfo("MemTotal"), meminfo("MemAvailable"));
    match container_limit() {
        Some(limit) => (memory.min(limit), available.min((limit - container_use()).max(0.0))),
        None => (memory, available),
    }
}

/// Bytes of memory in all, and those that are available; 0 where the system does not say.
#[cfg(not(target_os = "linux"))]
pub(crate) fn host_memory() -> (f64, f64) {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    (system.total_memory() as f64, system.available_memory() as f64)
}

/// A figure of `/proc/meminfo` in bytes, or 0 where there is none.
#[cfg(target_os = "linux")]
fn meminfo(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    let kib: f64 = line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap_or(0.0);
    kib * 1024.0
}

/// A limit set on this group of processes (a container's), in bytes; `None` where there is none.
#[cfg(target_os = "linux")]
fn container_limit() -> Option<f64> {
    let text = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok()?;
    text.trim().parse().ok()
}

#[cfg(target_os = "linux")]
fn container_use() -> f64 {
    let text = std::fs::read_to_string("/sys/fs/cgroup/memory.current").unwrap_or_default();
    text.trim().parse().unwrap_or(0.0)
}
