// The exact part of the forward pass on AMX: products of tiles of bfloat16, summed in float32.
//
// Everything lies transposed, queries in the lanes: logits [keys, queries] = K · Qᵀ and outputs [channels, queries] = Vᵀ · P, so that the softmax's maxima and sums
// take no step across lanes, rows of K are read as they are, and a short block's last keys cost nothing. A tile has 16 rows of 64 bytes: 16 floats, 32 channels (keys) of
// a left factor, or 16 columns of a right factor's pair of rows. Tiles are stored one after the other, as 256 entries of 4 bytes.

static constexpr int64_t TILE = 256, SIDE = 16, PAIR = 32;  // entries of a tile, its rows, and the depth of one product
static constexpr int64_t CHUNK = 64;                        // keys that one step of the softmax takes

// The unit's registers, which the thread that configures them must release: eight tiles of the largest size.
struct TileRegisters {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    TileRegisters() {
        const Configuration configuration;
        asm volatile("ldtilecfg %0" ::"m"(configuration));
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
    TileRegisters(const TileRegisters&) = delete;
};

// The instructions by name, as compilers' own forms of them leave out that they read memory.
template <int T>
static inline __attribute__((always_inline)) void tile_load(const void* from, int64_t stride = 64) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline __attribute__((always_inline)) void tile_store(void* to, int64_t stride = 64) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline __attribute__((always_inline)) void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
static inline __attribute__((always_inline)) void tile_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Tiles one after the other: where the first is, and how far it is to the next of another row or column of tiles, in entries.
template <class E>
struct TileGrid {
    E* first;
    int64_t step;
};

// M × N tiles of c = (or +=, where ADD) the sum over `depth` tiles of M rows of a times N columns of b. Both step TILE entries along the depth.
// In c columns are `across` entries apart, and a tile's rows `stride` bytes.
template <int M, int N, bool ADD>
static inline __attribute__((always_inline)) void multiply(TileGrid<float> c, int64_t across, TileGrid<const int32_t> a, TileGrid<const int32_t> b, int64_t depth, int64_t stride = 64) {
    float *c00 = c.first, *c01 = c00 + across, *c10 = c00 + c.step, *c11 = c10 + across;
    if (ADD) {
        tile_load<0>(c00, stride);
        if (N == 2) tile_load<1>(c01, stride);
        if (M == 2) tile_load<2>(c10, stride);
        if (M == 2 && N == 2) tile_load<3>(c11, stride);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (int64_t k = 0; k < depth * TILE; k += TILE) {
        tile_load<4>(a.first + k), tile_load<6>(b.first + k);
        tile_product<0, 4, 6>();
        if (N == 2) tile_load<7>(b.first + b.step + k), tile_product<1, 4, 7>();
        if (M == 2) tile_load<5>(a.first + a.step + k), tile_product<2, 5, 6>();
        if (M == 2 && N == 2) tile_product<3, 5, 7>();
    }
    tile_store<0>(c00, stride);
    if (N == 2) tile_store<1>(c01, stride);
    if (M == 2) tile_store<2>(c10, stride);
    if (M == 2 && N == 2) tile_store<3>(c11, stride);
}

// c = (or +=, where ADD) A · B for grids of tiles: row r and column n of c at c + r·c_row + n·c_column, row r of A at a + r·a_row, column n of B at b + n·b_column.
template <bool ADD>
static inline void multiply_grid(
    float* c, int64_t c_row, int64_t c_column, const int32_t* a, int64_t a_row, const int32_t* b, int64_t b_column, int64_t rows, int64_t columns, int64_t depth, int64_t stride = 64) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t n = 0; n < columns; n += 2) {
            const TileGrid<float> to{c + r * c_row + n * c_column, c_row};
            const TileGrid<const int32_t> left{a + r * a_row, a_row}, right{b + n * b_column, b_column};
            if (r + 1 < rows && n + 1 < columns) multiply<2, 2, ADD>(to, c_column, left, right, depth, stride);
            else if (r + 1 < rows) multiply<2, 1, ADD>(to, c_column, left, right, depth, stride);
            else if (n + 1 < columns) multiply<1, 2, ADD>(to, c_column, left, right, depth, stride);
            else multiply<1, 1, ADD>(to, c_column, left, right, depth, stride);
        }
}

