//! The tree of a file's types: of which columns a value is put together, and how each is written.

use std::ops::Range;
use std::sync::Arc;

use parquet::basic::{ConvertedType, Repetition, Type as Physical};
use parquet::schema::types::Type;

use crate::json;
use crate::values::Kind;

/// The names that columns of a meaning have in this file.
#[derive(Clone, Debug, Default)]
pub struct ColumnNames {
    /// Columns of lists and objects: text in them is their JSON.
    pub nested: Vec<String>,
    /// Of these, columns of images and the like, in which bytes are no text.
    pub media: Vec<String>,
    /// Columns of lists of objects: a list of texts in them is a list of their JSON.
    pub objects: Vec<String>,
    /// The column of the conversation.
    pub messages: String,
}

/// A value of the tree.
pub(crate) struct Node {
    /// The columns that it is put together from.
    pub(crate) leaves: Range<usize>,
    /// The definition level from which on it is present; below, it is null.
    pub(crate) level: i16,
    pub(crate) shape: Shape,
}

/// How a value is put together.
pub(crate) enum Shape {
    /// `counted`: how many are NaN or infinite is reported.
    Value {
        kind: Kind,
        counted: bool,
    },
    Struct(Vec<Field>),
    /// An image as Hugging Face's datasets store it: the bytes as a data URL, else the path.
    Image {
        bytes: Box<Node>,
        path: Box<Node>,
    },
    /// `repetition`: the level of every item but the first.
    List {
        item: Box<Node>,
        repetition: i16,
    },
    Map {
        key: Box<Node>,
        value: Box<Node>,
        repetition: i16,
    },
}

/// A field of a struct, or a column of the file.
pub(crate) struct Field {
    /// `"name":`
    pub(crate) key: Vec<u8>,
    pub(crate) node: Node,
    /// Whether null is left out.
    pub(crate) omits_null: bool,
}

/// Where in the tree a type is.
#[derive(Clone)]
struct Place {
    /// The top-level column.
    column: Arc<str>,
    /// How many fields, list items and map entries are around it, itself included.
    depth: usize,
    /// It is an item of the column's list, or in one.
    in_list: bool,
    definition: i16,
    repetition: i16,
}

impl Place {
    /// The place of each of several values, in a list or map that is here.
    fn repeated(&self, in_list: bool) -> Self {
        let in_list = if self.depth == 1 { in_list } else { self.in_list };
        let (definition, repetition) = (self.definition + 1, self.repetition + 1);
        Self { column: Arc::clone(&self.column), depth: self.depth + 1, in_list, definition, repetition }
    }
}

/// Builds the tree of one file.
pub(crate) struct Builder<'a> {
    pub(crate) names: &'a ColumnNames,
    /// Top-level columns whose text is JSON, whatever their names.
    pub(crate) json: &'a [String],
    /// How many leaves the tree has so far.
    pub(crate) leaves: usize,
}

fn is_repeated(field: &Type) -> bool {
    field.get_basic_info().repetition() == Repetition::REPEATED
}

fn is_text(field: &Type) -> bool {
    matches!(field.get_basic_info().converted_type(), ConvertedType::UTF8 | ConvertedType::ENUM)
}

fn has(names: &[String], column: &str) -> bool {
    names.iter().any(|name| name == column)
}

