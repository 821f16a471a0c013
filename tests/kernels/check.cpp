// The kernels of `src/compute/cuda` against their definitions, in double precision.
#include "warp.hpp"

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#define WIDTH 32 // channels per head
#include "../../src/compute/cuda/halves.cu"
namespace encoder {
#include "../../src/compute/cuda/kernels.cu"
}
#undef ROW
namespace search {
#include "../../src/compute/cuda/nearest.cu"
}

static std::mt19937 generator(7);
static int n_failures = 0;

static float random_value() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

static std::vector<float> random_values(size_t n) {
    std::vector<float> values(n);
    for (float &value : values) value = random_value();
    return values;
}

static std::vector<half_t> random_halves(size_t n) {
    std::vector<half_t> values(n);
    for (half_t &value : values) value = narrow(random_value());
    return values;
}

static void expect(const char *what, double worst, double most) {
    bool is_good = worst <= most; // not so for NaN
    std::printf("%s: off by %.2g, at most %.2g%s\n", what, worst, most, is_good ? "" : "  WRONG");
    n_failures += !is_good;
}

// NaN stays the worst that there is.
static void worse(double &worst, double apart) {
    worst = std::isnan(apart) ? INFINITY : std::max(worst, std::abs(apart));
}

static unsigned blocks_of(size_t n, unsigned size) { return (n + size - 1) / size; }

