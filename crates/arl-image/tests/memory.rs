//! What a picture takes is what its header said before, and a header alone takes next to nothing. Allocations are counted.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail loudly")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use arl_image::{ImageProcessor, measure, prepare};
use common::{encode, picture, png, processor, turned};
use image::ExtendedColorType;

/// Counts the bytes that are allocated, and the most of them at once.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all work is the system's allocator's, with the arguments as they came; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Ordering::SeqCst) + layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promises are those that the system asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(NOW.fetch_add(layout.size(), Ordering::SeqCst) + layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promises are those that the system asks for.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promises are those that the system asks for.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `job` has allocated at most at once.
fn peak<T>(job: impl FnOnce() -> T) -> (usize, T) {
    let before = NOW.load(Ordering::SeqCst);
    MOST.store(before, Ordering::SeqCst);
    let result = job();
    (MOST.load(Ordering::SeqCst) - before, result)
}

/// Tables of the decoders, whatever the size.
const TABLES: u64 = 1 << 20;

// One test, because others would count too.
#[test]
fn memory_is_what_the_header_says_and_a_refused_header_takes_none() {
    let (width, height) = (400, 300);
    let bytes = |samples: usize| (0..samples * 120_000).map(|at| (at * at / 77) as u8).collect::<Vec<u8>>();
    let colours = [
        ("L8", ExtendedColorType::L8, bytes(1)),
        ("La8", ExtendedColorType::La8, bytes(2)),
        ("Rgb8", ExtendedColorType::Rgb8, bytes(3)),
        ("Rgba8", ExtendedColorType::Rgba8, bytes(4)),
        ("L16", ExtendedColorType::L16, bytes(2)),
        ("Rgba16", ExtendedColorType::Rgba16, bytes(8)),
    ];
    let mut files: Vec<(String, Vec<u8>)> = colours
        .iter()
        .map(|(name, colour, pixels)| (format!("png {name}"), encode("png", pixels, width, height, *colour)))
        .collect();
    for format in common::FORMATS {
        files.push((format.to_owned(), picture(format, width, height)));
    }
    for format in ["jpeg", "png", "webp"] {
        files.push((format!("{format} turned"), turned(format, width, height, 6)));
    }
    files.push(("webp Rgba8".to_owned(), encode("webp", &bytes(4), width, height, ExtendedColorType::Rgba8)));
    // Scaled down, as they are, and enlarged.
    let scales = [(16, 4096), (16, 1 << 20), (500_000, 1 << 20)];
    for (name, file) in &files {
        for (min_pixels, max_pixels) in scales {
            let processor = ImageProcessor { min_pixels, max_pixels, ..processor() };
            let (header, measured) = peak(|| measure(file, &processor).unwrap());
            assert!(header as u64 <= TABLES, "{name}: its header took {header} bytes");
            let (took, _) = peak(|| prepare(file, &processor).unwrap());
            assert!(took as u64 <= measured.memory + TABLES, "{name}: {took} bytes, but {} announced", measured.memory);
            // Not announced so high that threads would wait for nothing.
            assert!(measured.memory <= 4 * took as u64 + TABLES, "{name}: {took} bytes, {} announced", measured.memory);
        }
    }
    // A few hundred bytes that claim ten thousand million pixels.
    let bomb = png((100_000, 100_000), 8, 2, &[], &[&[0; 24]]);
    let (took, result) = peak(|| prepare(&bomb, &processor()));
    assert!(result.is_err());
    assert!(took as u64 <= TABLES, "refusing took {took} bytes");
}
