//! Rates of the CPU's matrix products on the shapes of two small Qwen3 models, with weights in NF4 too; one JSON line a case.
//! Usage: `cargo run --release -p arl-engine --example gemm_rate [threads] [seconds a case] [part of a name]`.

#![allow(clippy::print_stdout, reason = "its output")]

use std::error::Error;
use std::time::Instant;

use arl_engine::backend::cpu::gemm::{
    Elements, ElementsMut, MatMut, MatRef, Nf4Matrix, Nf4Scales, Nf4Tensor, Products, matmul, matmul_nf4,
};
use arl_engine::backend::cpu::simd;
use arl_engine::backend::{DType, Layout};
use arl_model::Nf4Builder;
use half::bf16;
use serde_json::json;

/// A product as the forward (`Nt`) or the backward pass computes it; weight gradients (`Tn`) accumulate.
struct Case {
    name: String,
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let threads: usize = arguments.next().map_or(Ok(0), |x| x.parse())?;
    let seconds: f64 = arguments.next().map_or(Ok(0.5), |x| x.parse())?;
    let filter = arguments.next().unwrap_or_default();
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let threads = rayon::current_num_threads();
    println!("{}", json!({ "cpu": cpu_name(), "level": simd::level().name(), "threads": threads }));
    for case in cases().iter().filter(|case| case.name.contains(&filter)) {
        measure(case, threads, seconds);
    }
    for (m, n, k) in [(96, 16, 64), (48, 64, 64), (64, 96, 16), (64, 64, 64)] {
        measure_small(m, n, k, seconds);
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let mut products = Vec::new();
    for side in [1024, 1536, 2048] {
        products.push((format!("square {side}"), side, side, side));
    }
    let tokens = 2048;
    for (model, hidden, qkv, attention, intermediate, vocab) in
        [("30m", 512, 1024, 512, 1536, 16384), ("8m", 256, 512, 256, 768, 8192)]
    {
        for (name, rows, outputs, inputs) in [
            ("qkv", tokens, qkv, hidden),
            ("o", tokens, hidden, attention),
            ("gate_up", tokens, 2 * intermediate, hidden),
            ("down", tokens, hidden, intermediate),
            ("lm_head", 1024, vocab, hidden),
            ("gate_up of one token", 1, 2 * intermediate, hidden),
        ] {
            products.push((format!("{model} {name}"), rows, outputs, inputs));
        }
    }
    let case = |name: &str, layout, m, n, k| Case { name: format!("{name} {layout:?}"), layout, m, n, k };
    let three = |(name, rows, outputs, inputs): &(String, usize, usize, usize)| {
        [
            case(name, Layout::Nt, *rows, *outputs, *inputs),
            case(name, Layout::Nn, *rows, *inputs, *outputs),
            case(name, Layout::Tn, *outputs, *inputs, *rows),
        ]
    };
    products.iter().flat_map(three).collect()
}

fn measure(case: &Case, threads: usize, seconds: f64) {
    let &Case { layout, m, n, k, .. } = case;
    let accumulate = layout == Layout::Tn;
    let (a, b) = (values(m * k, 7919), values(n * k, 104_729));
    let (a_narrow, b_narrow): (Vec<bf16>, Vec<bf16>) =
        (a.iter().map(|&x| bf16::from_f32(x)).collect(), b.iter().map(|&x| bf16::from_f32(x)).collect());
    let mut c = vec![0.5f32; m * n];
    let mut c_narrow = vec![bf16::ONE; m * n];
    let (a_stride, b_stride) = (if layout == Layout::Tn { m } else { k }, if layout == Layout::Nt { k } else { n });
    let nf4 = Nf4::of(&b, layout, n, k);
    // Taken in turn, so that what disturbs the machine disturbs all alike.
    let mut best = [f64::MAX; 4];
    let begin = Instant::now();
    let mut runs = 0;
    while runs < 3 || begin.elapsed().as_secs_f64() < seconds {
        runs += 1;
        best[0] = best[0].min(time(|| {
            let (a, b) = (
                MatRef { data: Elements::F32(&a), stride: a_stride },
                MatRef { data: Elements::F32(&b), stride: b_stride },
            );
            matmul(layout, m, n, k, a, b, MatMut { data: ElementsMut::F32(&mut c), stride: n }, accumulate, None);
        }));
        best[1] = best[1].min(time(|| {
            let (a, b) = (
                MatRef { data: Elements::Bf16(&a_narrow), stride: a_stride },
                MatRef { data: Elements::Bf16(&b_narrow), stride: b_stride },
            );
            let data = if accumulate { ElementsMut::F32(&mut c) } else { ElementsMut::Bf16(&mut c_narrow) };
            matmul(layout, m, n, k, a, b, MatMut { data, stride: n }, accumulate, None);
        }));
        if layout != Layout::Tn {
            best[2] = best[2].min(time(|| {
                let (a, c) = (MatRef { data: Elements::F32(&a), stride: k }, ElementsMut::F32(&mut c));
                nf4.multiply(layout, [m, n, k], DType::F32, a, MatMut { data: c, stride: n });
            }));
            best[3] = best[3].min(time(|| {
                let (a, c) = (MatRef { data: Elements::Bf16(&a_narrow), stride: k }, ElementsMut::Bf16(&mut c_narrow));
                nf4.multiply(layout, [m, n, k], DType::Bf16, a, MatMut { data: c, stride: n });
            }));
        }
    }
    let rate = |seconds: f64| (2.0 * (m * n) as f64 * k as f64 / seconds / 1e8).round() / 10.0;
    println!(
        "{}",
        json!({
            "case": case.name, "m": m, "n": n, "k": k, "threads": threads,
            "f32_gflops": rate(best[0]), "bf16_gflops": rate(best[1]),
            "nf4_f32_gflops": rate(best[2]), "nf4_bf16_gflops": rate(best[3]),
        })
    );
}

/// Weights in NF4.
struct Nf4 {
    codes: Vec<u8>,
    scales: Vec<f32>,
    len: usize,
    width: usize,
}

impl Nf4 {
    fn of(values: &[f32], layout: Layout, n: usize, k: usize) -> Self {
        let mut builder = Nf4Builder::default();
        builder.push(values);
        let nf4 = builder.finish(false);
        let scales = match nf4.scales {
            arl_model::Nf4Scales::Plain(scales) => scales,
            arl_model::Nf4Scales::Nested { .. } => Vec::new(),
        };
        let width = if layout == Layout::Nt { k } else { n };
        Nf4 { codes: nf4.codes, scales, len: values.len(), width }
    }

