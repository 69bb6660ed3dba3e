//! Each leaf of the delta rule turns its operation's buffers into slices and hands them to the family that computes.

use super::decay::{Gates, Rates, gates, gates_backward};
use super::{Shape, backward, forward, step};
use crate::backend::cpu::element::with_element;
use crate::backend::cpu::matmul::widened;
use crate::backend::cpu::memory::Lease;
use crate::backend::cpu::{CpuBackend, conv, gated_norm};
use crate::backend::{Buffer, CausalConv, DeltaRule, GatedDelta, GatedNorm};

impl CausalConv {
    fn shape<'m>(&self, lease: &mut Lease<'m>) -> conv::Shape<'m> {
        let cu_seqlens: &[i32] = lease.read(self.sequences.cu_seqlens);
        assert_eq!(cu_seqlens.len(), self.sequences.count + 1, "cu_seqlens has a bound more than sequences");
        conv::Shape { channels: self.channels, taps: self.taps, cu_seqlens, stride: self.x.stride }
    }
}

impl GatedDelta {
    fn shape<'m>(&self, lease: &mut Lease<'m>) -> Shape<'m> {
        let cu_seqlens: &[i32] = lease.read(self.sequences.cu_seqlens);
        assert_eq!(cu_seqlens.len(), self.sequences.count + 1, "cu_seqlens has a bound more than sequences");
        Shape::new(self.heads, self.tokens, cu_seqlens, Self::CHUNK)
    }
}

impl DeltaRule for CpuBackend {
    fn causal_conv(&mut self, op: &CausalConv, out: Buffer) {
        let mut lease = self.memory.lease();
        let (shape, weight) = (op.shape(&mut lease), widened(&mut lease, op.weight));
        assert_eq!(out.len, op.tokens * op.channels, "causal_conv of {} tokens", op.tokens);
        with_element!(out.dtype, T => {
            let x = lease.read_rows::<T>(op.x, op.tokens, op.channels);
            conv::conv(&shape, x, &weight, lease.write::<T>(out));
        });
    }

    fn causal_conv_backward(&mut self, op: &CausalConv, d_out: Buffer, d_weight: Buffer) {
        let mut lease = self.memory.lease();
        let (shape, weight) = (op.shape(&mut lease), widened(&mut lease, op.weight));
        assert_eq!(d_out.len, op.tokens * op.channels, "causal_conv_backward of {} tokens", op.tokens);
        with_element!(d_out.dtype, T => {
            let x = lease.write_rows::<T>(op.x, op.tokens, op.channels);
            conv::conv_backward(&shape, x, &weight, lease.read::<T>(d_out), lease.write(d_weight));
        });
    }

    fn causal_conv_keep(&mut self, op: &CausalConv, inputs: Buffer) {
        let mut lease = self.memory.lease();
        let shape = op.shape(&mut lease);
        with_element!(inputs.dtype, T => {
            let x = lease.read_rows::<T>(op.x, op.tokens, op.channels);
            conv::keep(&shape, x, lease.write::<T>(inputs));
        });
    }

    fn causal_conv_step(&mut self, op: &CausalConv, inputs: Buffer, out: Buffer) {
        let mut lease = self.memory.lease();
        let weight = widened(&mut lease, op.weight);
        let shape = conv::Shape { channels: op.channels, taps: op.taps, cu_seqlens: &[], stride: op.x.stride };
        with_element!(out.dtype, T => {
            let x = lease.read_rows::<T>(op.x, op.tokens, op.channels);
            conv::step(&shape, x, &weight, lease.write::<T>(inputs), lease.write::<T>(out));
        });
    }

    fn gated_delta(&mut self, op: &GatedDelta, out: Buffer, states: Option<Buffer>) {
        let mut lease = self.memory.lease();
        let (shape, count) = (op.shape(&mut lease), op.tokens * op.heads.value);
        let (a_log, dt_bias) = (widened(&mut lease, op.a_log), widened(&mut lease, op.dt_bias));
        let (g, beta) = lease.write::<f32>(op.scratch)[..2 * count].split_at_mut(count);
        let states = states.map(|states| lease.write(states));
        with_element!(out.dtype, T => {
            let rows = lease.read_rows::<T>(op.gates, op.tokens, 2 * op.heads.value);
            gates(&Rates { a_log: &a_log, dt_bias: &dt_bias }, (rows, op.gates.stride), g, beta);
            forward::forward(&shape, lease.read::<T>(op.qkv), Gates { g, beta }, lease.write::<T>(out), states);
        });
    }

