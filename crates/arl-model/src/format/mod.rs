//! How weights files hold a model: names, layout, types, and the tensors that are carried. A file is read as it is, and
//! saved models are like the files that were read.

mod stored;
mod table;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

pub(crate) use stored::{Part, StoredTensor, StridedView};
use table::{Arrangement, Spelling};
pub(crate) use table::{Other, Row};

use crate::config::{ModelConfig, WeightDtype};
use crate::tensors::{TensorSpec, tensor_table};
use crate::weights::SafetensorsFile;

/// How weights files hold a model.
#[derive(Clone, Debug)]
pub struct CheckpointFormat {
    spelling: &'static Spelling,
    arrangement: &'static Arrangement,
    /// The type of most elements.
    pub(crate) dtype: WeightDtype,
    /// The types of the stored tensors that have another one.
    pub(crate) other_dtypes: HashMap<String, WeightDtype>,
    /// The tensors that are carried, by name.
    pub(crate) carried: Vec<Carried>,
}

/// A tensor that is not trained. It stays in its file, which stays mapped.
#[derive(Clone, Debug)]
pub(crate) struct Carried {
    pub(crate) name: String,
    pub(crate) file: Arc<SafetensorsFile>,
}

impl CheckpointFormat {
    /// What transformers writes for a model of this configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let row = Row::of(config);
        Self::plain(&row.spellings[0], &row.arrangements[0], config)
    }

    /// Each way in which files of the family may name and lay out parameters.
    pub fn all(config: &ModelConfig) -> Vec<Self> {
        Self::all_of(Row::of(config), config)
    }

    pub(crate) fn all_of(row: &'static Row, config: &ModelConfig) -> Vec<Self> {
        let spelled = |spelling| row.arrangements.iter().map(move |arrangement| (spelling, arrangement));
        let pairs = row.spellings.iter().flat_map(spelled);
        pairs.map(|(spelling, arrangement)| Self::plain(spelling, arrangement, config)).collect()
    }

    fn plain(spelling: &'static Spelling, arrangement: &'static Arrangement, config: &ModelConfig) -> Self {
        let dtype = config.dtype.unwrap_or(WeightDtype::F32);
        Self { spelling, arrangement, dtype, other_dtypes: HashMap::new(), carried: Vec::new() }
    }

    /// The format of files with these tensors, by names and shapes: that which knows the most names, and among equals the most
    /// shapes. Where another format knows a name that this one does not, the files mix the two, which is the error.
    pub(crate) fn of_tensors<'a>(
        row: &'static Row,
        config: &ModelConfig,
        tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    ) -> Result<Self, String> {
        let formats = Self::all_of(row, config);
        let table = tensor_table(config);
        let mut known: HashMap<&str, (&[usize], Vec<usize>)> =
            tensors.map(|(name, shape)| (name, (shape, Vec::new()))).collect();
        let mut counts = vec![(0, 0); formats.len()];
        for (index, format) in formats.iter().enumerate() {
            for tensor in format.tensors(config, &table) {
                if let Some((shape, by)) = known.get_mut(tensor.name.as_str()) {
                    by.push(index);
                    counts[index].0 += 1;
                    counts[index].1 += usize::from(*shape == tensor.shape);
                }
            }
        }
        let known: HashMap<&str, Vec<usize>> = known.into_iter().map(|(name, (_, by))| (name, by)).collect();
        // The first of the greatest.
        let best = (0..counts.len()).rev().max_by_key(|&index| counts[index]).unwrap_or(0);
        let least = |fits: &dyn Fn(&[usize]) -> bool| known.iter().filter(|(_, by)| fits(by)).min();
        if let Some((foreign, by)) = least(&|by| !by.is_empty() && !by.contains(&best)) {
            let own = least(&|own| own.contains(&best) && !own.contains(&by[0])).map_or("", |(own, _)| own);
            return Err(format!(
                "the tensors mix two formats: {} (`{own}`) and {} (`{foreign}`)",
                formats[best], formats[by[0]]
            ));
        }
        Ok(formats[best].clone())
    }

    /// The tensors of a file, in the order of the table of tensors.
    pub(crate) fn tensors(&self, config: &ModelConfig, table: &[TensorSpec]) -> Vec<StoredTensor> {
        stored::stored_tensors(self.spelling, self.arrangement, config, table)
    }

    /// The name in the file of a parameter that has a tensor of its own.
    pub(crate) fn spell(&self, name: &str) -> String {
        self.spelling.spell(name)
    }

    /// The type in which most elements are stored.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }
}

impl fmt::Display for CheckpointFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.spelling.what)?;
        if self.arrangement.what.is_empty() { Ok(()) } else { write!(f, ", {}", self.arrangement.what) }
    }
}
