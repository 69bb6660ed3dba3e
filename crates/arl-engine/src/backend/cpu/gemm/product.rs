//! Blocking: `b` is packed once for all threads, each task packs its rows of `a`, and `c` is split among tasks.
//!
//! An element of `c` is the same sum in the same order whatever the split: blocks of `k` depend on columns alone, and only
//! rows and columns are divided. So neither the number of threads nor the number of rows changes a bit of it.

use super::super::element::Element;
use super::kernel::{Block, Kernel, Tail};
use super::low_rank::{LeftPanels, Packed};
use super::nf4::Nf4Matrix;
use super::pack::{Panels, Source};
use super::workspace::Workspace;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Words of a block of `k`: a panel of `b` (16 KiB with 16 columns) and one of `a` share the first-level cache.
pub(super) const STEPS: usize = 256;
/// Rows of `a` that a task keeps packed in the second-level cache: 192 KiB.
const ROWS: usize = 192;
/// Words of `b` that are packed at a time: a part of the last-level cache.
const PACKED_WORDS: usize = 1 << 20;
/// Panels of `b` that are packed as one task.
const PANELS: usize = 16;
/// Panels of `b` up to which rows of `a` are not packed: where they run along `k`, and across it.
const IN_PLACE: usize = 1;
pub(super) const IN_PLACE_ACROSS: usize = 2;
/// Steps of a block where `a` is read across `k` in place: each step is a row of memory, and so many rows stay in the first-level cache
/// and in the address translation buffer while all their columns are used.
const FEW_STEPS: usize = 32;
/// Elements from one row of memory to the next from which on that is so; rows that are closer stay there by themselves.
pub(super) const FAR: usize = 512;
/// Multiplications below which threads cost more than they save.
const SMALL: usize = 1 << 18;

/// An operand of `rows` rows (`a`) or columns (`b`) over `k`.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) source: Source,
    pub(super) stride: usize,
    pub(super) along_k: bool,
}

impl Operand {
    pub(super) fn panels(&self, row: usize, rows: usize, start: usize, length: usize) -> Panels {
        let offset = if self.along_k { row * self.stride + start } else { start * self.stride + row };
        let source = match self.source {
            Source::F32(x) => Source::F32(x.wrapping_add(offset)),
            Source::Bf16(x) => Source::Bf16(x.wrapping_add(offset)),
            Source::F16(x) => Source::F16(x.wrapping_add(offset)),
        };
        Panels { source, stride: self.stride, along_k: self.along_k, rows, length }
    }
}

/// What `b` is.
#[derive(Clone, Copy)]
pub(super) enum RightOperand<'a> {
    Plain(Operand),
    /// Its rows are columns of `c` where they run along `k`.
    Nf4 {
        matrix: &'a Nf4Matrix<'a>,
        along_k: bool,
    },
}

/// Where the result goes.
#[derive(Clone, Copy)]
pub(super) enum Target {
    F32(*mut f32),
    Bf16(*mut bf16),
    F16(*mut f16),
}

/// A whole product; see [`super::matmul`].
pub(super) struct Product<'a> {
    pub(super) kernel: &'static Kernel,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) a: Operand,
    pub(super) b: RightOperand<'a>,
    pub(super) c: Target,
    pub(super) c_stride: usize,
    pub(super) accumulate: bool,
    pub(super) bias: Option<&'a (dyn Fn(usize) -> f32 + Sync)>,
    /// Of f32 alone.
    pub(super) low_rank: Option<&'a Packed<'a>>,
}

// SAFETY: the pointers are read, or (`c`) written by tasks that each own a part of it; see `Product::run`.
unsafe impl Sync for Product<'_> {}

/// A stretch of `c`'s columns and of `k`, for which `b` is packed.
struct Stage {
    columns: (usize, usize),
    k: (usize, usize),
    /// Elements of `k` in a block.
    block: usize,
    packed: *mut u32,
    /// Sums of [`Product::low_rank`]: of each task that divides the columns, all rows.
    low_sums: *mut f32,
}

// SAFETY: tasks write disjoint panels of `packed`, or only read it.
unsafe impl Sync for Stage {}

