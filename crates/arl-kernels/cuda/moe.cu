// A mixture of experts: the router's softmax and choice, the sorting of (token, expert) pairs by expert, and the weighted
// sums of the experts' outputs with their gradients.
// router, router_backward: one warp a token, its row of up to 512 probabilities in registers, read and written once.
// permute: a stable counting sort in three kernels; a block counts its run of pairs, a warp sums one expert's counts over
// the blocks, and each block places its run, warp after warp in the order of the pairs.
// combine: one block a token, reads its top_k rows and writes one. combine_backward: one warp a pair.
#include "arl.cuh"

namespace moe {

constexpr int WARPS = THREADS / 32;

// The warp's number over all blocks, and the lane.
__device__ __forceinline__ long long warp_number() { return blockIdx.x * (long long)WARPS + threadIdx.x / 32; }
__device__ __forceinline__ int lane_number() { return threadIdx.x % 32; }

// Lane l holds experts l, l + 32, ..., at most OWN of them.
template <int OWN>
__device__ void router(const float *logits, int tokens, int experts, int top_k, bool normalise, float *probabilities,
                       int *chosen, float *weights) {
    long long token = warp_number();
    int lane = lane_number();
    if (token >= tokens) return;
    logits += token * experts;
    probabilities += token * experts;
    chosen += token * top_k;
    weights += token * top_k;
    float own[OWN], greatest = -INFINITY, total = 0;
    for (int i = 0; i < OWN; i++) {
        int expert = lane + 32 * i;
        own[i] = expert < experts ? logits[expert] : -INFINITY;
        greatest = fmaxf(greatest, own[i]);
    }
    greatest = warp_max(greatest);
    for (int i = 0; i < OWN; i++) {
        own[i] = lane + 32 * i < experts ? expf(own[i] - greatest) : 0.0f;
        total += own[i];
    }
    total = warp_sum(total);
    // The bits of what is not negative ascend with it (and NaN is above all); below them the index, the lower the
    // greater. 0 is what is taken or not there.
    unsigned long long keys[OWN];
    for (int i = 0; i < OWN; i++) {
        int expert = lane + 32 * i;
        own[i] /= total;
        if (expert < experts) probabilities[expert] = own[i];
        keys[i] = expert < experts ? (unsigned long long)__float_as_uint(own[i]) << 32 | ~unsigned(expert) : 0;
    }
    float sum = 0;
    for (int slot = 0; slot < top_k; slot++) {
        unsigned long long best = 0;
        for (int i = 0; i < OWN; i++) best = keys[i] > best ? keys[i] : best;
        for (int distance = 16; distance > 0; distance /= 2) {
            unsigned long long other = __shfl_xor_sync(FULL, best, distance);
            best = other > best ? other : best;
        }
        for (int i = 0; i < OWN; i++)
            if (keys[i] == best) keys[i] = 0;
        float weight = __uint_as_float(unsigned(best >> 32));
        sum += weight;
        if (lane == slot % 32) {
            chosen[slot] = int(~unsigned(best));
            weights[slot] = weight;
        }
    }
    // Each lane divides what it wrote itself.
    if (normalise)
        for (int slot = lane; slot < top_k; slot += 32) weights[slot] /= sum;
}

// parts [blocks, 2, experts]: the choices and the sums of probabilities of `run` tokens.
__device__ __forceinline__ void balance_parts(const float *probabilities, const int *chosen, int tokens, int experts,
                                              int top_k, int run, float *parts) {
    __shared__ int counts[MOST_EXPERTS];
    long long first = blockIdx.x * (long long)run, end = first + run < tokens ? first + run : tokens;
    for (int expert = threadIdx.x; expert < experts; expert += THREADS) counts[expert] = 0;
    __syncthreads();
    for (long long i = first * top_k + threadIdx.x; i < end * top_k; i += THREADS) atomicAdd(&counts[chosen[i]], 1);
    __syncthreads();
    parts += blockIdx.x * 2LL * experts;
    for (int expert = threadIdx.x; expert < experts; expert += THREADS) {
        float sum = 0;
#pragma unroll 8
        for (long long token = first; token < end; token++) sum += probabilities[token * experts + expert];
        parts[expert] = float(counts[expert]);
        parts[experts + expert] = sum;
    }
}

// One thread a column of balance [2, experts].
__device__ __forceinline__ void balance(const float *parts, int count, int columns, float *balance) {
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= columns) return;
    float sum = 0;
#pragma unroll 8
    for (int part = 0; part < count; part++) sum += parts[(long long)part * columns + column];
    balance[column] += sum;
}

