//! The leaves of gates. Kernels: `cuda/gates.cu`.

use arl_kernels::constants::gates::{ROWS, THREADS};

use super::device::{Arg, Device, Launch, int, kernel, long};
use super::{CudaBackend, norm};
use crate::backend::gates::Gates;
use crate::backend::{Buffer, DType, Heads};

/// Elements of an access of 16 bytes.
fn pack(dtype: DType) -> usize {
    16 / dtype.bytes()
}

/// Blocks of so many elements, of which a thread has `each`.
fn blocks(len: usize, each: usize) -> [usize; 3] {
    [len.div_ceil(THREADS * each), 1, 1]
}

/// Tokens of the three, after a check of their lengths; and whether each head is whole packs.
fn tokens(heads: Heads, joined: Buffer, qkv: Buffer, gates: Buffer) -> (usize, bool) {
    let columns = [heads.qkv_columns() + heads.query_columns(), heads.qkv_columns(), heads.query_columns()];
    let tokens = gates.len / columns[2];
    let lengths = [joined, qkv, gates].map(|buffer| buffer.len);
    assert_eq!(lengths, columns.map(|columns| tokens * columns), "gates of {tokens} tokens");
    (tokens, norm::aligned(heads.dim, &[joined, qkv, gates]))
}

/// The sizes of rows, as the kernels take them.
fn sizes(heads: Heads, tokens: usize) -> [Arg; 4] {
    [int(heads.query), int(heads.dim), int(2 * heads.key_columns()), long(tokens)]
}

fn alike(a: Buffer, b: Buffer) {
    assert_eq!((a.len, a.dtype), (b.len, b.dtype), "a gate for each element");
}

impl<D: Device> Gates for CudaBackend<D> {
    fn split_gates(&mut self, heads: Heads, joined: Buffer, qkv: Buffer, gates: Buffer) {
        let (tokens, aligned) = tokens(heads, joined, qkv, gates);
        let (kernel, each) = if aligned {
            (kernel!(joined.dtype, "split_gates"), pack(joined.dtype))
        } else {
            (kernel!(joined.dtype, "split_gates_unaligned"), 1)
        };
        let [query, dim, rest, count] = sizes(heads, tokens);
        let args = &[Arg::Read(joined), Arg::Write(qkv), Arg::Write(gates), query, dim, rest, count];
        let grid = blocks(joined.len, each);
        self.device.launch(&Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args });
    }

    fn join_gates(&mut self, heads: Heads, qkv: Buffer, gates: Buffer, joined: Buffer) {
        let (tokens, aligned) = tokens(heads, joined, qkv, gates);
        let (kernel, each) = if aligned {
            (kernel!(joined.dtype, "join_gates"), pack(joined.dtype))
        } else {
            (kernel!(joined.dtype, "join_gates_unaligned"), 1)
        };
        let [query, dim, rest, count] = sizes(heads, tokens);
        let args = &[Arg::Read(qkv), Arg::Read(gates), Arg::Write(joined), query, dim, rest, count];
        let grid = blocks(joined.len, each);
        self.device.launch(&Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args });
    }

    fn gate(&mut self, x: Buffer, gates: Buffer, out: Buffer) {
        alike(x, gates);
        alike(x, out);
        self.device.launch(&Launch {
            kernel: kernel!(x.dtype, "gate"),
            grid: blocks(x.len, pack(x.dtype)),
            threads: THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(x), Arg::Read(gates), Arg::Write(out), long(x.len)],
        });
    }

    fn gate_backward(&mut self, d_out: Buffer, x: Buffer, gates: Buffer) {
        alike(x, gates);
        alike(x, d_out);
        self.device.launch(&Launch {
            kernel: kernel!(x.dtype, "gate_backward"),
            grid: blocks(x.len, pack(x.dtype)),
            threads: THREADS,
            shared_bytes: 0,
            args: &[Arg::Update(d_out), Arg::Read(x), Arg::Update(gates), long(x.len)],
        });
    }

    fn add_gated_rows(&mut self, x: Buffer, logits: Buffer, width: usize, out: Buffer) {
        assert_eq!(x.len, logits.len * width, "gated rows of {width}");
        alike(x, out);
        self.device.launch(&Launch {
            kernel: kernel!(x.dtype, "add_gated_rows"),
            grid: [logits.len.div_ceil(ROWS), 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(x), Arg::Read(logits), Arg::Update(out), long(logits.len), int(width)],
        });
    }

    fn gated_rows_backward(&mut self, d_out: Buffer, x: Buffer, logits: Buffer, width: usize, d_x: Buffer) {
        assert_eq!(x.len, logits.len * width, "gated rows of {width}");
        alike(x, d_out);
        alike(x, d_x);
        self.device.launch(&Launch {
            kernel: kernel!(x.dtype, "gated_rows_backward"),
            grid: [logits.len.div_ceil(ROWS), 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(d_out), Arg::Read(x), Arg::Update(logits), Arg::Write(d_x), long(logits.len), int(width)],
        });
    }
}
