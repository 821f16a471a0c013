// Runs CUDA kernels on a CPU: each thread of a block is a fiber, and what threads do together (barriers,
// shuffles, products of a warp) is done by all of them in turn. Blocks follow one another. A warp runs as far as
// it can before the next one does, the first and the last in turn being ahead, so that a missing barrier shows.
//
// It shows that indices, masks and sums are right. It does not show races within a warp, nor speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <utility>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::abs;
using std::max;
using std::min;

template <class To, class From> To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float value) { return bits_of<unsigned>(value); }
inline float __int_as_float(int value) { return bits_of<float>(value); }

inline Index threadIdx, blockIdx, blockDim;

// Threads that wait for one another. One that ends is waited for no longer.
struct Barrier {
    int n_members = 0, n_waiting = 0;
    unsigned generation = 0;

    void release_if_all_wait() {
        if (n_waiting < n_members) return;
        n_waiting = 0;
        ++generation;
    }
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[1 << 16]};
    Index index;
    bool is_done = false;
    // Where it waits, and since when.
    const Barrier *barrier = nullptr;
    unsigned generation = 0;
    // Copies on their way, in groups that were ended one after another, and those of no group yet.
    std::deque<std::vector<std::function<void()>>> groups;
    std::vector<std::function<void()>> copies;

    bool can_run() const { return !is_done && (!barrier || barrier->generation != generation); }
};

constexpr int WARP = 32, MAX_WARPS = 32;

struct Block {
    std::vector<Fiber> fibers;
    Barrier all, warps[MAX_WARPS];
    ucontext_t scheduler;
    Fiber *running = nullptr;
    const std::function<void()> *kernel = nullptr;
};
inline Block block;

inline void wait_at(Barrier &barrier) {
    unsigned generation = barrier.generation;
    ++barrier.n_waiting;
    barrier.release_if_all_wait();
    block.running->barrier = &barrier;
    block.running->generation = generation;
    if (barrier.generation == generation) swapcontext(&block.running->context, &block.scheduler);
}

inline int warp_of_this() { return threadIdx.x / WARP; }
inline int lane_of_this() { return threadIdx.x % WARP; }
inline void wait_for_warp() { wait_at(block.warps[warp_of_this()]); }
inline void __syncthreads() { wait_at(block.all); }

// What each lane of each warp shows to the others.
template <class T> T (&shown())[MAX_WARPS][WARP] {
    static T values[MAX_WARPS][WARP];
    return values;
}

// Shows `mine`, lets `look` see what the whole warp shows, and goes on when all have looked.
template <class T, class Look> auto together(const T &mine, Look look) {
    auto &values = shown<T>()[warp_of_this()];
    values[lane_of_this()] = mine;
    wait_for_warp();
    auto result = look(values);
    wait_for_warp();
    return result;
}

template <class T> T __shfl_xor_sync(unsigned, T value, int step) {
    return together(value, [&](const T *values) { return values[lane_of_this() ^ step]; });
}

inline void atomicMax(unsigned long long *at, unsigned long long value) { *at = std::max(*at, value); }

inline void run_fiber() {
    (*block.kernel)();
    block.running->is_done = true;
    for (Barrier *barrier : {&block.all, &block.warps[warp_of_this()]}) {
        --barrier->n_members;
        if (barrier->n_waiting > 0) barrier->release_if_all_wait();
    }
    swapcontext(&block.running->context, &block.scheduler);
}

// Runs a warp until all of its threads have ended or wait for others; whether any of them ran.
inline bool run_warp(unsigned warp) {
    bool has_run = false;
    for (bool is_busy = true; is_busy;) {
        is_busy = false;
        for (size_t thread = warp * WARP; thread < std::min<size_t>((warp + 1) * WARP, block.fibers.size()); ++thread) {
            Fiber &fiber = block.fibers[thread];
            if (!fiber.can_run()) continue;
            is_busy = has_run = true;
            block.running = &fiber;
            threadIdx = fiber.index;
            swapcontext(&block.scheduler, &fiber.context);
        }
    }
    return has_run;
}

