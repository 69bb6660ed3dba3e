//! A model's folder that several processes write together, each the elements that it has: byte for byte what one would write
//! with [`super::save_model`]. The first one lays the files out; then each writes to its own places in them.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::save::{CHUNK, Content, Saved, cut, encode, index, saved_tensors, shard_name, sync_folder};
use super::shards::INDEX;
use super::writer::{TensorDecl, header, refused};
use crate::config::{ModelConfig, WeightDtype};
use crate::folder::{ModelFiles, write_file};
use crate::format::{CheckpointFormat, Part, StoredTensor};
use crate::tensors::{TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

/// What the files of a folder are made of; equal on every process.
pub struct SharedModel<'a> {
    /// The folder.
    pub dir: &'a Path,
    /// The small files next to the weights.
    pub files: &'a ModelFiles,
    /// The model.
    pub config: &'a ModelConfig,
    /// Names and types of the tensors.
    pub format: &'a CheckpointFormat,
    /// The type of all parameters; `None`: those of `format`.
    pub dtype: Option<WeightDtype>,
    /// Bytes of one file, as in [`super::save_model`].
    pub max_shard_bytes: u64,
}

/// A file of weights.
struct Shard<'a> {
    path: PathBuf,
    header: Vec<u8>,
    bytes: usize,
    tensors: &'a [Saved<'a>],
}

impl SharedModel<'_> {
    /// Writes everything but parameters, and gives each file its length. The folder exists and is empty. Everything is on the
    /// disk when it returns.
    pub fn lay_out(&self) -> Result<()> {
        self.files.write(self.dir, self.dtype.unwrap_or(self.format.dtype), self.config.vision.is_some())?;
        let (_, stored) = self.stored();
        let saved = saved_tensors(self.format, self.dtype, &stored)?;
        let cut = cut(&saved, self.max_shard_bytes);
        for Shard { path, header, bytes, tensors } in self.shards(&cut)? {
            let mut file = File::create(&path).map_err(|error| refused(&path, &error))?;
            let mut put = |at: usize, bytes: &[u8]| put(&mut file, &path, at, bytes);
            put(0, &header)?;
            let mut at = header.len();
            for Saved { decl, content } in tensors {
                if let Content::Carried(view) = content {
                    let mut place = at;
                    for window in view.windows() {
                        put(place, window)?;
                        place += window.len();
                    }
                }
                at += decl.bytes().unwrap_or_default();
            }
            let all = file.set_len((header.len() + bytes) as u64).and_then(|()| file.sync_all());
            all.map_err(|error| refused(&path, &error))?;
        }
        if cut.len() > 1 {
            write_file(&self.dir.join(INDEX), index(&cut).as_bytes())?;
        }
        sync_folder(self.dir)
    }

    /// Writes the elements `owned(name)` of every parameter, row-major, into files that were laid out. `fetch` fills in elements
    /// of a parameter from the given one on. They are on the disk when it returns.
    pub fn fill(
        &self,
        owned: impl Fn(&str) -> Vec<Range<usize>>,
        mut fetch: impl FnMut(&str, usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let (table, stored) = self.stored();
        let saved = saved_tensors(self.format, self.dtype, &stored)?;
        let cut = cut(&saved, self.max_shard_bytes);
        for Shard { path, header, bytes, tensors } in self.shards(&cut)? {
            let mut file = self.open(&path, header.len() + bytes)?;
            let mut at = header.len();
            for Saved { decl, content } in tensors {
                if let Content::Parameters(tensor) = content {
                    let place = TensorPlace { at, decl, path: &path };
                    for part in &tensor.parts {
                        let name = &table[part.parameter].name;
                        for range in owned(name) {
                            place.write(&mut file, part, name, range, &mut fetch)?;
                        }
                    }
                }
                at += decl.bytes().unwrap_or_default();
            }
            file.sync_all().map_err(|error| refused(&path, &error))?;
        }
        Ok(())
    }

    fn stored(&self) -> (Vec<TensorSpec>, Vec<StoredTensor>) {
        let table = tensor_table(self.config);
        let stored = self.format.tensors(self.config, &table);
        (table, stored)
    }

    fn shards<'a>(&self, cut: &[&'a [Saved<'a>]]) -> Result<Vec<Shard<'a>>> {
        let shard = |(number, tensors): (usize, &&'a [Saved<'a>])| -> Result<Shard<'a>> {
            let path = self.dir.join(shard_name(number, cut.len()));
            let declared: Vec<TensorDecl> = tensors.iter().map(|tensor| tensor.decl.clone()).collect();
            let (header, bytes) = header(&path, &[("format", "pt")], &declared)?;
            Ok(Shard { path, header, bytes, tensors })
        };
        cut.iter().enumerate().map(shard).collect()
    }

    /// A file that another process has laid out.
    fn open(&self, path: &Path, bytes: usize) -> Result<File> {
        let wrong = |what: String| {
            Error::new(ErrorCode::Io, format!("{}: rank 0 has made this file, and here it {what}", path.display()))
                .hint("output_dir must be one folder that all ranks share")
        };
        let file = match OpenOptions::new().write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(wrong("is missing".to_owned())),
            Err(error) => return Err(refused(path, &error)),
        };
        let found = file.metadata().map_err(|error| refused(path, &error))?.len();
        if found != bytes as u64 { Err(wrong(format!("has {found} bytes, not {bytes}"))) } else { Ok(file) }
    }
}

/// A tensor's place in a file.
struct TensorPlace<'a> {
    /// Its first byte.
    at: usize,
    decl: &'a TensorDecl,
    path: &'a Path,
}

impl TensorPlace<'_> {
    /// Writes elements of a parameter to their places.
    fn write(
        &self,
        file: &mut File,
        part: &Part,
        name: &str,
        range: Range<usize>,
        fetch: &mut impl FnMut(&str, usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let mut values = vec![0f32; CHUNK.min(range.len())];
        let mut bytes = Vec::new();
        let width = self.decl.dtype.bitsize() / 8;
        // Elements that follow each other in the file are written at once.
        let mut places = part.places().skip(if part.is_contiguous() { 0 } else { range.start });
        for start in range.clone().step_by(CHUNK) {
            let values = &mut values[..CHUNK.min(range.end - start)];
            fetch(name, start, values)?;
            bytes.clear();
            encode(name, self.decl.dtype, values, &mut bytes)?;
            if part.is_contiguous() {
                put(file, self.path, self.at + (part.extent().start + start) * width, &bytes)?;
                continue;
            }
            let chunk: Vec<usize> = places.by_ref().take(values.len()).collect();
            let mut first = 0;
            for end in 1..=chunk.len() {
                if end == chunk.len() || chunk[end] != chunk[end - 1] + 1 {
                    put(file, self.path, self.at + chunk[first] * width, &bytes[first * width..end * width])?;
                    first = end;
                }
            }
        }
        Ok(())
    }
}

fn put(file: &mut File, path: &Path, at: usize, bytes: &[u8]) -> Result<()> {
    let written = file.seek(SeekFrom::Start(at as u64)).and_then(|_| file.write_all(bytes));
    written.map_err(|error| refused(path, &error))
}
