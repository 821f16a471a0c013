// The kernels between the matrix products, compiled by NVRTC when the engine starts.
//
// `halves.cu` stands in front. Sums, norms, softmax and the stream of tokens are f32. Everything is row-major.
// Launch shapes stand at each kernel.

// Sum over the threads of a block of whole warps, at most 32 of them; every thread gets it.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float parts[32];
    value = warp_sum(value);
    __syncthreads(); // the last call's parts have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += parts[warp];
    return sum;
}

// `sources` says where each row of tokens comes from: a patch, counted through all patches of all images, or, below
// zero, -1 - the number of a first token (class, registers). Patches that are left out have no row.

// Pixels [n_images, colours, side, side] to rows [n_rows, width], each colour by colour, line by line; width
// may be larger than colours * patch^2. That rest and the rows of first tokens are 0. One thread per entry.
extern "C" __global__ void patches(const half_t *pixels, const int *sources, half_t *out, long n_entries, int side,
                                   int patch, int width, int colours) {
    long entry = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (entry >= n_entries) return;
    int grid = side / patch, column = entry % width, source = sources[entry / width];
    int across = source % grid, down = source / grid % grid;
    long image = source / (grid * grid);
    int x = column % patch, y = column / patch % patch, colour = column / (patch * patch);
    half_t value = 0;
    if (colour < colours && source >= 0)
        value = pixels[((image * colours + colour) * side + down * patch + y) * side + across * patch + x];
    out[entry] = value;
}

// First tokens and embedded patches with their positions: [n_rows, channels]. One thread per entry.
extern "C" __global__ void tokens(const half_t *embedded, const int *sources, const float *first,
                                  const float *positions, float *out, long n_entries, int n_patches, int channels) {
    long entry = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (entry >= n_entries) return;
    int channel = entry % channels, source = sources[entry / channels];
    out[entry] = source < 0 ? first[(-1 - source) * channels + channel]
                            : positions[source % n_patches * channels + channel] + widen(embedded[entry]);
}

// A block of NORM_THREADS holds one token, each thread four neighbouring channels at a time.
#define NORM_THREADS 128
#define NORM_MOST 4 // channels up to 2,048
#define FOR_OWN(i, channel)                                                                       \
    _Pragma("unroll") for (int i = 0; i < NORM_MOST; ++i)                                          \
        if (int channel = (i * NORM_THREADS + threadIdx.x) * 4; channel < channels)

// Layer norm of the token that the threads of a block hold.
__device__ __forceinline__ void normalise(float4 *own, int channels, const float *weight, const float *bias) {
    float sum = 0.0f, squares = 0.0f;
    FOR_OWN(i, channel) sum += own[i].x + own[i].y + (own[i].z + own[i].w);
    float mean = block_sum(sum) / channels;
    FOR_OWN(i, channel) {
        float4 &v = own[i];
        v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    float scale = 1.0f / sqrtf(block_sum(squares) / channels + 1e-6f);
    FOR_OWN(i, channel) {
        float4 &v = own[i], w = *(const float4 *)(weight + channel), b = *(const float4 *)(bias + channel);
        v.x = v.x * scale * w.x + b.x, v.y = v.y * scale * w.y + b.y;
        v.z = v.z * scale * w.z + b.z, v.w = v.w * scale * w.w + b.w;
    }
}

// tokens += scale * branch (where there is a branch), then normed = layer norm of tokens.
// One block of NORM_THREADS per token.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) add_norm(
    float *tokens, const half_t *branch, const float *scale, const float *weight, const float *bias,
    half_t *normed, int channels, int has_branch) {
    long start = (long)blockIdx.x * channels;
    float4 own[NORM_MOST];
    FOR_OWN(i, channel) {
        float4 v = *(const float4 *)(tokens + start + channel);
        if (has_branch) {
            float4 s = *(const float4 *)(scale + channel);
            uint2 b = *(const uint2 *)(branch + start + channel);
            v.x += s.x * widen((half_t)b.x), v.y += s.y * widen((half_t)(b.x >> 16));
            v.z += s.z * widen((half_t)b.y), v.w += s.w * widen((half_t)(b.y >> 16));
            *(float4 *)(tokens + start + channel) = v;
        }
        own[i] = v;
    }
    normalise(own, channels, weight, bias);
    FOR_OWN(i, channel)
        *(uint2 *)(normed + start + channel) = make_uint2(pack(own[i].x, own[i].y), pack(own[i].z, own[i].w));
}