impl Builder<'_> {
    /// A top-level column.
    pub(crate) fn column(&mut self, field: &Type) -> Node {
        let column = Arc::from(field.name());
        self.field(field, Place { column, depth: 1, in_list: false, definition: 0, repetition: 0 })
    }

    fn field(&mut self, field: &Type, mut place: Place) -> Node {
        if is_repeated(field) {
            // A repeated field that is in no list is a list by itself.
            let inner = place.repeated(true);
            let item = self.value(field, inner.clone());
            return list(item, &place, &inner);
        }
        place.definition += i16::from(field.get_basic_info().repetition() == Repetition::OPTIONAL);
        self.value(field, place)
    }

    /// What a field holds; its own repetition is counted in `place` already.
    fn value(&mut self, field: &Type, place: Place) -> Node {
        if field.is_primitive() {
            return self.leaf(field, &place);
        }
        let fields = field.get_fields();
        if let [only] = fields
            && is_repeated(only)
        {
            match field.get_basic_info().converted_type() {
                ConvertedType::LIST => return self.list(only, &place),
                ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE if only.is_group() => {
                    if let [key, value] = only.get_fields() {
                        return self.map(key, value, &place);
                    }
                }
                _ => {}
            }
        }
        self.structure(fields, &place)
    }

    fn list(&mut self, repeated: &Type, place: &Place) -> Node {
        let inner = place.repeated(true);
        let name = repeated.name();
        // Lists of older writers have no level of their own for the item (the format's rules for compatibility).
        let wrapped = match repeated {
            Type::GroupType { fields, .. } if name != "array" && !name.ends_with("_tuple") => fields.as_slice(),
            _ => &[],
        };
        let item = match wrapped {
            [only] => self.field(only, inner.clone()),
            _ => self.value(repeated, inner.clone()),
        };
        list(item, place, &inner)
    }

    fn map(&mut self, key: &Type, value: &Type, place: &Place) -> Node {
        let inner = place.repeated(false);
        let key = Box::new(self.field(key, inner.clone()));
        let value = Box::new(self.field(value, inner.clone()));
        let leaves = key.leaves.start..value.leaves.end;
        Node { leaves, level: place.definition, shape: Shape::Map { key, value, repetition: inner.repetition } }
    }

    fn structure(&mut self, types: &[Arc<Type>], place: &Place) -> Node {
        let start = self.leaves;
        let message = place.depth == 2 && place.in_list && *self.names.messages == *place.column;
        let mut fields: Vec<Field> = Vec::new();
        for field in types {
            let name = field.name();
            let node = self.field(field, Place { depth: place.depth + 1, ..place.clone() });
            // A message has its `content` even where that is null: OpenAI's API writes it so for a reply of tool calls.
            fields.push(Field { key: json::key(name), node, omits_null: !(message && name == "content") });
        }
        let (leaves, level) = (start..self.leaves, place.definition);
        let is_image = |bytes: &Type, path: &Type| {
            (bytes.name(), path.name()) == ("bytes", "path")
                && bytes.is_primitive()
                && Kind::of(bytes) == Kind::Binary
                && is_text(path)
        };
        let shape = match types {
            [a, b] if is_image(a, b) || is_image(b, a) => {
                let mut nodes = fields.into_iter().map(|field| Box::new(field.node));
                match (nodes.next(), nodes.next()) {
                    (Some(bytes), Some(path)) if a.name() == "bytes" => Shape::Image { bytes, path },
                    (Some(path), Some(bytes)) => Shape::Image { bytes, path },
                    _ => Shape::Struct(Vec::new()),
                }
            }
            _ => Shape::Struct(fields),
        };
        Node { leaves, level, shape }
    }

    fn leaf(&mut self, field: &Type, place: &Place) -> Node {
        let index = self.leaves;
        self.leaves += 1;
        let (column, names) = (&*place.column, self.names);
        let mut kind = Kind::of(field);
        let top = place.depth == 1;
        let item = place.depth == 2 && place.in_list;
        if top && has(self.json, column) && is_text(field) {
            kind = Kind::Json;
        } else if (top && has(&names.nested, column) || item && has(&names.objects, column))
            && (kind == Kind::Text || kind == Kind::Binary && !has(&names.media, column))
        {
            kind = Kind::Nested;
        }
        let counted = matches!(field.get_physical_type(), Physical::FLOAT | Physical::DOUBLE);
        Node { leaves: index..index + 1, level: place.definition, shape: Shape::Value { kind, counted } }
    }
}

fn list(item: Node, place: &Place, inner: &Place) -> Node {
    let leaves = item.leaves.clone();
    let shape = Shape::List { item: Box::new(item), repetition: inner.repetition };
    Node { leaves, level: place.definition, shape }
}
