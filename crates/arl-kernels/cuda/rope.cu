// RMSNorm of each query's and key's head (Qwen3; not every model has it), then rotary position embedding of the head or of its first
// elements: forward, and backward in place.
//
// Some lanes of a warp have a head: each a pack of 16 bytes and the pack it is rotated with. Where only a part of the head is rotated, the
// others have packs of the rest, which pass. Heads of other sizes or alignments go element by element, a warp a head. Everything stays in
// registers.
// Forward: reads the query and key columns of qkv once, writes qk. Backward without norms: reads and writes the query
// and key columns of d_qkv. With norms also qkv is read; first the queries, then the keys, so that a lane sums its
// elements of one norm's gradient in registers; a block's sums go to `parts`, for `add_parts`.
// Cosines and sines are one row for all heads of a token, of tables that all tokens at the same position share; they are read
// from the cache, as the norms' weights are.
#include "arl.cuh"

namespace rope {

constexpr int WARPS = THREADS / 32;

// Blocks have THREADS; a bound of six of them leaves a thread 80 registers, so that six run at once.
constexpr int TURN_BOUND = 6 * THREADS;

// Pairs of a lane where heads go element by element: heads of up to 2 x 32 x 4 elements.
constexpr int PAIRS = 4;

// Which pairs of elements of a head a lane has: `COUNT` from number `first` on, `step` apart, but none from `half` on. Those below
// `turned` are rotated: `i` with `i + turned`. The others are two elements of the rest, `i + turned` and `i + half of the head`.
struct Lane {
    int first, step, half;
    // Lanes of a head.
    int lanes;
    int turned;

    // Where the elements of a pair are in heads of `2 half` elements: the first of each, and with HIGH the second.
    template <bool HIGH> __device__ __forceinline__ int at(int pair, int half) const {
        return pair < turned ? pair + (HIGH ? turned : 0) : pair + (HIGH ? half : turned);
    }
};

// Lanes of a head in packs; a power of two, so that sums may go by exclusive or. More than 32: not in packs.
template <typename T> __device__ __forceinline__ int packed_lanes(int half) {
    int lanes = 1;
    while (lanes * Pack<T>::SIZE < half) lanes *= 2;
    return lanes;
}

template <typename T, bool PACKED> __device__ __forceinline__ Lane lane_of(int half, int turned) {
    const int lane = threadIdx.x % 32;
    if (!PACKED) return {lane, 32, half, 32, turned};
    const int lanes = packed_lanes<T>(half);
    return {lane % lanes * Pack<T>::SIZE, 1, half, lanes, turned};
}

// Elements of a lane's half.
template <typename T, bool PACKED> constexpr int COUNT = PACKED ? Pack<T>::SIZE : PAIRS;

// A row in the order of its elements.
template <bool PACKED, int N, typename T>
__device__ __forceinline__ void read(const T *row, Lane lane, float (&values)[N]) {
    if constexpr (PACKED) {
        constexpr int SIZE = N < Pack<T>::SIZE ? N : Pack<T>::SIZE;
#pragma unroll
        for (int i = 0; i < N; i += SIZE) {
            Pack<T> pack = {};
            if (lane.first < lane.half) pack = load_pack(row + lane.first + i);
#pragma unroll
            for (int j = 0; j < SIZE; j++) values[i + j] = load(pack.at[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            int at = lane.first + i * lane.step;
            values[i] = at < lane.half ? load(row[at]) : 0.0f;
        }
    }
}

// The first elements of the lane's pairs of a head of `2 half` elements, or with HIGH the second ones.
template <bool PACKED, bool HIGH, int N, typename T>
__device__ __forceinline__ void read_pairs(const T *head, int half, Lane lane, float (&values)[N]) {
    if constexpr (PACKED) {
        static_assert(N == Pack<T>::SIZE, "a lane has a pack");
        Pack<T> pack = {};
        if (lane.first < lane.half) pack = load_pack(head + lane.at<HIGH>(lane.first, half));
#pragma unroll
        for (int j = 0; j < N; j++) values[j] = load(pack.at[j]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int pair = lane.first + i * lane.step;
            values[i] = pair < lane.half ? load(head[lane.at<HIGH>(pair, half)]) : 0.0f;
        }
    }
}

template <bool PACKED, bool HIGH, int N, typename T>
__device__ __forceinline__ void write_pairs(T *head, int half, Lane lane, const float (&values)[N]) {
    if constexpr (PACKED) {
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < N; j++) pack.at[j] = store<T>(values[j]);
        if (lane.first < lane.half) store_pack(head + lane.at<HIGH>(lane.first, half), pack);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int pair = lane.first + i * lane.step;
            if (pair < lane.half) head[lane.at<HIGH>(pair, half)] = store<T>(values[i]);
        }
    }
}

// The sum over the lanes of a head; all lanes of the warp take part.
__device__ __forceinline__ float head_sum(float value, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL, value, distance);
    return value;
}

