//! The way of an image from the bytes of its file to what a vision model takes: decoded and turned upright, put on white,
//! resized as torchvision does, to the bit, and cut into normalised patches. Memory is bounded whatever a file claims.
//! Knows nothing of rows, text, devices or training.

#![warn(missing_docs)]

mod budget;
mod decode;
mod format;
mod patches;
mod processor;
mod resample;

use arl_model::Result;

pub use budget::MAX_MEMORY;
pub use decode::MAX_PIXELS;
pub use format::Format;
pub use processor::ImageProcessor;
pub use resample::resize;

use decode::Header;
use resample::resize_memory;

/// What the header of an image tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measured {
    /// The kind of file.
    pub format: Format,
    /// Width in pixels as the image is shown, that is after EXIF's orientation.
    pub width: u32,
    /// Height in pixels, likewise.
    pub height: u32,
    /// `(height, width)` after resizing.
    pub resized: (u32, u32),
    /// The first 16 bytes of BLAKE3 of the file: changes whenever the file does.
    pub hash: [u8; 16],
    /// Bytes that [`prepare`] allocates at most, but for tables of less than a megabyte.
    pub memory: u64,
}

/// An image that is ready for the model but for its normalisation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// RGB, `[height, width, 3]`.
    pub pixels: Vec<u8>,
    /// Height after resizing.
    pub height: u32,
    /// Width after resizing.
    pub width: u32,
    /// The first 16 bytes of BLAKE3 of the file.
    pub hash: [u8; 16],
}

/// Size, orientation and resized size of an image, from its header alone. `ARL_DATA` where that is no supported image,
/// or one that [`prepare`] refuses for its size or its proportions. Pixels may still be damaged.
pub fn measure(bytes: &[u8], processor: &ImageProcessor) -> Result<Measured> {
    let plan = Plan::of(bytes, processor)?;
    budget::fits(plan.memory)?;
    let (width, height) = plan.header.shown();
    let format = plan.header.format();
    Ok(Measured { format, width, height, resized: plan.resized, hash: hash(bytes), memory: plan.memory })
}

/// Decodes an image, turns it upright, puts it on white and resizes it. Waits while the images that other threads
/// decode need all of [`MAX_MEMORY`]. `ARL_DATA` where the file is damaged, truncated or larger than allowed.
pub fn prepare(bytes: &[u8], processor: &ImageProcessor) -> Result<Prepared> {
    let plan = Plan::of(bytes, processor)?;
    let _held = budget::take(plan.memory)?;
    let (width, height) = plan.header.shown();
    let pixels = plan.header.decode(bytes)?;
    let pixels = resize(pixels, (height, width), plan.resized);
    Ok(Prepared { pixels, height: plan.resized.0, width: plan.resized.1, hash: hash(bytes) })
}

/// What preparing an image will take, from its header alone.
struct Plan {
    header: Header,
    /// `(height, width)`.
    resized: (u32, u32),
    /// Bytes, at most.
    memory: u64,
}

impl Plan {
    fn of(bytes: &[u8], processor: &ImageProcessor) -> Result<Self> {
        let header = Header::read(bytes)?;
        let (width, height) = header.shown();
        let resized = processor.smart_resize(height, width)?;
        let memory = header.memory() + resize_memory((height, width), resized);
        Ok(Self { header, resized, memory })
    }
}

fn hash(bytes: &[u8]) -> [u8; 16] {
    let mut first = [0; 16];
    first.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    first
}