impl Product<'_> {
    /// Computes it, on rayon's current pool where `parallel`.
    ///
    /// # Safety
    /// `a` and `b` are readable over their shapes, `c` is readable and writable over its own and overlaps neither; no
    /// other thread touches it meanwhile. The CPU has the kernel's instructions.
    pub(super) unsafe fn run(&self, parallel: bool) {
        let threads = if parallel && self.m * self.n * self.k >= SMALL { rayon::current_num_threads() } else { 1 };
        let per_word = if self.kernel.pairs { 2 } else { 1 };
        let nr = self.kernel.nr;
        let block = self.block();
        // As many columns as fit with the whole of k, but not so few that packing `a` for them would cost; if they are
        // too few, part of k. A result of 16 bits keeps its sums in a task, and so needs the whole of k.
        let whole = PACKED_WORDS / self.k.div_ceil(per_word).max(1);
        let enough = self.n.min(1024);
        let (columns, k_length) = if whole >= enough || !matches!(self.c, Target::F32(_)) {
            (whole.max(4 * nr), self.k)
        } else {
            (1024, (PACKED_WORDS / enough * per_word / block).max(1) * block)
        };
        let columns = self.n.div_ceil(self.n.div_ceil(columns)).next_multiple_of(nr).max(nr);
        let stage_words = columns * Panels::steps(k_length.min(self.k).next_multiple_of(2), self.kernel.pairs);
        let mut workspace = Workspace::take(stage_words);
        let (_, column_tasks) = self.tasks(columns.min(self.n).div_ceil(nr), threads);
        let mut low_sums = Workspace::take(self.low_rank.map_or(0, |low_rank| column_tasks * self.m * low_rank.rank));
        for column in (0..self.n).step_by(columns) {
            let mut start = 0;
            loop {
                let end = (start + k_length).min(self.k);
                let stage = Stage {
                    columns: (column, (column + columns).min(self.n)),
                    k: (start, end),
                    block,
                    packed: workspace.words(),
                    low_sums: low_sums.words().cast(),
                };
                // SAFETY: the caller's promise; the workspace has room for the stage's words.
                unsafe { self.stage(&stage, threads) };
                start = end;
                if start >= self.k {
                    break;
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::run`]; `stage.packed` has room for all its panels.
    unsafe fn stage(&self, stage: &Stage, threads: usize) {
        let (mr, nr) = (self.kernel.mr, self.kernel.nr);
        let panels = (stage.columns.1 - stage.columns.0).div_ceil(nr);
        let groups = panels.div_ceil(PANELS);
        let blocks = (stage.k.1 - stage.k.0).div_ceil(stage.block);
        // SAFETY: each block's panels are packed to their own place.
        each(groups * blocks, threads, |i| unsafe { self.pack_b(stage, i / groups, i % groups * PANELS) });

        let rows = self.m.div_ceil(mr);
        let (row_tasks, column_tasks) = self.tasks(panels, threads);
        each(row_tasks * column_tasks, threads, |task| {
            let (row_task, column_task) = (task / column_tasks, task % column_tasks);
            let (row, panels) = (share(rows, row_tasks, row_task), share(panels, column_tasks, column_task));
            // SAFETY: tasks own disjoint parts of `c`; all panels of `b` have been packed.
            unsafe { self.task((stage, column_task), (row.0 * mr, (row.1 * mr).min(self.m)), panels) }
        });
    }

    /// Elements of a block of `k`: equal blocks of whole words, which depend on `k`, and on `n` and the stride of `a`.
    pub(super) fn block(&self) -> usize {
        let steps = if self.reads_across() { FEW_STEPS } else { STEPS };
        let blocks = self.k.div_ceil(steps * if self.kernel.pairs { 2 } else { 1 }).max(1);
        self.k.div_ceil(blocks).next_multiple_of(2).max(2)
    }

    /// Whether `a` is read in place across `k`.
    fn reads_across(&self) -> bool {
        let in_place = matches!(self.a.source, Source::F32(_)) && !self.kernel.pairs && !self.a.along_k;
        in_place && self.a.stride >= FAR && self.n.div_ceil(self.kernel.nr) <= IN_PLACE_ACROSS
    }

    /// How many tasks divide the rows, and how many the columns of so many panels: of equal size, within a panel, and a multiple of the
    /// threads where there are rows enough; columns are divided only for want of rows, because each division packs `a` once more.
    fn tasks(&self, panels: usize, threads: usize) -> (usize, usize) {
        let mut rows = self.m.div_ceil(ROWS);
        if threads > 1 {
            rows = rows.next_multiple_of(threads).min(self.m.div_ceil(4 * self.kernel.mr));
        }
        let divides = threads > 1 && rows < 2 * threads;
        (rows, if divides { (2 * threads).div_ceil(rows).min(panels.div_ceil(4)) } else { 1 })
    }

    /// Packs the panels from `panel` on, [`PANELS`] at most, of a block of `k`.
    ///
    /// # Safety
    /// As [`Self::stage`]; no other thread packs them.
    unsafe fn pack_b(&self, stage: &Stage, block: usize, panel: usize) {
        let Kernel { nr, pairs, .. } = *self.kernel;
        let width = (stage.columns.1 - stage.columns.0).next_multiple_of(nr);
        let column = stage.columns.0 + panel * nr;
        let columns = (PANELS * nr).min(stage.columns.1 - column);
        let start = stage.k.0 + block * stage.block;
        let length = stage.block.min(stage.k.1 - start);
        let before = width * Panels::steps(block * stage.block, pairs) + panel * nr * Panels::steps(length, pairs);
        // SAFETY: blocks of `width * steps` words follow each other; the panels' places are within their block.
        unsafe {
            let target = stage.packed.add(before);
            match self.b {
                RightOperand::Plain(b) => (self.kernel.pack_b)(&b.panels(column, columns, start, length), target),
                RightOperand::Nf4 { matrix, along_k } => {
                    matrix.pack(self.kernel, along_k, (column, columns), (start, length), target);
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::stage`]; the panels are packed, and no other thread touches these rows and panels of `c`.
    unsafe fn task(&self, (stage, column_task): (&Stage, usize), rows: (usize, usize), panels: (usize, usize)) {
        let Kernel { mr, nr, pairs, .. } = *self.kernel;
        let column = stage.columns.0 + panels.0 * nr;
        let columns = (stage.columns.1 - column).min((panels.1 - panels.0) * nr);
        let count = rows.1 - rows.0;
        let width = (stage.columns.1 - stage.columns.0).next_multiple_of(nr);
        let mut packed_a = Workspace::take(count.next_multiple_of(mr) * Panels::steps(stage.block, pairs));
        let mut sums = match self.c {
            Target::F32(_) => None,
            Target::Bf16(_) | Target::F16(_) => Some(Workspace::take(count * columns)),
        };
        let (c, c_stride) = match (self.c, &mut sums) {
            (Target::F32(c), _) => (c.wrapping_add(rows.0 * self.c_stride + column), self.c_stride),
            (_, Some(sums)) => (sums.words().cast::<f32>(), columns),
            (Target::Bf16(_) | Target::F16(_), None) => return,
        };
        let into_f32 = sums.is_none();
        let mut packed_b = stage.packed.cast_const();
        for (start, length) in stage.blocks() {
            let steps = Panels::steps(length, pairs);
            let (a, a_panel, a_row, a_step) = match self.in_place(rows.0, start, panels) {
                Some(place) => place,
                None => {
                    // SAFETY: the workspace has `mr * steps` words for each panel.
                    unsafe { (self.kernel.pack_a)(&self.a.panels(rows.0, count, start, length), packed_a.words()) }
                    (packed_a.words().cast_const(), mr * steps, 1, mr)
                }
            };
            let part = |part: Range<usize>, tail: Tail| Block {
                rows: count,
                columns: part.len(),
                steps,
                a,
                a_panel,
                a_row,
                a_step,
                b: packed_b.wrapping_add((part.start - stage.columns.0) * steps),
                b_panel: nr * steps,
                c: c.wrapping_add(part.start - column),
                c_stride,
                add: start > 0 || (self.accumulate && into_f32),
                tail,
            };
            let left = LeftPanels { words: a, panel: a_panel, row: a_row, step: a_step };
            // SAFETY: the packed panels, and this task's part of `c` and of the sums of `low`.
            unsafe {
                self.with_low_rank(
                    (stage, column_task),
                    (start, length),
                    rows,
                    (column, column + columns),
                    left,
                    |columns, tail| (self.kernel.block)(&part(columns, tail)),
                )
            }
            packed_b = packed_b.wrapping_add(width * steps);
        }
        if stage.k.1 == self.k {
            // SAFETY: this task's part of `c`; the sums of all of k are there.
            unsafe { self.finish(rows, (column, columns), c) }
        }
    }

    /// Calls `block` for the columns of a task, with a block of `k` from `start` on. What is low-rank takes its sums from the rows of
    /// `a`; its additions come with the last block.
    ///
    /// # Safety
    /// As [`Self::task`], which has these rows and columns; `a` has the rows over the block.
    unsafe fn with_low_rank(
        &self,
        (stage, column_task): (&Stage, usize),
        (start, length): (usize, usize),
        rows: (usize, usize),
        columns: (usize, usize),
        a: LeftPanels,
        mut block: impl FnMut(Range<usize>, Tail),
    ) {
        let Some(low_rank) = self.low_rank else { return block(columns.0..columns.1, Tail::NONE) };
        let (count, last) = (rows.1 - rows.0, start + length == self.k);
        // Every task that divides the first columns has sums of its own; behind these `low` is whole.
        let low = if stage.columns.0 > 0 {
            low_rank.rows(rows.0)
        } else {
            let sums = stage.low_sums.wrapping_add((column_task * self.m + rows.0) * low_rank.rank);
            // SAFETY: the caller's promise; the sums are this task's.
            unsafe {
                low_rank.project(start / stage.block, a, count, sums);
                if last {
                    low_rank.finish(rows.0, count, sums, column_task == 0);
                }
            }
            sums
        };
        if !last {
            return block(columns.0..columns.1, Tail::NONE);
        }
        let mut packed = Workspace::take(count.next_multiple_of(self.kernel.mr) * low_rank.rank);
        // SAFETY: `low` has these rows, and all of `k` is in them; the workspace has room for them.
        unsafe { low_rank.each_part(columns, count, low, packed.words(), block) }
    }

    /// Where rows of `a` are read as they lie, from a row and a step on: their first word, and the words between panels, rows
    /// and steps. None where they are packed: that costs as much as one panel of `b` takes to use them.
    fn in_place(&self, row: usize, start: usize, panels: (usize, usize)) -> Option<(*const u32, usize, usize, usize)> {
        let Source::F32(a) = self.a.source else { return None };
        let few = !self.kernel.pairs && panels.1 - panels.0 <= IN_PLACE;
        if !few && !self.reads_across() {
            return None;
        }
        let (mr, stride) = (self.kernel.mr, self.a.stride);
        Some(if self.a.along_k {
            (a.wrapping_add(row * stride + start).cast(), mr * stride, stride, 1)
        } else {
            (a.wrapping_add(start * stride + row).cast(), mr, 1, stride)
        })
    }

    /// Adds the bias, and brings sums to a result of 16 bits.
    ///
    /// # Safety
    /// As [`Self::task`]; `sums` is `c` itself at its first row and column, or holds `columns` a row.
    unsafe fn finish(&self, rows: (usize, usize), (first, columns): (usize, usize), sums: *mut f32) {
        let bias = |j: usize| self.bias.map_or(0.0, |bias| bias(first + j));
        for row in rows.0..rows.1 {
            // SAFETY: the caller's promise.
            unsafe {
                match self.c {
                    Target::F32(_) if self.bias.is_none() => return,
                    Target::F32(_) => {
                        let sums = std::slice::from_raw_parts_mut(sums.add((row - rows.0) * self.c_stride), columns);
                        sums.iter_mut().enumerate().for_each(|(j, sum)| *sum += bias(j));
                    }
                    Target::Bf16(c) => {
                        let sums = std::slice::from_raw_parts(sums.add((row - rows.0) * columns), columns);
                        let c = std::slice::from_raw_parts_mut(c.add(row * self.c_stride + first), columns);
                        self.round(sums, bias, c);
                    }
                    Target::F16(c) => {
                        let sums = std::slice::from_raw_parts(sums.add((row - rows.0) * columns), columns);
                        let c = std::slice::from_raw_parts_mut(c.add(row * self.c_stride + first), columns);
                        self.round(sums, bias, c);
                    }
                }
            }
        }
    }

    /// One row of a result of 16 bits.
    fn round<T: Element>(&self, sums: &[f32], bias: impl Fn(usize) -> f32, c: &mut [T]) {
        for (j, (c, &sum)) in c.iter_mut().zip(sums).enumerate() {
            let old = if self.accumulate { c.load() } else { 0.0 };
            *c = T::store(old + sum + bias(j));
        }
    }
}

impl Stage {
    /// Start and length of each block of `k`; one, empty, where there is no `k`.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        let (start, end) = self.k;
        let count = (end - start).div_ceil(self.block).max(1);
        (0..count).map(move |i| start + i * self.block).map(move |at| (at, self.block.min(end - at)))
    }
}

/// Part `i` of `parts`, as equal as they can be, of `0 .. count`.
fn share(count: usize, parts: usize, i: usize) -> (usize, usize) {
    (i * count / parts, (i + 1) * count / parts)
}

/// Runs tasks `0 .. count`.
fn each(count: usize, threads: usize, task: impl Fn(usize) + Sync) {
    if threads == 1 || count == 1 {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().with_max_len(1).for_each(&task);
    }
}