template <int OWN>
__device__ void router_backward(const float *probabilities, const int *chosen, const float *weights,
                                const float *d_weights, const float *counts, float factor, int tokens, int experts,
                                int top_k, bool normalise, float *d_logits) {
    long long token = warp_number();
    int lane = lane_number();
    if (token >= tokens) return;
    probabilities += token * experts;
    d_logits += token * experts;
    chosen += token * top_k;
    weights += token * top_k;
    d_weights += token * top_k;
    // weight = p / total: d_p = (d_weight - sum of weight d_weight) / total, over the chosen.
    float pull = 0, total = 1;
    if (normalise) {
        total = 0;
        for (int slot = 0; slot < top_k; slot++) {
            total += probabilities[chosen[slot]];
            pull += weights[slot] * d_weights[slot];
        }
    }
    float own[OWN], d[OWN], product = 0;
    for (int i = 0; i < OWN; i++) {
        int expert = lane + 32 * i;
        own[i] = expert < experts ? probabilities[expert] : 0.0f;
        d[i] = counts != nullptr && expert < experts ? factor * counts[expert] : 0.0f;
    }
    for (int slot = 0; slot < top_k; slot++) {
        int expert = chosen[slot];
        float gradient = (d_weights[slot] - pull) / total;
        for (int i = 0; i < OWN; i++)
            if (expert == lane + 32 * i) d[i] += gradient;
    }
    for (int i = 0; i < OWN; i++) product += own[i] * d[i];
    product = warp_sum(product);
    for (int i = 0; i < OWN; i++)
        if (lane + 32 * i < experts) d_logits[lane + 32 * i] = own[i] * (d[i] - product);
}

// counts [experts, blocks]: how often each expert is in the block's run of pairs.
__device__ __forceinline__ void permute_count(const int *chosen, int pairs, int experts, int run, int *counts) {
    __shared__ int own[MOST_EXPERTS];
    long long first = blockIdx.x * (long long)run, end = first + run < pairs ? first + run : pairs;
    for (int expert = threadIdx.x; expert < experts; expert += THREADS) own[expert] = 0;
    __syncthreads();
    for (long long i = first + threadIdx.x; i < end; i += THREADS) atomicAdd(&own[chosen[i]], 1);
    __syncthreads();
    for (int expert = threadIdx.x; expert < experts; expert += THREADS)
        counts[expert * (long long)gridDim.x + blockIdx.x] = own[expert];
}

// The sum of the lanes up to this one.
__device__ __forceinline__ int warp_scan(int value) {
    int lane = lane_number();
    for (int distance = 1; distance < 32; distance *= 2) {
        int other = __shfl_up_sync(FULL, value, distance);
        if (lane >= distance) value += other;
    }
    return value;
}

// One warp an expert: counts becomes the number of its pairs in the blocks before, totals that in all.
__device__ __forceinline__ void permute_scan(int *counts, int blocks, int experts, int *totals) {
    long long expert = warp_number();
    if (expert >= experts) return;
    counts += expert * blocks;
    int lane = lane_number(), before = 0;
    for (int first = 0; first < blocks; first += 32) {
        int block = first + lane, own = block < blocks ? counts[block] : 0, sum = warp_scan(own);
        if (block < blocks) counts[block] = before + sum - own;
        before += __shfl_sync(FULL, sum, 31);
    }
    if (lane == 0) totals[expert] = before;
}

