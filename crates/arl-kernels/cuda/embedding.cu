// Rows by index, and columns of rows. Gathering, scattering and copying: one warp a row, 16 bytes (8 of a value of 16 bits that
// is converted) a lane. Bytes: each row once in, once out.
//
// The embedding's gradient, without atomics: first the tokens are put in order of their ids (those of one id in the
// order of t), each finding its own place by counting the tokens before it: T^2 comparisons of two instructions,
// whatever the ids are. Then the block of the first token of each id adds the rows of all of that id in registers, and
// once to the table. Bytes: the tokens' rows once, the table's rows in use once in, once out.
#include "arl.cuh"

namespace embedding {

constexpr int WARPS = THREADS / 32;
static_assert(WARPS == ROWS, "a warp a row");

// Accesses that a lane has under way.
constexpr int UNROLL = 4;

// B from A; no change of bits where they are one type.
template <typename A, typename B> struct Convert {
    static __device__ __forceinline__ B of(A value) { return store<B>(load(value)); }
};
template <typename T> struct Convert<T, T> {
    static __device__ __forceinline__ T of(T value) { return value; }
};

// Copies a row by the lanes of a warp, in groups that both types have in one access.
template <bool ALIGNED, typename A, typename B> __device__ void copy_groups(const A *source, B *target, int width) {
    constexpr int N = Pack<A>::SIZE < Pack<B>::SIZE ? Pack<A>::SIZE : Pack<B>::SIZE;
    int lane = threadIdx.x % 32;
    for (int start = lane * N; start < width; start += 32 * N * UNROLL) {
        Group<A, N> in[UNROLL];
        for (int u = 0; u < UNROLL; u++) {
            int at = start + u * 32 * N;
            if (at < width) in[u] = load_group<N, ALIGNED>(source + at, width - at);
        }
        for (int u = 0; u < UNROLL; u++) {
            int at = start + u * 32 * N;
            if (at >= width) break;
            Group<B, N> out;
            for (int j = 0; j < N; j++) out.at[j] = Convert<A, B>::of(in[u].at[j]);
            store_group<ALIGNED>(target + at, out, width - at);
        }
    }
}

template <typename A, typename B>
__device__ void copy_row(const A *x, long long from, B *out, long long to, int width) {
    constexpr int N = Pack<A>::SIZE < Pack<B>::SIZE ? Pack<A>::SIZE : Pack<B>::SIZE;
    bool aligned = vectorizable<N>(x, width) && vectorizable<N>(out, width);
    x += from * width;
    out += to * width;
    if (aligned) {
        copy_groups<true>(x, out, width);
    } else {
        copy_groups<false>(x, out, width);
    }
}

// `out[r] = x[rows[r] / divisor]` for one row r a warp; x has `most` rows.
template <typename A, typename B>
__device__ void gather(const A *x, const int *rows, int divisor, B *out, long long count, long long most, int width) {
    long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= count) return;
    int from = rows[row];
    ARL_REFUSE(from < 0 || from / divisor >= most, "a row to gather is outside the matrix");
    copy_row(x, from / divisor, out, row, width);
}

// `out[rows[r]] = x[r]` for one row r a warp; out has `most` rows.
template <typename A, typename B>
__device__ void scatter(const A *x, const int *rows, B *out, long long count, long long most, int width) {
    long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= count) return;
    int to = rows[row];
    ARL_REFUSE(to < 0 || to >= most, "a row to scatter to is outside the matrix");
    if (THOROUGH) {
        for (long long i = threadIdx.x % 32; i < row; i += 32) ARL_REFUSE(rows[i] == to, "a row is scattered to twice");
    }
    copy_row(x, row, out, to, width);
}

// The first `width` elements of one row a warp; rows are `from` elements apart in x, and `to` in out.
template <typename T> __device__ void copy_columns(const T *x, long long from, T *out, long long to, long long rows, int width) {
    constexpr int N = Pack<T>::SIZE;
    long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    bool aligned = width % N == 0 && vectorizable<N>(x, from) && vectorizable<N>(out, to);
    x += row * from;
    out += row * to;
    if (aligned) {
        copy_groups<true>(x, out, width);
    } else {
        copy_groups<false>(x, out, width);
    }
}

// Threads that split the comparisons of one token.
constexpr int SPLITS = THREADS / SORTED;

// How many of the ids in [begin, end) are less than `limit`, of those that are this split's; N ids an access.
template <int N> __device__ int count_less(const int *ids, int begin, int end, int limit, int split) {
    int found = 0;
#pragma unroll 4
    for (int i = begin + split * N; i < end; i += SPLITS * N) {
        Group<int, N> group = load_group<N>(ids + i);
        // The sign of the difference.
        for (int j = 0; j < N; j++) found += (int)((unsigned)(group.at[j] - limit) >> 31);
    }
    return found;
}

