// Sizes that kernels and their launches agree on. The build makes a Rust module of this file (`arl_kernels::constants`), so that
// each is written once: namespaces, constants whose values both languages read alike, and comments, nothing else.
#pragma once

namespace attention {
// Threads of a block, on tensor cores and at most on CUDA cores.
constexpr int THREADS = 128;
// Queries and keys of a tile of the forward pass on tensor cores.
constexpr int BLOCK_M = 128;
constexpr int BLOCK_N = 64;
// Rows of a block's own tile of the backward pass on tensor cores, by the size of a head; and of the tiles that it loops over.
constexpr int BACKWARD_BLOCK_M_64 = 128;
constexpr int BACKWARD_BLOCK_M_128 = 64;
constexpr int BACKWARD_BLOCK_N = 32;
// On tensor cores with heads of 256: threads of a block; rows of its own tile forward and backward; rows of the tiles that it loops
// over, and how many of these it has in shared memory.
constexpr int THREADS_256 = 256;
constexpr int BLOCK_M_256 = 128;
constexpr int BACKWARD_BLOCK_M_256 = 64;
constexpr int BLOCK_N_256 = 32;
constexpr int STAGES_256 = 3;
constexpr int BACKWARD_STAGES_256 = 2;
// On CUDA cores: rows of a warp, and from one row of probabilities to the next.
constexpr int ROWS = 8;
constexpr int WEIGHTS_STRIDE = 36;
}

namespace attention_packed {
constexpr int THREADS = 256;
// Operands of both passes: queries, keys, values, output, statistics; gradients of output, queries, keys and values.
constexpr int OPERANDS = 9;
}

namespace classifier {
constexpr int THREADS = 1024;
// Dynamic shared memory that keeps the beginning of a row until its gradient is written.
constexpr int KEPT_BYTES = 96 << 10;
}

namespace conv {
constexpr int THREADS = 128;
// Tokens of a block of the forward pass.
constexpr int TOKENS = 64;
// Most taps.
constexpr int TAPS = 4;
}

namespace delta {
constexpr int THREADS = 256;
// Tokens that are computed together.
constexpr int CHUNK = 64;
// Columns of values that a block has of a state, or stages at a time.
constexpr int COLUMNS = 32;
// From one row of f32 in shared memory to the next: of CHUNK columns, and of COLUMNS; four more, so that rows are in different banks.
constexpr int CHUNK_STRIDE = CHUNK + 4;
constexpr int COLUMNS_STRIDE = COLUMNS + 4;
// Key heads are staged whole, padded to so many elements; a row of them has at most so many bytes.
constexpr int PADDING = 16;
constexpr int MOST_KEY_BYTES = 512;
// Elements of the largest key head in the step of one token: rows of the state that a warp holds, of all warps.
constexpr int MOST_KEY_DIM = 256;
// Tokens of a block of the gates' backward pass.
constexpr int GATE_TOKENS = 1024;
}

namespace elementwise {
constexpr int THREADS = 256;
// Elements that a thread converts or adds.
constexpr int STEP = 8;
}

namespace embedding {
constexpr int THREADS = 256;
// Rows that a block gathers or scatters, one a warp.
constexpr int ROWS = 8;
// Tokens whose places in the order of ids a block finds.
constexpr int SORTED = 64;
constexpr int ADD_THREADS = 128;
// Columns that a thread adds at a time, where rows are read in groups.
constexpr int COLUMNS = 4;
}

namespace gated_norm {
constexpr int THREADS = 256;
// Elements of the largest head.
constexpr int MOST_DIM = 256;
}

namespace gates {
constexpr int THREADS = 256;
// Rows of a block, one a warp, where each row has one gate.
constexpr int ROWS = 8;
}

namespace gelu {
constexpr int THREADS = 256;
// Elements of a thread.
constexpr int STEP = 8;
}

namespace grouped {
// On tensor cores: threads, rows and columns of a block's tile, columns of a stage, and stages.
constexpr int THREADS = 128;
constexpr int BLOCK = 128;
constexpr int BLOCK_K = 32;
constexpr int STAGES = 3;
// Bytes of both operands' stages, in 16 bits.
constexpr int STAGES_BYTES = STAGES * 2 * BLOCK * BLOCK_K * 2;
// What the search for a block's expert has behind the stages.
constexpr int SEARCH_BYTES = 64;
}

namespace guard {
constexpr int THREADS = 256;
}

namespace layer_norm {
// Most threads of a block of the forward pass, and packs of 16 bytes that a thread of it holds.
constexpr int MOST_THREADS = 512;
constexpr int PACKS = 4;
// Most threads of a block of the backward pass, and elements that a thread of it holds.
constexpr int MOST_BACKWARD_THREADS = 1024;
constexpr int BACKWARD_ELEMENTS = 8;
}

namespace magnitude {
constexpr int THREADS = 256;
// Rows whose norms a block takes.
constexpr int ROWS = 4;
// Columns of a row that a thread scales.
constexpr int STEP = 8;
}

namespace matmul {
constexpr int SPLIT_THREADS = 256;
// Columns that a thread splits.
constexpr int SPLIT_STEP = 8;
}

namespace moe {
constexpr int THREADS = 256;
constexpr int COMBINE_THREADS = 128;
// What a warp holds of a row of probabilities, and a block of counts.
constexpr int MOST_EXPERTS = 512;
}

namespace nf4 {
constexpr int THREADS = 256;
// Weights that a thread takes at a time.
constexpr int STEP = 8;
// Weights that share a scale, and scales that share one in turn.
constexpr int BLOCK = 64;
constexpr int NESTED_BLOCK = 256;
// Rows that a block multiplies with a token, one a warp.
constexpr int ROWS = 8;
}

namespace optimizer {
constexpr int THREADS = 256;
// Parameters of a thread at a time, and times that a block repeats, so that the factor of the clipping costs little.
constexpr int GROUP = 4;
constexpr int ROUNDS = 4;
}

namespace ranks {
constexpr int THREADS = 256;
// Elements of which `block_squares` makes one sum, as the CPU does.
constexpr int BLOCK = 16384;
}

namespace reduce {
constexpr int THREADS = 1024;
}

namespace rms_norm {
// Most threads of a block of the forward pass, and packs of 16 bytes that a thread of it holds.
constexpr int MOST_THREADS = 512;
constexpr int PACKS = 4;
// Most threads of a block of the backward pass, and elements that a thread of it holds.
constexpr int MOST_BACKWARD_THREADS = 1024;
constexpr int BACKWARD_ELEMENTS = 8;
}

namespace rope {
constexpr int THREADS = 128;
}

namespace swiglu {
constexpr int MOST_THREADS = 256;
}

namespace tile {
// On CUDA cores: threads, rows and columns of a block's tile, columns of a stage.
constexpr int THREADS = 256;
constexpr int BLOCK_M = 128;
constexpr int BLOCK_N = 64;
constexpr int BLOCK_K = 16;
}

namespace vision {
constexpr int THREADS = 256;
// Rows of a block, one a warp.
constexpr int ROWS = 8;
// Rows of a table that a position is interpolated from.
constexpr int TAPS = 4;
// Threads of a block that owns a row of the table's gradient, and columns that a thread adds at a time.
constexpr int TAP_THREADS = 128;
constexpr int COLUMNS = 4;
}
