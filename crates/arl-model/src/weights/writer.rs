//! A safetensors file, written front to back: names, types and shapes are declared first, then bytes are appended. For
//! weights and for the state of a run; memory holds only what is being appended.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::{Error, ErrorCode, Result};

/// A tensor of a file to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDecl {
    /// Its name, unique in the file.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Row-major.
    pub shape: Vec<usize>,
}

impl TensorDecl {
    /// Size in bytes. `None`: the shape is larger than any memory, or its bits are not whole bytes.
    pub fn bytes(&self) -> Option<usize> {
        let elements = self.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side))?;
        let bits = elements.checked_mul(self.dtype.bitsize())?;
        (bits % 8 == 0).then_some(bits / 8)
    }
}

/// A safetensors file that is being written.
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    file: File,
    /// Bytes of tensors that are still to come.
    left: usize,
}

impl SafetensorsWriter {
    /// Creates the file (an existing one is replaced) and writes its header. The tensors are in the order of `tensors`;
    /// `metadata` are the header's free entries.
    pub fn create(path: &Path, metadata: &[(&str, &str)], tensors: &[TensorDecl]) -> Result<Self> {
        let (header, left) = header(path, metadata, tensors)?;
        let file = File::create(path).map_err(|error| refused(path, &error))?;
        let mut writer = Self { path: path.to_path_buf(), file, left };
        writer.write(&header)?;
        Ok(writer)
    }

    /// Appends bytes, little-endian, of the declared tensors in their order; calls need not end where tensors do.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        match self.left.checked_sub(bytes.len()) {
            Some(left) => self.left = left,
            None => return Err(self.wrong_size("more bytes than were declared")),
        }
        self.write(bytes)
    }

    /// Ends the file and waits until it is on the disk. All declared bytes must have been appended.
    pub fn finish(self) -> Result<()> {
        if self.left != 0 {
            return Err(self.wrong_size("fewer bytes than were declared"));
        }
        self.file.sync_all().map_err(|error| refused(&self.path, &error))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| refused(&self.path, &error))
    }

    fn wrong_size(&self, what: &str) -> Error {
        Error::new(ErrorCode::Internal, format!("{}: {what}", self.path.display()))
    }
}

/// The bytes of a file before its tensors, and how many bytes of tensors follow; the same for the same arguments.
pub(crate) fn header(path: &Path, metadata: &[(&str, &str)], tensors: &[TensorDecl]) -> Result<(Vec<u8>, usize)> {
    let internal = |what: String| Error::new(ErrorCode::Internal, format!("{}: {what}", path.display()));
    let mut header = Map::new();
    if !metadata.is_empty() {
        let entries = metadata.iter().map(|&(key, value)| (key.to_owned(), Value::from(value)));
        header.insert("__metadata__".to_owned(), Value::Object(entries.collect()));
    }
    let mut end = 0usize;
    for tensor in tensors {
        let begin = end;
        end = tensor
            .bytes()
            .and_then(|bytes| begin.checked_add(bytes))
            .ok_or_else(|| internal(format!("tensor `{}` has an impossible shape", tensor.name)))?;
        let entry = json!({
            "dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [begin, end],
        });
        if tensor.name == "__metadata__" || header.insert(tensor.name.clone(), entry).is_some() {
            return Err(internal(format!("tensor `{}` is declared twice", tensor.name)));
        }
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // Tensors begin at a multiple of 8 bytes, so that they can be used from a map.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok((bytes, end))
}

/// An error of the operating system while writing, with advice where there is some.
pub(crate) fn refused(path: &Path, error: &std::io::Error) -> Error {
    let hint = match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "free some space on that disk, or choose another output folder"
        }
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            "choose an output folder that you are allowed to write to"
        }
        _ => "",
    };
    Error::io(path, error).hint(hint)
}
