//! A device that computes one thing wrong is found, and nothing is timed on it.

#![cfg(feature = "emulation")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use arl_bench::options::Options;
use arl_bench::run::Run;
use arl_engine::backend::cuda::{Arg, CudaBackend, Device, EmulatedDevice, Launch, PackedAttention, PackedShape};
use arl_engine::backend::{Backend, Buffer, Event, Matmul, Pool, Stream};
use arl_model::Result;
use serde_json::Map;

/// What is wrong when it is not a kernel: the library for attention, which takes the scores too large by the factor.
const LIBRARY: &str = "library";

/// The kernels on the host; the floats that one of them is given are too large by a factor, which grows with each launch.
struct WrongDevice {
    inner: EmulatedDevice,
    kernel: &'static str,
    factor: f32,
    growth: f32,
}

impl Device for WrongDevice {
    fn launch(&mut self, launch: &Launch<'_>) {
        if launch.kernel == self.kernel {
            self.factor += self.growth;
        }
        let wrong = |arg: &Arg| match *arg {
            Arg::Float(value) if launch.kernel == self.kernel => Arg::Float(self.factor * value),
            arg => arg,
        };
        let args: Vec<Arg> = launch.args.iter().map(wrong).collect();
        self.inner.launch(&Launch { args: &args, ..*launch });
    }

    fn name(&self) -> String {
        self.inner.name()
    }

    fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors()
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        self.inner.reserve(pool, bytes)
    }

    fn upload(&mut self, source: &[u8], target: Buffer) {
        self.inner.upload(source, target);
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        self.inner.read_back(source, target)
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        self.inner.queue_read(sources);
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        self.inner.finish_read(target)
    }

    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer) {
        self.inner.transfer(stream, source, target);
    }

    fn record(&mut self, stream: Stream, event: Event) {
        self.inner.record(stream, event);
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        self.inner.wait(stream, event);
    }

    fn zero(&mut self, target: Buffer) {
        self.inner.zero(target);
    }

    fn copy(&mut self, source: Buffer, target: Buffer) {
        self.inner.copy(source, target);
    }

    fn matmul(&mut self, op: &Matmul) {
        self.inner.matmul(op);
    }

    fn plan_attention(&mut self, shape: &PackedShape) -> std::result::Result<(), String> {
        self.inner.plan_attention(shape)
    }

    fn packed_attention(&mut self, pass: &PackedAttention) {
        let factor = if self.kernel == LIBRARY { self.factor } else { 1.0 };
        let scale = (factor * f32::from_bits(pass.shape.scale)).to_bits();
        self.inner.packed_attention(&PackedAttention { shape: PackedShape { scale, ..pass.shape }, ..*pass });
    }
}

/// What a rehearsal on such a device prints, and how it ends.
fn rehearse(kernel: &'static str, factor: f32, growth: f32) -> (String, Result<()>) {
    rehearse_with(&["--only", "leaves,loss"], kernel, factor, growth)
}

fn rehearse_with(more: &[&str], kernel: &'static str, factor: f32, growth: f32) -> (String, Result<()>) {
    let words: Vec<String> = ["--rehearse", "--shapes", "3"].iter().chain(more).map(|word| word.to_string()).collect();
    let options = Options::parse(&words, Path::new(env!("CARGO_MANIFEST_DIR")).join("none")).unwrap();
    let open = || -> Result<Box<dyn Backend>> {
        let inner = EmulatedDevice::with_library();
        Ok(Box::new(CudaBackend::new(WrongDevice { inner, kernel, factor, growth })))
    };
    let mut out = Vec::new();
    let ended = Run::new(options, Map::new(), &open, &mut out).all();
    (String::from_utf8(out).unwrap(), ended)
}

#[test]
fn a_leaf_that_is_wrong_is_named_and_nothing_is_timed() {
    for (kernel, factor, leaf) in [
        ("attention_forward_64_bf16", 1.2, "attention"),
        ("attention_forward_f32", 1.001, "attention"),
        ("cross_entropy_gradient_f32", 1.001, "cross_entropy"),
    ] {
        let (out, ended) = rehearse(kernel, factor, 0.0);
        let error = ended.expect_err(kernel);
        assert!(error.message.starts_with(&format!("{leaf} is wrong, and nothing is timed: ")), "{kernel}: {error}");
        assert!(!out.contains("\"case\"") && !out.contains("ceilings"), "{kernel}: {out}");
        assert!(!out.contains(&format!("\"leaf\":\"{leaf}\"")), "{kernel}: {out}");
    }
}

#[test]
fn a_leaf_that_gives_other_bits_each_time_is_found() {
    // Far within what may differ from the CPU's.
    let (_, ended) = rehearse("attention_forward_f32", 1.0, 1e-6);
    let error = ended.expect_err("other bits");
    assert!(error.message.contains("a second run gives other bits"), "{error}");
}

#[test]
fn without_a_wrong_one_the_leaves_pass() {
    // The library is wrong, and nobody asks for it.
    let (out, ended) = rehearse(LIBRARY, 1.2, 0.0);
    // What comes after the leaves finds no golden models here.
    assert!(out.contains("# leaves: all right"), "{out}");
    assert!(ended.expect_err("no golden models").message.contains("no golden models there"));
}

#[test]
fn a_library_for_attention_that_is_wrong_is_found_before_anything_else() {
    for choice in ["cudnn", "auto"] {
        let (out, ended) = rehearse_with(&["--attention", choice, "--only", "loss"], LIBRARY, 1.2, 0.0);
        let error = ended.expect_err(choice);
        assert!(
            error.message.starts_with("attention by the library is wrong, and nothing is timed: "),
            "{choice}: {error}"
        );
        assert!(!out.contains("\"check\"") && !out.contains("\"case\""), "{choice}: {out}");
    }
}

#[test]
fn a_library_that_is_right_passes_with_its_steps() {
    let (out, ended) = rehearse_with(&["--attention", "cudnn", "--only", "attention"], "none", 1.0, 0.0);
    ended.unwrap();
    assert_eq!(out.matches("\"beside_own\"").count(), 2, "{out}");
    assert!(out.contains("\"refused\":0") && out.contains("# attention: all right"), "{out}");
}
