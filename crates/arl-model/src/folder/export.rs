//! Changes to the files of a saved model that follow from how it was trained: the template that rendered the rows, and
//! the tokens that end a reply.

use serde_json::{Map, Value, json};

use super::{CONFIG, GENERATION, ModelFiles, NAMED_TEMPLATES, OLD_TEMPLATE, ObjectText, TEMPLATE, TOKENIZER};

/// How a model was trained, as far as its folder describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportOverrides {
    /// The template that rendered the rows, if it is not the folder's own.
    pub chat_template: Option<String>,
    /// The tokens that end a reply; empty if they are not known.
    pub stop_ids: Vec<u32>,
}

/// What transformers reads from `config.json` for generation if there is no `generation_config.json`.
const GENERATION_KEYS: &[&str] = &[
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "max_length",
    "min_length",
    "suppress_tokens",
    "bad_words_ids",
];

impl ModelFiles {
    /// Changes the files to describe how the model was trained. Returns a sentence for each change, none if the folder
    /// describes all of it already.
    pub fn apply(&mut self, overrides: &ExportOverrides) -> Vec<String> {
        let template = match &overrides.chat_template {
            Some(template) => self.replace_template(template),
            None => self.drop_contradictions(),
        };
        template.into_iter().chain(self.stop_at(&overrides.stop_ids)).collect()
    }

    /// Stores the template as `chat_template.jinja` and removes all others: loaders would choose a named one for rows
    /// with tools.
    fn replace_template(&mut self, template: &str) -> Option<String> {
        let before = self.files.insert(TEMPLATE.to_owned(), template.as_bytes().to_vec());
        let mut replaced = Vec::new();
        if before.as_ref().is_some_and(|before| before != template.as_bytes()) {
            replaced.push(TEMPLATE.to_owned());
        }
        replaced.extend(self.remove_from_tokenizer());
        self.files.retain(|name, _| {
            let other = name == OLD_TEMPLATE || name.starts_with(NAMED_TEMPLATES);
            if other {
                replaced.push(name.clone());
            }
            !other
        });
        if before.is_some_and(|before| before == template.as_bytes()) && replaced.is_empty() {
            return None;
        }
        let place = match replaced.as_slice() {
            [] => "the model had no template".to_owned(),
            _ => format!("replacing the model's own ({})", replaced.join(", ")),
        };
        Some(format!("saved models have the template of --chat_template as {TEMPLATE}: {place}"))
    }

    /// `chat_template.jinja` counts, so a loader that does not know it must not find a different template.
    fn drop_contradictions(&mut self) -> Option<String> {
        let template = String::from_utf8(self.files.get(TEMPLATE)?.clone()).ok()?;
        let same = |other: &str| lines(other).eq(lines(&template));
        let of = |object: Option<ObjectText>| object.and_then(|object| object.get_non_null("chat_template"));
        let contradicts = |found: Option<Value>| found.is_some_and(|found| !found.as_str().is_some_and(same));
        let mut removed = Vec::new();
        if contradicts(of(self.object(TOKENIZER))) {
            removed.extend(self.remove_from_tokenizer());
        }
        if contradicts(of(self.object(OLD_TEMPLATE))) {
            self.files.remove(OLD_TEMPLATE);
            removed.push(OLD_TEMPLATE.to_owned());
        }
        (!removed.is_empty()).then(|| {
            let removed = removed.join(" and ");
            format!(
                "saved models leave out {removed}, which differs from {TEMPLATE}, the template that rendered the rows"
            )
        })
    }

    /// Removes `chat_template` from `tokenizer_config.json`. Returns what was removed.
    fn remove_from_tokenizer(&mut self) -> Option<String> {
        let mut object = self.object(TOKENIZER)?;
        let counted = object.get_non_null("chat_template").is_some();
        if object.remove("chat_template") {
            self.files.insert(TOKENIZER.to_owned(), object.into_text().into_bytes());
        }
        counted.then(|| format!("chat_template in {TOKENIZER}"))
    }

    /// Adds `ids` to the tokens at which `generation_config.json` stops.
    fn stop_at(&mut self, ids: &[u32]) -> Option<String> {
        let (source, before) = match self.files.contains_key(GENERATION) {
            // A file that is not a JSON object is not for loaders and stays as it is.
            true => (GENERATION, self.object(GENERATION)?),
            false => (CONFIG, self.object(CONFIG)?),
        };
        let said = before.get_non_null("eos_token_id");
        let known = ids_of(said.as_ref());
        let missing: Vec<u64> = ids.iter().map(|&id| u64::from(id)).filter(|id| !known.contains(id)).collect();
        if missing.is_empty() {
            return None;
        }
        let replies = missing.iter().map(u64::to_string).collect::<Vec<_>>().join(" or ");
        let all: Vec<u64> = missing.into_iter().chain(known).collect();
        let stops = match all.as_slice() {
            [one] => one.to_string(),
            _ => format!("[{}]", all.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
        };
        let text = if source == GENERATION {
            changed(before, &stops)
        } else {
            let mut keys: Map<String, Value> =
                GENERATION_KEYS.iter().filter_map(|&key| Some((key.to_owned(), before.get_non_null(key)?))).collect();
            keys.insert("eos_token_id".to_owned(), if let [one] = all.as_slice() { json!(one) } else { json!(all) });
            format!("{:#}\n", Value::Object(keys))
        };
        self.files.insert(GENERATION.to_owned(), text.into_bytes());
        let said = said.map_or("none".to_owned(), |said| said.to_string());
        let whose = if source == GENERATION { "the model's file" } else { CONFIG };
        Some(format!(
            "saved models have eos_token_id {stops} in {GENERATION} ({whose} has {said}): replies end with id {replies}"
        ))
    }
}

/// `generation_config.json` with these ids to stop at.
fn changed(mut file: ObjectText, stops: &str) -> String {
    file.set("eos_token_id", stops);
    // It no longer follows from config.json; transformers would derive it again and lose the change.
    if file.get("_from_model_config") == Some(json!(true)) {
        file.remove("_from_model_config");
    }
    file.into_text()
}

/// Lines of a template, however they end.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.trim_end().lines()
}

fn ids_of(value: Option<&Value>) -> Vec<u64> {
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect(),
        None => Vec::new(),
    }
}
