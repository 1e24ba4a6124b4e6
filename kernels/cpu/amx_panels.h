// Products of panels of float32 on AMX, in the place of `product_rows` and `outer`: factors are rounded to bfloat16, sums are float32. They lie in rows throughout, so
// that nothing is transposed but the factor that is said to be turned.

// One thread's space. Of rows no more than `channels` are read; what is past them counts as zero.
struct TiledPanels {
    const int64_t channels, padded, depth, tiles, most;  // pair steps and tiles of channels; pair steps of rows
    Array<int32_t> left, right;
    Array<float> spare;                                  // [padded, padded]

    TiledPanels(int64_t channels, int64_t rows)
        : channels(channels), padded(round_up(channels, SIDE)), depth(round_up(channels, PAIR) / PAIR), tiles(padded / SIDE), most(round_up(rows, PAIR) / PAIR),
          left(2 * most * depth * TILE), right(tiles * std::max(depth, most) * TILE), spare(padded * padded) {}

    V read(const float* row, int64_t c) const {  // channels [c, c + 16)
        const int64_t some = channels - c;
        return some <= 0 ? V{} : V(_mm512_maskz_loadu_ps(some >= SIDE ? __mmask16(~0u) : __mmask16((1u << some) - 1), row + c));
    }
    __m512i half(const float* row, int64_t c) const { return narrow_two(read(row, c), read(row, c + SIDE)); }
    __m512i pair(const float* rows, int64_t ld, int64_t r, int64_t n, int64_t c) const {  // of rows r and r + 1 of n
        return paired(r < n ? read(rows + r * ld, c) : V{}, r + 1 < n ? read(rows + (r + 1) * ld, c) : V{});
    }

    // Rows as pairs: a right factor [tiles, pair steps of rows].
    void pairs(const float* rows, int64_t ld, int64_t n) {
        const int64_t steps = (n + PAIR - 1) / PAIR;
        for (int64_t c = 0; c < tiles; c++)
            for (int64_t r = 0; r < steps * PAIR; r += 2) _mm512_store_si512(right + c * steps * TILE + r / 2 * SIDE, pair(rows, ld, r, n, c * SIDE));
    }
    // Rows of a matrix [channels, ld] as columns: a right factor [tiles, depth].
    void pairs_turned(const float* rows, int64_t ld) {
        for (int64_t c = 0; c < tiles; c++)
            for (int64_t s = 0; s < depth; s++) {
                __m512i tile[16];
                for (int64_t i = 0; i < 16; i++) tile[i] = c * SIDE + i < channels ? half(rows + (c * SIDE + i) * ld, s * PAIR) : _mm512_setzero_si512();
                transpose16(tile);
                for (int64_t i = 0; i < 16; i++) _mm512_store_si512(right + (c * depth + s) * TILE + i * SIDE, tile[i]);
            }
    }

    // out [n, padded] = (or +=) a · m, or a · mᵀ where it is turned; `a` and `out` are panels, m [channels, ld]. Rows of `out` are written up to a multiple of 16.
    void rows(float* out, const float* a, int64_t n, const float* m, int64_t ld, bool turned, bool add) {
        const int64_t row = depth * TILE, number = (n + SIDE - 1) / SIDE;
        for (int64_t r = 0; r < number * SIDE; r++)
            for (int64_t s = 0; s < depth; s++)
                _mm512_store_si512(left + (r / SIDE * depth + s) * TILE + r % SIDE * SIDE, r < n ? half(a + r * padded, s * PAIR) : _mm512_setzero_si512());
        if (turned)
            pairs_turned(m, ld);
        else
            pairs(m, ld, channels);
        if (add)
            multiply_grid<true>(out, SIDE * padded, SIDE, left, row, right, row, number, tiles, depth, padded * 4);
        else
            multiply_grid<false>(out, SIDE * padded, SIDE, left, row, right, row, number, tiles, depth, padded * 4);
    }

    void outer(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, bool add) { outer(out, ldo, a, lda, b, ldb, n, add, 0, tiles); }
    // out [channels, ldo] = (or +=) aᵀ · b, of n rows each; the rows of tiles [from, to) alone.
    void outer(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, bool add, int64_t from, int64_t to) {
        const int64_t steps = (n + PAIR - 1) / PAIR, row = steps * TILE, first = from * SIDE;
        for (int64_t c = from; c < to; c++)
            for (int64_t s = 0; s < steps; s++) {
                __m512i tile[16];
                for (int64_t i = 0; i < 16; i++) tile[i] = pair(a, lda, s * PAIR + 2 * i, n, c * SIDE);
                transpose16(tile);
                for (int64_t i = 0; i < 16; i++) _mm512_store_si512(left + ((c - from) * steps + s) * TILE + i * SIDE, tile[i]);
            }
        pairs(b, ldb, n);
        float* mine = out + first * ldo;
        if (channels == padded && add) return multiply_grid<true>(mine, SIDE * ldo, SIDE, left, row, right, row, to - from, tiles, steps, ldo * 4);
        if (channels == padded) return multiply_grid<false>(mine, SIDE * ldo, SIDE, left, row, right, row, to - from, tiles, steps, ldo * 4);
        multiply_grid<false>(spare, SIDE * padded, SIDE, left, row, right, row, to - from, tiles, steps, padded * 4);
        for (int64_t r = 0; r < std::min(to * SIDE, channels) - first; r++)
            for (int64_t c = 0; c < channels; c++) mine[r * ldo + c] = spare[r * padded + c] + (add ? mine[r * ldo + c] : 0.f);
    }
};
