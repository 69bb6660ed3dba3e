//! Attention. Kernels: `cuda/attention_*.cu`. Tensor cores take heads of 64, 72, 80, 128 and 256 elements of 16 bits whose rows are
//! at multiples of 16 bytes; everything else goes to CUDA cores. Each kernel exists for causal attention and for that of whole sequences.

use arl_kernels::constants::attention::{
    BACKWARD_BLOCK_M_64, BACKWARD_BLOCK_M_128, BACKWARD_BLOCK_M_256, BACKWARD_BLOCK_N, BACKWARD_STAGES_256, BLOCK_M,
    BLOCK_M_256, BLOCK_N, BLOCK_N_256, ROWS, STAGES_256, THREADS, THREADS_256, WEIGHTS_STRIDE,
};

use super::device::{Arg, Device, Launch, int, kernel, long};
use crate::backend::{Attention, Buffer, DType, Heads, Rows};

/// A kernel of the tensor cores, for causal attention or for that of whole sequences.
macro_rules! on_tensors {
    ($columns:literal, $causal:expr, $dtype:expr, $name:literal) => {
        match ($causal, $dtype) {
            (true, DType::Bf16) => concat!($name, "_", $columns, "_bf16"),
            (true, _) => concat!($name, "_", $columns, "_f16"),
            (false, DType::Bf16) => concat!($name, "_full_", $columns, "_bf16"),
            (false, _) => concat!($name, "_full_", $columns, "_f16"),
        }
    };
}

/// As [`on_tensors`], over so many columns, but not 256.
macro_rules! of_columns {
    ($columns:expr, $causal:expr, $dtype:expr, $name:literal) => {
        match $columns {
            64 => on_tensors!("64", $causal, $dtype, $name),
            80 => on_tensors!("80", $causal, $dtype, $name),
            _ => on_tensors!("128", $causal, $dtype, $name),
        }
    };
}

/// A kernel of the CUDA cores, for causal attention or for that of whole sequences.
macro_rules! on_cores {
    ($causal:expr, $dtype:expr, $causal_name:literal, $full_name:literal) => {
        if $causal { kernel!($dtype, $causal_name) } else { kernel!($dtype, $full_name) }
    };
}

/// What a block may have of shared memory on every GPU.
const SHARED_BYTES: usize = 99 << 10;

/// What a block has: rows of its own tile, threads, bytes of shared memory.
struct Block {
    rows: usize,
    threads: usize,
    shared_bytes: usize,
}

/// On CUDA cores, with so many tiles of its own and of the other side.
fn on_cuda_cores(dim: usize, own: usize, others: usize) -> Block {
    // As `row_stride` in `attention.cuh`.
    let stride = (dim.div_ceil(4) | 1) * 4;
    let bytes = |warps: usize| 4 * ((own * warps * ROWS + others * 32) * stride + warps * ROWS * WEIGHTS_STRIDE);
    let warps = [4, 2].into_iter().find(|warps| bytes(*warps) <= SHARED_BYTES).unwrap_or(1);
    Block { rows: ROWS * warps, threads: 32 * warps, shared_bytes: bytes(warps) }
}

/// Bytes of an element on tensor cores.
const NARROW: usize = 2;

/// Forward on tensor cores, whose tiles have rows of `row` elements.
fn forward_on_tensor_cores(row: usize) -> Block {
    match row {
        // Keys and values of each stage.
        256 => {
            Block { rows: BLOCK_M_256, threads: THREADS_256, shared_bytes: STAGES_256 * 2 * BLOCK_N_256 * row * NARROW }
        }
        _ => Block { rows: BLOCK_M, threads: THREADS, shared_bytes: (BLOCK_M + 2 * BLOCK_N) * row * NARROW },
    }
}

/// As [`forward_on_tensor_cores`], backward: two tiles of each stage and what two warps give each other, or the block's own two tiles
/// and two stages; then the statistics of two tiles of queries.
fn backward_on_tensor_cores(row: usize) -> Block {
    let (rows, threads, others, bytes) = match row {
        256 => {
            let stages = BACKWARD_STAGES_256 * 2 * BLOCK_N_256 * row * NARROW;
            let given = 2 * BACKWARD_BLOCK_M_256 * BLOCK_N_256 * DType::F32.bytes();
            (BACKWARD_BLOCK_M_256, THREADS_256, BLOCK_N_256, stages + given)
        }
        _ => {
            let rows = if row == 64 { BACKWARD_BLOCK_M_64 } else { BACKWARD_BLOCK_M_128 };
            (rows, THREADS, BACKWARD_BLOCK_N, (2 * rows + 4 * BACKWARD_BLOCK_N) * row * NARROW)
        }
    };
    Block { rows, threads, shared_bytes: bytes + 4 * others * DType::F32.bytes() }
}

