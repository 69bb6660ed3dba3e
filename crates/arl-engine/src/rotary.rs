//! The rotary embedding's cosines and sines on the device: a table over all positions, filled once, of which a micro-batch
//! uploads each token's row number alone. Where frequencies depend on a sequence's length (`dynamic`, `longrope`), each class
//! of lengths has rows of its own behind those of sequences that are not long.

use std::collections::BTreeMap;
use std::ops::Range;

use arl_model::{Result, RopeTable};
use rayon::prelude::*;

use crate::backend::{Angles, Backend, Buffer, DType, Pool};
use crate::placement::arena::ALIGNMENT;

/// Rows that are computed before they are uploaded, and those of a task among them.
const ROWS_AT_ONCE: usize = 1 << 15;
const ROWS_A_TASK: usize = 128;

/// Positions of a sequence whose angles are needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Tokens of the whole sequence.
    pub(crate) sequence_len: usize,
    pub(crate) positions: Range<usize>,
}

/// The tables on the device, without any token's rows of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    /// f32 `[rows, half]`, attention scaling included.
    cos: Buffer,
    /// f32 `[rows, half]`.
    sin: Buffer,
    /// i32 `[half]`: the axis of each frequency; `None`: positions have one axis.
    axes: Option<Buffer>,
}

impl Tables {
    /// Without any rows, for a dry run of a model's step.
    pub(crate) fn dry(rope: &RopeTable) -> Self {
        let layout = Layout::new(rope, 0);
        layout.tables(0)
    }

    /// For tokens whose positions have one axis, as those of text have in every model.
    pub(crate) fn one_axis(self) -> Self {
        Tables { axes: None, ..self }
    }

    /// Row numbers that a token has.
    pub(crate) fn rows_a_token(&self) -> usize {
        if self.axes.is_some() { 3 } else { 1 }
    }

    /// The tables, and tokens' rows of them.
    pub(crate) fn with_rows(self, rows: Buffer) -> Angles {
        Angles { cos: self.cos, sin: self.sin, rows, axes: self.axes }
    }
}

/// Where the tables are in [`Pool::Angles`].
#[derive(Clone, Copy)]
struct Layout {
    /// Rows of sequences that are not long, which come first.
    short: usize,
    /// All rows of a table.
    rows: usize,
    half: usize,
    /// Whether the axes of the frequencies follow the tables.
    axes: bool,
}

impl Layout {
    /// For micro-batches of so many positions.
    fn new(rope: &RopeTable, positions: usize) -> Self {
        let (axes, longest) = (rope.axes().is_some(), rope.longest_short().unwrap_or(positions));
        // With three axes a position may be greater than its sequence is long.
        let short = if axes { positions } else { longest.min(positions) };
        // The long sequences of a micro-batch have no more positions than the whole.
        let long = if longest < positions { positions } else { 0 };
        Layout { short, rows: short + long, half: rope.half(), axes }
    }

    fn table_bytes(self) -> usize {
        (self.rows * self.half * DType::F32.bytes()).next_multiple_of(ALIGNMENT)
    }

    fn axes(self) -> Option<Buffer> {
        let offset = 2 * self.table_bytes();
        self.axes.then_some(Buffer { pool: Pool::Angles, offset, len: self.half, dtype: DType::I32 })
    }

    fn bytes(self) -> usize {
        2 * self.table_bytes() + self.axes().map_or(0, Buffer::bytes)
    }

    /// The first `rows` rows.
    fn tables(self, rows: usize) -> Tables {
        let table = |offset| Buffer { pool: Pool::Angles, offset, len: rows * self.half, dtype: DType::F32 };
        Tables { cos: table(0), sin: table(self.table_bytes()), axes: self.axes() }
    }
}

/// Bytes of the tables for micro-batches of so many positions.
pub(crate) fn table_bytes(rope: &RopeTable, positions: usize) -> usize {
    Layout::new(rope, positions).bytes()
}

/// Rows of a class of long sequences.
#[derive(Clone, Debug)]
struct Run {
    class: usize,
    positions: Range<usize>,
    first: usize,
}

/// What the tables hold.
#[derive(Debug, Default)]
pub(crate) struct RotaryTables {
    /// Positions of a micro-batch for which there is room.
    positions: usize,
    /// Rows of sequences that are not long, so far.
    short: usize,
    /// Of long ones, in the order of their rows, which have no gaps.
    long: Vec<Run>,
    /// Host memory from which they are uploaded.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Computes every sequence's angles for itself, as if there were no tables: what they are compared with.
    #[cfg(test)]
    pub(crate) direct: bool,
}

