// The classifier pass: loss, accuracy, entropy and the logits' gradient. One block of 1024 threads a row, so that as
// few rows as possible are under way at a time. Reads the row from its end to its beginning for its statistics; with a
// gradient, then from the beginning on: the first 96 KiB of it are in shared memory by now, and what was read last is
// likely to be in the L2 cache still. The gradient replaces the row: in the logits' type element for element, or in
// 16 bits in the first half of the memory of an f32 row.
//
// Bytes: the logits once or (past the caches) twice, the gradient once.
#include "arl.cuh"

namespace classifier {

constexpr int WARPS = THREADS / 32;

// A sum that keeps what its roundings lost (Kahan).
struct Sum {
    float sum, lost;

    __device__ void add(float x) {
        float corrected = x - lost;
        float next = sum + corrected;
        lost = (next - sum) - corrected;
        sum = next;
    }

    __device__ void scale(float factor) {
        sum *= factor;
        lost *= factor;
    }

    __device__ double value() const { return (double)sum - (double)lost; }
};

// What a thread has seen of its row.
struct Seen {
    // Of all logits, and of those before the target. NaN is no maximum.
    float max, before;
    // Of e = exp(x - max): the sum, and the sum of e (x - max).
    Sum total, moment;
};

// Adds N * UNROLL logits; group `u` of them begins at column `columns[u]`.
template <typename T, int N, int UNROLL>
__device__ void see(Seen &seen, const Group<T, N> (&tile)[UNROLL], const int (&columns)[UNROLL], int target) {
    float max = -INFINITY;
    for (int u = 0; u < UNROLL; u++) {
        float of_group = -INFINITY;
        for (int j = 0; j < N; j++) of_group = fmaxf(of_group, load(tile[u].at[j]));
        max = fmaxf(max, of_group);
        if (columns[u] + N <= target) {
            seen.before = fmaxf(seen.before, of_group);
        } else if (columns[u] < target) {
            for (int j = 0; j < N; j++)
                if (columns[u] + j < target) seen.before = fmaxf(seen.before, load(tile[u].at[j]));
        }
    }
    if (max > seen.max) {
        if (seen.max > -INFINITY) {
            float shift = seen.max - max;
            float factor = expf(shift);
            seen.moment.add(shift * seen.total.sum);
            seen.moment.scale(factor);
            seen.total.scale(factor);
        }
        seen.max = max;
    }
    // All logits so far are -inf (or NaN): their exponentials are 0 (or NaN) against any base.
    float base = seen.max == -INFINITY ? 0.0f : seen.max;
    for (int u = 0; u < UNROLL; u++) {
        float moment = 0;
        for (int j = 0; j < N; j++) {
            float x = load(tile[u].at[j]) - base;
            float e = expf(x);
            seen.total.add(e);
            // At -inf, e x is 0.
            moment += e * fmaxf(x, -100.0f);
        }
        seen.moment.add(moment);
    }
}

__device__ __forceinline__ double warp_sum_f64(double value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL, value, distance);
    return value;
}

// What a row of logits says about its distribution.
struct Statistics {
    float max, before;
    double total, moment;
};

// Of the whole row; every thread gets it.
__device__ Statistics combine(const Seen &seen) {
    __shared__ float maxima[WARPS], befores[WARPS];
    __shared__ double totals[WARPS], moments[WARPS];
    static_assert(WARPS == 32, "a warp reads what each warp wrote");
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float max = warp_max(seen.max), before = warp_max(seen.before);
    if (lane == 0) {
        maxima[warp] = max;
        befores[warp] = before;
    }
    __syncthreads();
    max = warp_max(maxima[lane]);
    before = warp_max(befores[lane]);
    double total = seen.total.value(), moment = seen.moment.value();
    if (seen.max > -INFINITY) {
        float shift = seen.max - max;
        double factor = expf(shift);
        // A row whose logits fall far has threads of no weight at all, whatever their shift.
        moment = factor * (moment + (double)shift * total);
        total *= factor;
    }
    total = warp_sum_f64(total);
    moment = warp_sum_f64(moment);
    if (lane == 0) {
        totals[warp] = total;
        moments[warp] = moment;
    }
    __syncthreads();
    return {max, before, warp_sum_f64(totals[lane]), warp_sum_f64(moments[lane])};
}

// Where a row's results go.
struct Losses {
    float *nll, *correct, *entropy;
};

