//! THE table of weights files: for each family the names that files may give its parameters, the tensors in which they
//! may store them, and the tensors that they may hold besides. A new family is a new row; nothing else knows such a name.

use crate::config::{Family, ModelConfig};

/// What weights files of a family may look like.
#[derive(Debug)]
pub(crate) struct Row {
    /// Spellings of names, the one that transformers writes first.
    pub(crate) spellings: &'static [Spelling],
    /// Ways to store parameters, the one that transformers writes first. Files tell them apart by names.
    pub(crate) arrangements: &'static [Arrangement],
    /// Names of tensors that are not parameters, each with at most one `*` for any text, and what becomes of them. Any
    /// other name is refused.
    pub(crate) others: &'static [(&'static str, Other)],
}

/// How a file spells names.
#[derive(Debug)]
pub(crate) struct Spelling {
    /// For messages.
    pub(crate) what: &'static str,
    /// A prefix of this program's name and what the file has in its place; the first that fits counts.
    pub(crate) prefixes: &'static [(&'static str, &'static str)],
}

/// How a file stores parameters: one tensor for each, but for those that are joined.
#[derive(Debug)]
pub(crate) struct Arrangement {
    /// For messages; empty where the family has no other.
    pub(crate) what: &'static str,
    pub(crate) joins: &'static [Join],
}

/// Parameters that share a tensor.
#[derive(Debug)]
pub(crate) struct Join {
    /// How their names end; `#` is a number, and parameters of every number share the tensor.
    pub(crate) parameters: &'static [&'static str],
    /// How the tensor's name ends; it begins as the parameters' names do.
    pub(crate) tensor: &'static str,
    pub(crate) axes: Axes,
}

/// How matrices `[rows, columns]`, in the order of [`Join::parameters`], form one tensor.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), allow(dead_code, reason = "files of the families to come have the last two"))]
pub(crate) enum Axes {
    /// `[numbers, rows of all, columns]`.
    Stacked,
    /// `[numbers, columns, rows of all]`: each matrix is transposed.
    Transposed,
    /// `[rows of all, columns]`, the rows reordered. The function returns a number of groups and the rows of each section
    /// that the parameters consist of; a group holds an equal share of every section, in their order.
    Grouped(fn(&ModelConfig) -> (usize, Vec<usize>)),
}

/// A tensor that is not a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "files of the families to come have tensors to carry"))]
pub(crate) enum Other {
    /// Follows from the configuration: neither read nor written, as in transformers.
    Derived,
    /// A second copy of this parameter: must be equal to it, and is not written, as in transformers.
    CopyOf(&'static str),
    /// Not trained: every saved model has its bytes.
    Carried,
}

impl Row {
    pub(crate) fn of(family: Family) -> &'static Row {
        match family {
            Family::Qwen2 | Family::Qwen3 => &DENSE,
            Family::Qwen3Moe => &EXPERTS,
        }
    }

    /// What becomes of a tensor that is not a parameter. `None`: it is refused.
    pub(crate) fn other(&self, name: &str) -> Option<Other> {
        let fits = |pattern: &str| match pattern.split_once('*') {
            None => name == pattern,
            Some((begin, end)) => name.strip_prefix(begin).is_some_and(|rest| rest.ends_with(end)),
        };
        self.others.iter().find(|(pattern, _)| fits(pattern)).map(|&(_, other)| other)
    }
}

impl Spelling {
    /// How the file spells `name`.
    pub(crate) fn spell(&self, name: &str) -> String {
        let spelled = self.prefixes.iter().find_map(|&(from, to)| Some(format!("{to}{}", name.strip_prefix(from)?)));
        spelled.unwrap_or_else(|| name.to_owned())
    }
}

impl Join {
    /// Of a parameter that belongs here: the tensor's name, and the parameter's number and place in
    /// [`Join::parameters`].
    pub(crate) fn tensor_of(&self, name: &str) -> Option<(String, (usize, usize))> {
        self.parameters.iter().enumerate().find_map(|(place, pattern)| {
            let (begin, number) = match pattern.split_once('#') {
                None => (name.strip_suffix(pattern)?, 0),
                Some((before, after)) => {
                    let (begin, number) = name.strip_suffix(after)?.rsplit_once(before)?;
                    (begin, number.parse().ok()?)
                }
            };
            Some((format!("{begin}{}", self.tensor), (number, place)))
        })
    }
}

/// `Qwen3ForCausalLM` saves names with `model.`, a bare decoder (`Qwen3Model`) without; transformers loads both as both.
const WITH_OR_WITHOUT_MODEL: &[Spelling] = &[
    Spelling { what: "names with `model.`", prefixes: &[] },
    Spelling { what: "names without `model.`", prefixes: &[("model.", "")] },
];

const ONE_BY_ONE: Arrangement = Arrangement { what: "experts one by one", joins: &[] };

const JOINED: Arrangement = Arrangement {
    what: "experts joined in 3-D tensors",
    joins: &[
        Join {
            parameters: &["mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight"],
            tensor: "mlp.experts.gate_up_proj",
            axes: Axes::Stacked,
        },
        Join { parameters: &["mlp.experts.#.down_proj.weight"], tensor: "mlp.experts.down_proj", axes: Axes::Stacked },
    ],
};

const OTHERS: &[(&str, Other)] = &[
    // Of a tied model; that of another one is a parameter.
    ("lm_head.weight", Other::CopyOf("model.embed_tokens.weight")),
    // Files of old versions.
    ("*.rotary_emb.inv_freq", Other::Derived),
];

static DENSE: Row =
    Row { spellings: WITH_OR_WITHOUT_MODEL, arrangements: &[Arrangement { what: "", joins: &[] }], others: OTHERS };

static EXPERTS: Row = Row { spellings: WITH_OR_WITHOUT_MODEL, arrangements: &[ONE_BY_ONE, JOINED], others: OTHERS };
