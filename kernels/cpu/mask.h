// Which pairs of image tokens a disc or a window keeps, decided from coordinates in registers.

static constexpr int64_t PADDING = 16;  // entries behind each row of coordinates (geometry.py)

struct Mask {
    const Problem& p;
    const int first_axis;

    explicit Mask(const Geometry& g) : p(g.p), first_axis(g.first_axis) {}

    const int32_t* coord(int axis) const { return p.coords + axis * (p.image + PADDING); }
    const int32_t* window(int64_t w, int axis, int what) const { return p.windows + ((w * 3 + axis) * 3 + what) * (p.image + PADDING); }

    // One token against LANES others starting at image token `others`; `by_query`: the one is the query, the others are keys.
    // Loads whole vectors, up to LANES - 1 entries past the last token: hence PADDING.
    I pairs(int64_t one, int64_t others, bool by_query) const {
        I kept = all(int32_t(0));
        if (p.reach >= 0) {
            I distance = all(int32_t(0));
            for (int axis = first_axis; axis < 3; axis++) {
                I d = load(coord(axis) + others) - coord(axis)[one];
                distance += d * d;
            }
            kept = distance <= all(int32_t(p.reach));
        }
        for (int64_t w = 0; w < p.n_windows; w++) {
            I inside = all(int32_t(-1));
            for (int axis = first_axis; axis < 3; axis++) {
                const int32_t *c = coord(axis), *first = window(w, axis, 0), *last = window(w, axis, 1), *residue = window(w, axis, 2);
                if (by_query) {
                    I key = load(c + others);
                    inside &= (key >= all(first[one])) & (key <= all(last[one]));
                } else {
                    I key = all(c[one]);
                    inside &= (load(first + others) <= key) & (load(last + others) >= key);
                }
                inside &= load(residue + others) == all(residue[one]);
            }
            kept |= inside;
        }
        return kept;
    }

    // ROWS tokens from `one` on against N vectors of others: their masks, and whether any pair is kept. Rows past the last token repeat it;
    // others from `end` on are never kept.
    template <int N>
    inline __attribute__((always_inline)) bool strip(I (&kept)[ROWS][N], int64_t one, int64_t others, int64_t end, bool by_query) const {
        I seen = all(int32_t(0));
        for (int r = 0; r < ROWS; r++)
            for (int n = 0; n < N; n++) {
                int64_t at = others + n * LANES;
                kept[r][n] = pairs(std::min(one + r, p.image - 1), at, by_query);
                if (at + LANES > end) kept[r][n] &= LANE < all(int32_t(end - at));
                seen |= kept[r][n];
            }
        int64_t words[LANES / 2], any = 0;
        __builtin_memcpy(words, &seen, sizeof seen);
        for (int64_t word : words) any |= word;
        return any != 0;
    }
};
