//! Which algorithm computes each large matrix product: the fastest of those that the library proposes, chosen by measurement once
//! and kept, in a run's saved state and in a file for later runs. Knows neither the library nor a clock: both are behind
//! [`Proposals`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arl_model::Result;
use serde_json::{Map, Value, json};

use crate::backend::{DType, Layout};

/// Most algorithms that are compared.
pub(super) const MOST_PROPOSALS: usize = 8;
/// Timed rounds over all proposals, after one that warms up. The least time of each counts.
const ROUNDS: usize = 3;
/// Products over fewer tokens take the first proposal: those of generation, and what remains of a micro-batch's rows. They are
/// short, and have too many sizes.
const LEAST_TOKENS: usize = 1024;
/// The number of the format in which choices are kept.
const FORMAT: u64 = 1;

/// An algorithm, as cuBLASLt serialises it: `cublasLtMatmulAlgo_t` "can be trivially serialized and later restored for use with
/// the same version of cuBLAS library".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Algorithm(pub(super) [u64; 8]);

/// What the library has for one product.
pub(super) trait Proposals {
    /// At most so many algorithms, the library's best guess first; at least one.
    fn proposed(&mut self, most: usize) -> Result<Vec<Algorithm>>;

    /// Whether an algorithm computes this product, in the memory that there is for it.
    fn takes(&mut self, algorithm: &Algorithm) -> bool;

    /// Computes the product; seconds. Fails where the algorithm does.
    fn time(&mut self, algorithm: &Algorithm) -> Result<f64>;
}

/// A product, as far as its plan depends on it; sizes as in [`crate::backend::Matmul`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) layout: Layout,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Of a, b and c.
    pub(super) strides: [usize; 3],
    /// Of a, b and c.
    pub(super) types: [DType; 3],
    pub(super) accumulate: bool,
    pub(super) bias: Option<DType>,
    /// Bytes that the addresses of a, b and c are multiples of.
    pub(super) alignments: [u32; 3],
}

impl Product {
    /// The name under which its choice is kept; `None` where nothing is measured. All numbers of tokens of a class share one:
    /// packed micro-batches have thousands, and an eighth of an octave changes neither tiles nor waves by much.
    fn name(&self) -> Option<String> {
        let tokens = if self.layout == Layout::Tn { self.k } else { self.m };
        if tokens < LEAST_TOKENS {
            return None;
        }
        let class = class_of(tokens);
        let (layout, [m, n, k]) = match self.layout {
            Layout::Nt => ("nt", [class, self.n, self.k]),
            Layout::Nn => ("nn", [class, self.n, self.k]),
            Layout::Tn => ("tn", [self.m, self.n, class]),
        };
        let [a, b, c] = self.types.map(word);
        let [a_stride, b_stride, c_stride] = self.strides;
        let [a_bytes, b_bytes, c_bytes] = self.alignments;
        let add = if self.accumulate { " add" } else { "" };
        let bias = self.bias.map(|dtype| format!(" bias {}", word(dtype))).unwrap_or_default();
        Some(format!(
            "{layout} {m}x{n}x{k} {a} {b} {c} strides {a_stride} {b_stride} {c_stride} aligned {a_bytes} {b_bytes} {c_bytes}{add}{bias}"
        ))
    }
}

/// The most tokens of a class: an eighth of a power of two, rounded up.
fn class_of(tokens: usize) -> usize {
    let step = 1 << tokens.ilog2().saturating_sub(3);
    tokens.div_ceil(step) * step
}

fn word(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        DType::F64 => "f64",
        DType::I32 => "i32",
        DType::U16 => "u16",
        DType::U8 => "u8",
    }
}

/// What was chosen for a product.
#[derive(Clone, Debug, PartialEq)]
struct Choice {
    algorithm: Algorithm,
    /// Its place among the proposals, from 0.
    proposal: usize,
    /// Nanoseconds of the first proposal and of this one; `None`: not measured.
    times: Option<(u64, u64)>,
}

