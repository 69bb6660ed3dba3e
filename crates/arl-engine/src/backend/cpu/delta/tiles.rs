//! Matrices of one chunk and their products. A matrix that is the right operand of a product is kept in panels, as
//! [`Products`] reads it, so that one product can write what the next one takes without a copy. Knows nothing of the rule.

use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::{Left, MatRef, Products};

/// Rows of a block of a triangular product: whole tiles of every kernel.
const BLOCK: usize = 24;

/// The products of a chunk.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    products: Products,
}

/// Where a product is written.
pub(super) enum Target<'a> {
    /// Rows, so many elements apart.
    Rows(&'a mut [f32], usize),
    /// Panels of a matrix of so many rows.
    Panels(&'a mut [f32], usize),
}

impl Target<'_> {
    /// The rows from `row` on.
    fn rows_from(&mut self, row: usize, panel: usize) -> Target<'_> {
        match self {
            Target::Rows(data, stride) => Target::Rows(&mut data[row * *stride..], *stride),
            Target::Panels(data, rows) => Target::Panels(&mut data[row * panel..], *rows),
        }
    }
}

impl Tiles {
    pub(super) fn new() -> Self {
        Tiles { products: Products::new() }
    }

    /// Words of a matrix `[rows, columns]` in panels.
    pub(super) fn words(self, rows: usize, columns: usize) -> usize {
        self.products.right_words(columns, rows)
    }

    /// The first column and the width of each panel of a matrix of so many columns; its first word is `first column * rows`.
    pub(super) fn panels(self, columns: usize) -> impl Iterator<Item = (usize, usize)> {
        let panel = self.products.columns();
        (0..columns).step_by(panel).map(move |first| (first, panel.min(columns - first)))
    }

    /// Columns of a panel.
    pub(super) fn panel(self) -> usize {
        self.products.columns()
    }

    /// Packs `[rows, columns]`.
    pub(super) fn pack(self, source: &[f32], stride: usize, (rows, columns): (usize, usize), panels: &mut [f32]) {
        let source = MatRef { data: f32::elements(source), stride };
        self.products.pack_right(source, false, columns, rows, panels);
    }

    /// Packs `[rows, columns]` of which `source` is the transpose.
    pub(super) fn pack_transposed(
        self,
        source: &[f32],
        stride: usize,
        (rows, columns): (usize, usize),
        panels: &mut [f32],
    ) {
        let source = MatRef { data: f32::elements(source), stride };
        self.products.pack_right(source, true, columns, rows, panels);
    }

    /// From the panels of `[rows, columns]` to those of its transpose.
    pub(super) fn transpose(self, source: &[f32], (rows, columns): (usize, usize), target: &mut [f32]) {
        let panel = self.panel();
        for (column, width) in self.panels(columns) {
            for (row, height) in self.panels(rows) {
                let block = MatRef { data: f32::elements(&source[column * rows + row * panel..]), stride: panel };
                self.products.pack_right(block, true, height, width, &mut target[row * columns + column * panel..]);
            }
        }
    }

    /// The left operand `[rows, steps]` of a product, where it is.
    pub(super) fn left(self, words: &[f32], stride: usize) -> Left<'_> {
        self.products.left(words, stride, false)
    }

    /// The left operand of a product: the transpose of `[steps, rows]`.
    pub(super) fn left_transposed(self, words: &[f32], stride: usize) -> Left<'_> {
        self.products.left(words, stride, true)
    }

    /// `c[m, n] = a b` over `k` steps, or added to it. `b` has `steps` rows, of which the product takes those from `first` on.
    #[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
    fn part(
        self,
        (m, n, k): (usize, usize, usize),
        a: Left<'_>,
        b: &[f32],
        (steps, first): (usize, usize),
        c: Target<'_>,
        add: bool,
    ) {
        match c {
            Target::Rows(c, stride) => {
                self.products.multiply((m, n, k), a, self.products.right(b, steps).from_step(first), (c, stride), add);
            }
            Target::Panels(c, rows) => {
                for (column, width) in self.panels(n) {
                    let b = self.products.right(&b[column * steps..], steps).from_step(first);
                    self.products.multiply((m, width, k), a, b, (&mut c[column * rows..], self.panel()), add);
                }
            }
        }
    }

    /// `c[m, n] = a b` over `k` steps, or added to it.
    pub(super) fn multiply(self, shape: (usize, usize, usize), a: Left<'_>, b: &[f32], c: Target<'_>, add: bool) {
        self.part(shape, a, b, (shape.2, 0), c, add);
    }

    /// `c[i] = sum over j <= i of a[i, j] b[j]`, or added to it: `a` is `[n, n]`, `b` and `c` have `columns`.
    pub(super) fn lower(
        self,
        (n, columns): (usize, usize),
        a: (&[f32], usize),
        b: &[f32],
        mut c: Target<'_>,
        add: bool,
    ) {
        for row in (0..n).step_by(BLOCK) {
            let rows = BLOCK.min(n - row);
            let left = self.left(&a.0[row * a.1..], a.1);
            self.part((rows, columns, row + rows), left, b, (n, 0), c.rows_from(row, self.panel()), add);
        }
    }

    /// `c[i] = sum over j >= i of a[j, i] b[j]`, or added to it.
    pub(super) fn lower_transposed(
        self,
        (n, columns): (usize, usize),
        a: (&[f32], usize),
        b: &[f32],
        mut c: Target<'_>,
        add: bool,
    ) {
        for row in (0..n).step_by(BLOCK) {
            let rows = BLOCK.min(n - row);
            let left = self.left_transposed(&a.0[row * a.1 + row..], a.1);
            self.part((rows, columns, n - row), left, b, (n, row), c.rows_from(row, self.panel()), add);
        }
    }

    /// `c[i, j] = a[i] b[:, j]` for `j <= i`: `a` is `[n, k]`, `b` `[k, n]`. What is above the diagonal is arbitrary.
    pub(super) fn scores(self, (n, k): (usize, usize), a: &[f32], b: &[f32], (c, stride): (&mut [f32], usize)) {
        for (first, width) in self.panels(n) {
            let left = self.left(&a[first * k..], k);
            let right = self.products.right(&b[first * k..], k);
            self.products.multiply(
                (n - first, width, k),
                left,
                right,
                (&mut c[first * stride + first..], stride),
                false,
            );
        }
    }
}