// One row, N logits an access. With `GRADIENT`, `weight * (softmax(logits) - one_hot(target))` is written over it as
// type G, from the same first byte on.
template <typename T, typename G, int N, bool GRADIENT>
__device__ void row(const T *logits, G *gradient, int target, float weight, const Losses &losses, int vocab) {
    typedef Group<T, N> Logits;
    // Accesses that a thread has under way; 1024 threads have no registers for more than 16 logits each.
    constexpr int UNROLL = N == 8 ? 2 : 4;
    constexpr int TILE = THREADS * UNROLL;
    constexpr int KEPT = KEPT_BYTES / (int)sizeof(Logits);
    static_assert(KEPT >= TILE && sizeof(G) <= sizeof(T), "the gradient never overtakes the logits");
    ARL_SHARED(Logits, kept);

    int count = vocab / N;
    int tiles = (count + TILE - 1) / TILE;
    float at_target = load(logits[target]);
    Seen seen = {-INFINITY, -INFINITY, {0, 0}, {0, 0}};
    for (int tile = tiles - 1; tile >= 0; tile--) {
        Logits groups[UNROLL];
        int columns[UNROLL];
        for (int u = 0; u < UNROLL; u++) {
            int at = tile * TILE + u * THREADS + threadIdx.x;
            columns[u] = at * N;
            if (at < count) {
                groups[u] = load_group<N>(logits + columns[u]);
            } else {
                for (int j = 0; j < N; j++) groups[u].at[j] = store<T>(-INFINITY);
            }
            if (GRADIENT && at < KEPT) kept[at] = groups[u];
        }
        see<T, N, UNROLL>(seen, groups, columns, target);
    }

    Statistics statistics = combine(seen);
    double total = statistics.total;
    if (threadIdx.x == 0) {
        double log_total = log(total);
        *losses.nll = (float)((double)statistics.max - (double)at_target + log_total);
        *losses.entropy = (float)(log_total - statistics.moment / total);
        // Where a logit is NaN, so is the total.
        bool first = at_target == statistics.max && statistics.before < at_target && total > 0;
        *losses.correct = first ? 1.0f : 0.0f;
    }
    if (!GRADIENT) return;

    // exp(x - max) / total rather than exp(x - log_sum_exp): the rounding of a great log_sum_exp does not enter.
    double inverse = 1.0 / total;
    float factor = (float)((double)weight * inverse);
    G of_target = store<G>((float)((double)weight * ((double)expf(at_target - statistics.max) * inverse - 1.0)));
    // Where G is half of T, tile t of the gradient is in the memory of tile t / 2 of the logits, which all threads
    // must have read. For tiles up to `writable` they have: what is kept before the barriers of the sums, the rest
    // before those below.
    int writable = 2 * (KEPT / TILE) - 1;
    for (int tile = 0; tile < tiles; tile++) {
        Logits groups[UNROLL];
        for (int u = 0; u < UNROLL; u++) {
            int at = tile * TILE + u * THREADS + threadIdx.x;
            if (at < count) groups[u] = at < KEPT ? kept[at] : load_group<N>(logits + at * N);
        }
        if (sizeof(G) < sizeof(T) && tile > writable) {
            __syncthreads();
            writable = 2 * tile + 1;
        }
        for (int u = 0; u < UNROLL; u++) {
            int at = tile * TILE + u * THREADS + threadIdx.x;
            if (at >= count) continue;
            Group<G, N> out;
            for (int j = 0; j < N; j++) out.at[j] = store<G>(factor * expf(load(groups[u].at[j]) - statistics.max));
            if (at * N <= target && target < at * N + N) {
                for (int j = 0; j < N; j++)
                    if (at * N + j == target) out.at[j] = of_target;
            }
            store_group(gradient + at * N, out);
        }
    }
}

// The row of this block. `logits` and `gradient` are the same memory, or there is no gradient.
template <typename T, typename G, bool GRADIENT>
__device__ void row_of_block(const T *logits, G *gradient, const int *targets, float weight, float *nll, float *correct,
                             float *entropy, int vocab) {
    long long number = blockIdx.x;
    int target = targets[number];
    ARL_REFUSE(target < 0 || target >= vocab, "a target is outside the vocabulary");
    Losses losses = {nll + number, correct + number, entropy + number};
    bool whole = vectorizable(logits, vocab);
    logits += number * vocab;
    if (GRADIENT) gradient += number * vocab * (long long)(sizeof(T) / sizeof(G));
    if (whole) {
        row<T, G, Pack<T>::SIZE, GRADIENT>(logits, gradient, target, weight, losses, vocab);
    } else {
        row<T, G, 1, GRADIENT>(logits, gradient, target, weight, losses, vocab);
    }
}

} // namespace classifier

#define CROSS_ENTROPY(name, T)                                                                                         \
    ARL_KERNEL(cross_entropy_##name, classifier::THREADS, const T *logits, const int *targets, float *nll,             \
               float *correct, float *entropy, int vocab) {                                                            \
        classifier::row_of_block<T, T, false>(logits, nullptr, targets, 0, nll, correct, entropy, vocab);              \
    }
ARL_FOR_TYPES(CROSS_ENTROPY)
#undef CROSS_ENTROPY

#define CROSS_ENTROPY_GRADIENT(name, T, G)                                                                             \
    ARL_KERNEL(cross_entropy_gradient_##name, classifier::THREADS, T *logits, const int *targets,                      \
               const float *weights, float scale, float *nll, float *correct, float *entropy, int vocab) {             \
        classifier::row_of_block<T, G, true>(logits, reinterpret_cast<G *>(logits), targets,                           \
                                             weights[blockIdx.x] * scale, nll, correct, entropy, vocab);               \
    }
CROSS_ENTROPY_GRADIENT(f32, float, float)
#define CROSS_ENTROPY_GRADIENTS(name, T)                                                                               \
    CROSS_ENTROPY_GRADIENT(f32_##name, float, T)                                                                       \
    CROSS_ENTROPY_GRADIENT(name, T, T)
ARL_FOR_NARROW(CROSS_ENTROPY_GRADIENTS)
#undef CROSS_ENTROPY_GRADIENTS
#undef CROSS_ENTROPY_GRADIENT