impl RotaryTables {
    /// Reserves memory for micro-batches of so many positions, unless there is as much; then the tables are empty.
    pub(crate) fn reserve<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        rope: &RopeTable,
        positions: usize,
    ) -> Result<()> {
        if positions <= self.positions {
            return Ok(());
        }
        (self.positions, self.short) = (0, 0);
        self.long.clear();
        let layout = Layout::new(rope, positions);
        backend.reserve(Pool::Angles, layout.bytes())?;
        self.positions = positions;
        if let (Some(axes), Some(target)) = (rope.axes(), layout.axes()) {
            let axes: Vec<i32> = (0..rope.half()).map(|i| axes.axis(i) as i32).collect();
            backend.upload(bytemuck::cast_slice(&axes), target);
        }
        Ok(())
    }

    /// Computes what the tables lack of `spans`, which together have no more positions than were reserved. Returns what is
    /// added to a position of each span to give its row.
    pub(crate) fn provide<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        rope: &RopeTable,
        spans: &[Span],
    ) -> (Tables, Vec<isize>) {
        let layout = Layout::new(rope, self.positions);
        #[cfg(test)]
        if self.direct {
            return self.compute_all(backend, rope, layout, spans);
        }
        let mut wanted = BTreeMap::<usize, Range<usize>>::new();
        for Span { sequence_len, positions } in spans {
            let all = wanted.entry(rope.length_class(*sequence_len)).or_insert_with(|| positions.clone());
            *all = all.start.min(positions.start)..all.end.max(positions.end);
        }
        let short = wanted.remove(&0).map_or(0, |positions| positions.end.next_power_of_two().min(layout.short));
        // Long sequences' rows follow: there are no rows between that hold nothing.
        let short = if wanted.is_empty() { short } else { layout.short };
        if short > self.short {
            self.compute(backend, rope, layout, Run { class: 0, positions: self.short..short, first: self.short });
            self.short = short;
        }
        self.provide_long(backend, rope, layout, wanted);
        let offset = |Span { sequence_len, positions }: &Span| match rope.length_class(*sequence_len) {
            0 => 0,
            class => self.held(class, positions).map_or(0, |run| run.first as isize - run.positions.start as isize),
        };
        (layout.tables(self.end()), spans.iter().map(offset).collect())
    }

    /// Computes what is missing of long sequences; without room for it, all that is wanted in place of what is there.
    fn provide_long<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        rope: &RopeTable,
        layout: Layout,
        mut wanted: BTreeMap<usize, Range<usize>>,
    ) {
        let rows = |wanted: &BTreeMap<usize, Range<usize>>| wanted.values().map(Range::len).sum::<usize>();
        let all = wanted.clone();
        wanted.retain(|class, positions| self.held(*class, positions).is_none());
        if !wanted.is_empty() && self.end() + rows(&wanted) > layout.rows {
            self.long.clear();
            wanted = all;
        }
        for (class, positions) in wanted {
            let run = Run { class, first: self.end(), positions };
            assert!(run.first + run.positions.len() <= layout.rows, "{run:?} of tables of {} rows", layout.rows);
            self.compute(backend, rope, layout, run.clone());
            self.long.push(run);
        }
    }

    /// The rows of positions of a class of long sequences.
    fn held(&self, class: usize, positions: &Range<usize>) -> Option<&Run> {
        let holds = |run: &&Run| {
            run.class == class && run.positions.start <= positions.start && run.positions.end >= positions.end
        };
        self.long.iter().find(holds)
    }

    /// Rows so far.
    fn end(&self) -> usize {
        self.long.last().map_or(self.short, |run| run.first + run.positions.len())
    }

    /// Computes and uploads rows.
    fn compute<B: Backend + ?Sized>(&mut self, backend: &mut B, rope: &RopeTable, layout: Layout, run: Run) {
        let Layout { half, .. } = layout;
        let tables = layout.tables(layout.rows);
        for done in (0..run.positions.len()).step_by(ROWS_AT_ONCE) {
            let rows = ROWS_AT_ONCE.min(run.positions.len() - done);
            self.cos.resize(rows * half, 0.0);
            self.sin.resize(rows * half, 0.0);
            let tasks = self.cos.par_chunks_mut(ROWS_A_TASK * half).zip(self.sin.par_chunks_mut(ROWS_A_TASK * half));
            tasks.enumerate().for_each(|(task, (cos, sin))| {
                let from = run.positions.start + done + task * ROWS_A_TASK;
                let positions: Vec<i32> = (from..from + cos.len() / half).map(|position| position as i32).collect();
                rope.fill(run.class, &positions, cos, sin);
            });
            let place = |table: Buffer| table.slice((run.first + done) * half, rows * half);
            backend.upload(bytemuck::cast_slice(&self.cos), place(tables.cos));
            backend.upload(bytemuck::cast_slice(&self.sin), place(tables.sin));
        }
    }

    /// Every span's angles, one after the other, by its sequence's own length.
    #[cfg(test)]
    fn compute_all<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        rope: &RopeTable,
        layout: Layout,
        spans: &[Span],
    ) -> (Tables, Vec<isize>) {
        let (mut first, mut offsets) = (0, Vec::new());
        for Span { sequence_len, positions } in spans {
            let run = Run { class: *sequence_len, positions: positions.clone(), first };
            self.compute(backend, rope, layout, run);
            offsets.push(first as isize - positions.start as isize);
            first += positions.len();
        }
        (layout.tables(first), offsets)
    }
}

#[cfg(test)]
#[path = "rotary_tests.rs"]
mod tests;
