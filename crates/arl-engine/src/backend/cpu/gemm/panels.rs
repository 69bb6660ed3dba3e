//! Small f32 products on the calling thread, for leaves that are parallel themselves: operands are packed once and used
//! by many products. Knows slices and strides, nothing of what they stand for.

use super::super::simd;
use super::kernel::{Block, Kernel, Tail};
use super::operand::{MatRef, check};
use super::product::Operand;
use super::source;

/// The small products of this CPU.
#[derive(Clone, Copy)]
pub struct Products {
    kernel: &'static Kernel,
}

/// The left operand of a product: the element of row `i` and step `p` is
/// `words[i / ROWS * panel + i % ROWS * row + p * step]`, with [`Products::rows`] for `ROWS`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    words: &'a [f32],
    panel: usize,
    row: usize,
    step: usize,
}

/// The right operand of a product: the element of step `p` and column `j` is
/// `words[j / COLUMNS * panel + p * COLUMNS + j % COLUMNS]`, with [`Products::columns`] for `COLUMNS`.
#[derive(Clone, Copy)]
pub struct Right<'a> {
    words: &'a [f32],
    panel: usize,
    columns: usize,
}

impl Left<'_> {
    /// The steps from `step` on.
    pub fn from_step(self, step: usize) -> Self {
        Left { words: self.words.get(step * self.step..).unwrap_or_default(), ..self }
    }
}

impl<'a> Right<'a> {
    /// The columns from `column` on, which is the first of a panel.
    ///
    /// # Panics
    /// If it is not.
    pub fn from_column(self, column: usize) -> Right<'a> {
        assert_eq!(column % self.columns, 0, "a panel has {} columns", self.columns);
        Right { words: self.words.get(column / self.columns * self.panel..).unwrap_or_default(), ..self }
    }

    /// The steps from `step` on.
    pub fn from_step(self, step: usize) -> Right<'a> {
        Right { words: self.words.get(step * self.columns..).unwrap_or_default(), ..self }
    }
}

impl Products {
    /// With the widest instructions there are.
    pub fn new() -> Self {
        Products { kernel: Kernel::choose(simd::level(), false) }
    }

    /// Rows of a panel of a packed left operand.
    pub fn rows(&self) -> usize {
        self.kernel.mr
    }

    /// Columns of a panel of a right operand.
    pub fn columns(&self) -> usize {
        self.kernel.nr
    }

    /// Words of a left operand of `rows` rows over `steps`, packed.
    pub fn left_words(&self, rows: usize, steps: usize) -> usize {
        rows.next_multiple_of(self.kernel.mr) * steps
    }

    /// Words of a right operand of `columns` columns over `steps`, packed.
    pub fn right_words(&self, columns: usize, steps: usize) -> usize {
        columns.next_multiple_of(self.kernel.nr) * steps
    }

    /// Packs a left operand of `rows` rows over `steps`. Where memory runs `along` the steps, `source` is `[rows, steps]`,
    /// else `[steps, rows]`.
    ///
    /// # Panics
    /// If the source is smaller than its shape, or `words` than [`Self::left_words`].
    pub fn pack_left<'w>(
        &self,
        source: MatRef<'_>,
        along: bool,
        rows: usize,
        steps: usize,
        words: &'w mut [f32],
    ) -> Left<'w> {
        let panels = operand(source, along, rows, steps).panels(0, rows, 0, steps);
        assert!(words.len() >= self.left_words(rows, steps), "{} words for [{rows}, {steps}]", words.len());
        // SAFETY: the source was checked against its shape, and `words` has room for all panels.
        unsafe { (self.kernel.pack_a)(&panels, words.as_mut_ptr().cast()) }
        Left { words, panel: self.kernel.mr * steps, row: 1, step: self.kernel.mr }
    }

    /// Packs a right operand of `columns` columns over `steps`. Where memory runs `along` the steps, `source` is
    /// `[columns, steps]`, else `[steps, columns]`. Columns that are missing in the last panel are zeros.
    ///
    /// # Panics
    /// If the source is smaller than its shape, or `words` than [`Self::right_words`].
    pub fn pack_right<'w>(
        &self,
        source: MatRef<'_>,
        along: bool,
        columns: usize,
        steps: usize,
        words: &'w mut [f32],
    ) -> Right<'w> {
        let panels = operand(source, along, columns, steps).panels(0, columns, 0, steps);
        assert!(words.len() >= self.right_words(columns, steps), "{} words for [{columns}, {steps}]", words.len());
        // SAFETY: as in `pack_left`.
        unsafe { (self.kernel.pack_b)(&panels, words.as_mut_ptr().cast()) }
        self.right(words, steps)
    }

    /// A right operand that is packed already, over `steps`.
    pub fn right<'w>(&self, words: &'w [f32], steps: usize) -> Right<'w> {
        Right { words, panel: self.kernel.nr * steps, columns: self.kernel.nr }
    }

    /// A left operand where it is: `[rows, steps]` with a stride, or (`across`) the transpose of `[steps, rows]`.
    pub fn left<'w>(&self, words: &'w [f32], stride: usize, across: bool) -> Left<'w> {
        let (row, step) = if across { (1, stride) } else { (stride, 1) };
        Left { words, panel: self.kernel.mr * row, row, step }
    }

    /// `c[m, n] = a b` over `k` steps, plus `c` where `accumulate`. `c` is given with its stride.
    ///
    /// # Panics
    /// If an operand is smaller than its shape.
    #[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
    pub fn multiply(
        &self,
        (m, n, k): (usize, usize, usize),
        a: Left<'_>,
        b: Right<'_>,
        (c, c_stride): (&mut [f32], usize),
        accumulate: bool,
    ) {
        if m == 0 || n == 0 {
            return;
        }
        let Kernel { mr, nr, .. } = *self.kernel;
        if k > 0 {
            // Panels do not overlap, so that the last row is behind all others.
            let last = (m - 1) / mr * a.panel + (m - 1) % mr * a.row + (k - 1) * a.step;
            assert!(last < a.words.len(), "a: [{m}, {k}] does not lie in {} words", a.words.len());
            let end = (n - 1) / nr * b.panel + k * nr;
            assert!(end <= b.words.len(), "b: [{k}, {n}] does not lie in {} words", b.words.len());
        }
        check("c", c.len(), m, n, c_stride);
        let block = Block {
            rows: m,
            columns: n,
            steps: k,
            a: a.words.as_ptr().cast(),
            a_panel: a.panel,
            a_row: a.row,
            a_step: a.step,
            b: b.words.as_ptr().cast(),
            b_panel: b.panel,
            c: c.as_mut_ptr(),
            c_stride,
            add: accumulate,
            tail: Tail::NONE,
        };
        // SAFETY: just checked; `c` is borrowed mutably, so it overlaps nothing and no other thread has it.
        unsafe { (self.kernel.block)(&block) }
    }
}

impl Default for Products {
    fn default() -> Self {
        Self::new()
    }
}

/// `rows` rows (or columns) over `steps`, checked.
fn operand(source: MatRef<'_>, along: bool, rows: usize, steps: usize) -> Operand {
    let (outer, inner) = if along { (rows, steps) } else { (steps, rows) };
    check("source", source.data.len(), outer, inner, source.stride);
    Operand { source: self::source(source.data), stride: source.stride, along_k: along }
}