// Tokens, with the final norm or as they are, averaged over the images of a group: [n_means, channels]. For
// each mean `places` holds the row of the first image's token and how many rows lie between images. One block
// of NORM_THREADS per mean.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) features(
    const float *tokens, const int2 *places, const float *weight, const float *bias, float *out, int channels,
    int with_norm, int group) {
    int2 place = places[blockIdx.x];
    float4 mean[NORM_MOST] = {};
    for (int image = 0; image < group; ++image) {
        const float *token = tokens + (place.x + (long)image * place.y) * channels;
        float4 own[NORM_MOST];
        FOR_OWN(i, channel) own[i] = *(const float4 *)(token + channel);
        if (with_norm) normalise(own, channels, weight, bias);
        FOR_OWN(i, channel) {
            mean[i].x += own[i].x, mean[i].y += own[i].y;
            mean[i].z += own[i].z, mean[i].w += own[i].w;
        }
    }
    FOR_OWN(i, channel) {
        float4 m = mean[i];
        *(float4 *)(out + (long)blockIdx.x * channels + channel) =
            make_float4(m.x / group, m.y / group, m.z / group, m.w / group);
    }
}

#ifndef WIDTH
#define WIDTH 64 // channels per head, a multiple of 16
#endif
// Nine tiles of 16 queries: two blocks hold the 257 to 261 tokens of a slice of 224 pixels.
#define ATTEND_WARPS 9
#define ATTEND_KEYS 64
// Halves per row of keys or values in shared memory: padded by 16 bytes, so that the eight rows that a
// warp reads at once lie in different banks.
#define ROW (WIDTH + 8)

