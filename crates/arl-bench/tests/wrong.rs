//! A device that computes one thing wrong is found, and nothing is timed on it.

#![cfg(feature = "emulation")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use arl_bench::options::Options;
use arl_bench::run::Run;
use arl_engine::backend::cuda::{Arg, CudaBackend, Device, EmulatedDevice, Launch, PackedAttention, PackedShape};
use arl_engine::backend::{Backend, Buffer, DType, Event, Layout, Matmul, Pool, Rows, Stream};
use arl_model::Result;
use half::bf16;
use serde_json::Map;

/// What is wrong when it is not a kernel: the library for attention, which takes the scores too large by the factor.
const LIBRARY: &str = "library";
/// Or matrix products, whose sums are split in two; each part is rounded to the type of the result.
const SPLIT: &str = "split-k";

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
        let narrow = op.c.buffer.dtype == DType::Bf16 && !op.accumulate && op.c.stride == op.n && op.bias.is_none();
        if self.kernel != SPLIT || !narrow || op.layout != Layout::Nt || op.k < 2 {
            return self.inner.matmul(op);
        }
        let half = op.k / 2;
        let mut parts = [(0, half), (half, op.k - half)].map(|(first, k)| {
            let from = |rows: Rows| Rows { buffer: rows.buffer.slice(first, rows.buffer.len - first), ..rows };
            self.inner.matmul(&Matmul { k, a: from(op.a), b: from(op.b), ..*op });
            let mut part = vec![bf16::ZERO; op.c.buffer.len];
            self.inner.read_back(op.c.buffer, bytemuck::cast_slice_mut(&mut part)).unwrap();
            part
        });
        let [sum, second] = &mut parts;
        sum.iter_mut().zip(second).for_each(|(a, b)| *a = bf16::from_f32(a.to_f32() + b.to_f32()));
        self.inner.upload(bytemuck::cast_slice(sum), op.c.buffer);
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
fn products_whose_parts_are_rounded_are_found_by_sums_that_cancel_and_by_them_alone() {
    let (out, ended) = rehearse_with(&["--only", "scale", "--keep-going", "--part", "checks"], SPLIT, 1.0, 0.0);
    let wrong: Vec<&str> = out.lines().filter(|line| line.contains("\"ok\":false")).collect();
    assert!(wrong.len() == 1 && wrong[0].contains("\"leaf\":\"long_sums\""), "{wrong:?}");
    assert_eq!(ended.expect_err("one is wrong").message, "1 wrong, named above");
    let (out, ended) = rehearse_with(&["--only", "scale"], "none", 1.0, 0.0);
    ended.unwrap();
    assert!(out.contains("# scale: all right"), "{out}");
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
    assert_eq!(out.matches("\"apart_from_own\"").count(), 2, "{out}");
    assert!(out.contains("\"refused\":0") && out.contains("# attention: all right"), "{out}");
}