__device__ __forceinline__ void permute_place(const int *chosen, int pairs, int experts, int run, const int *counts,
                                              const int *totals, int *offsets, int *sorted, int *rows) {
    // Where each warp's next pair of an expert goes.
    __shared__ int next[WARPS][MOST_EXPERTS];
    __shared__ int sums[WARPS];
    constexpr int OWN = MOST_EXPERTS / THREADS;
    int lane = lane_number(), warp = threadIdx.x / 32;
    long long block_end = (blockIdx.x + 1LL) * run, first = blockIdx.x * (long long)run + warp * (run / WARPS);
    long long end = warp == WARPS - 1 ? block_end : first + run / WARPS;
    if (end > pairs) end = pairs;

    for (int i = threadIdx.x; i < WARPS * MOST_EXPERTS; i += THREADS) next[i / MOST_EXPERTS][i % MOST_EXPERTS] = 0;
    // The experts' offsets: each thread has OWN neighbours.
    int own[OWN], before = 0;
    for (int i = 0; i < OWN; i++) {
        int expert = threadIdx.x * OWN + i;
        own[i] = expert < experts ? totals[expert] : 0;
        before += own[i];
    }
    int in_warp = warp_scan(before);
    if (lane == 31) sums[warp] = in_warp;
    __syncthreads();
    before = in_warp - before;
    for (int i = 0; i < warp; i++) before += sums[i];
    for (long long i = first + lane; i < end; i += 32) atomicAdd(&next[warp][chosen[i]], 1);
    __syncthreads();
    for (int i = 0; i < OWN; i++) {
        int expert = threadIdx.x * OWN + i;
        if (expert < experts) {
            if (blockIdx.x == 0) offsets[expert] = before;
            int row = before + counts[expert * (long long)gridDim.x + blockIdx.x];
            for (int w = 0; w < WARPS; w++) {
                int count = next[w][expert];
                next[w][expert] = row;
                row += count;
            }
        }
        before += own[i];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) offsets[experts] = pairs;
    __syncthreads();
    for (long long at = first; at < end; at += 32) {
        long long pair = at + lane;
        bool there = pair < end;
        int expert = there ? chosen[pair] : -1;
        unsigned peers = __match_any_sync(FULL, expert);
        int rank = __popc(peers & ((1u << lane) - 1)), row = there ? next[warp][expert] + rank : 0;
        __syncwarp();
        if (there && rank == 0) next[warp][expert] += __popc(peers);
        __syncwarp();
        if (there) {
            sorted[row] = int(pair);
            rows[pair] = row;
        }
    }
}

// N elements an access.
template <int N, typename T>
__device__ void combine(const T *x, const int *rows, const float *weights, int top_k, int width, T *out) {
    long long token = blockIdx.x, first = token * top_k;
    out += token * width;
    for (int i = threadIdx.x * N; i < width; i += COMBINE_THREADS * N) {
        float sums[N] = {};
#pragma unroll 4
        for (int j = 0; j < top_k; j++) {
            Group<T, N> group = load_group<N>(x + (long long)rows[first + j] * width + i);
            float weight = weights != nullptr ? weights[first + j] : 1.0f;
            for (int e = 0; e < N; e++) sums[e] += weight * load(group.at[e]);
        }
        Group<T, N> group;
        for (int e = 0; e < N; e++) group.at[e] = store<T>(sums[e]);
        store_group(out + i, group);
    }
}

