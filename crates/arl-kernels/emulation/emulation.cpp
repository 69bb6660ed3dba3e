// Runs a kernel on the host: one fiber a thread, one block after the other. The only part of the project that switches
// stacks. Included once, by `kernels.cpp`.
#include "cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#if !(defined(__x86_64__) && defined(__linux__))
#include <ucontext.h>
#endif

namespace emulation {

thread_local Thread *thread;
thread_local Block *block;

static Kernel *kernels;

Kernel::Kernel(const char *name, const char *signature, unsigned most_threads, void (*call)(void **))
    : name(name), signature(signature), most_threads(most_threads), call(call), next(kernels) {
    kernels = this;
}

static constexpr size_t STACK = 64 << 10;
// From one stack to the next: tops that are a power of two apart would take turns in a few lines of the cache.
static constexpr size_t STRIDE = STACK + 17 * 64;

#if defined(__x86_64__) && defined(__linux__)

// What the ABI wants kept over a call is on the stack that is left; `from` gets its top.
struct Context {
    void *top;
};

extern "C" void arl_emulation_switch(void **from, void *to);
asm(R"(
.text
.type arl_emulation_switch, @function
arl_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size arl_emulation_switch, . - arl_emulation_switch
)");

static void prepare(Context &context, unsigned char *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + STACK);
    *--top = nullptr; // where `entry` would return to, which it never does; also aligns the stack as a call does
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.top = top;
}

static void switch_to(Context &from, Context &to) { arl_emulation_switch(&from.top, to.top); }

#else

struct Context {
    ucontext_t context;
};

static void prepare(Context &context, unsigned char *stack, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = STACK;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}

static void switch_to(Context &from, Context &to) { swapcontext(&from.context, &to.context); }

#endif

// The launch in progress on this thread of the host.
struct Launch {
    const Kernel *kernel;
    void **args;
    std::vector<unsigned> order;
    // A warp runs to the next barrier of the block before another one starts, or else all threads advance together.
    bool by_warps;
    // Of the room of this thread of the host.
    Thread *threads;
    Context *contexts;
    unsigned char *stacks;
    Context scheduler;
    std::string error;
};

// What a launch's threads need, kept from launch to launch: clearing it each time would take longer than most kernels.
struct Room {
    unsigned count = 0;
    std::unique_ptr<Thread[]> threads;
    std::unique_ptr<Context[]> contexts;
    std::unique_ptr<unsigned char[]> stacks;
    std::unique_ptr<Slots[]> warps;
    std::unique_ptr<Thread::Copy[]> copies;
    std::unique_ptr<unsigned[]> groups;

    void fit(unsigned wanted) {
        if (wanted <= count) return;
        threads.reset(new Thread[wanted]);
        contexts.reset(new Context[wanted]);
        stacks.reset(new unsigned char[wanted * STRIDE]);
        warps.reset(new Slots[(wanted + 31) / 32]);
        copies.reset(new Thread::Copy[wanted * Thread::MOST_COPIES]);
        groups.reset(new unsigned[wanted * Thread::MOST_GROUPS]);
        for (unsigned i = 0; i < wanted; i++) {
            threads[i].copies = &copies[i * Thread::MOST_COPIES];
            threads[i].groups = &groups[i * Thread::MOST_GROUPS];
        }
        count = wanted;
    }
};

static thread_local Room room;

static thread_local Launch *launch;

static void leave() { switch_to(launch->contexts[thread->linear], launch->scheduler); }

void wait_for_block() {
    thread->state = State::AtBlockBarrier;
    leave();
}

void wait_for_warp(unsigned mask) {
    if (!(mask >> lane() & 1)) fail("a lane waits for a warp whose mask it is not in");
    thread->state = State::AtWarpBarrier;
    thread->mask = mask;
    leave();
}

void fail(const char *what) {
    launch->error = what;
    thread->state = State::Done;
    for (;;) leave();
}

static void enter() {
    launch->kernel->call(launch->args);
    if (thread->copy_count != 0) fail("a thread ended with asynchronous copies that it did not wait for");
    thread->state = State::Done;
    for (;;) leave();
}

// Lets the warp of thread `first` continue if all lanes of one mask are here.
static bool release_warp(Thread *threads, unsigned first) {
    unsigned end = first + 32;
    for (unsigned i = first; i < end; i++) {
        if (threads[i].state != State::AtWarpBarrier) continue;
        unsigned here = 0, mask = threads[i].mask;
        for (unsigned j = first; j < end; j++)
            if (threads[j].state == State::AtWarpBarrier && threads[j].mask == mask) here |= 1u << (j - first);
        if (here != mask) continue;
        for (unsigned j = first; j < end; j++)
            if (mask >> (j - first) & 1) threads[j].state = State::Ready;
        return true;
    }
    return false;
}

// Runs thread `i`, which is ready, to its next wait.
static void run(Launch &present, unsigned i) {
    thread = &present.threads[i];
    switch_to(present.scheduler, present.contexts[i]);
}

