//! The tensors of a weights file, and where each has the elements of its parameters.

use std::collections::HashMap;
use std::ops::Range;

use super::table::{Arrangement, Axes, Join, Spelling};
use crate::config::ModelConfig;
use crate::tensors::TensorSpec;

/// A tensor of a weights file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredTensor {
    /// Its name in the file.
    pub(crate) name: String,
    /// Row-major.
    pub(crate) shape: Vec<usize>,
    /// The parameters that it holds.
    pub(crate) parts: Vec<Part>,
}

/// A parameter's place in a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The parameter's index in the table of tensors.
    pub(crate) parameter: usize,
    /// Where its elements are: each view holds those that follow the previous view's.
    pub(crate) views: Vec<StridedView>,
}

/// Elements of a parameter, as a matrix in a stored tensor: `[row, column]` is the element
/// `start + row * row_stride + column * column_stride` of the tensor. One of the strides is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StridedView {
    pub(crate) start: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl StridedView {
    pub(crate) fn len(&self) -> usize {
        self.rows * self.columns
    }

    /// From the first to the last element, with all elements between them.
    pub(crate) fn extent(&self) -> Range<usize> {
        let last = (self.rows.max(1) - 1) * self.row_stride + (self.columns.max(1) - 1) * self.column_stride;
        self.start..self.start + last + usize::from(self.len() > 0)
    }

    fn places(&self) -> impl Iterator<Item = usize> + use<> {
        let Self { start, rows, columns, row_stride, column_stride } = *self;
        (0..rows).flat_map(move |row| (0..columns).map(move |c| start + row * row_stride + c * column_stride))
    }
}

impl Part {
    /// Whether its elements follow each other in the tensor as they do in the parameter.
    pub(crate) fn is_contiguous(&self) -> bool {
        matches!(self.views.as_slice(), [StridedView { rows: 1, column_stride: 1, .. }])
    }

    /// The places of the parameter's elements in the tensor.
    pub(crate) fn places(&self) -> impl Iterator<Item = usize> {
        self.views.iter().flat_map(StridedView::places)
    }

    /// From the first to the last element.
    pub(crate) fn extent(&self) -> Range<usize> {
        let extents = || self.views.iter().map(StridedView::extent);
        extents().map(|e| e.start).min().unwrap_or(0)..extents().map(|e| e.end).max().unwrap_or(0)
    }
}

impl StoredTensor {
    fn whole(name: String, index: usize, spec: &TensorSpec) -> Self {
        let len = spec.elements();
        let views = vec![StridedView { start: 0, rows: 1, columns: len, row_stride: len, column_stride: 1 }];
        Self { name, shape: spec.shape.clone(), parts: vec![Part { parameter: index, views }] }
    }

    /// The parts in the order of the file, in groups that interleave: each fills a range of the tensor.
    pub(crate) fn groups(&self) -> Vec<&[Part]> {
        let mut groups = Vec::new();
        let (mut begin, mut end) = (0, 0);
        for (index, part) in self.parts.iter().enumerate() {
            let extent = part.extent();
            if index > begin && extent.start >= end {
                groups.push(&self.parts[begin..index]);
                begin = index;
            }
            end = end.max(extent.end);
        }
        groups.push(&self.parts[begin..]);
        groups
    }
}

/// The tensors of a file, in the order of the table of tensors.
pub(crate) fn stored_tensors(
    spelling: &Spelling,
    arrangement: &Arrangement,
    config: &ModelConfig,
    table: &[TensorSpec],
) -> Vec<StoredTensor> {
    /// A tensor that several parameters share: its place in the result, and each parameter's place there.
    type Shared<'a> = (usize, &'a Join, Vec<((usize, usize), usize)>);
    let mut stored = Vec::with_capacity(table.len());
    let mut all_shared: HashMap<String, Shared<'_>> = HashMap::new();
    for (index, spec) in table.iter().enumerate() {
        let join = arrangement.joins.iter().find_map(|join| Some((join, join.tensor_of(&spec.name)?)));
        let Some((join, (name, place))) = join else {
            stored.push(StoredTensor::whole(spelling.spell(&spec.name), index, spec));
            continue;
        };
        let shared = all_shared.entry(name).or_insert_with_key(|name| {
            stored.push(StoredTensor { name: spelling.spell(name), shape: Vec::new(), parts: Vec::new() });
            (stored.len() - 1, join, Vec::new())
        });
        shared.2.push((place, index));
    }
    for (index, join, mut parameters) in all_shared.into_values() {
        parameters.sort_unstable();
        let parameters: Vec<usize> = parameters.into_iter().map(|(_, parameter)| parameter).collect();
        (stored[index].shape, stored[index].parts) = join.place(config, table, &parameters);
    }
    stored
}

impl Join {
    /// The tensor's shape and parts, for the parameters by number and then by their place in [`Join::parameters`].
    fn place(&self, config: &ModelConfig, table: &[TensorSpec], parameters: &[usize]) -> (Vec<usize>, Vec<Part>) {
        let each = self.parameters.len();
        let rows: Vec<usize> = parameters.iter().take(each).map(|&index| table[index].shape[0]).collect();
        let (height, columns) = (rows.iter().sum::<usize>(), table[parameters[0]].shape[1]);
        let shape = match self.axes {
            Axes::Stacked => vec![parameters.len() / each, height, columns],
            Axes::Transposed => vec![parameters.len() / each, columns, height],
            Axes::Grouped(_) => vec![height, columns],
        };
        let (groups, sections) = match self.axes {
            Axes::Grouped(sections) => sections(config),
            Axes::Stacked | Axes::Transposed => (1, rows.clone()),
        };
        let mut parts = Vec::with_capacity(parameters.len());
        for (number, parameters) in parameters.chunks(each).enumerate() {
            let start = number * height * columns;
            let (mut sections, mut above) = (sections.iter(), 0);
            for (&parameter, rows) in parameters.iter().zip(&rows) {
                let end = above + rows;
                let mut views = Vec::new();
                while above < end
                    && let Some(&section) = sections.next()
                {
                    views.push(match self.axes {
                        Axes::Transposed => StridedView {
                            start: start + above,
                            rows: section,
                            columns,
                            row_stride: 1,
                            column_stride: height,
                        },
                        Axes::Stacked | Axes::Grouped(_) => StridedView {
                            start: start + above / groups * columns,
                            rows: groups,
                            columns: section / groups * columns,
                            row_stride: height / groups * columns,
                            column_stride: 1,
                        },
                    });
                    above += section;
                }
                parts.push(Part { parameter, views });
            }
        }
        (shape, parts)
    }
}