// softmax(Q K^T / sqrt(WIDTH)) V for one head of one image and 16 * ATTEND_WARPS of its queries, without
// the whole matrix in memory (Dao et al. 2022). qkv is [n_rows, 3, heads, WIDTH], out [n_rows, heads, WIDTH];
// the rows of image i are starts[i] to starts[i + 1]. Blocks of 32 * ATTEND_WARPS: (query tiles of the longest
// image, heads, n_images).
extern "C" __global__ void __launch_bounds__(32 * ATTEND_WARPS, 2) attention(
    const half_t *qkv, const int *starts, half_t *out, int heads, float scale_log2) {
    // Two of each: one chunk is copied while the other one is computed.
    __shared__ __align__(16) half_t keys[2][ATTEND_KEYS * ROW];
    __shared__ __align__(16) half_t values[2][ATTEND_KEYS * ROW];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int group = lane / 4, quad = lane % 4; // row and column pair within a tile
    long stride = 3l * heads * WIDTH, start_row = starts[blockIdx.z];
    int n_tokens = starts[blockIdx.z + 1] - start_row;
    if (blockIdx.x * ATTEND_WARPS * 16 >= n_tokens) return; // an image shorter than the longest
    const half_t *own = qkv + start_row * stride + blockIdx.y * WIDTH;
    int first = (blockIdx.x * ATTEND_WARPS + warp) * 16;
    int rows[2] = {first + group, first + group + 8};
    bool is_busy = first < n_tokens;

    auto fetch = [&](int start, int to) {
        for (int at = threadIdx.x; at < ATTEND_KEYS * WIDTH / 8; at += 32 * ATTEND_WARPS) {
            int key = at / (WIDTH / 8), channel = at % (WIDTH / 8) * 8;
            bool is_there = start + key < n_tokens;
            const half_t *from = own + (is_there ? start + key : 0) * stride + heads * WIDTH + channel;
            copy_16(keys[to] + key * ROW + channel, from, is_there);
            copy_16(values[to] + key * ROW + channel, from + heads * WIDTH, is_there);
        }
        end_of_copies();
    };
    fetch(0, 0);

    // Queries beyond the last are zero, and never written.
    half2_t query[WIDTH / 16][4];
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            int row = rows[part % 2], channel = k * 16 + quad * 2 + part / 2 * 8;
            query[k][part] = row < n_tokens ? *(const half2_t *)(own + row * stride + channel) : 0;
        }
    // `most` is of the products, before they are scaled.
    float sums[WIDTH / 8][4] = {}, most[2] = {-1e30f, -1e30f}, total[2] = {};

    for (int start = 0, chunk = 0; start < n_tokens; start += ATTEND_KEYS, chunk ^= 1) {
        if (start + ATTEND_KEYS < n_tokens) {
            fetch(start + ATTEND_KEYS, chunk ^ 1);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads(); // the copies of all threads are complete
        if (is_busy) {
            // Tiles without any key are left out: of 257 tokens, the last chunk has one.
            float scores[ATTEND_KEYS / 8][4] = {};
#pragma unroll
            for (int tile = 0; tile < ATTEND_KEYS / 8; ++tile)
                if (start + tile * 8 < n_tokens)
#pragma unroll
                    for (int k = 0; k < WIDTH / 16; k += 2) {
                        // Channels k * 16 to k * 16 + 31 of eight keys, as far as there are so many.
                        bool is_pair = k + 1 < WIDTH / 16;
                        int channel = k * 16 + (is_pair ? lane / 8 : lane / 8 % 2) * 8;
                        half2_t b[4];
                        load_tiles(b, keys[chunk] + (tile * 8 + lane % 8) * ROW + channel);
                        multiply(scores[tile], query[k], b[0], b[1]);
                        if (is_pair) multiply(scores[tile], query[k + 1], b[2], b[3]);
                    }

            if (start + ATTEND_KEYS > n_tokens)
#pragma unroll
                for (int tile = 0; tile < ATTEND_KEYS / 8; ++tile)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (start + tile * 8 + quad * 2 + i % 2 >= n_tokens) scores[tile][i] = -1e30f;
            float high[2] = {most[0], most[1]};
#pragma unroll
            for (int tile = 0; tile < ATTEND_KEYS / 8; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) high[i / 2] = fmaxf(high[i / 2], scores[tile][i]);
            float high_scaled[2];
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                high[row] = fmaxf(high[row], __shfl_xor_sync(~0u, high[row], 1));
                high[row] = fmaxf(high[row], __shfl_xor_sync(~0u, high[row], 2));
                high_scaled[row] = high[row] * scale_log2;
                float shrink = power_of_2(most[row] * scale_log2 - high_scaled[row]);
                most[row] = high[row];
                total[row] *= shrink;
#pragma unroll
                for (int tile = 0; tile < WIDTH / 8; ++tile) {
                    sums[tile][2 * row] *= shrink;
                    sums[tile][2 * row + 1] *= shrink;
                }
            }
#pragma unroll
            for (int tile = 0; tile < ATTEND_KEYS / 8; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    scores[tile][i] = power_of_2(fmaf(scores[tile][i], scale_log2, -high_scaled[i / 2]));
                    total[i / 2] += scores[tile][i];
                }

#pragma unroll
            for (int k = 0; k < ATTEND_KEYS / 16; ++k) {
                if (start + k * 16 >= n_tokens) break;
                half2_t weights[4] = {pack(scores[2 * k][0], scores[2 * k][1]),
                                      pack(scores[2 * k][2], scores[2 * k][3]),
                                      pack(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                                      pack(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
                for (int tile = 0; tile < WIDTH / 8; tile += 2) {
                    // Four 8 x 8 tiles of values, transposed: keys 0 and 8 of this tile, then of the next.
                    const half_t *from = values[chunk] + (k * 16 + lane % 16) * ROW + (tile + lane / 16) * 8;
                    half2_t v[4];
                    load_transposed(v, from);
                    multiply(sums[tile], weights, v[0], v[1]);
                    multiply(sums[tile + 1], weights, v[2], v[3]);
                }
            }
        }
        __syncthreads(); // the chunk may be overwritten
    }
    if (!is_busy) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        total[row] += __shfl_xor_sync(~0u, total[row], 1);
        total[row] += __shfl_xor_sync(~0u, total[row], 2);
        if (rows[row] >= n_tokens) continue;
        half_t *to = out + ((start_row + rows[row]) * heads + blockIdx.y) * WIDTH;
        float scale = 1.0f / total[row];
#pragma unroll
        for (int tile = 0; tile < WIDTH / 8; ++tile)
            *(half2_t *)(to + tile * 8 + quad * 2) =
                pack(sums[tile][2 * row] * scale, sums[tile][2 * row + 1] * scale);
    }
}
