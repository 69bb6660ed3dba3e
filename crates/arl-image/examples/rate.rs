//! How fast pictures are decoded and resized: a line of JSON a case, in megapixels of the file a second, on one thread and
//! with as many pictures at once as the machine has cores. Next to each, on Linux, megapixels a second that a core has worked
//! for this program, which other programs change little.
//!
//! ```sh
//! cargo run --release -p arl-image --example rate
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for developers, whose output is its purpose")]

use std::time::Instant;

use arl_image::{ImageProcessor, prepare, resize};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder};
use serde_json::json;

/// Seconds that a case is measured for, at least.
const LEAST: f64 = 1.0;

/// Waves with a little noise, as a photograph has both.
fn picture(width: u32, height: u32) -> Vec<u8> {
    let mut state = 1u32;
    let mut pixels = Vec::with_capacity(3 * width as usize * height as usize);
    for y in 0..height {
        for x in 0..width {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let wave = (x as f32 / 37.0).sin() * (y as f32 / 53.0).cos() * 90.0 + 127.0;
            let noise = ((state >> 24) % 9) as f32 - 4.0;
            pixels.extend([wave + noise, 255.0 - wave - noise, wave * 0.5 + 40.0 - noise].map(|value| value as u8));
        }
    }
    pixels
}

fn encode(format: &str, pixels: &[u8], width: u32, height: u32) -> Vec<u8> {
    let mut file = Vec::new();
    let colour = ExtendedColorType::Rgb8;
    match format {
        "jpeg" => JpegEncoder::new_with_quality(&mut file, 90).write_image(pixels, width, height, colour),
        "png" => PngEncoder::new(&mut file).write_image(pixels, width, height, colour),
        _ => WebPEncoder::new_lossless(&mut file).write_image(pixels, width, height, colour),
    }
    .unwrap();
    file
}

/// Seconds that cores have worked for this process.
fn worked() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the program, in parentheses, may have spaces. Times are in hundredths.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}

/// Megapixels a second of `job`, which each of `threads` does again and again: by the clock, and by the work of a core.
fn rate(pixels: u64, threads: usize, job: impl Fn() + Sync) -> [Option<f64>; 2] {
    job();
    let (begun, before) = (Instant::now(), worked());
    let done: u64 = std::thread::scope(|scope| {
        let work = || {
            let mut done = 0;
            while done < 2 || begun.elapsed().as_secs_f64() < LEAST {
                job();
                done += 1;
            }
            done
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let rate = |seconds: f64| ((done * pixels) as f64 / seconds / 1e5).round() / 10.0;
    let worked = worked().zip(before).map(|(now, before)| now - before);
    [Some(rate(begun.elapsed().as_secs_f64())), worked.map(rate)]
}

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("", |(_, name)| name);
    // The settings of Qwen2.5-VL: both sizes are resized a little. With squares of 8 pixels, neither is.
    let qwen = ImageProcessor {
        patch_size: 14,
        temporal_patch_size: 2,
        merge_size: 2,
        min_pixels: 3136,
        max_pixels: 12_845_056,
        mean: [0.5; 3],
        std: [0.5; 3],
    };
    let same = ImageProcessor { patch_size: 4, ..qwen.clone() };
    for (format, width, height) in
        [("jpeg", 1024, 1024), ("jpeg", 4000, 3000), ("png", 1024, 1024), ("png", 4000, 3000), ("webp", 1024, 1024)]
    {
        let pixels = picture(width, height);
        let file = encode(format, &pixels, width, height);
        let count = u64::from(width) * u64::from(height);
        let from = (height, width);
        let to = qwen.smart_resize(height, width).unwrap();
        for threads in if cores == 1 { vec![1] } else { vec![1, cores] } {
            let decode = rate(count, threads, || drop(prepare(&file, &same).unwrap()));
            // The copy is that of a decoder's result.
            let resized = rate(count, threads, || drop(resize(pixels.clone(), from, to)));
            let both = rate(count, threads, || drop(prepare(&file, &qwen).unwrap()));
            let line = json!({
                "format": format, "width": width, "height": height, "bytes": file.len(), "resized": [to.1, to.0],
                "threads": threads, "decode_mp_s": decode[0], "resize_mp_s": resized[0], "both_mp_s": both[0],
                "decode_mp_core_s": decode[1], "resize_mp_core_s": resized[1], "both_mp_core_s": both[1], "cpu": cpu, "cores": cores,
            });
            println!("{line}");
        }
    }
}
