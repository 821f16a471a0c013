// Numbers in half precision, their products, and sums over a warp, compiled with the kernels. The format is f16, or bf16 where
// BF16 is defined. No header is needed. `tests/kernels` runs the kernels on a CPU, with functions of its own
// (EMULATED) for those with assembly.

typedef unsigned short half_t;
typedef unsigned int half2_t; // low half first

#ifndef EMULATED
__device__ __forceinline__ half2_t pack(float low, float high) {
    half2_t packed;
#ifdef BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

__device__ __forceinline__ float widen(half_t value) {
#ifdef BF16
    return __uint_as_float((unsigned int)value << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
#endif
}

// acc += a * b for one 16 x 8 tile and 16 inner channels; which thread holds what is in NVIDIA's PTX
// manual under mma.m16n8k16.
__device__ __forceinline__ void multiply(float *acc, const half2_t *a, half2_t b0, half2_t b1) {
#ifdef BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Loads four 8 x 8 tiles from shared memory. Each thread passes the start of one of their rows.
__device__ __forceinline__ void load_tiles(half2_t *v, const half_t *row) {
    unsigned int at = (unsigned int)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at));
}

// The same, transposed.
__device__ __forceinline__ void load_transposed(half2_t *v, const half_t *row) {
    unsigned int at = (unsigned int)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at));
}

// Starts a copy of 16 bytes into shared memory, or writes zeros if `is_there` is false. The copy is complete when all
// threads have waited for their copies and for one another.
__device__ __forceinline__ void copy_16(half_t *to, const half_t *from, bool is_there) {
    unsigned int at = (unsigned int)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all copies except those of the last `N` ends.
template <int N> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2 to the power of `value`, numbers below 2^-126 as 0.
__device__ __forceinline__ float power_of_2(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}
#endif

// Sum over the threads of a warp; every thread gets it.
__device__ __forceinline__ float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