template <int N> __device__ __forceinline__ float squares(const float (&low)[N], const float (&high)[N]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum += low[i] * low[i] + high[i] * high[i];
    return sum;
}

// Cosines and sines, `[rows, turned]`, and each token's row of them. With `axes` a token has three rows, `tokens` apart, and
// `axes` says of each column which of them it is read from.
struct Angles {
    const float *cosines, *sines;
    const int *rows, *axes;
};

// A lane's part of a token's cosines and sines, of which a lane without a head reads none.
template <bool PACKED, int N>
__device__ __forceinline__ void read_angles(const Angles &angles, int tokens, unsigned token, Lane lane, float (&cos)[N],
                                            float (&sin)[N]) {
    const int width = lane.turned;
    lane.half = min(lane.half, width);
    if (angles.axes == nullptr) {
        const long long row = (long long)angles.rows[token] * width;
        read<PACKED>(angles.cosines + row, lane, cos);
        read<PACKED>(angles.sines + row, lane, sin);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int column = lane.first + i * lane.step;
        cos[i] = sin[i] = 0.0f;
        if (column < lane.half) {
            const long long row = angles.rows[(long long)angles.axes[column] * tokens + token];
            cos[i] = angles.cosines[row * width + column];
            sin[i] = angles.sines[row * width + column];
        }
    }
}

// A turn by the angle, or back by it: the transpose. What is not rotated passes.
template <bool BACK, int N>
__device__ __forceinline__ void rotate(Lane lane, float (&low)[N], float (&high)[N], const float (&cos)[N],
                                       const float (&sin)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (lane.first + i * lane.step >= lane.turned) continue;
        const float a = low[i], b = high[i], s = BACK ? -sin[i] : sin[i];
        low[i] = a * cos[i] - b * s;
        high[i] = b * cos[i] + a * s;
    }
}

// A norm's weights, to which `offset` is added.
template <typename T> struct Norm {
    const T *weight;
    float offset;

    // The normalised value, if there is no offset, and its product with the weight are rounded to T, as on the CPU.
    template <int N>
    __device__ __forceinline__ void scale(float (&values)[N], const float (&weight)[N], float factor) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float normed = values[i] * factor;
            values[i] = rounded<T>(weight[i] * (offset == 0 ? rounded<T>(normed) : normed));
        }
    }

    template <bool PACKED, int N>
    __device__ __forceinline__ void read(int half, Lane lane, float (&low)[N], float (&high)[N]) const {
        read_pairs<PACKED, false>(weight, half, lane, low);
        read_pairs<PACKED, true>(weight, half, lane, high);
        if (offset == 0) return;
#pragma unroll
        for (int i = 0; i < N; i++) low[i] += offset, high[i] += offset;
    }
};

// Heads go from `first` on in steps of `step`, the same number of steps for all lanes of a warp.
struct Steps {
    unsigned base, own, step;
};

__device__ __forceinline__ Steps steps(int lanes) {
    const unsigned heads_a_warp = 32 / lanes;
    return {(blockIdx.x * WARPS + threadIdx.x / 32) * heads_a_warp, threadIdx.x % 32 / lanes,
            gridDim.x * WARPS * heads_a_warp};
}

struct Shape {
    int tokens, query, key_value, dim, rotary;
};

