// Attention of one new token a sequence to its cached keys and values. A block a (sequence, query head); its warps take
// 32 keys at a time in turn, a lane a key for the scores, then all lanes together for the sum of the values, and join
// their results at the end. Each entry that is seen is read once a query head; nothing else is.
#include "attention.cuh"

namespace attention {

template <typename T>
__device__ __forceinline__ void cached(Matrix<const T> q, const T *k_cache, const T *v_cache, const int *lengths,
                                       const Shape &shape, long long capacity, T *out) {
    constexpr int SIZE = Pack<T>::SIZE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = shape.dim;
    int sequence = blockIdx.x / shape.query_heads, head = blockIdx.x % shape.query_heads;
    int key_head = head / (shape.query_heads / shape.key_heads);
    long long width = (long long)shape.key_heads * dim, base = sequence * capacity * width + key_head * dim;
    k_cache += base;
    v_cache += base;
    // The query, then each warp's sum of values, greatest score and sum of exponentials.
    __shared__ float query[LANE_COLUMNS * 32], sums[WARPS][LANE_COLUMNS * 32], greatests[WARPS], totals[WARPS];
    for (int i = threadIdx.x; i < dim; i += THREADS) query[i] = load(q.at(sequence, head * dim)[i]);
    __syncthreads();

    int length = lengths[sequence], first = max(length - shape.window, 0);
    bool aligned = vectorizable(k_cache, width) && dim % SIZE == 0;
    float scale_log2 = shape.scale * LOG2_E, greatest = MIN_SCORE, total = 0, sum[LANE_COLUMNS];
    fill(sum, 0);
    for (int start = first + warp * 32; start < length; start += THREADS) {
        float score = -INFINITY;
        if (start + lane < length) {
            const T *key = k_cache + (start + lane) * width;
            score = 0;
            if (aligned) {
                for (int i = 0; i < dim; i += SIZE) {
                    Pack<T> pack = load_pack(key + i);
#pragma unroll
                    for (int j = 0; j < SIZE; j++) score += query[i + j] * load(pack.at[j]);
                }
            } else {
                for (int i = 0; i < dim; i++) score += query[i] * load(key[i]);
            }
        }
        float now = fmaxf(greatest, warp_max(score)), factor = exp2f((greatest - now) * scale_log2);
        float p = exp2f((score - now) * scale_log2);
        greatest = now;
        total = total * factor + p;
#pragma unroll
        for (int x = 0; x < LANE_COLUMNS; x++) sum[x] *= factor;
        int valid = min(length - start, 32);
        for (int j = 0; j < valid; j++) {
            float weight = __shfl_sync(FULL, p, j);
            const T *value = v_cache + (start + j) * width;
#pragma unroll
            for (int x = 0; x < LANE_COLUMNS; x++)
                if (lane + 32 * x < dim) sum[x] += weight * load(value[lane + 32 * x]);
        }
    }
    total = warp_sum(total);
    if (lane == 0) {
        greatests[warp] = greatest;
        totals[warp] = total;
    }
#pragma unroll
    for (int x = 0; x < LANE_COLUMNS; x++) sums[warp][lane + 32 * x] = sum[x];
    __syncthreads();
    float most = greatests[0];
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, greatests[w]);
    for (int i = threadIdx.x; i < dim; i += THREADS) {
        float all = 0, value = 0;
        for (int w = 0; w < WARPS; w++) {
            float factor = exp2f((greatests[w] - most) * scale_log2);
            all += factor * totals[w];
            value += factor * sums[w][i];
        }
        out[(long long)blockIdx.x * dim + i] = store<T>(value / all);
    }
}

} // namespace attention

#define CACHED(name, T)                                                                                                \
    ARL_KERNEL(attention_cached_##name, attention::THREADS, const T *q, long long q_stride, const T *k_cache,          \
               const T *v_cache, const int *lengths, int query_heads, int key_heads, int dim, int window, float scale, \
               long long capacity, T *out) {                                                                           \
        attention::Shape shape = {nullptr, 0, query_heads, key_heads, dim, 0, window, scale};                          \
        attention::cached<T>({q, q_stride}, k_cache, v_cache, lengths, shape, capacity, out);                          \
    }
ARL_FOR_TYPES(CACHED)
#undef CACHED
