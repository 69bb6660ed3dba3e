//! The recording device finds what is wrong with an order of operations, and nothing else.

use super::*;
use crate::backend::cuda::CudaBackend;
use crate::backend::{Backend, DType, Layout, Rows};

const HOST: Buffer = Buffer { pool: Pool::HostStep, offset: 0, len: 16, dtype: DType::F32 };
const SLOT: Buffer = Buffer { pool: Pool::Step, ..HOST };
const COPIED: Event = Event(0);
const COMPUTED: Event = Event(1);

/// The faults of what `queue` queues, by what is wrong.
fn faults(queue: impl FnOnce(&mut RecordingDevice<NoDevice>)) -> Vec<String> {
    let mut device = RecordingDevice::new(NoDevice);
    device.reserve(Pool::Step, 1024).unwrap();
    device.reserve(Pool::HostStep, 1024).unwrap();
    queue(&mut device);
    device.faults.iter().map(|fault| fault.split(':').next().unwrap().to_string()).collect()
}

#[test]
fn what_was_not_written_must_not_be_read() {
    let copied = |device: &mut RecordingDevice<_>| device.copy(SLOT.slice(0, 4), SLOT.slice(8, 4));
    assert_eq!(faults(copied), ["copy on Compute reads what was not written"]);
    assert!(
        faults(|device| {
            device.zero(SLOT.slice(0, 4));
            copied(device);
        })
        .is_empty()
    );
    // A part of it was not.
    let fault = faults(|device| {
        device.zero(SLOT.slice(0, 3));
        copied(device);
    });
    assert_eq!(fault.len(), 1);
    // Nor what was given back since.
    let fault = faults(|device| {
        device.zero(SLOT);
        device.discard(SLOT);
        copied(device);
    });
    assert_eq!(fault.len(), 1);
}

#[test]
fn a_stream_sees_what_another_wrote_only_behind_an_event() {
    let run = |with_event: bool| {
        faults(|device| {
            device.zero(SLOT);
            if with_event {
                device.record(Stream::Compute, COMPUTED);
                device.wait(Stream::ToHost, COMPUTED);
            }
            device.transfer(Stream::ToHost, SLOT, HOST);
        })
    };
    assert_eq!(run(false), ["transfer on ToHost reads what another stream may not have written yet"]);
    assert!(run(true).is_empty());
}

#[test]
fn what_another_stream_reads_is_not_overwritten_without_an_event() {
    let run = |with_event: bool, discarded: bool| {
        faults(|device| {
            device.zero(SLOT);
            device.record(Stream::Compute, COMPUTED);
            device.wait(Stream::ToHost, COMPUTED);
            device.transfer(Stream::ToHost, SLOT, HOST);
            device.record(Stream::ToHost, COPIED);
            if with_event {
                device.wait(Stream::Compute, COPIED);
            }
            if discarded {
                device.discard(SLOT);
            }
            device.zero(SLOT);
        })
    };
    for discarded in [false, true] {
        assert_eq!(run(false, discarded), ["zero on Compute overwrites what another stream may still read"]);
        assert!(run(true, discarded).is_empty());
    }
}

#[test]
fn two_streams_do_not_write_the_same_bytes_without_an_event() {
    let run = |with_event: bool| {
        faults(|device| {
            device.upload(&[0; 64], HOST);
            device.record(Stream::Compute, COMPUTED);
            device.wait(Stream::FromHost, COMPUTED);
            device.transfer(Stream::FromHost, HOST, SLOT);
            device.record(Stream::FromHost, COPIED);
            if with_event {
                device.wait(Stream::Compute, COPIED);
            }
            device.zero(SLOT);
        })
    };
    assert_eq!(run(false), ["zero on Compute writes what another stream may still write"]);
    assert!(run(true).is_empty());
}

#[test]
fn what_was_read_for_the_host_is_fetched_before_the_next() {
    let twice = |fetched: bool| {
        faults(|device| {
            device.zero(SLOT);
            for _ in 0..2 {
                device.queue_read(&[SLOT]);
                if fetched {
                    device.finish_read(&mut [0; 64]).unwrap();
                }
            }
            // The host alone has waited.
            device.transfer(Stream::ToHost, SLOT, HOST);
        })
    };
    let unordered = "transfer on ToHost reads what another stream may not have written yet";
    assert_eq!(twice(true), [unordered]);
    assert_eq!(twice(false), ["queue_read overwrites what the host has not read yet", unordered]);
    let fault = faults(|device| device.queue_read(&[SLOT]));
    assert_eq!(fault, ["queue_read on Compute reads what was not written"]);
    assert_eq!(faults(|device| device.finish_read(&mut []).unwrap()), ["finish_read without a queue_read"]);
}

#[test]
fn an_event_tells_of_what_was_queued_before_it_alone() {
    let fault = faults(|device| {
        device.zero(SLOT);
        device.record(Stream::Compute, COMPUTED);
        device.zero(SLOT);
        device.wait(Stream::ToHost, COMPUTED);
        device.transfer(Stream::ToHost, SLOT, HOST);
    });
    assert_eq!(fault.len(), 1);
}

#[test]
fn a_split_gradient_goes_through_the_scratch_in_order_and_what_cannot_be_split_does_not() {
    let kernels = |layout: Layout, c_type, [m, n, k]: [usize; 3]| {
        let mut backend = CudaBackend::new(RecordingDevice::new(NoDevice));
        backend.reserve(Pool::Step, 1 << 28).unwrap();
        backend.reserve(Pool::Scratch, backend.scratch_bytes(64, 64)).unwrap();
        let mut next = 0;
        let mut put = |rows: usize, width: usize, dtype| {
            let buffer = Buffer { pool: Pool::Step, offset: next, len: rows * width, dtype };
            next += buffer.bytes();
            backend.device_mut().zero(buffer);
            Rows { buffer, stride: width }
        };
        let a = if layout == Layout::Tn { put(k, m, DType::F32) } else { put(m, k, DType::F32) };
        let b = if layout == Layout::Nt { put(n, k, DType::Bf16) } else { put(k, n, DType::Bf16) };
        let c = put(m, n, c_type);
        backend.matmul(&Matmul { layout, m, n, k, a, b, c, accumulate: true, bias: None });
        let device = backend.device_mut();
        assert_eq!(device.faults, Vec::<String>::new(), "{layout:?} {m} {n} {k}");
        device.kernels.clone()
    };
    // 128 experts: 14,336 rows fit behind two copies of the router's weights, and 16,384 without.
    assert_eq!(kernels(Layout::Nn, DType::Bf16, [14_336, 2048, 128]), ["split_f32_bf16"]);
    assert_eq!(kernels(Layout::Nn, DType::Bf16, [14_337, 2048, 128]), ["split_f32_bf16"; 2]);
    assert_eq!(kernels(Layout::Tn, DType::F32, [128, 2048, 16_384]), ["split_f32_bf16"]);
    assert_eq!(kernels(Layout::Tn, DType::F32, [128, 2048, 16_385]), ["split_f32_bf16"; 2]);
    assert_eq!(kernels(Layout::Nn, DType::Bf16, [20, 36, 128]), ["matmul_f32_bf16_bf16"]);
    assert_eq!(kernels(Layout::Tn, DType::F32, [12, 64, 20]), ["matmul_f32_bf16_f32"]);
    // So many experts that two copies of their weights leave no room.
    assert_eq!(kernels(Layout::Nn, DType::Bf16, [300, 8192, 512]), ["matmul_f32_bf16_bf16"]);
}