// What is read and what is written: `target` rows are as wide as `source`'s in place (BACK), or hold queries and keys
// alone.
template <typename T, bool PACKED, bool BACK>
__device__ __forceinline__ void turn(const T *source, T *target, const T *query_norm, const T *key_norm, float offset,
                                     float epsilon, const Angles &angles, Shape shape) {
    constexpr int N = COUNT<T, PACKED>;
    const int half = shape.dim / 2;
    const unsigned heads = shape.query + shape.key_value, all = shape.tokens * heads;
    const int width = (heads + shape.key_value) * shape.dim;
    const int target_width = BACK ? width : heads * shape.dim;
    Lane lane = lane_of<T, PACKED>(half, shape.rotary / 2);
    const Steps at = steps(lane.lanes);
    for (unsigned base = at.base; base < all; base += at.step) {
        // A lane without a head computes on zeroes and stores nothing.
        lane.half = base + at.own < all ? half : 0;
        const unsigned item = lane.half > 0 ? base + at.own : 0;
        const unsigned token = item / heads, head = item - token * heads;
        const T *x = source + (long long)token * width + head * shape.dim;
        T *out = target + (long long)token * target_width + head * shape.dim;
        float low[N], high[N], cos[N], sin[N];
        read_pairs<PACKED, false>(x, half, lane, low);
        read_pairs<PACKED, true>(x, half, lane, high);
        read_angles<PACKED>(angles, shape.tokens, token, lane, cos, sin);
        if (query_norm != nullptr) {
            const Norm<T> norm = {head < unsigned(shape.query) ? query_norm : key_norm, offset};
            float weight_low[N], weight_high[N];
            norm.template read<PACKED>(half, lane, weight_low, weight_high);
            const float factor = rsqrtf(head_sum(squares(low, high), lane.lanes) / shape.dim + epsilon);
            norm.scale(low, weight_low, factor);
            norm.scale(high, weight_high, factor);
        }
        rotate<BACK>(lane, low, high, cos, sin);
        write_pairs<PACKED, false>(out, half, lane, low);
        write_pairs<PACKED, true>(out, half, lane, high);
    }
}

// Backward of the norm and the turn, for the queries (`first_head` 0) or the keys. With `d` the gradient turned back,
// `g = weight d` and `r = 1 / rms`: `r g - x r^3 mean(g x)` over the gradient in `d_qkv`, and the sum of `d x r` over
// the block's heads into row `blockIdx.x` of `parts`. `sums`: `dim` floats a warp.
template <typename T, bool PACKED>
__device__ __forceinline__ void norm_backward(const T *qkv, T *d_qkv, Norm<T> norm, float epsilon, const Angles &angles,
                                              Shape shape, int first_head, unsigned heads, float *sums,
                                              float *parts) {
    constexpr int N = COUNT<T, PACKED>;
    const int half = shape.dim / 2;
    const unsigned all = shape.tokens * heads;
    const int width = (shape.query + 2 * shape.key_value) * shape.dim;
    Lane lane = lane_of<T, PACKED>(half, shape.rotary / 2);
    const Steps at = steps(lane.lanes);
    float sum_low[N] = {}, sum_high[N] = {};
    for (unsigned base = at.base; base < all; base += at.step) {
        lane.half = base + at.own < all ? half : 0;
        const unsigned item = lane.half > 0 ? base + at.own : 0;
        const unsigned token = item / heads, head = first_head + item - token * heads;
        const long long place = (long long)token * width + head * shape.dim;
        float x_low[N], x_high[N], d_low[N], d_high[N], cos[N], sin[N], weight_low[N], weight_high[N];
        read_pairs<PACKED, false>(d_qkv + place, half, lane, d_low);
        read_pairs<PACKED, true>(d_qkv + place, half, lane, d_high);
        read_pairs<PACKED, false>(qkv + place, half, lane, x_low);
        read_pairs<PACKED, true>(qkv + place, half, lane, x_high);
        read_angles<PACKED>(angles, shape.tokens, token, lane, cos, sin);
        rotate<true>(lane, d_low, d_high, cos, sin);
        norm.template read<PACKED>(half, lane, weight_low, weight_high);
        float product = 0;
#pragma unroll
        for (int i = 0; i < N; i++)
            product += weight_low[i] * d_low[i] * x_low[i] + weight_high[i] * d_high[i] * x_high[i];
        product = head_sum(product, lane.lanes);
        const float factor = rsqrtf(head_sum(squares(x_low, x_high), lane.lanes) / shape.dim + epsilon);
        const float pull = product / shape.dim * factor * factor * factor;
#pragma unroll
        for (int i = 0; i < N; i++) {
            sum_low[i] += d_low[i] * (x_low[i] * factor);
            sum_high[i] += d_high[i] * (x_high[i] * factor);
            d_low[i] = weight_low[i] * d_low[i] * factor - x_low[i] * pull;
            d_high[i] = weight_high[i] * d_high[i] * factor - x_high[i] * pull;
        }
        write_pairs<PACKED, false>(d_qkv + place, half, lane, d_low);
        write_pairs<PACKED, true>(d_qkv + place, half, lane, d_high);
    }
    // Over the heads that a warp has at once, then over the warps.
    for (int distance = lane.lanes; distance < 32; distance *= 2)
#pragma unroll
        for (int i = 0; i < N; i++) {
            sum_low[i] += __shfl_xor_sync(FULL, sum_low[i], distance);
            sum_high[i] += __shfl_xor_sync(FULL, sum_high[i], distance);
        }
    lane.half = half;
    float *own = sums + threadIdx.x / 32 * shape.dim;
    if (int(threadIdx.x % 32) < lane.lanes)
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int pair = lane.first + i * lane.step;
            if (pair >= half) continue;
            own[lane.at<false>(pair, half)] = sum_low[i];
            own[lane.at<true>(pair, half)] = sum_high[i];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < shape.dim; i += THREADS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[w * shape.dim + i];
        parts[(long long)blockIdx.x * shape.dim + i] = sum;
    }
    __syncthreads();
}