impl Choice {
    fn to_json(&self) -> Value {
        let hex: String = self.algorithm.0.iter().map(|word| format!("{word:016x}")).collect();
        let (first, chosen) = self.times.unzip();
        json!({ "algorithm": hex, "proposal": self.proposal, "first_ns": first, "chosen_ns": chosen })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let hex = value["algorithm"].as_str().filter(|hex| hex.len() == 128 && hex.is_ascii())?;
        let mut words = [0; 8];
        for (i, word) in words.iter_mut().enumerate() {
            *word = u64::from_str_radix(&hex[16 * i..][..16], 16).ok()?;
        }
        Some(Choice {
            algorithm: Algorithm(words),
            proposal: usize::try_from(value["proposal"].as_u64()?).ok()?,
            times: value["first_ns"].as_u64().zip(value["chosen_ns"].as_u64()),
        })
    }
}

/// Choices by the names of their products.
type Choices = BTreeMap<String, Choice>;

/// The choices of one run on one GPU.
#[derive(Debug)]
pub(super) struct Algorithms {
    /// The GPU's name and the library's version: no other can use what is kept.
    made_for: String,
    /// Those that this run uses: what its saved state has.
    used: Choices,
    /// Those of earlier runs.
    stored: Choices,
    /// Where later runs find them.
    file: Option<PathBuf>,
}

impl Algorithms {
    /// Without a choice yet, but with those of earlier runs that `folder` has. Also gives what a user should know: that they
    /// cannot be read, or that none can be kept.
    pub(super) fn open(gpu: &str, version: usize, folder: Option<&Path>) -> (Self, Option<String>) {
        let made_for = format!("{gpu}, cuBLASLt {version}");
        let mut opened = Algorithms { made_for, used: Choices::new(), stored: Choices::new(), file: None };
        let Some(folder) = folder else { return (opened, None) };
        let file = folder.join(format!("{}.json", opened.made_for.replace(|c: char| !c.is_ascii_alphanumeric(), "-")));
        let notice = match std::fs::create_dir_all(folder).and_then(|()| read_if_any(&file)) {
            Err(error) => {
                let why = "algorithms of matrix products are measured in every run, which may then differ in bits";
                return (opened, Some(format!("{}: {error}; {why}", file.display())));
            }
            Ok(None) => None,
            Ok(Some(text)) => {
                let (stored, wrong) = parse(&text, &opened.made_for);
                opened.stored = stored;
                wrong.map(|wrong| format!("{}: {wrong}; they are ignored and measured again", file.display()))
            }
        };
        opened.file = Some(file);
        (opened, notice)
    }

    /// The algorithm of a product: what the run used before, else what an earlier run did, else the fastest now.
    pub(super) fn choose(&mut self, product: &Product, library: &mut impl Proposals) -> Result<Algorithm> {
        let Some(name) = product.name() else { return first(library) };
        if !self.used.contains_key(&name) {
            let choice = match self.stored.get(&name) {
                Some(stored) => stored.clone(),
                None => {
                    let made = if product.accumulate { self.as_assigned(product, library)? } else { measure(library)? };
                    self.store(&name, &made);
                    made
                }
            };
            self.used.insert(name.clone(), choice);
        }
        let algorithm = self.used[&name].algorithm;
        // It was chosen for another number of tokens of the class, and need not take all of them. The numbers alone decide.
        if library.takes(&algorithm) { Ok(algorithm) } else { first(library) }
    }

    /// A product that is added to its result cannot be measured without changing it, so that it takes what was chosen for the
    /// one that assigns it: the first micro-batch of a step has both shapes in this order.
    fn as_assigned(&self, product: &Product, library: &mut impl Proposals) -> Result<Choice> {
        let name = Product { accumulate: false, ..*product }.name();
        let assigned = name.and_then(|name| self.used.get(&name).or_else(|| self.stored.get(&name)));
        match assigned {
            Some(choice) if library.takes(&choice.algorithm) => Ok(Choice { times: None, ..choice.clone() }),
            _ => Ok(Choice { algorithm: first(library)?, proposal: 0, times: None }),
        }
    }

