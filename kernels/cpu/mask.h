// Which pairs of image tokens a partial block keeps: by bit masks, or by windows decided from coordinates in registers.
//
// Both are called as keep(kept, r, c): they fill the masks of ROWS rows of a block from row r on against N vectors of columns from c on. Bit n
// of what they return says whether any pair of vector n is kept. Rows past the block's last repeat a row or keep nothing; nobody reads them. Columns past it are never kept.

static constexpr int64_t PADDING = 16;  // entries behind each row of coordinates (operator/lists.py)

// One block's bit mask. Rows of 64-bit words: bit j of word w of row i is column 64·w + j; 0 past a short block's end.
struct BitMask {
    const int64_t* rows;
    int64_t words, height;

    // Mask number n with queries as rows and keys as columns, or the other way around.
    BitMask(const Problem& p, int64_t n, bool by_query) {
        words = ((by_query ? p.k_width : p.q_width) + 63) / 64, height = by_query ? p.q_width : p.k_width;
        rows = (by_query ? p.masks : p.masks_t) + n * height * words;
    }

    template <int N>
    inline __attribute__((always_inline)) uint32_t operator()(I (&kept)[ROWS][N], int64_t r, int64_t c) const {
        static_assert(64 % (N * LANES) == 0, "a strip lies in one word");
        uint64_t bits[ROWS], any = 0;
        for (int i = 0; i < ROWS; i++) {
            bits[i] = uint64_t(rows[std::min(r + i, height - 1) * words + c / 64]) >> (c % 64);
            any |= bits[i];
        }
        for (int i = 0; i < ROWS; i++)
            for (int n = 0; n < N; n++) kept[i][n] = (all(int32_t(bits[i] >> (n * LANES))) & load(LANE_BITS)) != I{};
        uint32_t live = 0;
        for (int n = 0; n < N; n++) live |= uint32_t((any >> (n * LANES) & ((1 << LANES) - 1)) != 0) << n;
        return live;
    }
};

// Windows, united. `one`: the image token of row 0, `others`: of column 0, `last`: of the last row that there is, `end`: past the
// last column; `by_query`: rows are queries and columns keys.
struct WindowMask {
    const Problem& p;
    const int first_axis;
    const int64_t one, last, others, end;
    const bool by_query;

    WindowMask(const Geometry& g, const Run& rows, const Run& columns, bool by_query)
        : p(g.p), first_axis(g.first_axis), one(rows.image), last(rows.image + rows.count - 1), others(columns.image), end(columns.image + columns.count), by_query(by_query) {}

    const int32_t* coord(int axis) const { return p.coords + axis * (p.image_k + PADDING); }
    const int32_t* window(int64_t w, int axis, int what) const { return p.windows + ((w * 3 + axis) * 3 + what) * (p.image_q + PADDING); }
    const int32_t* key_residue(int64_t w, int axis) const { return p.residues ? p.residues + (w * 3 + axis) * (p.image_k + PADDING) : window(w, axis, 2); }

    // Token `row` against LANES others starting at image token `column`. Loads whole vectors, up to LANES - 1 entries past the last token:
    // hence PADDING.
    I pairs(int64_t row, int64_t column) const {
        I kept = all(int32_t(0));
        for (int64_t w = 0; w < p.n_windows; w++) {
            I inside = all(int32_t(-1));
            for (int axis = first_axis; axis < 3; axis++) {
                const int32_t *c = coord(axis), *from = window(w, axis, 0), *to = window(w, axis, 1);
                const int32_t *of_query = window(w, axis, 2), *of_key = key_residue(w, axis);
                if (by_query) {
                    I key = load(c + column);
                    inside &= (key >= all(from[row])) & (key <= all(to[row])) & (load(of_key + column) == all(of_query[row]));
                } else {
                    I key = all(c[row]);
                    inside &= (load(from + column) <= key) & (load(to + column) >= key) & (load(of_query + column) == all(of_key[row]));
                }
            }
            kept |= inside;
        }
        return kept;
    }

    template <int N>
    inline __attribute__((always_inline)) uint32_t operator()(I (&kept)[ROWS][N], int64_t r, int64_t c) const {
        uint32_t live = 0;
        for (int n = 0; n < N; n++) {
            I seen = all(int32_t(0));
            int64_t at = others + c + n * LANES;
            for (int i = 0; i < ROWS; i++) {
                kept[i][n] = pairs(std::min(one + r + i, last), at);
                if (at + LANES > end) kept[i][n] &= LANE < all(int32_t(end - at));
                seen |= kept[i][n];
            }
            int64_t words[LANES / 2], any = 0;
            __builtin_memcpy(words, &seen, sizeof seen);
            for (int64_t word : words) any |= word;
            live |= uint32_t(any != 0) << n;
        }
        return live;
    }
};

// Calls body(keep) with the mask of a partial block that has bit mask n, or is decided by windows where there are none.
template <class Body>
static inline __attribute__((always_inline)) auto with_mask(const Geometry& g, int64_t n, const Run& rows, const Run& columns, bool by_query, Body&& body) {
    return g.p.masks ? body(BitMask(g.p, n, by_query)) : body(WindowMask(g, rows, columns, by_query));
}
