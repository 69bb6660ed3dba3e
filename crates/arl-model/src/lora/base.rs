//! How an adapter names the model that it belongs to. Pure: looks at the path's text alone.

use std::path::Path;

/// The name that `adapter_config.json` gives its base: `OWNER/NAME` where `path` is a snapshot in the Hugging Face Hub's cache
/// (`models--OWNER--NAME/snapshots/COMMIT`), which other machines do not have at that path, else the path itself.
pub(super) fn base_name(path: &str) -> String {
    from_cache(path).unwrap_or_else(|| path.to_owned())
}

fn from_cache(path: &str) -> Option<String> {
    let snapshot = Path::new(path);
    let commit = snapshot.file_name()?.to_str()?;
    let snapshots = snapshot.parent()?;
    let repository = snapshots.parent()?.file_name()?.to_str()?;
    let name = repository.strip_prefix("models--")?;
    let is_commit = commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_commit && snapshots.ends_with("snapshots")).then(|| name.replace("--", "/"))
}
