// The nearest token of another scan, for each token of two scans, compiled by NVRTC when the engine starts.
//
// `halves.cu` stands in front.

struct tokens_t {
    const half_t *features; // [n, channels], row-major, with channels a multiple of 8
    const float *norms;     // squared lengths
    const int *places;      // cells of a grid, 10 bits each: x | y << 10 | z << 20
    int n;
    // For the pair of another scan with this one: the places of its tokens, and then of these, in the output.
    int start;
};

// The larger number means the smaller squared distance or, at equal distance, the earlier token. 0 means none.
typedef unsigned long long candidate_t;

__device__ __forceinline__ candidate_t candidate(float squared, int token) {
    return ~((candidate_t)__float_as_uint(squared) << 32 | (unsigned int)token);
}

__device__ __forceinline__ candidate_t larger(candidate_t a, candidate_t b) { return a > b ? a : b; }

// Squared lengths. One warp per token.
extern "C" __global__ void norms(const half_t *tokens, float *out, int n, int channels) {
    int token = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (token >= n) return;
    float sum = 0.0f;
    for (int channel = lane; channel < channels; channel += 32) {
        float value = widen(tokens[(long)token * channels + channel]);
        sum += value * value;
    }
    sum = warp_sum(sum);
    if (lane == 0) out[token] = sum;
}

#define TILE 128
#define DEPTH 32
// Halves per row in shared memory: padded by 16 bytes, so that the eight rows that a warp reads at once lie in
// different banks.
#define ROW (DEPTH + 8)

__device__ __forceinline__ int x_of(int place) { return place & 1023; }
__device__ __forceinline__ int y_of(int place) { return place >> 10 & 1023; }
__device__ __forceinline__ int z_of(int place) { return place >> 20; }

// Eight halves of a row, zeros beyond the rows and the channels.
__device__ __forceinline__ uint4 eight(const half_t *tokens, int row, int n, int channel, int channels) {
    uint4 found = {0, 0, 0, 0};
    if (row < n && channel < channels) found = *(const uint4 *)(tokens + (long)row * channels + channel);
    return found;
}

// For each token of `first` the best candidate among the tokens of each of `others` at most `reach` cells away along
// each axis, and the other way round, into numbers that are 0 before. Blocks of 256 threads, a tile of TILE x TILE
// pairs each: (tiles of the largest of `others`, tiles of `first`, `others`). Each warp takes 64 x 32 pairs of it.
extern "C" __global__ void __launch_bounds__(256, 2) nearest(tokens_t first, const tokens_t *others, int channels,
                                                             int reach_x, int reach_y, int reach_z,
                                                             candidate_t *candidates) {
    __shared__ __align__(16) half_t left[TILE * ROW];
    __shared__ __align__(16) half_t right[TILE * ROW];
    tokens_t second = others[blockIdx.z];
    int first_start = blockIdx.y * TILE, second_start = blockIdx.x * TILE;
    if (second_start >= second.n) return;
    // Tokens ascend with z, so tiles that are far apart hold no pair.
    int first_last = min(first_start + TILE, first.n) - 1, second_last = min(second_start + TILE, second.n) - 1;
    if (z_of(first.places[first_start]) - z_of(second.places[second_last]) > reach_z) return;
    if (z_of(second.places[second_start]) - z_of(first.places[first_last]) > reach_z) return;
    candidate_t *of_first = candidates + second.start, *of_second = of_first + first.n;

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int group = lane / 4, quad = lane % 4;
    int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    float sums[4][4][4] = {};
    uint4 next_left[2], next_right[2];
    for (int start = -DEPTH; start < channels; start += DEPTH) {
        // The next part is copied while this one is multiplied.
        if (start + DEPTH < channels)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int at = threadIdx.x + i * 256, row = at / (DEPTH / 8);
                int channel = start + DEPTH + at % (DEPTH / 8) * 8;
                next_left[i] = eight(first.features, first_start + row, first.n, channel, channels);
                next_right[i] = eight(second.features, second_start + row, second.n, channel, channels);
            }
        if (start >= 0)
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16) {
                half2_t a[4][4], b[4][2];
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
                    for (int part = 0; part < 4; ++part)
                        a[tile][part] = *(const half2_t *)(left + (warp_row + tile * 16 + group + part % 2 * 8) * ROW +
                                                           k + quad * 2 + part / 2 * 8);
#pragma unroll
                    for (int part = 0; part < 2; ++part)
                        b[tile][part] = *(const half2_t *)(right + (warp_column + tile * 8 + group) * ROW + k +
                                                           quad * 2 + part * 8);
                }