    /// Keeps a choice for later runs, next to those that other processes have kept meanwhile. Where the file cannot be written,
    /// later runs measure again.
    fn store(&mut self, name: &str, choice: &Choice) {
        let Some(file) = &self.file else { return };
        let meanwhile = read_if_any(file).ok().flatten().map(|text| parse(&text, &self.made_for).0);
        self.stored.extend(meanwhile.unwrap_or_default());
        self.stored.entry(name.to_owned()).or_insert_with(|| choice.clone());
        let partial = file.with_extension(format!("{}.partial", std::process::id()));
        let written = std::fs::write(&partial, text_of(&self.stored, &self.made_for));
        if written.and_then(|()| std::fs::rename(&partial, file)).is_err() {
            // A disk that is full is no reason to end a run.
            let _ = std::fs::remove_file(&partial);
            self.file = None;
        }
    }

    /// The choices of this run, for its saved state; `None` where there are none.
    pub(super) fn to_text(&self) -> Option<String> {
        (!self.used.is_empty()).then(|| text_of(&self.used, &self.made_for))
    }

    /// Uses the choices of a saved state before all others. Gives what a user should know: why the run's bits will differ.
    pub(super) fn restore(&mut self, saved: &str) -> Option<String> {
        let (used, wrong) = parse(saved, &self.made_for);
        self.used = used;
        wrong.map(|wrong| {
            format!("the checkpoint's algorithms of matrix products: {wrong}; they are chosen again, so results differ in bits")
        })
    }
}

/// The library's best guess.
fn first(library: &mut impl Proposals) -> Result<Algorithm> {
    let proposed = library.proposed(1)?;
    Ok(proposed[0])
}

/// The fastest proposal, the first of equals; those that fail are left out. Fails where all do.
fn measure(library: &mut impl Proposals) -> Result<Choice> {
    let proposed = library.proposed(MOST_PROPOSALS)?;
    let mut times = vec![Some(f64::INFINITY); proposed.len()];
    let mut failure = None;
    // Round by round, so that a clock that slows down slows all of them.
    for round in 0..=ROUNDS {
        for (time, algorithm) in times.iter_mut().zip(&proposed) {
            let Some(least) = *time else { continue };
            match library.time(algorithm) {
                Ok(seconds) if round > 0 => *time = Some(least.min(seconds)),
                Ok(_) => {}
                Err(error) => {
                    failure = failure.or(Some(error));
                    *time = None;
                }
            }
        }
    }
    let timed = times.iter().enumerate().filter_map(|(i, time)| Some((i, (*time)?)));
    let fastest = timed.reduce(|best, other| if other.1 < best.1 { other } else { best });
    match (fastest, failure) {
        (Some((proposal, seconds)), _) => {
            let nanoseconds = |seconds: f64| (1e9 * seconds).round() as u64;
            let measured = times[0].map(|of_first| (nanoseconds(of_first), nanoseconds(seconds)));
            Ok(Choice { algorithm: proposed[proposal], proposal, times: measured })
        }
        (None, Some(error)) => Err(error),
        (None, None) => unreachable!("a library proposes at least one algorithm"),
    }
}

fn read_if_any(file: &Path) -> std::io::Result<Option<String>> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn text_of(choices: &Choices, made_for: &str) -> String {
    let choices: Map<String, Value> = choices.iter().map(|(name, choice)| (name.clone(), choice.to_json())).collect();
    json!({ "format": FORMAT, "made_for": made_for, "choices": choices }).to_string()
}

/// The choices in a text that this GPU and library can use, and in words what is wrong with the others.
fn parse(text: &str, made_for: &str) -> (Choices, Option<String>) {
    let none = |wrong: String| (Choices::new(), Some(wrong));
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(error) => return none(format!("their text is not JSON ({error})")),
    };
    if value["format"] != FORMAT {
        return none(format!("this version does not read their format {}", value["format"]));
    }
    let Some(choices) = value["choices"].as_object() else { return none("they are missing".into()) };
    if value["made_for"] != made_for {
        return none(format!("they are for {}, and this is \"{made_for}\"", value["made_for"]));
    }
    let read = |(name, choice): (&String, &Value)| Some((name.clone(), Choice::from_json(choice)?));
    let read: Choices = choices.iter().filter_map(read).collect();
    let damaged = choices.len() - read.len();
    let wrong = (damaged > 0).then(|| format!("{damaged} of {} are damaged", choices.len()));
    (read, wrong)
}

#[cfg(test)]
#[path = "algorithms_tests.rs"]
mod tests;
