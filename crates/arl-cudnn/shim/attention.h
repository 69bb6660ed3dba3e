// cuDNN's fused attention with a C interface: what Rust calls. Sequences are packed, one after the other, as rows of tokens.
// No exception leaves these functions: what goes wrong is written into `message` (`message_size` bytes, ended by 0).
#pragma once

#include <cstdint>

extern "C" {

// A handle of the library for one device, or the description of a device that is not there.
struct arl_cudnn;
// A plan of one graph, made for one shape.
struct arl_attention;

// What a plan is made for. Strides are in elements, from one token to the next.
struct arl_attention_shape {
    // 0: the forward pass, which writes `out` and `stats`; 1: the backward pass, which writes the three gradients.
    int32_t backward;
    // 0: bf16, 1: f16.
    int32_t type;
    // The compute capability, as 90.
    int32_t capability;
    // 1: the backward pass adds in an order that is always the same.
    int32_t deterministic;
    float scale;
    // Most sequences, most tokens of one, most tokens of all together.
    int64_t sequences, max_len, tokens;
    int64_t query_heads, key_value_heads, dim;
    // Keys that a query sees, itself included; 0: all before it.
    int64_t window;
    int64_t q_stride, k_stride, v_stride, out_stride;
    // Of the backward pass alone.
    int64_t d_out_stride, d_q_stride, d_k_stride, d_v_stride;
};

// Addresses on the device; 0: there is no such operand.
struct arl_attention_operands {
    // Operands of 16 bits, but for `stats`: f32 `[tokens, query_heads]`, log of the sum of the exponentials.
    uint64_t q, k, v, out, stats, d_out, d_q, d_k, d_v;
    // int32 `[sequences]`: the lengths; 0 where there is no sequence.
    uint64_t lengths;
    // int32 `[sequences + 1]` each, in the order of the operands: the first element of every sequence, and what follows the
    // last one.
    uint64_t offsets[9];
};

// Opens cuDNN by `path` where none is open yet, and gives its version, as 91501; 0: `message` says why not.
int64_t arl_cudnn_open(char const *path, char *message, int64_t message_size);

// A handle on the current device, or, where `properties` is not null, on the device that this JSON describes: on that one
// plans can be made but not run. Null: `message` says why.
arl_cudnn *arl_cudnn_create(char const *properties, char *message, int64_t message_size);

// Nothing of it may be in use.
void arl_cudnn_destroy(arl_cudnn *);

// A plan, and the bytes of the device's memory that it works in. Null: cuDNN has none for the shape, and `message` says why.
arl_attention *arl_attention_create(arl_cudnn *, arl_attention_shape const *, int64_t *workspace, char *message,
                                    int64_t message_size);

void arl_attention_destroy(arl_attention *);

// Queues the plan on a stream. 0: queued; else `message` says why not.
int32_t arl_attention_run(arl_cudnn *, arl_attention *, arl_attention_operands const *, uint64_t workspace,
                          void *stream, char *message, int64_t message_size);
}