#pragma unroll
                for (int row = 0; row < 4; ++row)
#pragma unroll
                    for (int column = 0; column < 4; ++column)
                        multiply(sums[row][column], a[row], b[column][0], b[column][1]);
            }
        __syncthreads(); // what was multiplied may be overwritten
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int at = threadIdx.x + i * 256, to = at / (DEPTH / 8) * ROW + at % (DEPTH / 8) * 8;
            *(uint4 *)(left + to) = next_left[i];
            *(uint4 *)(right + to) = next_right[i];
        }
        __syncthreads();
    }

    // Read once, because the compiler cannot know that the atomics below do not change them.
    float norms_there[8];
    int places_there[8];
#pragma unroll
    for (int column = 0; column < 8; ++column) {
        int other = second_start + warp_column + column / 2 * 8 + quad * 2 + column % 2;
        bool is_there = other < second.n;
        norms_there[column] = is_there ? second.norms[other] : 0.0f;
        places_there[column] = is_there ? second.places[other] : 0;
    }
    candidate_t of_column[4][2] = {};
#pragma unroll
    for (int row = 0; row < 8; ++row) {
        int own = first_start + warp_row + row / 2 * 16 + row % 2 * 8 + group;
        bool is_own = own < first.n;
        float norm = is_own ? first.norms[own] : 0.0f;
        int place = is_own ? first.places[own] : 0;
        candidate_t of_row = 0;
#pragma unroll
        for (int column = 0; column < 8; ++column) {
            int other = second_start + warp_column + column / 2 * 8 + quad * 2 + column % 2;
            if (!is_own || other >= second.n) continue;
            int there = places_there[column];
            if (abs(x_of(place) - x_of(there)) > reach_x || abs(y_of(place) - y_of(there)) > reach_y ||
                abs(z_of(place) - z_of(there)) > reach_z)
                continue;
            float product = sums[row / 2][column / 2][row % 2 * 2 + column % 2];
            float squared = fmaxf(norm + norms_there[column] - 2.0f * product, 0.0f);
            of_row = larger(of_row, candidate(squared, other));
            candidate_t &of_this = of_column[column / 2][column % 2];
            of_this = larger(of_this, candidate(squared, own));
        }
        of_row = larger(of_row, __shfl_xor_sync(~0u, of_row, 1));
        of_row = larger(of_row, __shfl_xor_sync(~0u, of_row, 2));
        if (quad == 0 && of_row != 0) atomicMax(of_first + own, of_row);
    }
#pragma unroll
    for (int column = 0; column < 8; ++column) {
        candidate_t best = of_column[column / 2][column % 2];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) best = larger(best, __shfl_xor_sync(~0u, best, step));
        int other = second_start + warp_column + column / 2 * 8 + quad * 2 + column % 2;
        if (group == 0 && best != 0) atomicMax(of_second + other, best);
    }
}

// The distance of each token to the one that its candidate names, from the differences: |a|^2 + |b|^2 - 2ab
// loses close tokens to cancellation. Infinite where there is none. One warp per token: (tokens of `first` and of the
// largest of `others`, `others`).
extern "C" __global__ void distances(tokens_t first, const tokens_t *others, int channels,
                                     const candidate_t *candidates, float *out) {
    tokens_t second = others[blockIdx.y];
    int token = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (token >= first.n + second.n) return;
    candidate_t found = candidates[second.start + token];
    bool is_first = token < first.n;
    const half_t *own = is_first ? first.features + (long)token * channels
                                 : second.features + (long)(token - first.n) * channels;
    const half_t *other = (is_first ? second : first).features + (long)(unsigned int)~found * channels;
    float sum = 0.0f;
    if (found != 0)
        for (int channel = lane; channel < channels; channel += 32) {
            float apart = widen(own[channel]) - widen(other[channel]);
            sum += apart * apart;
        }
    sum = warp_sum(sum);
    if (lane == 0) out[second.start + token] = found == 0 ? __int_as_float(0x7f800000) : sqrtf(sum);
}
