//! A backend that computes nothing and only notes how far the leaves' buffers reach: the dry run of a step against it
//! is the memory plan.

use std::collections::HashMap;

use arl_comm::Group;
use arl_model::Result;

use super::gates::Gates;
use super::*;

/// Computes nothing.
#[derive(Debug, Default)]
pub struct PlanBackend {
    /// Leaves that were asked for.
    pub leaves: usize,
    kind: DeviceKind,
    /// Memory of the device, if it is not the host's, and what is reserved of it.
    memory: Option<usize>,
    reserved: HashMap<Pool, usize>,
}

impl PlanBackend {
    /// In the place of a device of a sort.
    pub fn of(kind: DeviceKind) -> Self {
        PlanBackend { kind, ..PlanBackend::default() }
    }

    /// In the place of one that has so many bytes of memory.
    pub fn with_memory(self, bytes: usize) -> Self {
        PlanBackend { memory: Some(bytes), ..self }
    }
}

macro_rules! no_op {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {
        $(#[allow(clippy::too_many_arguments, reason = "the trait's signature")]
        fn $name(&mut self, $($arg: $type),*) {
            $(let _ = $arg;)*
            self.leaves += 1;
        })*
    };
}

impl Gates for PlanBackend {
    no_op! {
        split_gates(heads: Heads, joined: Buffer, qkv: Buffer, gates: Buffer);
        join_gates(heads: Heads, qkv: Buffer, gates: Buffer, joined: Buffer);
        gate(x: Buffer, gates: Buffer, out: Buffer);
        gate_backward(d_out: Buffer, x: Buffer, gates: Buffer);
        add_gated_rows(x: Buffer, logits: Buffer, width: usize, out: Buffer);
        gated_rows_backward(d_out: Buffer, x: Buffer, logits: Buffer, width: usize, d_x: Buffer);
    }
}

impl Backend for PlanBackend {
    fn name(&self) -> String {
        "plan".into()
    }

    fn kind(&self) -> DeviceKind {
        self.kind
    }

    fn logits_gradient(&self, activations: DType) -> DType {
        if self.kind == DeviceKind::Cuda { activations } else { DType::F32 }
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        if !matches!(pool, Pool::HostState | Pool::HostStep) {
            self.reserved.insert(pool, bytes);
        }
        Ok(())
    }

    fn memory(&self) -> Result<Option<(usize, usize)>> {
        let reserved: usize = self.reserved.values().sum();
        Ok(self.memory.map(|bytes| (bytes.saturating_sub(reserved), bytes)))
    }

    fn read_back(&mut self, _source: Buffer, target: &mut [u8]) -> Result<()> {
        target.fill(0);
        Ok(())
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        target.fill(0);
        Ok(())
    }