// Groups of two images of 12 x 12 patches, of which some are left out: the tables of `parts.rs`.
static void check_encoder() {
    const int group = 2, n_first = 3, patch = 2, grid = 12, side = grid * patch, n_patches = grid * grid;
    const int channels = 64, heads = 2, width = 8;
    std::vector<int> all(n_patches);
    std::iota(all.begin(), all.end(), 0);
    std::vector<std::vector<int>> kept = {{}, {1, 5, 143}, all, {7}};
    std::vector<int2> places;
    std::vector<int> sources, starts = {0}, group_of;
    int longest = 0;
    for (size_t g = 0; g < kept.size(); ++g) {
        int n_tokens = n_first + kept[g].size();
        longest = std::max(longest, n_tokens);
        for (int k = n_first; k < n_tokens; ++k) places.push_back({int(sources.size()) + k, n_tokens});
        for (int i = 0; i < group; ++i) {
            int image = starts.size() - 1;
            for (int first = 0; first < n_first; ++first) sources.push_back(-1 - first);
            for (int p : kept[g]) sources.push_back(image * n_patches + p);
            starts.push_back(sources.size());
            group_of.push_back(g);
        }
    }
    int n_images = starts.size() - 1;
    size_t n_rows = sources.size();
    auto patch_of = [&](int image, int token) { return kept[group_of[image]][token - n_first]; };

    std::vector<half_t> pixels = random_halves(n_images * side * side), rows(n_rows * width, narrow(NAN));
    launch({blocks_of(rows.size(), 256), 1, 1}, 256, [&] {
        encoder::patches(pixels.data(), sources.data(), rows.data(), rows.size(), side, patch, width, 1);
    });
    std::vector<half_t> embedded = random_halves(n_rows * channels);
    std::vector<float> first = random_values(n_first * channels), positions = random_values(n_patches * channels);
    std::vector<float> tokens(n_rows * channels, NAN);
    launch({blocks_of(tokens.size(), 256), 1, 1}, 256, [&] {
        encoder::tokens(embedded.data(), sources.data(), first.data(), positions.data(), tokens.data(), tokens.size(),
                        n_patches, channels);
    });
    double of_patches = 0, of_tokens = 0;
    for (int image = 0; image < n_images; ++image)
        for (int row = starts[image]; row < starts[image + 1]; ++row) {
            int token = row - starts[image];
            for (int column = 0; column < width; ++column) {
                float expected = 0;
                if (token >= n_first && column < patch * patch) {
                    int p = patch_of(image, token), y = p / grid * patch + column / patch;
                    expected = widen(pixels[(image * side + y) * side + p % grid * patch + column % patch]);
                }
                worse(of_patches, widen(rows[row * width + column]) - expected);
            }
            for (int channel = 0; channel < channels; ++channel) {
                float expected = token < n_first ? first[token * channels + channel]
                                                 : positions[patch_of(image, token) * channels + channel] +
                                                       widen(embedded[row * channels + channel]);
                worse(of_tokens, tokens[row * channels + channel] - expected);
            }
        }
    expect("patches", of_patches, 0);
    expect("tokens", of_tokens, 0);

    std::vector<float> weight = random_values(channels), bias = random_values(channels);
    std::vector<float> scale = random_values(channels);
    auto normed = [&](const float *token, int channel) {
        double mean = std::accumulate(token, token + channels, 0.0) / channels, squares = 0;
        for (int c = 0; c < channels; ++c) squares += (token[c] - mean) * (token[c] - mean);
        return (token[channel] - mean) / std::sqrt(squares / channels + 1e-6) * weight[channel] + bias[channel];
    };
    for (int with_norm = 0; with_norm < 2; ++with_norm) {
        std::vector<float> means(places.size() * channels, NAN);
        launch({unsigned(places.size()), 1, 1}, 128, [&] {
            encoder::features(tokens.data(), places.data(), weight.data(), bias.data(), means.data(), channels,
                              with_norm, group);
        });
        double worst = 0;
        for (size_t mean = 0; mean < places.size(); ++mean)
            for (int channel = 0; channel < channels; ++channel) {
                double expected = 0;
                for (int i = 0; i < group; ++i) {
                    const float *token = &tokens[(places[mean].x + i * places[mean].y) * channels];
                    expected += (with_norm ? normed(token, channel) : token[channel]) / group;
                }
                worse(worst, means[mean * channels + channel] - expected);
            }
        expect(with_norm ? "features with the norm" : "features", worst, 1e-5);
    }

    std::vector<half_t> branch = random_halves(n_rows * channels), out(n_rows * channels, narrow(NAN));
    std::vector<float> before = tokens;
    launch({unsigned(n_rows), 1, 1}, 128, [&] {
        encoder::add_norm(tokens.data(), branch.data(), scale.data(), weight.data(), bias.data(), out.data(), channels,
                          1);
    });
    double of_sum = 0, of_norm = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
        worse(of_sum, tokens[i] - (before[i] + scale[i % channels] * widen(branch[i])));
        worse(of_norm, widen(out[i]) - normed(&tokens[i / channels * channels], i % channels));
    }
    expect("add_norm, sum", of_sum, 1e-6);
    expect("add_norm, norm", of_norm, 3e-3);

    std::vector<half_t> qkv = random_halves(n_rows * 3 * channels);
    for (half_t &value : qkv) value = narrow(3 * widen(value));
    auto part = [&](int which, int row, int head, int c) {
        return double(widen(qkv[(row * 3 + which) * channels + head * WIDTH + c]));
    };
    std::vector<double> expected(n_rows * channels);
    for (int image = 0; image < n_images; ++image)
        for (int head = 0; head < heads; ++head)
            for (int row = starts[image]; row < starts[image + 1]; ++row) {
                double total = 0, sums[WIDTH] = {};
                for (int other = starts[image]; other < starts[image + 1]; ++other) {
                    double product = 0;
                    for (int c = 0; c < WIDTH; ++c) product += part(0, row, head, c) * part(1, other, head, c);
                    double share = std::exp(product / std::sqrt(double(WIDTH)));
                    total += share;
                    for (int c = 0; c < WIDTH; ++c) sums[c] += share * part(2, other, head, c);
                }
                for (int c = 0; c < WIDTH; ++c) expected[row * channels + head * WIDTH + c] = sums[c] / total;
            }
    for (bool late : {false, true}) {
        copies_are_late = late;
        std::fill(out.begin(), out.end(), narrow(NAN));
        launch({blocks_of(longest, 9 * 16), heads, unsigned(n_images)}, 288, [&] {
            encoder::attention(qkv.data(), starts.data(), out.data(), heads, 1.44269504f / std::sqrt(float(WIDTH)));
        });
        double worst = 0;
        for (size_t i = 0; i < out.size(); ++i) worse(worst, widen(out[i]) - expected[i]);
        expect(late ? "attention, copies late" : "attention, copies early", worst, 5e-3);
    }
}

