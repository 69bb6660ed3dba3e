//! The factors of adapters (LoRA) inside the product that they adapt: `low = factor a P`, of a few columns, is computed from rows of
//! `a` that are packed for the product anyway, and what `low Q` adds to `c` are further steps of the sums of `c`. So `a` is read
//! once and `c` is written once, where products of their own would read and write them again for next to no arithmetic.
//! Knows slices and strides, nothing of layers.

use std::ops::Range;

use super::kernel::{Block, Kernel, Tail};
use super::operand::{Elements, MatRef, check};
use super::pack::{Panels, Source};
use super::product::Operand;
use super::workspace::Workspace;

/// A matrix of a few columns over some of the steps of a product, or of a few steps over some of its columns.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'a> {
    /// f32, one row a column (`along`), or one row a step.
    pub matrix: MatRef<'a>,
    /// Whether a row of memory runs along the steps.
    pub along: bool,
}

/// `low[:, at .. at + columns] = factor a[:, k] b`.
#[derive(Clone, Debug)]
pub struct Projection<'a> {
    /// Columns of `a`.
    pub k: Range<usize>,
    /// First column of `low`.
    pub at: usize,
    /// Columns.
    pub columns: usize,
    /// `b`, over the steps `k`.
    pub b: Factor<'a>,
}

/// `c[:, columns] += low[:, low] b`.
#[derive(Clone, Debug)]
pub struct Addition<'a> {
    /// Columns of `c`.
    pub columns: Range<usize>,
    /// Columns of `low`, which are the steps of `b`.
    pub low: Range<usize>,
    /// `b`, of as many columns.
    pub b: Factor<'a>,
}

/// What adapters make of `a`, and add to `c`.
#[derive(Debug)]
pub struct LowRank<'a> {
    /// `[m, rank]`: what `a` is projected to.
    pub low: &'a mut [f32],
    /// Columns of `low`, each of which is a projection's.
    pub rank: usize,
    /// On what projections give.
    pub factor: f32,
    /// What gives `low`.
    pub projections: &'a [Projection<'a>],
    /// What is made of it, in the order of columns of `c`; no two of the same columns.
    pub additions: &'a [Addition<'a>],
}

impl LowRank<'_> {
    /// Panics unless all operands have their shapes within a product of `m` rows and `n` columns over `k`.
    pub(super) fn check(&self, m: usize, n: usize, k: usize) {
        check("low", self.low.len(), m, self.rank, self.rank);
        for part in self.projections {
            assert!(part.k.end <= k && part.at + part.columns <= self.rank, "a projection within the product");
            part.b.check(part.columns, part.k.len());
        }
        for part in self.additions {
            assert!(part.columns.end <= n && part.low.end <= self.rank, "an addition within the product");
            part.b.check(part.columns.len(), part.low.len());
        }
        assert!(self.additions.is_sorted_by(|a, b| a.columns.end <= b.columns.start), "additions in order");
    }
}

impl Factor<'_> {
    fn check(&self, columns: usize, steps: usize) {
        let (rows, width) = if self.along { (columns, steps) } else { (steps, columns) };
        check("factor", self.matrix.data.len(), rows, width, self.matrix.stride);
        assert!(matches!(self.matrix.data, Elements::F32(_)), "factors are f32 here");
    }

    fn operand(&self) -> Operand {
        Operand { source: super::source(self.matrix.data), stride: self.matrix.stride, along_k: self.along }
    }
}

/// The part of a projection in one block of `k`, packed.
struct Piece {
    block: usize,
    /// Steps of the block before it.
    skipped: usize,
    steps: usize,
    at: usize,
    columns: usize,
    /// Whether it is its projection's first one.
    first: bool,
    packed: usize,
}

/// An addition, packed.
struct Added {
    columns: Range<usize>,
    low: Range<usize>,
    packed: usize,
}

/// [`LowRank`], packed for one product. Offsets are of words of `memory`.
pub(super) struct Packed<'a> {
    kernel: &'static Kernel,
    memory: *const u32,
    /// Keeps `memory`.
    _workspace: Workspace,
    pieces: Vec<Piece>,
    added: Vec<Added>,
    pub(super) rank: usize,
    factor: f32,
    low: *mut f32,
    _low: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `memory` is only read; rows of `low` are written by the one task that owns them.
unsafe impl Sync for Packed<'_> {}

/// Where rows of `a` are: the word of row `i`, step `p` is `words + (i / MR) panel + (i % MR) row + p step`.
#[derive(Clone, Copy)]
pub(super) struct LeftPanels {
    pub(super) words: *const u32,
    pub(super) panel: usize,
    pub(super) row: usize,
    pub(super) step: usize,
}

