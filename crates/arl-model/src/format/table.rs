//! THE table of weights files: for each family the names that files may give its parameters, the tensors in which they
//! may store them, and the tensors that they may hold besides. A new family is a new row; nothing else knows such a name.

use crate::config::{DeltaConfig, Family, ModelConfig};

/// What weights files of a family may look like.
#[derive(Debug)]
pub(crate) struct Row {
    /// Spellings of names, the one that transformers writes first.
    pub(crate) spellings: &'static [Spelling],
    /// Ways to store parameters, the one that released files have first. Files tell them apart by names, or else by shapes.
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
pub(crate) enum Other {
    /// Follows from the configuration: neither read nor written, as in transformers.
    Derived,
    /// A second copy of this parameter: must be equal to it, and is not written, as in transformers.
    CopyOf(&'static str),
    /// Not trained: every saved model has its bytes.
    Carried,
}

impl Row {
    pub(crate) fn of(config: &ModelConfig) -> &'static Row {
        let sees = config.vision.is_some();
        match (config.family, config.nested) {
            (Family::Qwen2 | Family::Qwen3, _) => &DENSE,
            (Family::Qwen3Moe, _) => &EXPERTS,
            (Family::Qwen3Next, _) => &NEXT,
            (Family::Qwen3_5, _) if sees => &SEEING,
            (Family::Qwen3_5, false) => &TEXT,
            (Family::Qwen3_5, true) => &NESTED,
            (Family::Qwen3_5Moe, _) if sees => &SEEING_EXPERTS,
            (Family::Qwen3_5Moe, false) => &TEXT_EXPERTS,
            (Family::Qwen3_5Moe, true) => &NESTED_EXPERTS,
            (Family::Qwen2_5Vl, _) if sees => &FLAT_VL,
            (Family::Qwen3Vl, _) if sees => &VL,
            (Family::Qwen3VlMoe, _) if sees => &VL_EXPERTS,
            (Family::Qwen2_5Vl, _) | (Family::Qwen3Vl, false) => &VL_TEXT,
            (Family::Qwen3Vl, true) => &VL_NESTED,
            (Family::Qwen3VlMoe, false) => &VL_TEXT_EXPERTS,
            (Family::Qwen3VlMoe, true) => &VL_NESTED_EXPERTS,
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
const WITH_OR_WITHOUT_MODEL: &[Spelling] = &[WITH_MODEL, WITHOUT_MODEL];

const WITH_MODEL: Spelling = Spelling { what: "names with `model.`", prefixes: &[] };

const WITHOUT_MODEL: Spelling = Spelling { what: "names without `model.`", prefixes: &[("model.", "")] };

/// The text part of a model that sees. transformers writes such names also next to the configuration of the text alone, where it
/// has read them.
const IN_LANGUAGE_MODEL: Spelling =
    Spelling { what: "names with `model.language_model.`", prefixes: &[("model.", "model.language_model.")] };

/// A model that sees, which was saved without its head.
const BARE: Spelling = Spelling {
    what: "names with `language_model.` and `visual.`",
    prefixes: &[("model.visual.", "visual."), ("model.", "language_model.")],
};

/// What transformers 5 has in memory.
const TOWER_AND_LANGUAGE_MODEL: Spelling = Spelling {
    what: "names with `model.language_model.` and `model.visual.`",
    prefixes: &[("model.visual.", "model.visual."), ("model.", "model.language_model.")],
};

/// Qwen2.5-VL as it was released, and as transformers writes it from files with such names.
const TOWER_OUTSIDE: Spelling =
    Spelling { what: "names with `model.` and `visual.`", prefixes: &[("model.visual.", "visual.")] };

const TOWER_INSIDE: Spelling = Spelling { what: "names with `model.` and `model.visual.`", prefixes: &[] };

const ONE_BY_ONE: Arrangement = Arrangement { what: "experts one by one", joins: &[] };

const JOINED: Arrangement =
    Arrangement { what: "experts joined in 3-D tensors", joins: &[JOINED_GATE_UP, JOINED_DOWN] };

const JOINED_GATE_UP: Join = Join {
    parameters: &["mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight"],
    tensor: "mlp.experts.gate_up_proj",
    axes: Axes::Stacked,
};

const JOINED_DOWN: Join =
    Join { parameters: &["mlp.experts.#.down_proj.weight"], tensor: "mlp.experts.down_proj", axes: Axes::Stacked };

/// Qwen3-VL-MoE as it was released, and as transformers 4 writes it. Of files that were loaded so transformers 5.24 writes
/// [`JOINED`], with the same names.
const TRANSPOSED: Arrangement = Arrangement {
    what: "experts joined in 3-D tensors and transposed",
    joins: &[Join { axes: Axes::Transposed, ..JOINED_GATE_UP }, Join { axes: Axes::Transposed, ..JOINED_DOWN }],
};

/// Qwen3-Next's projections, whose rows go by key head: its query, its key, then its value heads and their gates.
const FUSED_QKVZ: Join = Join {
    parameters: &["linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"],
    tensor: "linear_attn.in_proj_qkvz.weight",
    axes: Axes::Grouped(|config| {
        by_key_head(config, |delta| {
            vec![delta.key_columns(), delta.key_columns(), delta.value_columns(), delta.value_columns()]
        })
    }),
};

const FUSED_BA: Join = Join {
    parameters: &["linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"],
    tensor: "linear_attn.in_proj_ba.weight",
    axes: Axes::Grouped(|config| {
        by_key_head(config, |delta| vec![delta.linear_num_value_heads, delta.linear_num_value_heads])
    }),
};

fn by_key_head(config: &ModelConfig, sections: fn(&DeltaConfig) -> Vec<usize>) -> (usize, Vec<usize>) {
    config.delta.map_or((1, Vec::new()), |delta| (delta.linear_num_key_heads, sections(&delta)))
}

/// Of a tied model; that of another one is a parameter.
const TIED_HEAD: (&str, Other) = ("lm_head.weight", Other::CopyOf("model.embed_tokens.weight"));

/// Files of old versions.
const FREQUENCIES: (&str, Other) = ("*.rotary_emb.inv_freq", Other::Derived);

/// Heads that predict more than one token, which transformers passes over.
const PREDICTION: (&str, Other) = ("mtp.*", Other::Carried);

/// Of a model whose text alone is trained.
const VISION: (&str, Other) = ("model.visual.*", Other::Carried);

const VISION_OUTSIDE: (&str, Other) = ("visual.*", Other::Carried);

const OTHERS: &[(&str, Other)] = &[TIED_HEAD, FREQUENCIES];

const PLAIN: &[Arrangement] = &[Arrangement { what: "", joins: &[] }];

static DENSE: Row = Row { spellings: WITH_OR_WITHOUT_MODEL, arrangements: PLAIN, others: OTHERS };

static EXPERTS: Row = Row { spellings: WITH_OR_WITHOUT_MODEL, arrangements: &[ONE_BY_ONE, JOINED], others: OTHERS };

static NEXT: Row = Row {
    spellings: WITH_OR_WITHOUT_MODEL,
    arrangements: &[
        Arrangement { what: ONE_BY_ONE.what, joins: &[FUSED_QKVZ, FUSED_BA] },
        Arrangement { what: JOINED.what, joins: &[FUSED_QKVZ, FUSED_BA, JOINED_GATE_UP, JOINED_DOWN] },
    ],
    others: &[TIED_HEAD, PREDICTION],
};

/// Text alone, whose tower is carried.
static TEXT: Row = Row {
    spellings: &[WITH_MODEL, IN_LANGUAGE_MODEL, WITHOUT_MODEL, BARE],
    arrangements: PLAIN,
    others: &[TIED_HEAD, PREDICTION, VISION, VISION_OUTSIDE],
};

static NESTED: Row = Row { spellings: &[IN_LANGUAGE_MODEL, WITH_MODEL, WITHOUT_MODEL, BARE], ..TEXT };

/// Released files have joined experts.
static TEXT_EXPERTS: Row = Row { arrangements: &[JOINED, ONE_BY_ONE], ..TEXT };

static NESTED_EXPERTS: Row = Row { arrangements: &[JOINED, ONE_BY_ONE], ..NESTED };

/// Qwen3.5 with its tower.
static SEEING: Row = Row {
    spellings: &[TOWER_AND_LANGUAGE_MODEL, TOWER_INSIDE, TOWER_OUTSIDE, BARE],
    arrangements: PLAIN,
    others: &[TIED_HEAD, PREDICTION],
};

static SEEING_EXPERTS: Row = Row { arrangements: &[JOINED, ONE_BY_ONE], ..SEEING };

static VL: Row = Row { others: OTHERS, ..SEEING };

static VL_EXPERTS: Row = Row { arrangements: VL_ARRANGEMENTS, ..VL };

static FLAT_VL: Row = Row { spellings: &[TOWER_OUTSIDE, TOWER_AND_LANGUAGE_MODEL, TOWER_INSIDE, BARE], ..VL };

/// Text alone of the families of images.
static VL_TEXT: Row = Row { others: &[TIED_HEAD, FREQUENCIES, VISION, VISION_OUTSIDE], ..TEXT };

static VL_NESTED: Row = Row { others: VL_TEXT.others, ..NESTED };

const VL_ARRANGEMENTS: &[Arrangement] = &[TRANSPOSED, JOINED, ONE_BY_ONE];

static VL_TEXT_EXPERTS: Row = Row { arrangements: VL_ARRANGEMENTS, ..VL_TEXT };

static VL_NESTED_EXPERTS: Row = Row { arrangements: VL_ARRANGEMENTS, ..VL_NESTED };
