//! Adapters of low rank (LoRA; Hu et al., 2021) of one matrix product: `out += factor drop(x) A^T B^T`, and their gradients.
//! `t = factor drop(x) A^T`, of `rank` columns, is kept from the forward pass for the backward pass.

use super::Context;
use super::linear::{Linear, packed};
use crate::backend::{Backend, Buffer, Dropout, Layout, LowRankFactor, LowRankMatmul, Matmul, Rows};
use crate::mesh::Axis;
use crate::placement::{AdapterPlace, Param};

/// Most layers that one product computes: the four of the delta rule's input.
const PARTS: usize = 4;

/// Dropout of the input of A, in training.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRankDropout {
    pub(crate) probability: f32,
    /// Seed, step and micro-batch.
    pub(crate) words: [u64; 3],
    /// In the micro-batch, the first token that this rank has, and the first that ranks along [`Axis::Tensor`] have.
    pub(crate) first: [usize; 2],
}

impl LowRankDropout {
    /// Of an adapter's input with so many columns: where ranks divide tokens or columns, the mask of what this one has.
    fn of(self, adapter: &Adapter, own: usize, (ranks, rank): (usize, usize)) -> Dropout {
        let [seed, step, micro_batch] = self.words;
        let AdapterPlace { a, b, number, .. } = adapter.place;
        let [cuts_columns, cuts_rows] = [a, b].map(|param| param.axis == Axis::SameTensor);
        let whole = if cuts_columns { ranks * own } else { own };
        // What ranks divide between products has the tokens of all of them.
        let token = self.first[usize::from(cuts_columns || cuts_rows)];
        let first = token * whole + if cuts_columns { rank * own } else { 0 };
        let mask = Dropout::new(self.probability, &[seed, step, micro_batch, u64::from(number)]);
        Dropout { first, columns: [own, whole], ..mask }
    }

    /// What is left is as large on average.
    fn factor(self) -> f32 {
        1.0 / (1.0 - self.probability)
    }
}

/// The adapter of a layer whose output is a part of a product's columns.
#[derive(Clone, Copy, Debug)]
struct Adapter {
    place: AdapterPlace,
    first: usize,
    columns: usize,
}

/// The adapters of the layers that one product computes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Adapters([Option<Adapter>; PARTS]);

/// Adapters whose products with the input are one: they have the same factor, and the same mask, which is none.
struct Group {
    adapters: Vec<Adapter>,
    /// `[rank, k]`: of all of them.
    a: Param,
    rank: usize,
    /// Ranks of the groups before it.
    first: usize,
}

impl Adapters {
    /// Of layers side by side: each one's adapter, if it has one, and columns.
    pub(crate) fn new(parts: &[(Option<AdapterPlace>, usize)]) -> Self {
        let mut adapters = [None; PARTS];
        let mut first = 0;
        for (slot, &(place, columns)) in adapters.iter_mut().zip(parts) {
            *slot = place.map(|place| Adapter { place, first, columns });
            first += columns;
        }
        Adapters(adapters)
    }

    /// The place of each, and its first column and columns.
    pub(super) fn places(&self) -> impl Iterator<Item = (AdapterPlace, usize, usize)> + use<> {
        self.0.into_iter().flatten().map(|adapter| (adapter.place, adapter.first, adapter.columns))
    }

    /// A and B of all of them.
    pub(crate) fn params(&self) -> impl Iterator<Item = Param> + use<> {
        self.0.into_iter().flatten().flat_map(|adapter| [adapter.place.a, adapter.place.b])
    }