    no_op! {
        queue_read(sources: &[Buffer]);
        upload(source: &[u8], target: Buffer);
        transfer(stream: Stream, source: Buffer, target: Buffer);
        record(stream: Stream, event: Event);
        wait(stream: Stream, event: Event);
        zero(target: Buffer);
        copy(source: Buffer, target: Buffer);
        magnitude(op: &Magnitude);
        dequantize(weights: &Nf4Weights, first: usize, out: Buffer);
        matmul(op: &Matmul);
        matmul_nf4(op: &Nf4Matmul<'_>);
        matmul_low_rank(op: &LowRankMatmul<'_>);
        grouped_matmul(op: &GroupedMatmul);
        sum_rows(x: Rows, rows: usize, columns: usize, out: Buffer);
        embedding(ids: Buffer, table: Buffer, width: usize, out: Buffer);
        embedding_backward(ids: Buffer, d_out: Buffer, width: usize, table_gradient: Buffer);
        rms_norm(x: Buffer, weight: NormWeight, epsilon: f32, out: Buffer, inverse_rms: Buffer);
        add_rms_norm(x: Buffer, delta: Buffer, sum: Buffer, weight: NormWeight, epsilon: f32, out: Buffer, inverse_rms: Buffer);
        rms_norm_recompute(x: Buffer, weight: NormWeight, inverse_rms: Buffer, out: Buffer);
        rms_norm_backward(d_out: Buffer, x: Buffer, weight: NormWeight, inverse_rms: Buffer, d_x: Buffer, d_weight: Buffer);
        add(x: Buffer, delta: Buffer);
        scale(x: Buffer, factor: f32, dropout: Option<Dropout>, out: Buffer);
        norm_rope(op: &NormRope, qkv: Buffer, qk: Buffer);
        norm_rope_backward(op: &NormRope, qkv: Buffer, d_qkv: Buffer, d_norm: Option<(Buffer, Buffer)>);
        attention(op: &Attention);
        attention_backward(op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer);
        attention_cached(heads: Heads, window: Option<usize>, scale: f32, q: Rows, k_cache: Buffer, v_cache: Buffer, capacity: usize, lengths: Buffer, out: Buffer);
        swiglu(gate_up: Buffer, width: usize, out: Buffer);
        swiglu_backward(gate_up: Buffer, width: usize, d_out: Buffer);
        gather_rows(x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer);
        scatter_rows(x: Buffer, rows: Buffer, width: usize, out: Buffer);
        copy_columns(source: Rows, target: Rows, rows: usize, columns: usize);
        cross_entropy(op: &CrossEntropy);
        dot(a: Buffer, b: Buffer, out: Buffer);
        guard(losses: Rows, balances: Option<Buffer>, norm_squared: Buffer);
        adamw(op: &AdamW);
        router(op: &Router, logits: Buffer, balance: Option<Buffer>);
        router_backward(op: &Router, d_weights: Buffer, balance: Option<(Buffer, f32)>, d_logits: Buffer);
        permute(op: &Router, permutation: &Permutation);
        combine(x: Buffer, permutation: &Permutation, weights: Option<Buffer>, top_k: usize, width: usize, out: Buffer);
        combine_backward(d_out: Buffer, x: Buffer, permutation: &Permutation, weights: Buffer, top_k: usize, width: usize, d_x: Buffer, d_weights: Buffer);
    }
}

impl DeltaRule for PlanBackend {
    no_op! {
        causal_conv(op: &CausalConv, out: Buffer);
        causal_conv_backward(op: &CausalConv, d_out: Buffer, d_weight: Buffer);
        causal_conv_keep(op: &CausalConv, inputs: Buffer);
        causal_conv_step(op: &CausalConv, inputs: Buffer, out: Buffer);
        gated_delta(op: &GatedDelta, out: Buffer, states: Option<Buffer>);
        gated_delta_backward(op: &GatedDelta, d_out: Buffer, d_a_log: Buffer, d_dt_bias: Buffer);
        gated_delta_step(op: &GatedDelta, states: Buffer, out: Buffer);
        gated_norm(op: &GatedNorm, out: Buffer);
        gated_norm_backward(op: &GatedNorm, d: Buffer, d_weight: Buffer);
    }
}

impl Vision for PlanBackend {
    no_op! {
        layer_norm(op: &LayerNorm);
        layer_norm_backward(op: &LayerNorm, d_out: Buffer, d_x: Buffer, d_weight: Buffer, d_bias: Buffer);
        gelu(kind: Gelu, x: Buffer, out: Buffer);
        gelu_backward(kind: Gelu, x: Buffer, d_x: Buffer);
        interpolate(table: Buffer, taps: Buffer, weights: Buffer, width: usize, out: Buffer);
        interpolate_backward(d_out: Buffer, taps: Buffer, weights: Buffer, width: usize, d_table: Buffer);
        add_rows(x: Buffer, rows: Buffer, width: usize, out: Buffer);
        zero_rows(rows: Buffer, width: usize, x: Buffer);
    }
}

impl comm::Collectives for PlanBackend {
    fn join_ranks(&mut self, _group: &dyn Group) -> Result<()> {
        Ok(())
    }

    fn join_groups(&mut self, _group: &dyn Group, _groups: &[Vec<usize>]) -> Result<()> {
        Ok(())
    }

    fn exchange_sum(&mut self, _group: &dyn Group, _parts: &[Buffer], _sum: Buffer) -> Result<()> {
        self.leaves += 1;
        Ok(())
    }

    fn all_gather(
        &mut self,
        _group: &dyn Group,
        _bytes: usize,
        _own: &[comm::Part],
        _all: &[Vec<comm::Part>],
    ) -> Result<()> {
        self.leaves += 1;
        Ok(())
    }

    fn gather(&mut self, _group: &dyn Group, _own: Buffer, _all: Buffer) -> Result<()> {
        self.leaves += 1;
        Ok(())
    }

    fn exchange(&mut self, _group: &dyn Group, _sends: &[Vec<Buffer>], _receives: &[Vec<Buffer>]) -> Result<()> {
        self.leaves += 1;
        Ok(())
    }

    fn block_squares(&mut self, _a: Buffer, _tail: &[f32]) -> Result<Vec<f64>> {
        self.leaves += 1;
        Ok(Vec::new())
    }
}