// Runs all threads of the present block to their ends.
static void run_block(Launch &present) {
    Thread *threads = present.threads;
    unsigned count = present.order.size();
    for (unsigned i = 0; i < count; i++) {
        Thread &t = threads[i];
        t.index = {i % block->threads.x, i / block->threads.x % block->threads.y,
                   i / (block->threads.x * block->threads.y)};
        t.linear = i;
        t.state = State::Ready;
        t.turn = t.copy_count = t.group_count = 0;
        prepare(present.contexts[i], present.stacks + i * STRIDE, enter);
    }
    for (;;) {
        bool ran = false;
        for (unsigned i : present.order) {
            if (threads[i].state != State::Ready) continue;
            run(present, i);
            if (present.by_warps) {
                unsigned first = i / 32 * 32;
                do {
                    for (unsigned lane = first; lane < first + 32 && present.error.empty(); lane++)
                        if (threads[lane].state == State::Ready) run(present, lane);
                } while (present.error.empty() && release_warp(threads, first));
            }
            if (!present.error.empty()) return;
            ran = true;
        }
        bool released = false;
        for (unsigned first = 0; first < count; first += 32) released |= release_warp(threads, first);
        if (ran || released) continue;
        unsigned done = 0, waiting = 0;
        for (unsigned i = 0; i < count; i++) {
            done += threads[i].state == State::Done;
            waiting += threads[i].state == State::AtBlockBarrier;
        }
        if (done == count) return;
        if (waiting != count) {
            present.error = done > 0 && done + waiting == count
                                ? "a barrier is not reached by threads that ended before it"
                                : "threads wait for each other at different barriers";
            return;
        }
        for (unsigned i = 0; i < count; i++) threads[i].state = State::Ready;
    }
}

static unsigned shuffled(unsigned i, unsigned count, unsigned order) {
    // An odd multiple permutes the residues of a power of two.
    unsigned size = 1;
    while (size < count) size *= 2;
    for (;;) {
        i = (i * (2 * order + 5) + order) & (size - 1);
        if (i < count) return i;
    }
}

// Thread or block `i` of `count`, in the order of this launch.
static unsigned nth(unsigned i, unsigned count, unsigned order) {
    if (order == 0) return i;
    if (order == 1) return count - 1 - i;
    return shuffled(i, count, order);
}

} // namespace emulation

using namespace emulation;

extern "C" const Kernel *arl_emulation_find(const char *name) {
    for (const Kernel *k = kernels; k != nullptr; k = k->next)
        if (strcmp(k->name, name) == 0) return k;
    return nullptr;
}

extern "C" const Kernel *arl_emulation_next(const Kernel *kernel) { return kernel == nullptr ? kernels : kernel->next; }

extern "C" const char *arl_emulation_name(const Kernel *kernel) { return kernel->name; }

extern "C" const char *arl_emulation_signature(const Kernel *kernel) { return kernel->signature; }

// Runs a kernel; 0, or 1 with what is wrong in `error`. `order` 0: threads and blocks ascending, 1: descending, more:
// shuffled. With odd ones each warp runs as far ahead of the others as barriers let it.
extern "C" int arl_emulation_launch(const Kernel *kernel, const unsigned *grid, const unsigned *threads,
                                    size_t shared_bytes, void **args, unsigned order, char *error, size_t error_room) {
    unsigned count = threads[0] * threads[1] * threads[2];
    auto state = std::make_unique<Launch>();
    launch = state.get();
    launch->kernel = kernel;
    launch->args = args;
    launch->by_warps = order % 2 == 1;
    if (count == 0 || count > kernel->most_threads) {
        launch->error = "a block has more threads than the kernel's bound";
    } else if (count % 32 != 0) {
        launch->error = "a block is no whole number of warps";
    } else {
        room.fit(count);
        launch->threads = room.threads.get();
        launch->contexts = room.contexts.get();
        launch->stacks = room.stacks.get();
        for (unsigned i = 0; i < count; i++) launch->order.push_back(nth(i, count, order));
    }
    // On a GPU, dynamic shared memory is aligned and holds whatever was there.
    std::unique_ptr<unsigned char, decltype(&free)> shared(
        static_cast<unsigned char *>(aligned_alloc(128, (shared_bytes + 255) / 128 * 128)), &free);
    Block present{};
    present.grid = {grid[0], grid[1], grid[2]};
    present.threads = {threads[0], threads[1], threads[2]};
    present.shared = shared.get();
    present.warps = room.warps.get();
    block = &present;
    unsigned blocks = grid[0] * grid[1] * grid[2];
    for (unsigned i = 0; i < blocks && launch->error.empty(); i++) {
        unsigned b = nth(i, blocks, order);
        present.index = {b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])};
        memset(shared.get(), 0xff, shared_bytes);
        run_block(*launch);
    }
    bool failed = !launch->error.empty();
    if (failed) snprintf(error, error_room, "%s", launch->error.c_str());
    launch = nullptr;
    return failed;
}
