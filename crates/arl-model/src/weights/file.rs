//! One safetensors file, mapped into memory. The header is checked against the file before any tensor is handed out.
//! Reads copy from the map and release its pages, so that a file never counts twice.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Metadata, SafeTensorError, TensorInfo};
use safetensors::{Dtype, SafeTensors};

use crate::folder::unreadable;
use crate::{Error, ErrorCode, Result};

/// Bytes that are read between two releases of pages.
const WINDOW: usize = 4 << 20;

/// A mapped safetensors file whose header fits the file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    /// First byte of the tensors.
    start: usize,
    metadata: Metadata,
}

/// A tensor of a mapped file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorView<'a> {
    file: &'a SafetensorsFile,
    name: &'a str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    /// Little-endian.
    pub(crate) bytes: &'a [u8],
}

impl SafetensorsFile {
    /// Maps the file and checks its header: every tensor is within the file, there are no gaps, and each tensor's size
    /// is that of its shape.
    pub fn open(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path).map_err(|error| Error::io(path, &error))?;
        if !found.is_file() {
            return Err(damaged(path, "is a folder or a device, not a file"));
        }
        if found.len() == 0 {
            return Err(damaged(path, "is empty"));
        }
        let file = File::open(path).map_err(|error| Error::io(path, &error))?;
        // SAFETY: the map is only read. A model's files do not change while it is trained; if a program truncates one
        // nevertheless, this process ends with a bus error, as every program does that maps its files.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(path, &error))?;
        if let Some(what) = unreadable(&map) {
            return Err(what.error(ErrorCode::Weights, path));
        }
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| header_error(path, &map, &error))?;
        Ok(Self { path: path.to_path_buf(), map, start: header + 8, metadata })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The header's free entries.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.metadata.info(name).map(|info| (info.dtype, info.shape.as_slice()))
    }

    /// The bytes of a tensor as they are in the file, little-endian.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(self.tensor(name)?.1)
    }

    /// Reads a tensor of F32, BF16 or F16; `out` must have its size. A value that is not finite is an error.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let view = self.view(name)?;
        let elements: usize = view.shape.iter().product();
        if out.len() != elements {
            let what = format!("tensor `{name}` has {elements} elements; {} are read", out.len());
            return Err(Error::new(ErrorCode::Internal, what));
        }
        view.read(0, 1, out)
    }

    pub(crate) fn view<'a>(&'a self, name: &'a str) -> Result<TensorView<'a>> {
        let (info, bytes) = self.tensor(name)?;
        Ok(TensorView { file: self, name, dtype: info.dtype, shape: &info.shape, bytes })
    }

    fn tensor(&self, name: &str) -> Result<(&TensorInfo, &[u8])> {
        let info = self.metadata.info(name).ok_or_else(|| damaged(&self.path, &format!("has no tensor `{name}`")))?;
        let (begin, end) = info.data_offsets;
        let bytes = self.map.get(self.start + begin..self.start + end);
        let bytes = bytes.ok_or_else(|| damaged(&self.path, "is shorter than its header says"))?;
        Ok((info, bytes))
    }
}

impl<'a> TensorView<'a> {
    /// Reads consecutive elements of F32, BF16 or F16 from `start` on, counted row-major, into every `step`th of `out`,
    /// until `out` is full. A value that is not finite is an error that names tensor and place.
    pub(crate) fn read(&self, start: usize, step: usize, out: &mut [f32]) -> Result<()> {
        match self.dtype {
            Dtype::F32 => self.convert(start, step, out, f32::from_le_bytes),
            Dtype::BF16 => self.convert(start, step, out, |raw| bf16::from_le_bytes(raw).to_f32()),
            Dtype::F16 => self.convert(start, step, out, |raw| f16::from_le_bytes(raw).to_f32()),
            other => {
                let what = format!("tensor `{}` is {other:?}; only F32, BF16 and F16 can be read", self.name);
                Err(damaged(&self.file.path, &what))
            }
        }
    }