impl<'a> Packed<'a> {
    /// Packs what was checked for a product whose blocks of `k` have `block` elements.
    ///
    /// # Safety
    /// The CPU has the kernel's instructions.
    pub(super) unsafe fn new(kernel: &'static Kernel, low_rank: &'a mut LowRank<'_>, block: usize) -> Packed<'a> {
        let nr = kernel.nr;
        let mut words = 0;
        let mut place = |columns: usize, steps: usize| {
            let at = words;
            words += columns.next_multiple_of(nr) * steps;
            at
        };
        let mut pieces = Vec::new();
        let mut panels: Vec<(Panels, usize)> = Vec::new();
        for part in low_rank.projections {
            let mut start = part.k.start;
            while start < part.k.end {
                let index = start / block;
                let steps = ((index + 1) * block).min(part.k.end) - start;
                let packed = place(part.columns, steps);
                panels.push((part.b.operand().panels(0, part.columns, start - part.k.start, steps), packed));
                let (skipped, first) = (start - index * block, start == part.k.start);
                pieces.push(Piece { block: index, skipped, steps, at: part.at, columns: part.columns, first, packed });
                start += steps;
            }
        }
        let added = low_rank.additions.iter().map(|part| {
            let packed = place(part.columns.len(), part.low.len());
            panels.push((part.b.operand().panels(0, part.columns.len(), 0, part.low.len()), packed));
            Added { columns: part.columns.clone(), low: part.low.clone(), packed }
        });
        let added = added.collect();
        let mut workspace = Workspace::take(words);
        let memory = workspace.words();
        for (panels, at) in panels {
            // SAFETY: the source was checked, and the panels have their words from `at` on.
            unsafe { (kernel.pack_b)(&panels, memory.add(at)) }
        }
        Packed {
            kernel,
            memory,
            _workspace: workspace,
            pieces,
            added,
            rank: low_rank.rank,
            factor: low_rank.factor,
            low: low_rank.low.as_mut_ptr(),
            _low: std::marker::PhantomData,
        }
    }

    /// Adds to `sums`, `[count, rank]`, what block `block` of `k` gives; `a` are its rows.
    ///
    /// # Safety
    /// `a` has `count` rows over the block, and no other thread touches `sums`.
    pub(super) unsafe fn project(&self, block: usize, a: LeftPanels, count: usize, sums: *mut f32) {
        for piece in self.pieces.iter().filter(|piece| piece.block == block) {
            let block = Block {
                rows: count,
                columns: piece.columns,
                steps: piece.steps,
                a: a.words.wrapping_add(piece.skipped * a.step),
                a_panel: a.panel,
                a_row: a.row,
                a_step: a.step,
                b: self.memory.wrapping_add(piece.packed),
                b_panel: self.kernel.nr * piece.steps,
                c: sums.wrapping_add(piece.at),
                c_stride: self.rank,
                add: !piece.first,
                tail: Tail::NONE,
            };
            // SAFETY: the caller's promise; the piece is packed, and its columns are among those of `sums`.
            unsafe { (self.kernel.block)(&block) }
        }
    }

    /// Multiplies the sums of `count` rows by the factor, and leaves them in `low` where `keep`: this task has the rows from `row` on.
    ///
    /// # Safety
    /// As [`Self::project`]; with `keep`, no other thread touches these rows of `low`.
    pub(super) unsafe fn finish(&self, row: usize, count: usize, sums: *mut f32, keep: bool) {
        // SAFETY: the caller's promise.
        let sums = unsafe { std::slice::from_raw_parts_mut(sums, count * self.rank) };
        if self.factor != 1.0 {
            sums.iter_mut().for_each(|sum| *sum *= self.factor);
        }
        if keep {
            // SAFETY: `low` has `rank` columns for every row of the product.
            unsafe { std::slice::from_raw_parts_mut(self.low.add(row * self.rank), sums.len()) }.copy_from_slice(sums);
        }
    }

    /// The rows of `low` from `row` on.
    pub(super) fn rows(&self, row: usize) -> *mut f32 {
        self.low.wrapping_add(row * self.rank)
    }

    /// The columns from `first` to `end`, cut where additions begin and end, with each part's addition; its rows are those of
    /// `low`, packed into `words`.
    ///
    /// # Safety
    /// `low` has `count` rows of `rank` columns, and `words` room for them in panels.
    pub(super) unsafe fn each_part(
        &self,
        (first, end): (usize, usize),
        count: usize,
        low: *const f32,
        words: *mut u32,
        mut part: impl FnMut(Range<usize>, Tail),
    ) {
        let mut at = first;
        for added in self.added.iter().filter(|added| added.columns.start < end && added.columns.end > first) {
            let (from, to) = (added.columns.start.max(first), added.columns.end.min(end));
            if at < from {
                part(at..from, Tail::NONE);
            }
            let steps = added.low.len();
            let rows = Panels {
                source: Source::F32(low.wrapping_add(added.low.start)),
                stride: self.rank,
                along_k: true,
                rows: count,
                length: steps,
            };
            // SAFETY: the caller's promise.
            unsafe { (self.kernel.pack_a)(&rows, words) }
            let b = self.memory.wrapping_add(added.packed + (from - added.columns.start) * steps);
            part(from..to, Tail { steps, a: words, b });
            at = to;
        }
        if at < end {
            part(at..end, Tail::NONE);
        }
    }
}
