//! Rows put together from columns. Whether a value is null, a list is empty or neither follows from the definition level,
//! where a list ends from the repetition level (Melnik et al., "Dremel", 2010).

use arl_model::Result;

use crate::leaf::Leaf;
use crate::schema::{Field, Node, Shape};
use crate::values::{self, Value};

/// How many of something each top-level column has, in the order in which columns first had one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(pub(crate) Vec<(String, u64)>);

impl Counts {
    fn add(&mut self, column: &str, count: u64) {
        match self.0.iter_mut().find(|(name, _)| name == column) {
            Some((_, sum)) => *sum += count,
            None => self.0.push((column.to_owned(), count)),
        }
    }
}

/// The columns of a file, each at its next entry, and the text of the rows that are taken from them.
pub(crate) struct Cursors {
    pub(crate) leaves: Vec<Leaf>,
    pub(crate) out: Vec<u8>,
    /// Nulls in structs that were left out.
    pub(crate) left_out: Counts,
    /// Floats that are NaN or infinite.
    pub(crate) not_finite: Counts,
    /// Of the column in progress.
    omitted: u64,
    infinite: u64,
}

impl Cursors {
    pub(crate) fn new(leaves: Vec<Leaf>) -> Self {
        let (left_out, not_finite) = (Counts::default(), Counts::default());
        Self { leaves, out: Vec::new(), left_out, not_finite, omitted: 0, infinite: 0 }
    }

    /// Appends a row without a line's end; `columns` with their names.
    pub(crate) fn row(&mut self, columns: &[(String, Field)]) -> Result<()> {
        let start = self.out.len();
        for (name, column) in columns {
            if column.omits_null && self.is_null(&column.node)? {
                self.skip(&column.node)?;
                continue;
            }
            self.out.push(if self.out.len() == start { b'{' } else { b',' });
            self.out.extend_from_slice(&column.key);
            self.write_or_null(&column.node)?;
            if self.omitted > 0 {
                self.left_out.add(name, std::mem::take(&mut self.omitted));
            }
            if self.infinite > 0 {
                self.not_finite.add(name, std::mem::take(&mut self.infinite));
            }
        }
        if self.out.len() == start {
            self.out.push(b'{');
        }
        self.out.push(b'}');
        Ok(())
    }

    fn is_null(&mut self, node: &Node) -> Result<bool> {
        Ok(self.leaves[node.leaves.start].definition()? < node.level)
    }

    /// Passes over a value that is null, or an empty list.
    fn skip(&mut self, node: &Node) -> Result<()> {
        self.leaves[node.leaves.clone()].iter_mut().try_for_each(Leaf::skip)
    }

    fn write_or_null(&mut self, node: &Node) -> Result<()> {
        if self.is_null(node)? {
            self.out.extend_from_slice(b"null");
            return self.skip(node);
        }
        self.write(node)
    }

    fn write(&mut self, node: &Node) -> Result<()> {
        match &node.shape {
            Shape::Value { kind, counted } => {
                let leaf = &mut self.leaves[node.leaves.start];
                let value = leaf.take();
                self.infinite += u64::from(*counted && matches!(value, Value::Float(value) if !value.is_finite()));
                values::write(&mut self.out, *kind, value).map_err(|reason| leaf.damaged(&reason))
            }
            Shape::Struct(fields) => self.structure(fields),
            Shape::Image { bytes, path } => {
                if self.is_null(bytes)? {
                    self.skip(bytes)?;
                    return self.write_or_null(path);
                }
                self.write(bytes)?;
                self.skip(path)
            }
            Shape::List { item, repetition } => {
                self.out.push(b'[');
                self.each(node, *repetition, |cursors| cursors.write_or_null(item))?;
                self.out.push(b']');
                Ok(())
            }
            Shape::Map { key, value, repetition } => {
                self.out.push(b'{');
                self.each(node, *repetition, |cursors| {
                    cursors.key(key)?;
                    cursors.out.push(b':');
                    cursors.write_or_null(value)
                })?;
                self.out.push(b'}');
                Ok(())
            }
        }
    }

    fn structure(&mut self, fields: &[Field]) -> Result<()> {
        let mut separator = b'{';
        for field in fields {
            if field.omits_null && self.is_null(&field.node)? {
                self.skip(&field.node)?;
                self.omitted += 1;
                continue;
            }
            self.out.push(separator);
            separator = b',';
            self.out.extend_from_slice(&field.key);
            self.write_or_null(&field.node)?;
        }
        if separator == b'{' {
            self.out.push(b'{');
        }
        self.out.push(b'}');
        Ok(())
    }

    /// Has `write` write each item of a list or map, with commas between them.
    fn each(&mut self, node: &Node, repetition: i16, write: impl Fn(&mut Self) -> Result<()>) -> Result<()> {
        let first = node.leaves.start;
        if self.leaves[first].definition()? <= node.level {
            return self.skip(node);
        }
        write(self)?;
        while self.leaves[first].repetition()? == repetition {
            self.out.push(b',');
            write(self)?;
        }
        Ok(())
    }

    /// Writes a map's key, which is a string in JSON: of other values it is their text.
    fn key(&mut self, key: &Node) -> Result<()> {
        let start = self.out.len();
        self.write_or_null(key)?;
        if self.out[start] != b'"' {
            self.out.insert(start, b'"');
            self.out.push(b'"');
        }
        Ok(())
    }
}