// 16 × 16 entries of 4 bytes.
static inline void transpose16(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {  // columns c, 4 + c, 8 + c and 12 + c, four rows in each quarter of a vector
        __m512i even0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), even1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i odd0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD), odd1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
        t[c] = _mm512_shuffle_i32x4(even0, even1, 0x88), t[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xDD);
        t[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88), t[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// The bfloat16 rows of a run, zero past the run, past the channels and where `cleared` says so.
struct HalfRows {
    const uint16_t* base;
    int64_t row, channels;
    const Run run;
    const float* bias;  // of a block of keys (Geometry::clear_masked), or null

    HalfRows(const uint16_t* base, int64_t row, int64_t channels, const Run& run) : base(base), row(row), channels(channels), run(run), bias(nullptr) {}
    HalfRows(const Geometry& g, const Rows& in, int64_t bh, const Run& run, const float* bias)
        : base(static_cast<const uint16_t*>(in.data) + bh / g.p.heads * in.batch + g.head(bh) * in.head), row(in.row), channels(g.channels), run(run), bias(bias) {}

    bool absent(int64_t n) const { return n >= run.count || (bias && bias[n] <= MASKED); }
    const uint16_t* at(int64_t n, int64_t c) const { return base + run.at(n) * row + c; }
    __m512i load32(int64_t n, int64_t c) const {  // channels [c, c + 32)
        if (absent(n)) return _mm512_setzero_si512();
        int64_t left = channels - c;
        return _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, at(n, c));
    }
    __m512i load16(int64_t n, int64_t c) const {  // the same of 16, in the lower half of each entry
        if (absent(n)) return _mm512_setzero_si512();
        int64_t left = channels - c;
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(left >= 16 ? __mmask16(~0u) : __mmask16((1u << left) - 1), at(n, c)));
    }
};

// How one head's blocks lie in tiles. As a left factor: rows [token tiles, depth] or columns [channel tiles, steps of PAIR tokens]. As a right one: pairs of channels
// [token tiles, depth].
struct TileSizes {
    const int64_t depth, channel_tiles, steps;  // pair steps of channels, tiles of channels, pair steps of a block's tokens
    const int64_t block;                        // entries of a block, either way
    explicit TileSizes(const Geometry& g) : TileSizes(g, g.width) {}
    TileSizes(const Geometry& g, int64_t tokens)
        : depth(round_up(g.channels, PAIR) / PAIR), channel_tiles(g.padded / SIDE), steps(round_up(tokens, PAIR) / PAIR), block(steps * 2 * depth * TILE) {}

    void rows(int32_t* to, const HalfRows& from) const {
        for (int64_t n = 0; n < round_up(from.run.count, SIDE); n++)
            for (int64_t s = 0; s < depth; s++) _mm512_store_si512(to + (n / SIDE * depth + s) * TILE + n % SIDE * SIDE, from.load32(n, s * PAIR));
    }
    void columns(int32_t* to, const HalfRows& from) const {
        for (int64_t step = 0; step * PAIR < from.run.count; step++)
            for (int64_t c = 0; c < channel_tiles; c++) {
                __m512i tile[16];
                for (int64_t i = 0; i < 16; i++) {
                    int64_t n = step * PAIR + 2 * i;
                    tile[i] = _mm512_or_si512(from.load16(n, c * SIDE), _mm512_slli_epi32(from.load16(n + 1, c * SIDE), 16));
                }
                transpose16(tile);
                for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + (c * steps + step) * TILE + i * SIDE, tile[i]);
            }
    }
    void pairs(int32_t* to, const HalfRows& from) const {
        for (int64_t t = 0; t * SIDE < from.run.count; t++)
            for (int64_t s = 0; s < depth; s++) {
                __m512i tile[16];
                for (int64_t i = 0; i < 16; i++) tile[i] = from.load32(t * SIDE + i, s * PAIR);
                transpose16(tile);
                for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + (t * depth + s) * TILE + i * SIDE, tile[i]);
            }
    }
};