    fn gated_delta_backward(&mut self, op: &GatedDelta, d_out: Buffer, d_a_log: Buffer, d_dt_bias: Buffer) {
        let mut lease = self.memory.lease();
        let (shape, count) = (op.shape(&mut lease), op.tokens * op.heads.value);
        let (a_log, dt_bias) = (widened(&mut lease, op.a_log), widened(&mut lease, op.dt_bias));
        let rates = Rates { a_log: &a_log, dt_bias: &dt_bias };
        let (g, rest) = lease.write::<f32>(op.scratch).split_at_mut(count);
        let (beta, rest) = rest.split_at_mut(count);
        let (d_g, rest) = rest.split_at_mut(count);
        let (d_beta, states) = rest.split_at_mut(count);
        let of_rates = (lease.write(d_a_log), lease.write(d_dt_bias));
        with_element!(d_out.dtype, T => {
            let rows = lease.write_rows::<T>(op.gates, op.tokens, 2 * op.heads.value);
            gates(&rates, (&*rows, op.gates.stride), g, beta);
            let of_gates = Gates { g, beta };
            let (qkv, d_out) = (lease.write::<T>(op.qkv), lease.read::<T>(d_out));
            backward::backward(&shape, qkv, of_gates, d_out, (&mut *d_g, &mut *d_beta), states);
            gates_backward(&rates, of_gates, (&*d_g, &*d_beta), (rows, op.gates.stride), of_rates);
        });
    }

    fn gated_delta_step(&mut self, op: &GatedDelta, states: Buffer, out: Buffer) {
        let mut lease = self.memory.lease();
        let count = op.tokens * op.heads.value;
        let (a_log, dt_bias) = (widened(&mut lease, op.a_log), widened(&mut lease, op.dt_bias));
        let (g, beta) = lease.write::<f32>(op.scratch)[..2 * count].split_at_mut(count);
        with_element!(out.dtype, T => {
            let rows = lease.read_rows::<T>(op.gates, op.tokens, 2 * op.heads.value);
            gates(&Rates { a_log: &a_log, dt_bias: &dt_bias }, (rows, op.gates.stride), g, beta);
            let (states, out) = (lease.write(states), lease.write::<T>(out));
            step::step(op.heads, lease.read::<T>(op.qkv), Gates { g, beta }, states, out);
        });
    }

    fn gated_norm(&mut self, op: &GatedNorm, out: Buffer) {
        let mut lease = self.memory.lease();
        let (weight, width) = (widened(&mut lease, op.weight), op.x.len / op.tokens);
        assert_eq!(width, op.heads * op.weight.len, "gated_norm of {} heads", op.heads);
        with_element!(out.dtype, T => {
            let gate = lease.read_rows::<T>(op.gate, op.tokens, width);
            let (x, out) = (lease.read::<T>(op.x), lease.write::<T>(out));
            gated_norm::gated_norm(x, (gate, op.gate.stride), (&weight, op.epsilon), width, out);
        });
    }

    fn gated_norm_backward(&mut self, op: &GatedNorm, d: Buffer, d_weight: Buffer) {
        let mut lease = self.memory.lease();
        let (weight, width) = (widened(&mut lease, op.weight), op.x.len / op.tokens);
        assert_eq!(width, op.heads * op.weight.len, "gated_norm_backward of {} heads", op.heads);
        with_element!(d.dtype, T => {
            let gate = (lease.write_rows::<T>(op.gate, op.tokens, width), op.gate.stride);
            let (x, d, d_weight) = (lease.read::<T>(op.x), lease.write::<T>(d), lease.write(d_weight));
            gated_norm::gated_norm_backward(x, gate, (&weight, op.epsilon), width, d, d_weight);
        });
    }
}