// Whether heads can be read in packs, one a lane and half.
template <typename T>
__device__ __forceinline__ bool in_packs(const T *a, const T *b, const T *query_norm, const T *key_norm,
                                         const Angles &angles, Shape shape) {
    const int half = shape.dim / 2, turned = shape.rotary / 2;
    return vectorizable(a, half) && vectorizable(b, half) && vectorizable(query_norm, half) && vectorizable(key_norm, half) &&
           vectorizable(a, turned) && vectorizable(angles.cosines, turned) && vectorizable(angles.sines, turned) &&
           packed_lanes<T>(half) <= 32;
}

} // namespace rope

// The tables, each token's rows of them and the columns' axes, or null; in every kernel.
#define ANGLES const float *cosines, const float *sines, const int *rows, const int *axes

#define ROPE(name, T)                                                                                                  \
    ARL_KERNEL(norm_rope_##name, rope::TURN_BOUND, const T *qkv, T *qk, const T *query_norm, const T *key_norm,        \
               float offset, float epsilon, ANGLES, int tokens, int query, int key_value, int dim, int rotary) {       \
        const rope::Shape shape = {tokens, query, key_value, dim, rotary};                                             \
        const rope::Angles angles = {cosines, sines, rows, axes};                                                      \
        if (rope::in_packs<T>(qkv, qk, query_norm, key_norm, angles, shape))                                           \
            rope::turn<T, true, false>(qkv, qk, query_norm, key_norm, offset, epsilon, angles, shape);                 \
        else rope::turn<T, false, false>(qkv, qk, query_norm, key_norm, offset, epsilon, angles, shape);               \
    }                                                                                                                  \
    ARL_KERNEL_ALONE(rope_backward_##name, rope::THREADS, T *d_qkv, ANGLES, int tokens, int query, int key_value,      \
                     int dim, int rotary) {                                                                            \
        const rope::Shape shape = {tokens, query, key_value, dim, rotary};                                             \
        const rope::Angles angles = {cosines, sines, rows, axes};                                                      \
        if (rope::in_packs<T>(d_qkv, d_qkv, nullptr, nullptr, angles, shape))                                          \
            rope::turn<T, true, true>(d_qkv, d_qkv, nullptr, nullptr, 0, 0, angles, shape);                            \
        else rope::turn<T, false, true>(d_qkv, d_qkv, nullptr, nullptr, 0, 0, angles, shape);                          \
    }                                                                                                                  \
    ARL_KERNEL(norm_rope_backward_##name, rope::THREADS, const T *qkv, T *d_qkv, const T *query_norm,                  \
               const T *key_norm, float offset, float epsilon, ANGLES, int tokens, int query, int key_value, int dim,  \
               int rotary, float *query_parts, float *key_parts) {                                                     \
        ARL_SHARED(float, sums);                                                                                       \
        const rope::Shape shape = {tokens, query, key_value, dim, rotary};                                             \
        const rope::Angles angles = {cosines, sines, rows, axes};                                                      \
        const bool packed = rope::in_packs<T>(qkv, d_qkv, query_norm, key_norm, angles, shape);                        \
        for (int keys = 0; keys < 2; keys++) {                                                                         \
            const rope::Norm<T> norm = {keys ? key_norm : query_norm, offset};                                         \
            const int first = keys ? query : 0, heads = keys ? key_value : query;                                      \
            float *parts = keys ? key_parts : query_parts;                                                             \
            if (packed)                                                                                                \
                rope::norm_backward<T, true>(qkv, d_qkv, norm, epsilon, angles, shape, first, heads, sums, parts);     \
            else rope::norm_backward<T, false>(qkv, d_qkv, norm, epsilon, angles, shape, first, heads, sums, parts);   \
        }                                                                                                              \
    }
ARL_FOR_TYPES(ROPE)
#undef ROPE
#undef ANGLES
