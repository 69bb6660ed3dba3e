//! Context parallelism of what mixes tokens, after Jacobs et al., 2023 (DeepSpeed Ulysses, arXiv 2309.14509): the ranks along
//! [`Axis::Context`], each with some tokens and all heads, exchange these for all tokens and some heads before, and back behind.
//! `t` are a rank's tokens, `W` those of the whole micro-batch, `C` the number of ranks: `W = C t`.
//!
//! What is exchanged is not kept: the backward pass exchanges it again.

use super::context::{Context, Run};
use crate::backend::{Attention, Backend, Buffer, Heads, Rows};
use crate::mesh::Axis;

/// Columns of a row of all heads from `first` on: `width` of them belong to each rank's heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    pub(super) rows: Rows,
    pub(super) width: usize,
}

impl Columns {
    /// The columns `[first, first + all)` of `rows`, divided among `ranks`.
    pub(super) fn new(rows: Rows, first: usize, all: usize, ranks: usize) -> Self {
        let Rows { buffer, stride } = rows;
        Columns { rows: Rows { buffer: buffer.slice(first, buffer.len - first), stride }, width: all / ranks }
    }

    /// Those of a rank's heads.
    fn of(&self, rank: usize) -> Rows {
        let Rows { buffer, stride } = self.rows;
        let first = rank * self.width;
        Rows { buffer: buffer.slice(first, buffer.len - first), stride }
    }
}

fn width(parts: &[Columns]) -> usize {
    parts.iter().map(|part| part.width).sum()
}

/// All rows behind one another, and each rank's of them.
fn by_rank(all: Buffer, ranks: usize) -> Vec<Buffer> {
    let len = all.len / ranks;
    (0..ranks).map(|rank| all.slice(rank * len, len)).collect()
}

impl<B: Backend + ?Sized> Context<'_, B> {
    /// `whole` `[W, sum of widths]` becomes this rank's heads' columns of all tokens, of which each rank has `t` rows of all heads'
    /// columns: those of the first part, then those of the next.
    pub(super) fn tokens_for_heads(&mut self, parts: &[Columns], whole: Buffer) {
        let (ranks, _) = self.along(Axis::Context);
        let top = self.arena.mark();
        let packed = self.workspace(whole.dtype, whole.len);
        let sends = by_rank(packed, ranks);
        self.each_part(parts, &sends, |backend, columns, packed, t, width| {
            backend.copy_columns(columns, packed, t, width);
        });
        self.exchange(Axis::Context, &sends, &by_rank(whole, ranks));
        self.arena.release(top);
    }

    /// The reverse of [`Context::tokens_for_heads`]: `parts` get what all ranks have in `whole` of this one's tokens.
    pub(super) fn heads_for_tokens(&mut self, whole: Buffer, parts: &[Columns]) {
        let (ranks, _) = self.along(Axis::Context);
        let top = self.arena.mark();
        let packed = self.workspace(whole.dtype, whole.len);
        let receives = by_rank(packed, ranks);
        self.exchange(Axis::Context, &by_rank(whole, ranks), &receives);
        self.each_part(parts, &receives, |backend, columns, packed, t, width| {
            backend.copy_columns(packed, columns, t, width);
        });
        self.arena.release(top);
    }

    /// Calls `copy` with the columns of each part and rank, and their place in what is exchanged with that rank.
    fn each_part(
        &mut self,
        parts: &[Columns],
        exchanged: &[Buffer],
        mut copy: impl FnMut(&mut B, Rows, Rows, usize, usize),
    ) {
        let stride = width(parts);
        for (rank, buffer) in exchanged.iter().enumerate() {
            let mut first = 0;
            for part in parts {
                let packed = Rows { buffer: buffer.slice(first, buffer.len - first), stride };
                copy(self.backend, part.of(rank), packed, buffer.len / stride, part.width);
                first += part.width;
            }
        }
    }

    /// Attention over the whole micro-batch; of `op` tokens are this rank's. `log_sum_exp` is left for the backward pass as it is of
    /// the exchanged heads and tokens.
    pub(super) fn context_attention(&mut self, op: &Attention, run: &Run) {
        let ranks = run.inputs.shared.contexts();
        if ranks == 1 {
            return self.backend.attention(op);
        }
        let top = self.arena.mark();
        let exchanged = self.exchanged(op, ranks);
        self.backend.attention(&exchanged);
        self.heads_for_tokens(exchanged.out.buffer, &[outputs(op.heads, op.out, ranks)]);
        self.arena.release(top);
    }

    /// As [`Backend::attention_backward`], of attention over the whole micro-batch. `scratch` is of all tokens and this rank's heads.
    pub(super) fn context_attention_backward(
        &mut self,
        op: &Attention,
        d_out: Rows,
        d_qkv: Buffer,
        scratch: Buffer,
        run: &Run,
    ) {
        let (heads, ranks) = (op.heads, run.inputs.shared.contexts());
        if ranks == 1 {
            return self.backend.attention_backward(op, d_out, d_qkv, scratch);
        }
        let top = self.arena.mark();
        let exchanged = self.exchanged(op, ranks);
        self.tokens_for_heads(&[outputs(heads, op.out, ranks)], exchanged.out.buffer);
        let d_whole = self.workspace(d_qkv.dtype, exchanged.out.buffer.len);
        self.tokens_for_heads(&[outputs(heads, d_out, ranks)], d_whole);
        let d_out = Rows { buffer: d_whole, stride: exchanged.out.stride };
        let d_whole = self.workspace(d_qkv.dtype, d_qkv.len);
        self.backend.attention_backward(&exchanged, d_out, d_whole, scratch);
        let d_qkv = Rows { buffer: d_qkv, stride: heads.qkv_columns() };
        let (q, k) = (heads.query_columns(), heads.key_columns());
        let parts = [(0, q), (q, k), (q + k, k)].map(|(first, all)| Columns::new(d_qkv, first, all, ranks));
        self.heads_for_tokens(d_whole, &parts);
        self.arena.release(top);
    }

    /// Attention with this rank's heads of all tokens: `op` with queries, keys and values exchanged, and room for what it gives.
    fn exchanged(&mut self, op: &Attention, ranks: usize) -> Attention {
        let all = op.heads;
        let heads = Heads { query: all.query / ranks, key_value: all.key_value / ranks, dim: all.dim };
        let whole = op.tokens() * ranks;
        let dtype = op.q.buffer.dtype;
        let qkv = self.workspace(dtype, whole * heads.qkv_columns());
        let out = self.workspace(dtype, whole * heads.query_columns());
        let (q, k) = (all.query_columns(), all.key_columns());
        let parts = [(op.q, q), (op.k, k), (op.v, k)].map(|(rows, all)| Columns::new(rows, 0, all, ranks));
        self.tokens_for_heads(&parts, qkv);
        let stride = heads.qkv_columns();
        let columns = |first: usize| Rows { buffer: qkv.slice(first, qkv.len - first), stride };
        Attention {
            heads,
            q: columns(0),
            k: columns(heads.query_columns()),
            v: columns(heads.qk_columns()),
            out: Rows { buffer: out, stride: heads.query_columns() },
            ..*op
        }
    }
}

/// What attention gives, or its gradient.
fn outputs(heads: Heads, rows: Rows, ranks: usize) -> Columns {
    Columns::new(rows, 0, heads.query_columns(), ranks)
}