    fn groups(&self, dropout: bool) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for adapter in self.0.into_iter().flatten() {
            let AdapterPlace { a, rank, factor, .. } = adapter.place;
            match groups.last_mut() {
                Some(group) if !dropout && group.adapters[0].place.factor == factor => {
                    group.adapters.push(adapter);
                    group.rank += rank;
                    group.a.len += a.len;
                }
                _ => {
                    let first = groups.last().map_or(0, |group| group.first + group.rank);
                    groups.push(Group { adapters: vec![adapter], a, rank, first });
                }
            }
        }
        groups
    }

    /// Columns of `t`: the ranks of all of them.
    pub(crate) fn rank(&self) -> usize {
        self.0.iter().flatten().map(|adapter| adapter.place.rank).sum()
    }

    /// The adapters as one group, where they are: then a device may compute them together with the product.
    fn together(&self, dropout: bool) -> Option<Group> {
        let mut groups = self.groups(dropout);
        groups.pop().filter(|_| groups.is_empty() && !dropout)
    }

    /// `out[m, n] = x[m, k] weight[n, k]^T + bias` and what the adapters add; leaves `t` in `low`, of `m * rank` elements.
    #[allow(clippy::too_many_arguments, reason = "what a layer has")]
    pub(super) fn forward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        product: &Linear,
        x: Buffer,
        bias: Option<Buffer>,
        out: Buffer,
        low: Buffer,
        m: usize,
    ) {
        let top = cx.arena.mark();
        if let Some(group) = self.together(cx.dropout.is_some()) {
            let (down, up) = (group.down(cx), group.up(cx));
            let scratch = group.scratch(cx, m);
            let low = group.low(low, m).buffer;
            let size = [m, out.len / m, x.len / m];
            let (rank, factor) = (group.rank, group.factor());
            let (x, out) = (packed(x, m), packed(out, m));
            cx.with_product(Layout::Nt, size, x, product.weight, out, false, bias, |backend, product| {
                let (projections, additions) = (down.as_slice(), up.as_slice());
                backend.matmul_low_rank(&LowRankMatmul { product, projections, low, rank, factor, scratch, additions });
            });
            return cx.arena.release(top);
        }
        product.multiply(cx, x, bias, out, m);
        for group in self.groups(cx.dropout.is_some()) {
            let top = cx.arena.mark();
            let input = group.input(cx, x, m);
            let low = group.project(cx, input, low, m);
            group.add(cx, low, out, m);
            cx.arena.release(top);
        }
    }

    /// Adds to `out[m, n]` what the adapters made in the forward pass, which left `t` in `low`.
    pub(super) fn add<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, low: Buffer, out: Buffer, m: usize) {
        for group in self.groups(cx.dropout.is_some()) {
            group.add(cx, group.low(low, m), out, m);
        }
    }

    /// From `d_out[m, n]`, the input `x[m, k]` and `t` the gradients of A and B, assigned or added to where `accumulate` says so, and
    /// `d_x[m, k]`: where there is a `product`, with its part, which is assigned or, where `added`, added to; else what is there is
    /// added to. Empty: not wanted.
    #[allow(clippy::too_many_arguments, reason = "a layer's backward pass has as many, and what the forward pass left")]
    pub(crate) fn backward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        product: Option<(&Linear, bool)>,
        d_out: Rows,
        x: Buffer,
        low: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        let product = product.filter(|_| d_x.len > 0);
        let together =
            product.and_then(|(product, added)| Some((self.together(cx.dropout.is_some())?, product, added)));
        if let Some((group, product, added)) = together {
            let top = cx.arena.mark();
            let d_low = group.input_gradient_together(cx, product, d_out, d_x, m, added);
            group.gradients(cx, d_out, x, group.low(low, m), d_low, m, accumulate);
            return cx.arena.release(top);
        }
        if let Some((product, added)) = product {
            product.backward_input(cx, d_out, d_x, m, added);
        }
        for group in self.groups(cx.dropout.is_some()) {
            let top = cx.arena.mark();
            let input = group.input(cx, x, m);
            let d_low = group.d_low(cx, d_out, m);
            group.gradients(cx, d_out, input, group.low(low, m), d_low, m, accumulate);
            if d_x.len > 0 {
                group.input_gradient(cx, d_low, d_x, m);
            }
            cx.arena.release(top);
        }
    }
}

impl Group {
    /// Each adapter and where its columns begin among those of `t`.
    fn parts(&self) -> impl Iterator<Item = (&Adapter, usize)> {
        self.adapters.iter().scan(0, |next, adapter| {
            let from = *next;
            *next += adapter.place.rank;
            Some((adapter, from))
        })
    }

