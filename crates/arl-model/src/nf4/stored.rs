//! A tensor in NF4 as bitsandbytes stores it in a weights file: its codes under the tensor's own name, and next to them scales,
//! tables of values and a description in JSON. Checks that these are the ones that this program computes with.

use safetensors::Dtype;
use serde_json::Value;

use super::{NF4_BLOCK, NF4_NESTED_BLOCK, NF4_VALUES, Nf4, Nf4Scales, nf4_scale_values};
use crate::weights::SafetensorsFile;
use crate::{Error, ErrorCode, Result};

const DESCRIPTION: &str = "quant_state.bitsandbytes__nf4";
/// What is stored next to a tensor's codes, by the end of its name.
const COMPANIONS: [&str; 5] = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", DESCRIPTION];

/// Whether a name is that of a companion of a tensor that `quantized` knows.
pub(crate) fn is_companion(name: &str, quantized: impl Fn(&str) -> bool) -> bool {
    let tensor = |end: &&str| name.strip_suffix(*end).and_then(|name| name.strip_suffix('.'));
    COMPANIONS.iter().filter_map(tensor).any(quantized)
}

/// A tensor in NF4 in a file, its description checked.
pub(crate) struct StoredNf4<'a> {
    file: &'a SafetensorsFile,
    name: &'a str,
    elements: usize,
    nested: bool,
    offset: f32,
}

impl<'a> StoredNf4<'a> {
    /// Whether the file has a tensor's codes under its name, `elements` of them.
    pub(crate) fn is_stored(file: &SafetensorsFile, name: &str, elements: usize) -> bool {
        let codes = elements.div_ceil(2);
        file.info(name).is_some_and(|(dtype, shape)| dtype == Dtype::U8 && shape.iter().product::<usize>() == codes)
    }

    /// Reads the description.
    pub(crate) fn open(file: &'a SafetensorsFile, name: &'a str, shape: &[usize]) -> Result<Self> {
        let elements = shape.iter().product();
        let mut stored = StoredNf4 { file, name, elements, nested: false, offset: 0.0 };
        let text: Value = serde_json::from_slice(file.bytes(&stored.part(DESCRIPTION))?)
            .map_err(|error| stored.fault(&format!("its description is not JSON: {error}")))?;
        let is = |key: &str, expected: Value| {
            if text[key] == expected {
                return Ok(());
            }
            Err(stored.fault(&format!("`{key}` of its description is {}, not {expected}", text[key])))
        };
        is("quant_type", "nf4".into())?;
        is("blocksize", NF4_BLOCK.into())?;
        is("shape", shape.into())?;
        let nested = !text["nested_offset"].is_null();
        if nested {
            is("nested_blocksize", NF4_NESTED_BLOCK.into())?;
        }
        let offset = text["nested_offset"].as_f64().unwrap_or_default() as f32;
        (stored.nested, stored.offset) = (nested, offset);
        stored.table("quant_map", &NF4_VALUES)?;
        if nested {
            stored.table("nested_quant_map", nf4_scale_values())?;
        }
        Ok(stored)
    }

    /// Reads codes and scales.
    pub(crate) fn read(&self) -> Result<Nf4> {
        let codes = self.file.bytes(self.name)?.to_vec();
        let blocks = self.elements.div_ceil(NF4_BLOCK);
        if !self.nested {
            return Ok(Nf4 { codes, scales: Nf4Scales::Plain(self.floats("absmax", blocks)?) });
        }
        let scales = self.file.bytes(&self.part("absmax"))?.to_vec();
        if scales.len() != blocks {
            return Err(self.fault(&format!("`absmax` has {} values, not {blocks}", scales.len())));
        }
        let largest = self.floats("nested_absmax", blocks.div_ceil(NF4_NESTED_BLOCK))?;
        Ok(Nf4 { codes, scales: Nf4Scales::Nested { codes: scales, largest, offset: self.offset } })
    }

    fn part(&self, end: &str) -> String {
        format!("{}.{end}", self.name)
    }

    fn floats(&self, end: &str, len: usize) -> Result<Vec<f32>> {
        let name = self.part(end);
        if self.file.info(&name).is_some_and(|(_, shape)| shape.iter().product::<usize>() != len) {
            return Err(self.fault(&format!("`{end}` does not have {len} values")));
        }
        let mut values = vec![0f32; len];
        self.file.read_f32(&name, &mut values)?;
        Ok(values)
    }

    fn table(&self, end: &str, expected: &[f32]) -> Result<()> {
        if self.floats(end, expected.len())? == expected {
            return Ok(());
        }
        Err(self.fault(&format!("`{end}` is another table of values")))
    }

    fn fault(&self, what: &str) -> Error {
        let (path, name) = (self.file.path().display(), self.name);
        Error::new(ErrorCode::Weights, format!("{path}: tensor `{name}` is in 4 bits, and {what}"))
            .hint("built is NF4 of bitsandbytes with blocks of 64; or take the folder with weights in 16 bits")
    }
}
