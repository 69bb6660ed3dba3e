//! Why a row cannot be used. The reasons are short and stable, because reports count by them.

/// Why a row cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowProblem {
    /// Index of the row in its source.
    pub row: usize,
    /// Stable and short, for counting: one of the constants of [`reason`].
    pub reason: String,
    /// What is wrong with this row.
    pub message: String,
}

/// The reasons that there are.
pub(crate) mod reason {
    pub(crate) const EMPTY: &str = "empty row";
    pub(crate) const ENCODING: &str = "wrong encoding";
    pub(crate) const NOT_JSON: &str = "not json";
    pub(crate) const SURROGATE: &str = "lone surrogate";
    pub(crate) const TOO_DEEP: &str = "nested too deep";
    pub(crate) const TOO_LARGE: &str = "row too large";
    pub(crate) const SHAPE: &str = "other shape";
    pub(crate) const NO_MESSAGES: &str = "no messages";
    pub(crate) const BAD_MESSAGE: &str = "bad message";
    pub(crate) const UNKNOWN_ROLE: &str = "unknown role";
    pub(crate) const BLANK_REPLY: &str = "blank reply";
    pub(crate) const PREFERENCE: &str = "preference row";
    pub(crate) const LAST_MESSAGE: &str = "last message not from the assistant";
    pub(crate) const IMAGE: &str = "image";
    pub(crate) const NO_IMAGE: &str = "no image";
    pub(crate) const IMAGE_TOKEN: &str = "image token";
    pub(crate) const CUT_IMAGE: &str = "cut image";
    pub(crate) const BAD_FIELD: &str = "bad field";
    pub(crate) const BAD_INDEX: &str = "bad message index";
    pub(crate) const TEMPLATE: &str = "template";
    pub(crate) const TOO_LONG: &str = "too long";
    pub(crate) const NO_TARGET: &str = "no target";
    pub(crate) const NO_TARGET_LEFT: &str = "no target left";
    pub(crate) const TOKENS: &str = "bad tokens";
}

/// A problem before the row's index is known.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    pub(crate) fn at(self, row: usize) -> RowProblem {
        RowProblem { row, reason: self.reason.to_owned(), message: self.message }
    }
}