/// Blocks of all tiles of `size` rows, each of them once a head (see `tile_at`).
fn blocks(op: &Attention, size: usize, heads: usize) -> usize {
    (op.tokens() / size + op.sequences.count) * heads
}

/// Whether rows can be read in accesses of 16 bytes, and a tile of them with offsets that are ints.
pub(super) fn aligned(rows: Rows) -> bool {
    let bytes = rows.stride * rows.buffer.dtype.bytes();
    rows.buffer.offset.is_multiple_of(16) && bytes.is_multiple_of(16) && bytes < 1 << 24
}

/// Columns that the tensor cores compute with over heads of `dim` elements, and columns of a row of their tiles: `N` and `D` in
/// `attention.cuh`. `None`: they have no kernel.
pub(super) fn tensor_columns(dim: usize) -> Option<(usize, usize)> {
    match dim {
        64 => Some((64, 64)),
        72 | 80 => Some((80, 128)),
        128 | 256 => Some((dim, dim)),
        _ => None,
    }
}

/// [`tensor_columns`], where types and rows allow it.
fn on_tensor_cores(op: &Attention) -> Option<(usize, usize)> {
    let Attention { q, k, v, out, heads, .. } = *op;
    let served = q.buffer.dtype != DType::F32 && [q, k, v, out].into_iter().all(aligned);
    tensor_columns(heads.dim).filter(|_| served)
}

fn check_mask(op: &Attention) {
    check(op.heads, op.window);
    assert!(op.causal || op.window.is_none(), "a window is of causal attention");
}

fn check(heads: Heads, window: Option<usize>) {
    assert_eq!(heads.query % heads.key_value, 0, "query heads are a multiple of key heads");
    assert!(heads.dim.is_multiple_of(2) && heads.dim <= super::MOST_HEAD, "heads of {} elements", heads.dim);
    assert!(window != Some(0), "a query sees itself");
}

/// The window as a kernel's `int`.
fn window(window: Option<usize>) -> Arg {
    Arg::Int(window.and_then(|window| i32::try_from(window).ok()).unwrap_or(i32::MAX))
}

/// `ATTENTION_INPUTS` of the kernels, then `more`.
fn args(op: &Attention, more: &[Arg]) -> Vec<Arg> {
    let mut args = vec![
        Arg::Read(op.q.buffer),
        long(op.q.stride),
        Arg::Read(op.k.buffer),
        long(op.k.stride),
        Arg::Read(op.v.buffer),
        long(op.v.stride),
        Arg::Read(op.sequences.cu_seqlens),
        int(op.sequences.count),
        int(op.heads.query),
        int(op.heads.key_value),
        int(op.heads.dim),
        int(op.tokens()),
        window(op.window),
        Arg::Float(op.scale),
    ];
    args.extend_from_slice(more);
    args
}

/// As [`crate::backend::Backend::attention`].
pub(super) fn forward<D: Device>(device: &mut D, op: &Attention) {
    check_mask(op);
    if op.tokens() == 0 {
        return;
    }
    let Heads { query, dim, .. } = op.heads;
    // Between rows there may be what is another's.
    let out = if op.out.stride == query * dim { Arg::Write(op.out.buffer) } else { Arg::Update(op.out.buffer) };
    let args = args(op, &[out, long(op.out.stride), Arg::Write(op.log_sum_exp)]);
    let (causal, dtype) = (op.causal, op.q.buffer.dtype);
    let (kernel, block) = if let Some((columns, row)) = on_tensor_cores(op) {
        let kernel = match columns {
            256 => on_tensors!("256", causal, dtype, "attention_forward"),
            _ => of_columns!(columns, causal, dtype, "attention_forward"),
        };
        (kernel, forward_on_tensor_cores(row))
    } else {
        let kernel = on_cores!(causal, dtype, "attention_forward", "attention_forward_full");
        (kernel, on_cuda_cores(dim, 1, 2))
    };
    let Block { rows, threads, shared_bytes } = block;
    device.launch(&Launch { kernel, grid: [blocks(op, rows, query), 1, 1], threads, shared_bytes, args: &args });
}