    fn multiply(&self, layout: Layout, [m, n, k]: [usize; 3], dtype: DType, a: MatRef<'_>, c: MatMut<'_>) {
        let tensors = [Nf4Tensor { len: self.len, codes: &self.codes, scales: Nf4Scales::Plain(&self.scales) }];
        let matrix = Nf4Matrix { tensors: &tensors, width: self.width, dtype };
        matmul_nf4(layout, m, n, k, a, &matrix, c, false, None);
    }
}

/// Products of attention: of operands that are packed, or (the left one) where it is, either way round.
fn measure_small(m: usize, n: usize, k: usize, seconds: f64) {
    let products = Products::new();
    let (a, b, mut c) = (values(m * k, 7919), values(n * k, 104_729), vec![0f32; m * n]);
    let (mut a_words, mut b_words) = (vec![0f32; products.left_words(m, k)], vec![0f32; products.right_words(n, k)]);
    let source = |x, stride| MatRef { data: Elements::F32(x), stride };
    let right = products.pack_right(source(&b, n), false, n, k, &mut b_words);
    let packed = products.pack_left(source(&a, k), true, m, k, &mut a_words);
    let lefts = [("packed", packed), ("rows", products.left(&a, k, false)), ("columns", products.left(&a, m, true))];
    for (name, left) in lefts {
        let calls = 1 + 4_000_000 / (m * n * k);
        let mut best = f64::MAX;
        let begin = Instant::now();
        while begin.elapsed().as_secs_f64() < seconds {
            best = best
                .min(time(|| (0..calls).for_each(|_| products.multiply((m, n, k), left, right, (&mut c, n), true))));
        }
        let rate = (2.0 * (m * n * k * calls) as f64 / best / 1e8).round() / 10.0;
        println!(
            "{}",
            json!({ "case": format!("small {name}"), "m": m, "n": n, "k": k, "threads": 1, "f32_gflops": rate })
        );
    }
}

fn values(count: usize, step: usize) -> Vec<f32> {
    (0..count).map(|i| (i.wrapping_mul(step) % 1000) as f32 / 500.0 - 1.0).collect()
}

fn time(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.to_string())
}
