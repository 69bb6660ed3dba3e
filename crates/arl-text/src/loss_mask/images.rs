//! Images in the contents of messages. While replies are located, contents are strings and an image is a sentinel in them; where
//! the template is rendered it is a part, or, for templates that take strings alone, the text that stands for it.

use crate::row::{Json, image_part, is_reply, role, text_part};
use crate::vision::{IMAGE_PAD, IMAGE_TEXT};

use super::probe::{Probe, message};

/// How a template takes images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ImageForm {
    /// As parts of a content that is a list.
    Parts,
    /// As text: it takes strings alone, or does not write the parts.
    Text,
}

impl ImageForm {
    pub(super) fn of(probe: &Probe<'_>) -> Self {
        let mut question = message("user", "");
        question.set("content", Json::Array(vec![image_part(), text_part("qzuserqz")]));
        match probe.render(&[question, message("assistant", "b")], None, false) {
            Ok(text) if text.matches(IMAGE_PAD).count() == 1 && text.contains("qzuserqz") => Self::Parts,
            _ => Self::Text,
        }
    }

    /// The messages as the template takes them; `image` is the sentinel.
    pub(super) fn unfold(self, messages: &[Json], image: char) -> Vec<Json> {
        let mut messages = messages.to_vec();
        for message in &mut messages {
            let Some(content) = message.get_mut("content") else { continue };
            let Some(text) = content.as_str().filter(|text| text.contains(image)) else { continue };
            *content = match self {
                Self::Text => Json::Str(text.replace(image, IMAGE_TEXT)),
                Self::Parts => {
                    let mut parts = Vec::new();
                    for (i, piece) in text.split(image).enumerate() {
                        parts.extend((i > 0).then(image_part));
                        parts.extend((!piece.is_empty()).then(|| text_part(piece)));
                    }
                    Json::Array(parts)
                }
            };
        }
        messages
    }
}

/// Contents that are lists become strings with the sentinel `image` for each image.
pub(super) fn fold(messages: &mut [Json], image: char) {
    for message in messages {
        let Some(content @ Json::Array(_)) = message.get_mut("content") else { continue };
        let Json::Array(parts) = &*content else { continue };
        let mut text = String::new();
        for part in parts {
            match part.get("text").and_then(Json::as_str) {
                Some(piece) => text.push_str(piece),
                None => text.push(image),
            }
        }
        *content = Json::Str(text);
    }
}

/// The message whose images a template most likely leaves out, for a report: many write those of the user alone.
pub(crate) fn suspect(messages: &[Json]) -> Option<usize> {
    let has_images = |message: &Json| matches!(message.get("content"), Some(Json::Array(_)));
    let order: [fn(&Json) -> bool; 3] =
        [|message| role(message) == "system", is_reply, |message| role(message) != "user"];
    order.iter().find_map(|of_role| messages.iter().position(|message| has_images(message) && of_role(message)))
}