inline void run_block(unsigned n_threads, const std::function<void()> &kernel) {
    block.fibers.resize(n_threads);
    block.kernel = &kernel;
    block.all = {int(n_threads)};
    for (Barrier &warp : block.warps) warp = {};
    for (unsigned thread = 0; thread < n_threads; ++thread) {
        Fiber &fiber = block.fibers[thread];
        ++block.warps[thread / WARP].n_members;
        fiber.index = {thread, 0, 0};
        fiber.is_done = false;
        fiber.barrier = nullptr;
        fiber.groups.clear();
        fiber.copies.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 1 << 16;
        makecontext(&fiber.context, run_fiber, 0);
    }
    unsigned n_warps = (n_threads + WARP - 1) / WARP;
    bool is_busy = true;
    for (unsigned round = 0; is_busy; ++round) {
        is_busy = false;
        for (unsigned turn = 0; turn < n_warps; ++turn)
            is_busy |= run_warp(round % 2 ? n_warps - 1 - turn : turn);
    }
}

inline void launch(Index grid, unsigned n_threads, const std::function<void()> &kernel) {
    blockDim = {n_threads, 1, 1};
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                run_block(n_threads, kernel);
            }
}

// In place of the assembly of `halves.cu`, for f16.
typedef unsigned short half_t;
typedef unsigned int half2_t;
inline half_t narrow(float value) { return bits_of<half_t>(static_cast<_Float16>(value)); }
inline float widen(half_t value) { return static_cast<float>(bits_of<_Float16>(value)); }
inline half2_t pack(float low, float high) { return narrow(low) | unsigned(narrow(high)) << 16; }

struct Factors { half2_t a[4], b[2]; };

// mma.m16n8k16 of NVIDIA's PTX manual: which thread holds what.
inline void multiply(float *acc, const half2_t *a, half2_t b0, half2_t b1) {
    auto half_of = [](half2_t pair, int k) { return widen(half_t(k % 2 ? pair >> 16 : pair)); };
    Factors mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    together(mine, [&](const Factors *all) {
        int group = lane_of_this() / 4, quad = lane_of_this() % 4;
        for (int i = 0; i < 4; ++i) {
            int row = group + i / 2 * 8, column = quad * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
                const Factors &of_row = all[row % 8 * 4 + k % 8 / 2], &of_column = all[column * 4 + k % 8 / 2];
                acc[i] += half_of(of_row.a[row / 8 + k / 8 * 2], k) * half_of(of_column.b[k / 8], k);
            }
        }
        return 0;
    });
}

// ldmatrix.m8n8.x4.
inline void load_tiles(half2_t *v, const half_t *row) {
    together(row, [&](const half_t *const *rows) {
        int group = lane_of_this() / 4, quad = lane_of_this() % 4;
        for (int tile = 0; tile < 4; ++tile) {
            const half_t *pair = rows[tile * 8 + group] + quad * 2;
            v[tile] = pair[0] | unsigned(pair[1]) << 16;
        }
        return 0;
    });
}

// cp.async: copies are made as early as they may be, at once, or as late, when they are waited for.
inline bool copies_are_late = false;
inline void copy_16(half_t *to, const half_t *from, bool is_there) {
    auto copy = [=] {
        if (is_there) std::memcpy(to, from, 16);
        else std::memset(to, 0, 16);
    };
    if (copies_are_late) block.running->copies.push_back(copy);
    else copy();
}
inline void end_of_copies() { block.running->groups.push_back(std::exchange(block.running->copies, {})); }
template <int N> void wait_for_copies() {
    for (auto &groups = block.running->groups; groups.size() > N; groups.pop_front())
        for (auto &copy : groups.front()) copy();
}
inline float power_of_2(float value) { return std::exp2(value); }

// ldmatrix.m8n8.x4.trans.
inline void load_transposed(half2_t *v, const half_t *row) {
    together(row, [&](const half_t *const *rows) {
        int group = lane_of_this() / 4, quad = lane_of_this() % 4;
        for (int tile = 0; tile < 4; ++tile)
            v[tile] = rows[tile * 8 + quad * 2][group] | unsigned(rows[tile * 8 + quad * 2 + 1][group]) << 16;
        return 0;
    });
}