// Sums [channels, tokens of a tile], tile after tile, as rows [tokens, padded] times `factor`.
static inline void rows_of_sums(const Geometry& g, float* to, const float* sums, int64_t count, float factor) {
    for (int64_t t = 0; t * SIDE < count; t++)
        for (int64_t c = 0; c < g.padded; c += SIDE) {
            __m512i tile[16];
            for (int64_t i = 0; i < 16; i++) tile[i] = __m512i(load(sums + (t * g.padded + c + i) * SIDE) * factor);
            transpose16(tile);
            for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + (t * SIDE + i) * g.padded + c, tile[i]);
        }
}

// One block of keys, and of transposed values in `steps` pair steps.
struct TiledBlock {
    const int32_t *keys, *values;
    int64_t steps;
};

// One head's blocks in tiles, from bfloat16 tensors.
struct Pairs {
    const Geometry& g;
    const TileSizes sizes;
    Array<int32_t> keys, values;

    explicit Pairs(const Geometry& g) : g(g), sizes(g), keys(g.first_extra() * sizes.block), values(g.first_extra() * sizes.block) {}

    void fill(int64_t bh, int64_t j, uint16_t*) {
        sizes.rows(keys + j * sizes.block, HalfRows(g, g.p.k, bh, g.key(j), g.key_bias(bh, j)));
        sizes.columns(values + j * sizes.block, HalfRows(g, g.p.v, bh, g.key(j), g.key_bias(bh, j)));
    }
    TiledBlock block(int64_t j) const { return {keys + j * sizes.block, values + j * sizes.block, sizes.steps}; }
};

// 2^x to 3·10⁻⁶, far below what rounding to bfloat16 adds; exactly 0 below 2^-126, NaN for NaN.
static inline __attribute__((always_inline)) V rough_exp2(V x) {
    V f = V(_mm512_reduce_ps(__m512(x), 1)), p = all(0.013534167781472206f);  // 1: from the integer below
    p = p * f + 0.052011460065841675f;
    p = p * f + 0.2414427548646927f;
    p = p * f + 0.6930038332939148f;
    p = p * f + 1.0000026226043701f;
    __mmask16 some = _mm512_cmp_ps_mask(__m512(x), __m512(all(-126.f)), _CMP_NLT_UQ);
    return V(_mm512_maskz_scalef_ps(some, __m512(p), __m512(x)));
}
static inline __m512i rounded(V x) { return _mm512_add_epi32(__m512i(x), _mm512_set1_epi32(0x8000)); }  // to bfloat16, in the upper half

// Two vectors of weights, of keys that follow each other, as a right factor's row of pairs.
static inline __m512i paired(V even, V odd) { return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(rounded(even), 16), rounded(odd)); }

// Two vectors, one after the other, each by an instruction of its own: Bochs, which tests this code, converts two at once wrongly.
static inline __m512i narrow_two(V first, V second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(__m256i(_mm512_cvtneps_pbh(__m512(first)))), __m256i(_mm512_cvtneps_pbh(__m512(second))), 1);
}

// Which tokens of a tile see token k of the other side: bit l of the result is token own + l of the mask's columns.
static inline __mmask16 seen_by(const BitMask& mask, int64_t k, int64_t own) { return __mmask16(uint64_t(mask.rows[k * mask.words + own / 64]) >> (own % 64)); }
static inline __mmask16 seen_by(const WindowMask& mask, int64_t k, int64_t own) {
    I kept = mask.pairs(mask.one + k, mask.others + own);
    if (mask.others + own + LANES > mask.end) kept &= LANE < all(int32_t(mask.end - mask.others - own));
    return _mm512_movepi32_mask(__m512i(kept));
}

// What a mask keeps of a chunk of `count` keys from `from` on for one or two tiles of queries: bits into seen [2, CHUNK]; the keys outside of [first, last) are seen
// by none, and first is a multiple of PAIR.
struct Seen {
    int64_t first, last;
    template <class Mask>
    Seen(uint16_t* seen, const Mask& mask, int64_t t, bool two, int64_t from, int64_t count) : first(count), last(0) {
        for (int64_t k = 0; k < count; k++) {
            seen[k] = seen_by(mask, from + k, t * SIDE);
            seen[CHUNK + k] = two ? seen_by(mask, from + k, (t + 1) * SIDE) : 0;
            if (seen[k] | seen[CHUNK + k]) first = std::min(first, k), last = k + 1;
        }
        first = first / PAIR * PAIR;
    }
};

#include "amx_softmax.h"
#include "amx_panels.h"