/// As [`crate::backend::Backend::attention_backward`].
pub(super) fn backward<D: Device>(device: &mut D, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) {
    check_mask(op);
    let Heads { query, key_value, dim } = op.heads;
    assert_eq!(d_qkv.len, op.tokens() * (query + 2 * key_value) * dim, "d_qkv is that of q, k and v");
    if op.tokens() == 0 {
        return;
    }
    let scratch = scratch.slice(0, op.log_sum_exp.len);
    device.launch(&Launch {
        kernel: kernel!(op.q.buffer.dtype, "attention_delta"),
        grid: [(op.tokens() * query).div_ceil(32), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(op.out.buffer),
            long(op.out.stride),
            Arg::Read(d_out.buffer),
            long(d_out.stride),
            int(query),
            int(dim),
            int(op.tokens()),
            Arg::Write(scratch),
        ],
    });
    let d_rows = Rows { buffer: d_qkv, stride: (query + 2 * key_value) * dim };
    let (causal, dtype) = (op.causal, op.q.buffer.dtype);
    let tensor = on_tensor_cores(op).filter(|_| aligned(d_out) && aligned(d_rows));
    let block = tensor.map_or_else(|| on_cuda_cores(dim, 2, 2), |(_, row)| backward_on_tensor_cores(row));
    let (key_blocks, query_blocks) = (blocks(op, block.rows, key_value), blocks(op, block.rows, query));
    let mut launch = |kernel: &'static str, key_blocks: usize, query_blocks: usize, gradient: Arg| {
        let more = [
            Arg::Read(d_out.buffer),
            long(d_out.stride),
            Arg::Read(op.log_sum_exp),
            Arg::Read(scratch),
            gradient,
            int(key_blocks),
        ];
        let grid = [key_blocks + query_blocks, 1, 1];
        let Block { threads, shared_bytes, .. } = block;
        device.launch(&Launch { kernel, grid, threads, shared_bytes, args: &args(op, &more) });
    };
    match tensor {
        // The first of the two leaves the columns of queries to the second.
        Some((256, _)) => {
            let kernel = on_tensors!("256", causal, dtype, "attention_backward_keys");
            launch(kernel, key_blocks, 0, Arg::Write(d_qkv));
            let kernel = on_tensors!("256", causal, dtype, "attention_backward_queries");
            launch(kernel, 0, query_blocks, Arg::Update(d_qkv));
        }
        Some((columns, _)) => {
            let kernel = of_columns!(columns, causal, dtype, "attention_backward");
            launch(kernel, key_blocks, query_blocks, Arg::Write(d_qkv));
        }
        None => {
            let kernel = on_cores!(causal, dtype, "attention_backward", "attention_backward_full");
            launch(kernel, key_blocks, query_blocks, Arg::Write(d_qkv));
        }
    }
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn cached<D: Device>(
    device: &mut D,
    heads: Heads,
    window_of: Option<usize>,
    scale: f32,
    q: Rows,
    k_cache: Buffer,
    v_cache: Buffer,
    capacity: usize,
    lengths: Buffer,
    out: Buffer,
) {
    check(heads, window_of);
    let Heads { query, key_value, dim } = heads;
    assert_eq!(out.len, lengths.len * query * dim, "attention_cached of {} sequences", lengths.len);
    assert_eq!(k_cache.len, lengths.len * capacity * key_value * dim, "attention_cached with a capacity of {capacity}");
    assert_eq!(v_cache.len, k_cache.len, "attention_cached with a capacity of {capacity}");
    device.launch(&Launch {
        kernel: kernel!(q.buffer.dtype, "attention_cached"),
        grid: [lengths.len * query, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(q.buffer),
            long(q.stride),
            Arg::Read(k_cache),
            Arg::Read(v_cache),
            Arg::Read(lengths),
            int(query),
            int(key_value),
            int(dim),
            window(window_of),
            Arg::Float(scale),
            long(capacity),
            Arg::Write(out),
        ],
    });
}

#[cfg(test)]
mod tests {
    use super::super::CudaBackend;
    use super::super::emulated::EmulatedDevice;
    use crate::backend::{Attention, Backend, Buffer, DType, Heads, Pool, Rows, Sequences};