static std::vector<int> random_places(int n, int side) {
    std::vector<int> cells(side * side * side);
    std::iota(cells.begin(), cells.end(), 0);
    std::shuffle(cells.begin(), cells.end(), generator);
    cells.resize(n);
    std::sort(cells.begin(), cells.end());
    for (int &cell : cells) cell = cell % side | cell / side % side << 10 | cell / (side * side) << 20;
    return cells;
}

// A scan with others at once, in a cube of `side` cells; the last token of each of them is one of the first.
static void check_search(int n_first, std::vector<int> n_others, int channels, int side, Index reach) {
    struct Scan {
        int n;
        std::vector<int> places;
        std::vector<half_t> features;
        std::vector<float> norms;
        int start;
        search::tokens_t tokens() { return {features.data(), norms.data(), places.data(), n, start}; }
    };
    int n_found = 0, most = 0;
    auto scan = [&](int n) {
        Scan made = {n, random_places(n, side), random_halves(size_t(n) * channels), std::vector<float>(n, NAN), 0};
        launch({blocks_of(n * 32, 256), 1, 1}, 256,
               [&] { search::norms(made.features.data(), made.norms.data(), n, channels); });
        return made;
    };
    Scan first = scan(n_first);
    std::vector<Scan> others;
    std::vector<search::tokens_t> table;
    for (int n : n_others) {
        others.push_back(scan(n));
        Scan &other = others.back();
        std::copy_n(&first.features[3 * channels], channels, &other.features[(n - 1) * channels]);
        other.norms[n - 1] = first.norms[3];
        other.start = n_found;
        table.push_back(other.tokens());
        n_found += n_first + n;
        most = std::max(most, n);
    }
    std::vector<unsigned long long> candidates(n_found);
    std::vector<float> found(n_found, NAN);
    unsigned n_pairs = others.size();
    launch({blocks_of(most, 128), blocks_of(n_first, 128), n_pairs}, 256, [&] {
        search::nearest(first.tokens(), table.data(), channels, reach.x, reach.y, reach.z, candidates.data());
    });
    launch({blocks_of((n_first + most) * 32, 256), n_pairs, 1}, 256,
           [&] { search::distances(first.tokens(), table.data(), channels, candidates.data(), found.data()); });
    double worst = 0;
    int n_unmatched = 0;
    auto check = [&](const Scan &own, const Scan &other, const float *found) {
        for (int i = 0; i < own.n; ++i) {
            double best = INFINITY;
            for (int j = 0; j < other.n; ++j) {
                auto apart = [&](int shift) {
                    return unsigned(std::abs((own.places[i] >> shift & 1023) - (other.places[j] >> shift & 1023)));
                };
                if (apart(0) > reach.x || apart(10) > reach.y || apart(20) > reach.z) continue;
                double squares = 0;
                for (int c = 0; c < channels; ++c) {
                    double difference = widen(own.features[i * channels + c]) - widen(other.features[j * channels + c]);
                    squares += difference * difference;
                }
                best = std::min(best, std::sqrt(squares));
            }
            bool is_unmatched = std::isinf(best) && std::isinf(found[i]);
            n_unmatched += is_unmatched;
            if (!is_unmatched) worse(worst, found[i] - best);
        }
    };
    for (const Scan &other : others) {
        check(first, other, &found[other.start]);
        check(other, first, &found[other.start + n_first]);
    }
    char what[99];
    std::snprintf(what, sizeof what, "nearest of %d and of %u others, %u %u %u cells around (%d without any)", n_first,
                  n_pairs, reach.x, reach.y, reach.z, n_unmatched);
    expect(what, worst, 1e-5);
}

int main() {
    check_encoder();
    check_search(150, {300, 20, 129}, 40, 12, {1024, 1024, 1024});
    check_search(150, {300, 130}, 40, 12, {1, 1, 2});
    check_search(300, {130}, 96, 10, {0, 1, 1});
    check_search(128, {128, 5}, 8, 8, {3, 3, 0});
    check_search(5, {1, 1}, 8, 4, {0, 0, 0});
    return n_failures > 0;
}
