// What is around attention by the device's own library: where each packed sequence begins in each operand, and the way of
// the keys' and values' gradients into the rows that queries, keys and values share.
#include "arl.cuh"

namespace attention_packed {

// From one token to the next, of each operand.
struct Strides {
    int of[OPERANDS];
};

// `lengths[s]` of `places` sequences, and `offsets[o][s]`, their first elements, one more than there are places. Places
// after the last sequence are empty, and begin where it ends.
__device__ void offsets(const int *cu_seqlens, int count, int places, const Strides &strides, int operands, int *lengths,
                        int *offsets) {
    int s = blockIdx.x * THREADS + threadIdx.x;
    if (s > places) return;
    int first = cu_seqlens[min(s, count)];
    if (s < places) lengths[s] = cu_seqlens[min(s + 1, count)] - first;
    for (int o = 0; o < operands; o++) offsets[o * (places + 1) + s] = first * strides.of[o];
}

// `d_qkv[r]` from column `first` on is row r of `d_k`, then row r of `d_v`, of `width` elements each; a pack a thread.
__device__ void place(const bf16 *d_k, const bf16 *d_v, int width, bf16 *d_qkv, long long stride, int first,
                      long long rows) {
    constexpr int N = Pack<bf16>::SIZE;
    int packs_of_row = 2 * width / N;
    long long at = blockIdx.x * (long long)THREADS + threadIdx.x;
    long long row = at / packs_of_row;
    if (row >= rows) return;
    int column = at % packs_of_row * N;
    const bf16 *source = column < width ? d_k + column : d_v + (column - width);
    store_pack(d_qkv + row * stride + first + column, load_pack(source + row * width));
}

} // namespace attention_packed

ARL_KERNEL(attention_offsets, attention_packed::THREADS, const int *cu_seqlens, int count, int places, int q, int k, int v,
           int out, int stats, int d_out, int d_q, int d_k, int d_v, int operands, int *lengths, int *offsets) {
    attention_packed::Strides strides = {{q, k, v, out, stats, d_out, d_q, d_k, d_v}};
    attention_packed::offsets(cu_seqlens, count, places, strides, operands, lengths, offsets);
}

ARL_KERNEL(attention_place_bf16, attention_packed::THREADS, const bf16 *d_k, const bf16 *d_v, int width, bf16 *d_qkv,
           long long stride, int first, long long rows) {
    attention_packed::place(d_k, d_v, width, d_qkv, stride, first, rows);
}
