//! What a user should know about a row that is trained all the same: noticed row by row, counted, reported once with the first place.
//! Knows nothing of rows or templates; each of them says what it noticed.

use std::collections::BTreeMap;

/// Stands for all subjects of a kind beyond those that are counted apart.
pub(crate) const MORE: &str = "...";

/// Subjects of a kind that are counted apart over all rows.
const MOST_TOTALS: usize = 128;

/// What can be noticed. The order is that of a report: what changes training most comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum NoteKind {
    /// Replies of which nothing but the token that ends them is trained, for example after truncation.
    EndTokenOnly = 1,
    /// Replies after the last question whose reasoning the chat template leaves out.
    LostReasoning = 2,
    /// Rows whose tools the chat template leaves out, all or some.
    LostTools = 3,
    /// `<image>` in texts of rows that have no images, which is trained as text.
    WordWithoutImage = 4,
    /// Replies that follow a reply directly.
    ConsecutiveReplies = 5,
    /// A key with a value that nothing reads; the subject is its path, for example `messages[].name`.
    UnreadKey = 6,
    /// Replies of earlier turns whose reasoning the chat template leaves out.
    EarlierReasoning = 7,
    /// Tool calls whose arguments came as JSON text and were parsed, because the template needs an object.
    ParsedArguments = 8,
    /// Tool calls whose arguments came as an empty text.
    EmptyArguments = 9,
    /// Messages whose `name` the chat template leaves out.
    LostName = 10,
    /// Images that `images: drop` left out.
    DroppedImages = 11,
    /// Messages that were nothing but such images.
    EmptiedMessages = 12,
    /// Images in what truncation cut off.
    CutImages = 13,
}

impl NoteKind {
    const ALL: [Self; 13] = [
        Self::EndTokenOnly,
        Self::LostReasoning,
        Self::LostTools,
        Self::WordWithoutImage,
        Self::ConsecutiveReplies,
        Self::UnreadKey,
        Self::EarlierReasoning,
        Self::ParsedArguments,
        Self::EmptyArguments,
        Self::LostName,
        Self::DroppedImages,
        Self::EmptiedMessages,
        Self::CutImages,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Stable and short, for programs that read reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndTokenOnly => "end token only",
            Self::LostReasoning => "lost reasoning",
            Self::LostTools => "lost tools",
            Self::WordWithoutImage => "word without image",
            Self::ConsecutiveReplies => "consecutive replies",
            Self::UnreadKey => "unread key",
            Self::EarlierReasoning => "earlier reasoning",
            Self::ParsedArguments => "parsed arguments",
            Self::EmptyArguments => "empty arguments",
            Self::LostName => "lost name",
            Self::DroppedImages => "dropped images",
            Self::EmptiedMessages => "emptied messages",
            Self::CutImages => "cut images",
        }
    }

    /// A sentence for a person, without a place.
    fn sentence(self, subject: &str, count: u64) -> String {
        let counted = |one, many| format!("{count} {}", plural(count, one, many));
        match self {
            Self::EndTokenOnly => {
                format!("only the token that ends a reply is trained of {}", counted("reply", "replies"))
            }
            Self::LostReasoning => format!(
                "the chat template leaves out the reasoning of {} (--thinking keep trains it or refuses the row, \
                 --thinking strip asks for this)",
                counted("reply", "replies")
            ),
            Self::LostTools => format!("the chat template leaves out `tools` of {}", counted("row", "rows")),
            Self::WordWithoutImage => format!(
                "{} in rows without `images` is trained as text: if images have another column, name it with --columns \
                 images=NAME",
                counted("`<image>`", "`<image>`")
            ),
            Self::ConsecutiveReplies => format!(
                "{} a reply directly: each is a turn with an end of its own",
                counted("reply follows", "replies follow")
            ),
            Self::UnreadKey if subject == MORE => "further keys are not read".to_owned(),
            Self::UnreadKey => format!("`{subject}` is not read"),
            Self::EarlierReasoning => format!(
                "the chat template leaves out the reasoning of {} before the last question, as it does when the model \
                 answers (--thinking keep trains it all the same)",
                counted("reply", "replies")
            ),
            Self::ParsedArguments => format!(
                "parsed the JSON text in `arguments` of {}: the chat template writes arguments given as an object",
                counted("tool call", "tool calls")
            ),
            Self::EmptyArguments => format!(
                "`arguments` of {} are an empty text: written as an empty object",
                counted("tool call", "tool calls")
            ),
            Self::LostName => {
                format!("the chat template leaves out the `name` of {}", counted("message", "messages"))
            }
            Self::DroppedImages => format!("left out {}", counted("image", "images")),
            Self::EmptiedMessages => {
                format!("{} empty without the images", counted("message is", "messages are"))
            }
            Self::CutImages => format!("truncation cut off {}", counted("image", "images")),
        }
    }
}

fn plural<'a>(count: u64, one: &'a str, many: &'a str) -> &'a str {
    if count == 1 { one } else { many }
}

/// Something noticed in one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What was noticed.
    pub kind: NoteKind,
    /// What it is about, where the kind alone does not say that; else empty.
    pub subject: String,
    /// How often it occurs in the row.
    pub count: u32,
}

/// The notes of one row; equal ones are counted together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes(Vec<Note>);

impl Notes {
    /// Counts `count` more occurrences; 0 is nothing.
    pub(crate) fn add(&mut self, kind: NoteKind, subject: &str, count: u32) {
        if count == 0 {
            return;
        }
        match self.0.iter_mut().find(|note| note.kind == kind && note.subject == subject) {
            Some(note) => note.count = note.count.saturating_add(count),
            None => self.0.push(Note { kind, subject: subject.to_owned(), count }),
        }
    }