    /// A, which all of `low` is made with.
    fn down<B: Backend + ?Sized>(&self, cx: &Context<'_, B>) -> Vec<LowRankFactor> {
        let weight = cx.store.weight(self.a);
        vec![LowRankFactor { columns: 0..weight.len / self.rank, low: 0..self.rank, weight }]
    }

    /// The adapters' Bs, each with its columns of the output.
    fn up<B: Backend + ?Sized>(&self, cx: &Context<'_, B>) -> Vec<LowRankFactor> {
        let factor = |(adapter, from): (&Adapter, usize)| LowRankFactor {
            columns: adapter.first..adapter.first + adapter.columns,
            low: from..from + adapter.place.rank,
            weight: cx.store.weight(adapter.place.b),
        };
        self.parts().map(factor).collect()
    }

    fn factor(&self) -> f32 {
        self.adapters[0].place.factor
    }

    /// What a product of `m` rows needs for `t` before the factor.
    fn scratch<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, m: usize) -> Buffer {
        let len = if self.factor() == 1.0 { 0 } else { m * self.rank };
        cx.workspace(cx.dtype, len)
    }

    /// The gradient of `factor x A^T` by that of the output, times the factor, in workspace; `d_x` becomes the gradient of the
    /// input, or it is added to.
    fn input_gradient_together<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        product: &Linear,
        d_out: Rows,
        d_x: Buffer,
        m: usize,
        added: bool,
    ) -> Rows {
        let (down, up) = (self.down(cx), self.up(cx));
        let low = cx.workspace(cx.dtype, m * self.rank);
        let scratch = self.scratch(cx, m);
        let (rank, factor, k) = (self.rank, self.factor(), d_x.len / m);
        let (size, d_x) = ([m, k, product.weight.len / k], packed(d_x, m));
        cx.with_product(Layout::Nn, size, d_out, product.weight, d_x, added, None, |backend, product| {
            let (projections, additions) = (up.as_slice(), down.as_slice());
            backend.matmul_low_rank(&LowRankMatmul { product, projections, low, rank, factor, scratch, additions });
        });
        Rows { buffer: low, stride: rank }
    }

    /// As [`Group::input_gradient_together`], without the input's.
    fn d_low<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, d_out: Rows, m: usize) -> Rows {
        let d_product = cx.workspace(cx.dtype, m * self.rank);
        for (adapter, from) in self.parts() {
            let AdapterPlace { b, rank, .. } = adapter.place;
            let d_out = part(d_out, adapter.first);
            let d_product = part(Rows { buffer: d_product, stride: self.rank }, from);
            let weight = cx.store.weight(b);
            product(cx, Layout::Nn, [m, rank, adapter.columns], d_out, weight, d_product, false);
        }
        self.scaled(cx, d_product)
    }

    /// The gradients of A and B, assigned or added to.
    #[allow(clippy::too_many_arguments, reason = "what the passes left")]
    fn gradients<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        input: Buffer,
        low: Rows,
        d_low: Rows,
        m: usize,
        accumulate: bool,
    ) {
        for (adapter, from) in self.parts() {
            let AdapterPlace { b, rank, .. } = adapter.place;
            if let Some(d_b) = cx.store.gradient(b) {
                let d_b = Rows { buffer: d_b, stride: rank };
                let (d_out, low) = (part(d_out, adapter.first), part(low, from));
                matmul(cx, Layout::Tn, [adapter.columns, rank, m], d_out, low, d_b, accumulate);
            }
        }
        let k = input.len / m;
        if let Some(d_a) = cx.store.gradient(self.a) {
            let (input, d_a) = (Rows { buffer: input, stride: k }, Rows { buffer: d_a, stride: k });
            matmul(cx, Layout::Tn, [self.rank, k, m], d_low, input, d_a, accumulate);
        }
    }

    /// What A takes: `x`, or in workspace what dropout leaves of it.
    fn input<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, x: Buffer, m: usize) -> Buffer {
        let Some(dropout) = cx.dropout else { return x };
        let dropped = cx.workspace(x.dtype, x.len);
        let mask = dropout.of(&self.adapters[0], x.len / m, cx.along(Axis::Tensor));
        cx.backend.scale(x, dropout.factor(), Some(mask), dropped);
        dropped
    }

    /// `out += low B^T`, each adapter's columns.
    fn add<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, low: Rows, out: Buffer, m: usize) {
        let out = Rows { buffer: out, stride: out.len / m };
        for (adapter, from) in self.parts() {
            let b = cx.store.weight(adapter.place.b);
            let (a, c) = (part(low, from), part(out, adapter.first));
            product(cx, Layout::Nt, [m, adapter.columns, adapter.place.rank], a, b, c, true);
        }
    }

    /// Its part of `t`.
    fn low(&self, low: Buffer, m: usize) -> Rows {
        Rows { buffer: low.slice(m * self.first, m * self.rank), stride: self.rank }
    }

    /// `factor input A^T`, `[m, rank]`, into its part of `low`.
    fn project<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, input: Buffer, low: Buffer, m: usize) -> Rows {
        let low = self.low(low, m);
        let (k, factor) = (input.len / m, self.adapters[0].place.factor);
        let plain = if factor == 1.0 { low.buffer } else { cx.workspace(cx.dtype, m * self.rank) };
        let (a, c) = (Rows { buffer: input, stride: k }, Rows { buffer: plain, stride: self.rank });
        let weight = cx.store.weight(self.a);
        product(cx, Layout::Nt, [m, self.rank, k], a, weight, c, false);
        if factor != 1.0 {
            cx.backend.scale(plain, factor, None, low.buffer);
        }
        low
    }

    /// `factor x`, `[m, rank]`.
    fn scaled<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, x: Buffer) -> Rows {
        let factor = self.adapters[0].place.factor;
        if factor == 1.0 {
            return Rows { buffer: x, stride: self.rank };
        }
        let scaled = cx.workspace(x.dtype, x.len);
        cx.backend.scale(x, factor, None, scaled);
        Rows { buffer: scaled, stride: self.rank }
    }

    /// `d_x += drop(d_low A)`.
    fn input_gradient<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, d_low: Rows, d_x: Buffer, m: usize) {
        let (k, weight) = (d_x.len / m, cx.store.weight(self.a));
        let Some(dropout) = cx.dropout else {
            let d_x = Rows { buffer: d_x, stride: k };
            return product(cx, Layout::Nn, [m, k, self.rank], d_low, weight, d_x, true);
        };
        let d_input = cx.workspace(d_x.dtype, d_x.len);
        let out = Rows { buffer: d_input, stride: k };
        product(cx, Layout::Nn, [m, k, self.rank], d_low, weight, out, false);
        let dropped = cx.workspace(d_x.dtype, d_x.len);
        let mask = dropout.of(&self.adapters[0], k, cx.along(Axis::Tensor));
        cx.backend.scale(d_input, dropout.factor(), Some(mask), dropped);
        cx.backend.add(d_x, dropped);
    }
}

/// The columns of a matrix from `first` on.
fn part(rows: Rows, first: usize) -> Rows {
    Rows { buffer: rows.buffer.slice(first, rows.buffer.len - first), stride: rows.stride }
}

/// A product whose right operand is a whole weight.
fn product<B: Backend + ?Sized>(
    cx: &mut Context<'_, B>,
    layout: Layout,
    [m, n, k]: [usize; 3],
    a: Rows,
    weight: Buffer,
    c: Rows,
    accumulate: bool,
) {
    let stride = if layout == Layout::Nt { k } else { n };
    matmul(cx, layout, [m, n, k], a, Rows { buffer: weight, stride }, c, accumulate);
}

fn matmul<B: Backend + ?Sized>(
    cx: &mut Context<'_, B>,
    layout: Layout,
    [m, n, k]: [usize; 3],
    a: Rows,
    b: Rows,
    c: Rows,
    accumulate: bool,
) {
    cx.backend.matmul(&Matmul { layout, m, n, k, a, b, c, accumulate, bias: None });
}