    fn convert<const N: usize>(
        &self,
        start: usize,
        step: usize,
        out: &mut [f32],
        convert: impl Fn([u8; N]) -> f32,
    ) -> Result<()> {
        let count = out.len().div_ceil(step);
        let bytes = self.bytes.get(start * N..(start + count) * N).ok_or_else(|| {
            let (name, end) = (self.name, start + count);
            let what = format!("tensor `{name}` has {} bytes; elements {start} to {end} are read", self.bytes.len());
            Error::new(ErrorCode::Internal, what)
        })?;
        for (window, (source, target)) in bytes.chunks(WINDOW).zip(out.chunks_mut(WINDOW / N * step)).enumerate() {
            let raw = source.as_chunks::<N>().0;
            let mut finite = true;
            let put = |(raw, value): (&[u8; N], &mut f32)| {
                *value = convert(*raw);
                finite &= value.is_finite();
            };
            match step {
                // A loop over two slices, which the compiler makes a loop over vectors.
                1 => raw.iter().zip(target).for_each(put),
                _ => raw.iter().zip(target.iter_mut().step_by(step)).for_each(put),
            }
            if !finite && let Some(index) = raw.iter().position(|raw| !convert(*raw).is_finite()) {
                return Err(self.not_finite(start + window * (WINDOW / N) + index));
            }
            self.release_bytes(source);
        }
        Ok(())
    }

    fn not_finite(&self, index: usize) -> Error {
        let mut place = vec![0; self.shape.len()];
        let mut rest = index;
        for (at, &side) in place.iter_mut().zip(self.shape).rev() {
            *at = rest % side;
            rest /= side;
        }
        let (path, name) = (self.file.path.display(), self.name);
        Error::new(ErrorCode::Weights, format!("{path}: tensor `{name}` is NaN or infinite at {place:?}"))
            .hint("the checkpoint is damaged or comes from a run that diverged; take another one")
    }

    /// Whether two tensors have the same type, shape and bytes.
    pub(crate) fn equals(&self, other: &TensorView<'_>) -> bool {
        let mut equal = (self.dtype, self.shape) == (other.dtype, other.shape);
        for (left, right) in self.windows().zip(other.windows()) {
            equal = equal && left == right;
        }
        equal
    }

    /// The tensor's bytes in pieces, each of which is released when the next one is taken.
    pub(crate) fn windows(self) -> impl Iterator<Item = &'a [u8]> {
        let mut read: Option<&'a [u8]> = None;
        let mut windows = self.bytes.chunks(WINDOW);
        std::iter::from_fn(move || {
            if let Some(read) = read {
                self.release_bytes(read);
            }
            read = windows.next();
            read
        })
    }

    /// Releases the pages of these elements, of a type that can be read.
    pub(crate) fn release(&self, elements: Range<usize>) {
        let size = self.dtype.bitsize() / 8;
        if let Some(read) = self.bytes.get(elements.start * size..elements.end * size) {
            self.release_bytes(read);
        }
    }

    /// Releases the pages that are wholly in `read`, a part of the map. They come back from the file when touched.
    #[cfg(unix)]
    fn release_bytes(&self, read: &[u8]) {
        // As large as any system's on that processor: 16 KiB on Macs, up to 64 KiB on Linux.
        const PAGE: usize = if cfg!(target_arch = "aarch64") { 65536 } else { 4096 };
        let map = &self.file.map;
        let begin = (read.as_ptr() as usize - map.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (read.as_ptr() as usize - map.as_ptr() as usize + read.len()) / PAGE * PAGE;
        if begin < end {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is a read-only map of a file, so a released page reads the same again.
            let released = unsafe { map.unchecked_advise_range(advice, begin, end - begin) };
            // It only saves memory; where a kernel refuses it, nothing else is lost.
            drop(released);
        }
    }

    /// Windows takes the pages of a map back by itself when memory is short.
    #[cfg(not(unix))]
    fn release_bytes(&self, _read: &[u8]) {}
}

/// The error for a file that is not what it should be.
pub(crate) fn damaged(path: &Path, what: &str) -> Error {
    Error::new(ErrorCode::Weights, format!("{}: {what}", path.display()))
        .hint("copy or download the file again; compare its size with the source")
}

fn header_error(path: &Path, bytes: &[u8], error: &SafeTensorError) -> Error {
    let what = match error {
        SafeTensorError::HeaderTooSmall => "is too short for a safetensors header".to_owned(),
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            let length = bytes.first_chunk::<8>().map_or(0, |raw| u64::from_le_bytes(*raw));
            format!("claims a header of {length} bytes, but has {} bytes in all", bytes.len())
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("the header is wrong: tensor `{name}` leaves a gap or overlaps another one")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("is truncated or has bytes too many: its {} bytes are not what the header says", bytes.len())
        }
        SafeTensorError::TensorInvalidInfo => {
            "the header is wrong: a tensor's size is not that of its shape".to_owned()
        }
        other => format!("the header cannot be read: {other}"),
    };
    damaged(path, &what)
}