    /// The kernels of a forward and a backward pass over one token.
    fn kernels(dtype: DType, dim: usize, gap: usize, causal: bool) -> Vec<&'static str> {
        let mut backend = CudaBackend::new(EmulatedDevice::default());
        backend.reserve(Pool::Step, 1 << 16).unwrap();
        let place = |offset: usize, len: usize, dtype: DType| Buffer { pool: Pool::Step, offset, len, dtype };
        let rows = |offset: usize| Rows { buffer: place(offset, dim, dtype), stride: dim + gap };
        let cu_seqlens = place(0, 2, DType::I32);
        backend.upload(&[0, 0, 0, 0, 1, 0, 0, 0], cu_seqlens);
        let op = Attention {
            heads: Heads { query: 1, key_value: 1, dim },
            sequences: Sequences { cu_seqlens, count: 1, max_len: 1 },
            causal,
            window: None,
            scale: 1.0,
            q: rows(0x1000),
            k: rows(0x2000),
            v: rows(0x3000),
            out: rows(0x4000),
            log_sum_exp: place(0x5000, 1, DType::F32),
        };
        backend.attention(&op);
        backend.attention_backward(&op, rows(0x6000), place(0x7000, 3 * dim, dtype), place(0x5010, 1, DType::F32));
        let ran = &backend.device_mut().ran;
        ran.iter().copied().filter(|name| !name.contains("delta")).collect()
    }

    #[test]
    fn heads_of_64_to_80_128_and_256_in_16_bits_run_on_tensor_cores_where_rows_are_aligned() {
        let (bf16, f16) = (DType::Bf16, DType::F16);
        let causal = |dtype, dim, gap| kernels(dtype, dim, gap, true);
        assert_eq!(causal(bf16, 64, 0), ["attention_backward_64_bf16", "attention_forward_64_bf16"]);
        assert_eq!(causal(bf16, 128, 8), ["attention_backward_128_bf16", "attention_forward_128_bf16"]);
        assert_eq!(causal(f16, 64, 0), ["attention_backward_64_f16", "attention_forward_64_f16"]);
        assert_eq!(causal(f16, 128, 8), ["attention_backward_128_f16", "attention_forward_128_f16"]);
        assert_eq!(causal(bf16, 80, 0), ["attention_backward_80_bf16", "attention_forward_80_bf16"]);
        assert_eq!(causal(f16, 72, 8), ["attention_backward_80_f16", "attention_forward_80_f16"]);
        assert_eq!(causal(bf16, 256, 2), ["attention_backward_bf16", "attention_forward_bf16"]);
        assert_eq!(causal(bf16, 248, 0), ["attention_backward_bf16", "attention_forward_bf16"]);
        assert_eq!(causal(f16, 96, 0), ["attention_backward_f16", "attention_forward_f16"]);
        assert_eq!(causal(bf16, 128, 2), ["attention_backward_bf16", "attention_forward_bf16"]);
        assert_eq!(causal(bf16, 96, 0), ["attention_backward_bf16", "attention_forward_bf16"]);
        assert_eq!(causal(DType::F32, 64, 0), ["attention_backward_f32", "attention_forward_f32"]);
    }

    #[test]
    fn attention_of_whole_sequences_has_kernels_of_its_own() {
        let (bf16, f16) = (DType::Bf16, DType::F16);
        let full = |dtype, dim, gap| kernels(dtype, dim, gap, false);
        assert_eq!(full(bf16, 64, 0), ["attention_backward_full_64_bf16", "attention_forward_full_64_bf16"]);
        assert_eq!(full(bf16, 72, 0), ["attention_backward_full_80_bf16", "attention_forward_full_80_bf16"]);
        assert_eq!(full(f16, 80, 8), ["attention_backward_full_80_f16", "attention_forward_full_80_f16"]);
        assert_eq!(full(f16, 128, 0), ["attention_backward_full_128_f16", "attention_forward_full_128_f16"]);
        assert_eq!(full(bf16, 72, 2), ["attention_backward_full_bf16", "attention_forward_full_bf16"]);
        assert_eq!(full(bf16, 8, 0), ["attention_backward_full_bf16", "attention_forward_full_bf16"]);
        assert_eq!(full(DType::F32, 72, 0), ["attention_backward_full_f32", "attention_forward_full_f32"]);
    }

    #[test]
    fn the_backward_pass_over_heads_of_256_is_a_kernel_for_keys_and_one_for_queries() {
        for (dtype, gap, causal, suffix) in [
            (DType::Bf16, 0, true, "256_bf16"),
            (DType::F16, 8, true, "256_f16"),
            (DType::Bf16, 8, false, "full_256_bf16"),
            (DType::F16, 0, false, "full_256_f16"),
        ] {
            let of_suffix = |name| format!("attention_{name}_{suffix}");
            assert_eq!(
                kernels(dtype, 256, gap, causal),
                ["backward_keys", "backward_queries", "forward"].map(of_suffix)
            );
        }
    }
}