    /// Counts one more occurrence; where `most` others of the kind are there already, of `rest` instead.
    pub(crate) fn add_at_most(&mut self, most: usize, kind: NoteKind, subject: &str, rest: &str) {
        let of_kind = self.0.iter().filter(|note| note.kind == kind);
        let full = of_kind.clone().count() >= most && of_kind.clone().all(|note| note.subject != subject);
        self.add(kind, if full { rest } else { subject }, 1);
    }

    /// Adds the notes of another part of the row.
    pub(crate) fn append(&mut self, other: Self) {
        for Note { kind, subject, count } in other.0 {
            self.add(kind, &subject, count);
        }
    }

    /// Each note once.
    pub fn iter(&self) -> impl Iterator<Item = &Note> {
        self.0.iter()
    }

    /// The notes as those of one row alone, `row`.
    pub fn counts(&self, row: u32) -> Vec<NoteCount> {
        let mut totals = NoteTotals::default();
        totals.add(row, self);
        totals.counts()
    }

    /// For the cache: kind (1 byte), count (4), bytes of the subject (4), the subject.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for Note { kind, subject, count } in &self.0 {
            bytes.push(*kind as u8);
            bytes.extend(count.to_le_bytes());
            bytes.extend((subject.len() as u32).to_le_bytes());
            bytes.extend(subject.as_bytes());
        }
        bytes
    }

    /// The inverse of [`Notes::to_bytes`]; nothing where the bytes are not of that form.
    pub(crate) fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let mut notes = Vec::new();
        while let [kind, a, b, c, d, e, f, g, h, rest @ ..] = bytes {
            let length = u32::from_le_bytes([*e, *f, *g, *h]) as usize;
            let subject = std::str::from_utf8(rest.get(..length)?).ok()?.to_owned();
            notes.push(Note {
                kind: NoteKind::from_byte(*kind)?,
                subject,
                count: u32::from_le_bytes([*a, *b, *c, *d]),
            });
            bytes = &rest[length..];
        }
        bytes.is_empty().then_some(Self(notes))
    }
}

/// One kind of note over many rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoteCount {
    /// What was noticed.
    pub kind: NoteKind,
    /// What it is about, where the kind alone does not say that; else empty.
    pub subject: String,
    /// Rows in which it occurs.
    pub rows: u32,
    /// Occurrences in all of them.
    pub count: u64,
    /// The lowest index of such a row in its source.
    pub first_row: u32,
}

impl NoteCount {
    /// The rows train less, or something else, than their author may expect. A column that is not read seldom means that: most
    /// data sets have some.
    pub fn is_warning(&self) -> bool {
        let is_column = self.kind == NoteKind::UnreadKey && !self.subject.contains('[');
        self.kind <= NoteKind::UnreadKey && !is_column
    }

    /// A sentence for a person, without a place.
    pub fn message(&self) -> String {
        self.kind.sentence(&self.subject, self.count)
    }
}

/// The notes of many rows, counted as they come.
#[derive(Clone, Debug, Default)]
pub(crate) struct NoteTotals(BTreeMap<(NoteKind, String), NoteCount>);

impl NoteTotals {
    pub(crate) fn add(&mut self, row: u32, notes: &Notes) {
        for Note { kind, subject, count } in notes.iter() {
            let mut subject = subject.as_str();
            // Rows may each have keys of their own.
            if !self.0.contains_key(&(*kind, subject.to_owned()))
                && self.0.keys().filter(|(other, _)| other == kind).count() >= MOST_TOTALS
            {
                subject = MORE;
            }
            let total = self.0.entry((*kind, subject.to_owned())).or_insert_with(|| NoteCount {
                kind: *kind,
                subject: subject.to_owned(),
                rows: 0,
                count: 0,
                first_row: row,
            });
            total.rows += 1;
            total.count += u64::from(*count);
            total.first_row = total.first_row.min(row);
        }
    }

    /// Sorted by kind, then by subject.
    pub(crate) fn counts(&self) -> Vec<NoteCount> {
        self.0.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_as_bytes_and_equal_ones_are_counted_together() {
        let mut notes = Notes::default();
        notes.add(NoteKind::UnreadKey, "messages[].größe", 2);
        notes.add(NoteKind::ParsedArguments, "", 1);
        notes.add(NoteKind::UnreadKey, "messages[].größe", 3);
        notes.add(NoteKind::EndTokenOnly, "", 0);
        assert_eq!(notes.iter().map(|note| note.count).collect::<Vec<_>>(), [5, 1]);
        let bytes = notes.to_bytes();
        assert_eq!(Notes::from_bytes(&bytes), Some(notes));
        for end in 1..bytes.len() {
            let cut = Notes::from_bytes(&bytes[..end]);
            assert!(cut.is_none_or(|cut| cut.to_bytes().len() == end), "cut at {end}");
        }
    }

    #[test]
    fn totals_name_the_first_row_whatever_order_rows_come_in() {
        let mut totals = NoteTotals::default();
        let mut notes = Notes::default();
        notes.add(NoteKind::ParsedArguments, "", 2);
        totals.add(7, &notes);
        totals.add(3, &notes);
        let [count] = totals.counts().try_into().expect("one kind");
        assert_eq!((count.rows, count.count, count.first_row), (2, 4, 3));
        assert!(count.message().contains("4 tool calls"), "{}", count.message());
    }
}
