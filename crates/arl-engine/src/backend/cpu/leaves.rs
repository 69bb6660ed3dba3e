//! Each leaf turns its operation's buffers into slices and hands them to the family that computes.

use arl_model::Result;

use super::element::with_element;
use super::{
    CpuBackend, attention, elementwise, embedding, loss, magnitude, matmul, moe, nf4, norm, optimizer, rope, simd,
    swiglu,
};
use crate::backend::{
    AdamW, Attention, Backend, Buffer, CrossEntropy, Dropout, Event, GroupedMatmul, Heads, LowRankMatmul, Magnitude,
    Matmul, Nf4Matmul, Nf4Weights, NormRope, NormWeight, Permutation, Pool, Router, Rows, Stream, low_rank,
};

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", simd::level().name(), rayon::current_num_threads())
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        self.memory.reserve(pool, bytes)
    }

    fn upload(&mut self, source: &[u8], target: Buffer) {
        elementwise::copy_bytes(source, self.memory.lease().write_bytes(target));
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        elementwise::copy_bytes(self.memory.lease().read_bytes(source), target);
        Ok(())
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        self.queued.clear();
        for source in sources {
            self.queued.extend_from_slice(self.memory.lease().read_bytes(*source));
        }
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        target.copy_from_slice(&self.queued);
        Ok(())
    }

    fn transfer(&mut self, _stream: Stream, source: Buffer, target: Buffer) {
        let mut lease = self.memory.lease();
        elementwise::copy_bytes(lease.read_bytes(source), lease.write_bytes(target));
    }

    // What is queued is done already.
    fn record(&mut self, _stream: Stream, _event: Event) {}

    fn wait(&mut self, _stream: Stream, _event: Event) {}

    fn zero(&mut self, target: Buffer) {
        elementwise::zero(self.memory.lease().write_bytes(target));
    }

    fn copy(&mut self, source: Buffer, target: Buffer) {
        let mut lease = self.memory.lease();
        if source.dtype == target.dtype {
            elementwise::copy_bytes(lease.read_bytes(source), lease.write_bytes(target));
            return;
        }
        with_element!(source.dtype, A => with_element!(target.dtype, B => {
            elementwise::convert(lease.read::<A>(source), lease.write::<B>(target));
        }));
    }

    fn magnitude(&mut self, op: &Magnitude) {
        magnitude::magnitude(&mut self.memory.lease(), op);
    }

    fn dequantize(&mut self, weights: &Nf4Weights, first: usize, out: Buffer) {
        nf4::dequantize(&mut self.memory.lease(), weights, first, out);
    }

    fn matmul(&mut self, op: &Matmul) {
        matmul::matmul(&mut self.memory.lease(), op);
    }

    fn matmul_nf4(&mut self, op: &Nf4Matmul<'_>) {
        matmul::matmul_nf4(&mut self.memory.lease(), op);
    }

    fn matmul_low_rank(&mut self, op: &LowRankMatmul<'_>) {
        if !matmul::low_rank(&mut self.memory.lease(), op) {
            low_rank::apart(self, op);
        }
    }

    fn grouped_matmul(&mut self, op: &GroupedMatmul) {
        matmul::grouped_matmul(&mut self.memory.lease(), op);
    }

    fn sum_rows(&mut self, x: Rows, rows: usize, columns: usize, out: Buffer) {
        assert_eq!(out.len, columns, "sum_rows of {columns} columns");
        let mut lease = self.memory.lease();
        with_element!(x.buffer.dtype, T => {
            elementwise::sum_rows(lease.read_rows::<T>(x, rows, columns), x.stride, rows, lease.write(out));
        });
    }

    fn embedding(&mut self, ids: Buffer, table: Buffer, width: usize, out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(table.dtype, A => with_element!(out.dtype, B => {
            embedding::gather(lease.read::<A>(table), lease.read(ids), 1, width, lease.write::<B>(out));
        }));
    }

    fn embedding_backward(&mut self, ids: Buffer, d_out: Buffer, width: usize, table_gradient: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(d_out.dtype, T => {
            let (ids, d_out) = (lease.read(ids), lease.read::<T>(d_out));
            embedding::embedding_backward(ids, d_out, width, lease.write(table_gradient));
        });
    }

    fn rms_norm(&mut self, x: Buffer, weight: NormWeight, epsilon: f32, out: Buffer, inverse_rms: Buffer) {
        let mut lease = self.memory.lease();
        let weight = norm::Weight::read(&mut lease, weight);
        with_element!(x.dtype, T => {
            let (x, out) = (lease.read::<T>(x), lease.write::<T>(out));
            norm::rms_norm(x, &weight, epsilon, out, lease.write(inverse_rms));
        });
    }

    fn add_rms_norm(
        &mut self,
        x: Buffer,
        delta: Buffer,
        sum: Buffer,
        weight: NormWeight,
        epsilon: f32,
        out: Buffer,
        inverse_rms: Buffer,
    ) {
        let mut lease = self.memory.lease();
        let weight = norm::Weight::read(&mut lease, weight);
        with_element!(x.dtype, T => {
            // In place, the operand that is not the sum is what is added to it.
            let (x, delta) = if sum == x {
                (None, delta)
            } else if sum == delta {
                (None, x)
            } else {
                (Some(lease.read::<T>(x)), delta)
            };
            let (delta, sum, out) = (lease.read::<T>(delta), lease.write::<T>(sum), lease.write::<T>(out));
            norm::add_rms_norm(x, delta, sum, &weight, epsilon, out, lease.write(inverse_rms));
        });
    }

    fn rms_norm_recompute(&mut self, x: Buffer, weight: NormWeight, inverse_rms: Buffer, out: Buffer) {
        let mut lease = self.memory.lease();
        let weight = norm::Weight::read(&mut lease, weight);
        with_element!(x.dtype, T => {
            norm::rms_norm_recompute(lease.read::<T>(x), &weight, lease.read(inverse_rms), lease.write::<T>(out));
        });
    }

    fn rms_norm_backward(
        &mut self,
        d_out: Buffer,
        x: Buffer,
        weight: NormWeight,
        inverse_rms: Buffer,
        d_x: Buffer,
        d_weight: Buffer,
    ) {
        let mut lease = self.memory.lease();
        let weight = norm::Weight::read(&mut lease, weight);
        with_element!(x.dtype, T => {
            let (d_out, x, inverse_rms) = (lease.read::<T>(d_out), lease.read::<T>(x), lease.read(inverse_rms));
            let (d_x, d_weight) = (lease.write::<T>(d_x), lease.write(d_weight));
            norm::rms_norm_backward(d_out, x, &weight.values, inverse_rms, d_x, d_weight);
        });
    }

    fn add(&mut self, x: Buffer, delta: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, T => elementwise::add(lease.write::<T>(x), lease.read::<T>(delta)));
    }

    fn scale(&mut self, x: Buffer, factor: f32, dropout: Option<Dropout>, out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, T => elementwise::scale(lease.read::<T>(x), factor, dropout, lease.write::<T>(out)));
    }

    fn norm_rope(&mut self, op: &NormRope, qkv: Buffer, qk: Buffer) {
        let mut lease = self.memory.lease();
        let (norm, angles) = (rope::HeadNorm::read(&mut lease, op), rope::Angles::read(&mut lease, op));
        with_element!(qkv.dtype, T => {
            rope::norm_rope(op.heads, norm.as_ref(), angles, lease.read::<T>(qkv), lease.write::<T>(qk));
        });
    }

    fn norm_rope_backward(&mut self, op: &NormRope, qkv: Buffer, d_qkv: Buffer, d_norm: Option<(Buffer, Buffer)>) {
        assert_eq!(op.norm.is_some(), d_norm.is_some(), "norms have gradients");
        let mut lease = self.memory.lease();
        let (norm, angles) = (rope::HeadNorm::read(&mut lease, op), rope::Angles::read(&mut lease, op));
        let d_norm = d_norm.map(|(query, key)| (lease.write(query), lease.write(key)));
        with_element!(qkv.dtype, T => {
            let (qkv, d_qkv) = (lease.read::<T>(qkv), lease.write::<T>(d_qkv));
            rope::norm_rope_backward(op.heads, norm.as_ref(), angles, qkv, d_qkv, d_norm);
        });
    }

    fn attention(&mut self, op: &Attention) {
        attention::attention(&mut self.memory.lease(), op);
    }

    fn attention_backward(&mut self, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) {
        attention::attention_backward(&mut self.memory.lease(), op, d_out, d_qkv, scratch);
    }

    fn attention_cached(
        &mut self,
        heads: Heads,
        window: Option<usize>,
        scale: f32,
        q: Rows,
        k_cache: Buffer,
        v_cache: Buffer,
        capacity: usize,
        lengths: Buffer,
        out: Buffer,
    ) {
        let mut lease = self.memory.lease();
        let lengths: &[i32] = lease.read(lengths);
        let window = window.unwrap_or(usize::MAX);
        with_element!(q.buffer.dtype, T => {
            let q = attention::matrix::<T>(&mut lease, q, lengths.len(), heads.query_columns());
            let caches = (lease.read::<T>(k_cache), lease.read::<T>(v_cache));
            attention::cached(heads, window, scale, q, caches, capacity, lengths, lease.write::<T>(out));
        });
    }

    fn swiglu(&mut self, gate_up: Buffer, width: usize, out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(gate_up.dtype, T => swiglu::swiglu(lease.read::<T>(gate_up), width, lease.write::<T>(out)));
    }

    fn swiglu_backward(&mut self, gate_up: Buffer, width: usize, d_out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(gate_up.dtype, T => {
            swiglu::swiglu_backward(lease.write::<T>(gate_up), width, lease.read::<T>(d_out));
        });
    }

    fn gather_rows(&mut self, x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, A => with_element!(out.dtype, B => {
            embedding::gather(lease.read::<A>(x), lease.read(rows), divisor, width, lease.write::<B>(out));
        }));
    }

    fn scatter_rows(&mut self, x: Buffer, rows: Buffer, width: usize, out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, A => with_element!(out.dtype, B => {
            embedding::scatter(lease.read::<A>(x), lease.read(rows), width, lease.write::<B>(out));
        }));
    }

    fn copy_columns(&mut self, source: Rows, target: Rows, rows: usize, columns: usize) {
        let mut lease = self.memory.lease();
        elementwise::copy_columns(&mut lease, source, target, rows, columns);
    }

    fn cross_entropy(&mut self, op: &CrossEntropy) {
        let mut lease = self.memory.lease();
        let input = loss::Targets {
            targets: lease.read(op.targets),
            weights: lease.read(op.weights),
            scale: op.scale,
            gradient: op.gradient.is_some(),
        };
        if let Some(gradient) = op.gradient {
            assert_eq!((gradient.buffer, gradient.stride), (op.logits, op.vocab), "the gradient replaces the logits");
        }
        assert_eq!(input.targets.len(), op.rows, "cross_entropy of {} rows", op.rows);
        let (nll, correct, entropy) = (lease.write(op.nll), lease.write(op.correct), lease.write(op.entropy));
        with_element!(op.logits.dtype, T => {
            let output = loss::Losses { nll, correct, entropy };
            loss::cross_entropy(lease.write::<T>(op.logits), op.vocab, &input, output);
        });
    }

    fn dot(&mut self, a: Buffer, b: Buffer, out: Buffer) {
        let mut lease = self.memory.lease();
        lease.write::<f64>(out)[0] += elementwise::dot(lease.read(a), lease.read(b));
    }

    fn guard(&mut self, losses: Rows, balances: Option<Buffer>, norm_squared: Buffer) {
        let mut lease = self.memory.lease();
        let mut losses = lease.read::<f64>(losses.buffer).iter().step_by(losses.stride);
        let mut balances = balances.map_or(&[][..], |balances| lease.read::<f32>(balances)).iter();
        if !losses.all(|loss| loss.is_finite()) || !balances.all(|balance| balance.is_finite()) {
            lease.write::<f64>(norm_squared)[0] = f64::NAN;
        }
    }

    fn adamw(&mut self, op: &AdamW) {
        optimizer::run(&mut self.memory.lease(), op);
    }

    fn router(&mut self, op: &Router, logits: Buffer, balance: Option<Buffer>) {
        let mut lease = self.memory.lease();
        assert_eq!(logits.len, op.tokens * op.experts, "router of {} tokens", op.tokens);
        let logits = lease.read(logits);
        let routing = moe::Routing {
            probabilities: lease.write(op.probabilities),
            chosen: lease.write(op.experts_chosen),
            weights: lease.write(op.weights),
        };
        moe::router(moe::Choice::of(op), logits, routing, balance.map(|balance| lease.write(balance)));
    }

    fn router_backward(&mut self, op: &Router, d_weights: Buffer, balance: Option<(Buffer, f32)>, d_logits: Buffer) {
        let mut lease = self.memory.lease();
        assert_eq!(d_logits.len, op.tokens * op.experts, "router_backward of {} tokens", op.tokens);
        let input = moe::RouterBackward {
            probabilities: lease.read(op.probabilities),
            chosen: lease.read(op.experts_chosen),
            weights: lease.read(op.weights),
            d_weights: lease.read(d_weights),
            balance: balance.map(|(counts, factor)| (lease.read(counts), factor)),
        };
        moe::router_backward(moe::Choice::of(op), &input, lease.write(d_logits));
    }

    fn permute(&mut self, op: &Router, permutation: &Permutation) {
        let mut lease = self.memory.lease();
        assert_eq!(permutation.offsets.len, op.experts + 1, "permute by {} experts", op.experts);
        let chosen = lease.read(op.experts_chosen);
        let (offsets, pairs) = (lease.write(permutation.offsets), lease.write(permutation.pairs));
        moe::permute(chosen, offsets, pairs, lease.write(permutation.rows));
    }

    fn combine(
        &mut self,
        x: Buffer,
        permutation: &Permutation,
        weights: Option<Buffer>,
        top_k: usize,
        width: usize,
        out: Buffer,
    ) {
        let mut lease = self.memory.lease();
        let rows = lease.read(permutation.rows);
        let weights = weights.map(|weights| lease.read(weights));
        with_element!(x.dtype, T => {
            moe::combine(lease.read::<T>(x), rows, weights, top_k, width, lease.write::<T>(out));
        });
    }

    fn combine_backward(
        &mut self,
        d_out: Buffer,
        x: Buffer,
        permutation: &Permutation,
        weights: Buffer,
        top_k: usize,
        width: usize,
        d_x: Buffer,
        d_weights: Buffer,
    ) {
        let mut lease = self.memory.lease();
        let (rows, weights) = (lease.read(permutation.rows), lease.read(weights));
        with_element!(x.dtype, T => {
            let (d_out, x, d_x) = (lease.read::<T>(d_out), lease.read::<T>(x), lease.write::<T>(d_x));
            moe::combine_backward(d_out, x, rows, weights, top_k, width, d_x, lease.write(d_weights));
        });
    }
}