// `order[place] = t`, by ids and, among equal ones, by t.
template <int N> __device__ void sort(const int *ids, int *order, int count, long long vocab) {
    __shared__ int places[THREADS];
    int first = blockIdx.x * SORTED, split = threadIdx.x / SORTED;
    int t = first + threadIdx.x % SORTED;
    int id = t < count ? ids[t] : 0;
    ARL_REFUSE(id < 0 || id >= vocab, "an id is outside the vocabulary");
    // Tokens before this block come before an equal id, those after it do not.
    int end = min(first + SORTED, count), whole = max(end, count / N * N);
    int place = count_less<N>(ids, 0, first, id + 1, split);
    for (int u = first + split; u < end; u += SPLITS) place += ids[u] < (u < t ? id + 1 : id);
    place += count_less<N>(ids, end, whole, id, split) + count_less<1>(ids, whole, count, id, split);
    places[threadIdx.x] = place;
    __syncthreads();
    if (split != 0 || t >= count) return;
    for (int i = 1; i < SPLITS; i++) place += places[i * SORTED + threadIdx.x];
    order[place] = t;
}

// Rows of tokens that are read at a time.
constexpr int BATCH = 8;

// Adds N columns from `column` on of all tokens of `id`, which begin at `place`, to the table's row, in the order of t.
template <int N, typename T>
__device__ void add_columns(const int *ids, const int *order, const T *d_out, float *table, int count, int width,
                            int place, int id, int column) {
    int lane = threadIdx.x % 32;
    // Threads past the last column stay with their warp.
    bool in_row = column < width;
    table += (long long)id * width + column;
    Group<float, N> sum;
    if (in_row) sum = load_group<N>(table);
    for (;;) {
        // Each lane looks at one place.
        int at = place + lane;
        int token = at < count ? order[at] : -1;
        unsigned differs = __ballot_sync(FULL, token < 0 || ids[token] != id);
        int found = differs == 0 ? 32 : __ffs(differs) - 1;
        for (int start = 0; start < found; start += BATCH) {
            Group<T, N> rows[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int t = __shfl_sync(FULL, token, start + i);
                if (in_row && start + i < found) rows[i] = load_group<N>(d_out + (long long)t * width + column);
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                if (!in_row || start + i >= found) continue;
                for (int j = 0; j < N; j++) sum.at[j] += load(rows[i].at[j]);
            }
        }
        if (found < 32) break;
        place += 32;
    }
    if (in_row) store_group(table, sum);
}

// The rows of this block's place, if they begin there: `table[id] += d_out[t]` for all t of one id.
template <int N, typename T>
__device__ void add_rows(const int *ids, const int *order, const T *d_out, float *table, int count, int width) {
    int place = blockIdx.x;
    int id = ids[order[place]];
    if (place > 0 && ids[order[place - 1]] == id) return;
    constexpr int TILE = ADD_THREADS * N;
    for (int start = blockIdx.y * TILE; start < width; start += gridDim.y * TILE)
        add_columns<N>(ids, order, d_out, table, count, width, place, id, start + threadIdx.x * N);
}

} // namespace embedding

#define GATHER(name, A, B)                                                                                             \
    ARL_KERNEL(gather_##name, embedding::THREADS, const A *x, const int *rows, int divisor, B *out, long long count,   \
               long long most, int width) {                                                                            \
        embedding::gather(x, rows, divisor, out, count, most, width);                                                  \
    }                                                                                                                  \
    ARL_KERNEL(scatter_##name, embedding::THREADS, const A *x, const int *rows, B *out, long long count,               \
               long long most, int width) {                                                                            \
        embedding::scatter(x, rows, out, count, most, width);                                                          \
    }
GATHER(f32, float, float)
#define GATHER_WITH(name, T)                                                                                           \
    GATHER(name, T, T)                                                                                                 \
    GATHER(f32_##name, float, T)                                                                                       \
    GATHER(name##_f32, T, float)
ARL_FOR_NARROW(GATHER_WITH)
#undef GATHER_WITH
#undef GATHER

#define COPY_COLUMNS(name, T)                                                                                          \
    ARL_KERNEL(copy_columns_##name, embedding::THREADS, const T *x, long long from, T *out, long long to,              \
               long long rows, int width) {                                                                            \
        embedding::copy_columns(x, from, out, to, rows, width);                                                        \
    }
ARL_FOR_TYPES(COPY_COLUMNS)
#undef COPY_COLUMNS

ARL_KERNEL(sort_ids, embedding::THREADS, const int *ids, int *order, int count, long long vocab) {
    if (vectorizable(ids, 0)) {
        embedding::sort<4>(ids, order, count, vocab);
    } else {
        embedding::sort<1>(ids, order, count, vocab);
    }
}

#define EMBEDDING_BACKWARD(name, T)                                                                                    \
    ARL_KERNEL(embedding_backward_##name, embedding::ADD_THREADS, const int *ids, const int *order, const T *d_out,    \
               float *table_gradient, int count, int width) {                                                          \
        constexpr int N = embedding::COLUMNS;                                                                          \
        if (vectorizable<N>(d_out, width) && vectorizable<N>(table_gradient, width)) {                                 \
            embedding::add_rows<N>(ids, order, d_out, table_gradient, count, width);                                   \
        } else {                                                                                                       \
            embedding::add_rows<1>(ids, order, d_out, table_gradient, count, width);                                   \
        }                                                                                                              \
    }
ARL_FOR_TYPES(EMBEDDING_BACKWARD)
#undef EMBEDDING_BACKWARD
