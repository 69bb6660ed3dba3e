//! Finds a model's weights: one file, or the shards that an index lists.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::path::{Component, Path};
use std::sync::Arc;

use serde_json::Value;

use super::file::{SafetensorsFile, damaged};
use crate::folder::{no_weights, unreadable};
use crate::{Error, ErrorCode, Result};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Files of weights, and the index of the file that has a tensor.
pub(super) type Found = (Vec<Arc<SafetensorsFile>>, HashMap<String, usize>);

/// `dir/model.safetensors`, or the shards of `dir/model.safetensors.index.json`.
pub(super) fn find(dir: &Path) -> Result<Found> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if single.exists() {
        let file = SafetensorsFile::open(&single)?;
        let home = file.names().into_iter().map(|name| (name, 0)).collect();
        Ok((vec![Arc::new(file)], home))
    } else if index.exists() {
        open_shards(dir, &index)
    } else {
        Err(no_weights(dir))
    }
}

fn open_shards(dir: &Path, index: &Path) -> Result<Found> {
    let text = std::fs::read_to_string(index).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => damaged(index, "is not UTF-8"),
        _ => Error::io(index, &error),
    })?;
    if let Some(what) = unreadable(text.as_bytes()) {
        return Err(what.error(ErrorCode::Weights, index));
    }
    let value: Value = serde_json::from_str(&text).map_err(|error| damaged(index, &format!("is not JSON: {error}")))?;
    let Some(Value::Object(map)) = value.get("weight_map") else {
        return Err(damaged(index, "has no object `weight_map`"));
    };
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let Some(shard) = shard.as_str().filter(|shard| is_file_name(shard)) else {
            return Err(damaged(index, &format!("maps `{tensor}` to {shard}, which is not a file name")));
        };
        shards.entry(shard).or_default().insert(tensor);
    }
    let absent: Vec<String> =
        shards.keys().filter(|shard| !dir.join(shard).exists()).map(|shard| (*shard).to_owned()).collect();
    if !absent.is_empty() {
        let mut message = String::new();
        list(&mut message, "files that it lists are missing", &absent);
        let hint = format!("complete the download: {} of {} files of weights are missing", absent.len(), shards.len());
        return Err(damaged(index, &message).hint(hint));
    }
    let mut files = Vec::new();
    let mut home = HashMap::new();
    for (shard, tensors) in shards {
        let path = dir.join(shard);
        let file = SafetensorsFile::open(&path)?;
        let names = file.names();
        let unlisted: Vec<String> = names.iter().filter(|name| !tensors.contains(name.as_str())).cloned().collect();
        let absent: Vec<String> =
            tensors.iter().filter(|name| file.info(name).is_none()).map(|name| (*name).to_owned()).collect();
        let mut message = String::new();
        list(&mut message, "tensors that the index places there are missing", &absent);
        list(&mut message, "tensors that the index does not place there", &unlisted);
        if !message.is_empty() {
            return Err(damaged(&path, &format!("disagrees with {INDEX}: {message}")));
        }
        home.extend(names.into_iter().map(|name| (name, files.len())));
        files.push(Arc::new(file));
    }
    Ok((files, home))
}

/// Adds `what (count): the first five names` to a message.
pub(super) fn list(message: &mut String, what: &str, names: &[String]) {
    const SHOWN: usize = 5;
    if names.is_empty() {
        return;
    }
    if !message.is_empty() {
        message.push_str("; ");
    }
    let first = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    // Writing to a string cannot fail.
    let _ = write!(message, "{what} ({}): {first}{more}", names.len());
}

/// A plain name, which cannot point outside the folder.
fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}