// The warps of one token's pairs read its `d_out` from the cache.
template <int N, typename T>
__device__ void combine_backward(const T *d_out, const T *x, const int *rows, const float *weights, int pairs, int top_k,
                                 int width, T *d_x, float *d_weights) {
    long long number = warp_number();
    if (number >= pairs) return;
    int lane = lane_number();
    long long row = rows[number];
    float weight = weights[number], product = 0;
    d_out += number / top_k * width;
    x += row * width;
    d_x += row * width;
#pragma unroll 2
    for (int i = lane * N; i < width; i += 32 * N) {
        Group<T, N> d = load_group<N>(d_out + i), group = load_group<N>(x + i);
        for (int e = 0; e < N; e++) {
            product += load(group.at[e]) * load(d.at[e]);
            d.at[e] = store<T>(weight * load(d.at[e]));
        }
        store_group(d_x + i, d);
    }
    product = warp_sum(product);
    if (lane == 0) d_weights[number] = product;
}

} // namespace moe

// For up to 128 and up to 512 experts.
#define ROUTER(most, own)                                                                                              \
    ARL_KERNEL(router_##most, moe::THREADS, const float *logits, int tokens, int experts, int top_k, int normalise,    \
               float *probabilities, int *chosen, float *weights) {                                                    \
        moe::router<own>(logits, tokens, experts, top_k, normalise != 0, probabilities, chosen, weights);              \
    }                                                                                                                  \
    ARL_KERNEL(router_backward_##most, moe::THREADS, const float *probabilities, const int *chosen,                    \
               const float *weights, const float *d_weights, const float *counts, float factor, int tokens,            \
               int experts, int top_k, int normalise, float *d_logits) {                                               \
        moe::router_backward<own>(probabilities, chosen, weights, d_weights, counts, factor, tokens, experts, top_k,   \
                                  normalise != 0, d_logits);                                                           \
    }
ROUTER(128, 4)
ROUTER(512, 16)
#undef ROUTER

ARL_KERNEL(router_balance_parts, moe::THREADS, const float *probabilities, const int *chosen, int tokens, int experts,
           int top_k, int run, float *parts) {
    moe::balance_parts(probabilities, chosen, tokens, experts, top_k, run, parts);
}

ARL_KERNEL(router_balance, moe::THREADS, const float *parts, int count, int columns, float *balance) {
    moe::balance(parts, count, columns, balance);
}

ARL_KERNEL(permute_count, moe::THREADS, const int *chosen, int pairs, int experts, int run, int *counts) {
    moe::permute_count(chosen, pairs, experts, run, counts);
}

ARL_KERNEL(permute_scan, moe::THREADS, int *counts, int blocks, int experts, int *totals) {
    moe::permute_scan(counts, blocks, experts, totals);
}

ARL_KERNEL(permute_place, moe::THREADS, const int *chosen, int pairs, int experts, int run, const int *counts,
           const int *totals, int *offsets, int *sorted, int *rows) {
    moe::permute_place(chosen, pairs, experts, run, counts, totals, offsets, sorted, rows);
}

#define COMBINE(name, T)                                                                                               \
    ARL_KERNEL(combine_##name, moe::COMBINE_THREADS, const T *x, const int *rows, const float *weights, int top_k,     \
               int width, T *out) {                                                                                    \
        if (vectorizable(x, width) && vectorizable(out, width))                                                        \
            moe::combine<Pack<T>::SIZE>(x, rows, weights, top_k, width, out);                                          \
        else moe::combine<1>(x, rows, weights, top_k, width, out);                                                     \
    }                                                                                                                  \
    ARL_KERNEL(combine_backward_##name, moe::THREADS, const T *d_out, const T *x, const int *rows,                     \
               const float *weights, int pairs, int top_k, int width, T *d_x, float *d_weights) {                      \
        if (vectorizable(d_out, width) && vectorizable(x, width) && vectorizable(d_x, width))                          \
            moe::combine_backward<Pack<T>::SIZE>(d_out, x, rows, weights, pairs, top_k, width, d_x, d_weights);        \
        else moe::combine_backward<1>(d_out, x, rows, weights, pairs, top_k, width, d_x, d_weights);                   \
    }
ARL_FOR_TYPES(COMBINE)
#undef COMBINE
