//! The types of weights, and their names in `config.json`.

use safetensors::Dtype;

use super::keys::Keys;
use crate::Result;

/// The types in which weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl WeightDtype {
    /// The name in `config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            WeightDtype::F32 => "float32",
            WeightDtype::Bf16 => "bfloat16",
            WeightDtype::F16 => "float16",
        }
    }

    /// The type of that name in `config.json`: one of torch's, with or without `torch.` before it.
    pub fn from_name(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" | "float" => Some(WeightDtype::F32),
            "bfloat16" => Some(WeightDtype::Bf16),
            "float16" | "half" => Some(WeightDtype::F16),
            _ => None,
        }
    }

    /// The type of a tensor in a file. `None`: weights are not stored in it.
    pub(crate) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(WeightDtype::F32),
            Dtype::BF16 => Some(WeightDtype::Bf16),
            Dtype::F16 => Some(WeightDtype::F16),
            _ => None,
        }
    }

    /// The type of a tensor in a file.
    pub(crate) fn in_file(self) -> Dtype {
        match self {
            WeightDtype::F32 => Dtype::F32,
            WeightDtype::Bf16 => Dtype::BF16,
            WeightDtype::F16 => Dtype::F16,
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            WeightDtype::F32 => 4,
            WeightDtype::Bf16 | WeightDtype::F16 => 2,
        }
    }
}

/// The type of the weights. `None`: the file does not name it, or says `auto`, the type of the weights files.
pub(super) fn read(keys: &mut Keys<'_>) -> Result<Option<WeightDtype>> {
    let old = keys.optional_text("torch_dtype")?;
    let new = keys.optional_text("dtype")?;
    let (key, name) = match (new, old) {
        (Some(name), _) => ("dtype", name),
        (None, Some(name)) => ("torch_dtype", name),
        (None, None) => return Ok(None),
    };
    match WeightDtype::from_name(name) {
        _ if name == "auto" => Ok(None),
        Some(dtype) => Ok(Some(dtype)),
        None => Err(keys
            .error(key, format_args!("`{name}` is not supported"))
            .hint("supported are float32, bfloat16 and float16")),
    }
}
