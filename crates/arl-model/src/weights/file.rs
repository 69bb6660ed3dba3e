//! One safetensors file, mapped into memory. The header is proven against the file before any tensor is handed out;
//! reading copies straight from the map and gives the pages back, so that a file never counts twice.

use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
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

impl SafetensorsFile {
    /// Maps the file and proves its header: every tensor lies within the file, without gaps, and its size is that of
    /// its shape.
    pub fn open(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path).map_err(|error| Error::io(path, &error))?;
        if !found.is_file() {
            return Err(damaged(path, "is a folder or a device, not a file"));
        }
        if found.len() == 0 {
            return Err(damaged(path, "is empty"));
        }
        let file = File::open(path).map_err(|error| Error::io(path, &error))?;
        // SAFETY: the map is only read. Nobody writes to a model's files while they are trained from; should somebody
        // truncate one meanwhile, the process ends with a bus error, as with every program that maps its files.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(path, &error))?;
        if let Some(what) = unreadable(&map) {
            return Err(what.error(ErrorCode::Weights, path));
        }
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| header_error(path, &map, &error))?;
        Ok(Self { path: path.to_path_buf(), map, start: header + 8, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, in the order in which they lie in the file.
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
        let info = self.tensor_info(name)?;
        let (begin, end) = info.data_offsets;
        self.map.get(self.start + begin..self.start + end).ok_or_else(|| damaged(&self.path, "is shorter than it was"))
    }

    /// Copies a tensor's bytes; `out` must have just its size.
    pub fn read_bytes(&self, name: &str, out: &mut [u8]) -> Result<()> {
        let bytes = self.sized(name, out.len(), 1)?;
        for (source, target) in bytes.chunks(WINDOW).zip(out.chunks_mut(WINDOW)) {
            target.copy_from_slice(source);
            self.release(source);
        }
        Ok(())
    }

    /// Reads a tensor of f32, bf16 or f16 as f32. A value that is not finite is an error.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        self.read(name, None, out, |value| value, bf16::to_f32, f16::to_f32)
    }

    /// [`SafetensorsFile::read_f32`] of a part: `out.len()` elements from `start` on, counted row-major.
    pub fn read_f32_part(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        self.read(name, Some(start), out, |value| value, bf16::to_f32, f16::to_f32)
    }

    /// Reads a tensor of f32, bf16 or f16 as bf16, rounding to nearest even. A value that is not finite is an error.
    pub fn read_bf16(&self, name: &str, out: &mut [bf16]) -> Result<()> {
        self.read(name, None, out, bf16::from_f32, |value| value, |value| bf16::from_f32(value.to_f32()))
    }

    /// [`SafetensorsFile::read_bf16`] of a part: `out.len()` elements from `start` on, counted row-major.
    pub fn read_bf16_part(&self, name: &str, start: usize, out: &mut [bf16]) -> Result<()> {
        self.read(name, Some(start), out, bf16::from_f32, |value| value, |value| bf16::from_f32(value.to_f32()))
    }

    /// Whether a tensor here and one of `other` have the same bytes.
    pub(crate) fn bytes_equal(&self, name: &str, other: &Self, other_name: &str) -> Result<bool> {
        let (left, right) = (self.bytes(name)?, other.bytes(other_name)?);
        let mut equal = left.len() == right.len();
        for (left, right) in left.chunks(WINDOW).zip(right.chunks(WINDOW)) {
            equal = equal && left == right;
            self.release(left);
            other.release(right);
        }
        Ok(equal)
    }

    /// `start`: the first element of a part; `None`: the whole tensor.
    fn read<T: Finite>(
        &self,
        name: &str,
        start: Option<usize>,
        out: &mut [T],
        f32_to: impl Fn(f32) -> T,
        bf16_to: impl Fn(bf16) -> T,
        f16_to: impl Fn(f16) -> T,
    ) -> Result<()> {
        let dtype = self.tensor_info(name)?.dtype;
        match dtype {
            Dtype::F32 => self.convert(name, start, out, |raw: [u8; 4]| f32_to(f32::from_le_bytes(raw))),
            Dtype::BF16 => self.convert(name, start, out, |raw: [u8; 2]| bf16_to(bf16::from_le_bytes(raw))),
            Dtype::F16 => self.convert(name, start, out, |raw: [u8; 2]| f16_to(f16::from_le_bytes(raw))),
            other => Err(damaged(&self.path, &format!("tensor `{name}` is {other:?}; read are F32, BF16 and F16"))),
        }
    }

    fn convert<T: Finite, const N: usize>(
        &self,
        name: &str,
        start: Option<usize>,
        out: &mut [T],
        convert: impl Fn([u8; N]) -> T,
    ) -> Result<()> {
        let bytes = match start {
            None => self.sized(name, out.len(), N)?,
            Some(start) => self.part(name, start, out.len(), N)?,
        };
        for (window, (source, target)) in bytes.chunks(WINDOW).zip(out.chunks_mut(WINDOW / N)).enumerate() {
            let mut finite = true;
            for (raw, value) in source.as_chunks::<N>().0.iter().zip(target.iter_mut()) {
                *value = convert(*raw);
                finite &= value.finite();
            }
            if !finite && let Some(index) = target.iter().position(|value| !value.finite()) {
                let index = start.unwrap_or(0) + window * (WINDOW / N) + index;
                return Err(self.not_finite(name, index));
            }
            self.release(source);
        }
        Ok(())
    }

    fn not_finite(&self, name: &str, index: usize) -> Error {
        let shape = self.info(name).map_or(&[][..], |(_, shape)| shape);
        let mut place = vec![0; shape.len()];
        let mut rest = index;
        for (at, &side) in place.iter_mut().zip(shape).rev() {
            *at = rest % side;
            rest /= side;
        }
        Error::new(
            ErrorCode::Weights,
            format!(
                "{}: tensor `{name}` holds a value that is not finite (NaN, infinite, or too large for the training type) at {place:?}",
                self.path.display()
            ),
        )
        .hint("the checkpoint is damaged or comes from a run that diverged; take another one")
    }

    fn tensor_info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| damaged(&self.path, &format!("has no tensor `{name}`")))
    }

    /// The tensor's bytes, which must be `elements` of `size` bytes.
    fn sized(&self, name: &str, elements: usize, size: usize) -> Result<&[u8]> {
        let bytes = self.bytes(name)?;
        if bytes.len() != elements * size {
            return Err(Error::new(
                ErrorCode::Internal,
                format!("tensor `{name}` has {} bytes, but {elements} elements of {size} bytes are read", bytes.len()),
            ));
        }
        Ok(bytes)
    }

    /// The bytes of `elements` of `size` bytes, from element `start` of a tensor on.
    fn part(&self, name: &str, start: usize, elements: usize, size: usize) -> Result<&[u8]> {
        let bytes = self.bytes(name)?;
        bytes.get(start * size..(start + elements) * size).ok_or_else(|| {
            let what =
                format!("tensor `{name}` has {} bytes; elements {start} to {} are read", bytes.len(), start + elements);
            Error::new(ErrorCode::Internal, what)
        })
    }

    /// Gives back the pages that lie wholly in `read`, a part of the map. They come back from the file when touched.
    fn release(&self, read: &[u8]) {
        const PAGE: usize = 4096;
        let begin = (read.as_ptr() as usize - self.map.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (read.as_ptr() as usize - self.map.as_ptr() as usize + read.len()) / PAGE * PAGE;
        if begin < end {
            // SAFETY: the map is a read-only map of a file, so that a page given back reads the same again.
            let given_back = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
            // It only saves memory; a kernel that refuses it loses nothing else.
            drop(given_back);
        }
    }
}

/// Numbers that may be NaN or infinite.
trait Finite: Copy {
    fn finite(self) -> bool;
}

impl Finite for f32 {
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Finite for bf16 {
    fn finite(self) -> bool {
        self.is_finite()
    }
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
