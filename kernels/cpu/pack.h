// From the caller's tensors to float panels, one head at a time, and the geometry of blocks.

static inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t narrow(float x) {  // to bfloat16, nearest even
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if (x != x) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// A run of tokens: where it begins in the sequence and among the image tokens of the blocks' order (-1 outside the image), and how many.
// `places`: where each of them is, counted from `place`; null where they follow each other.
struct Run {
    int64_t place, image, count;
    const int32_t* places = nullptr;
    int64_t at(int64_t i) const { return place + (places ? places[i] : i); }  // in the sequence
};

// out[i, :] = factor · row i of the run; out has leading dimension ld
static inline void read_rows(float* out, int64_t ld, const Rows& in, int64_t b, int64_t h, const Run& run, int64_t channels, float factor) {
    int64_t base = b * in.batch + h * in.head;
    for (int64_t i = 0; i < run.count; i++) {
        float* to = out + i * ld;
        if (in.bf16) {
            const uint16_t* from = static_cast<const uint16_t*>(in.data) + base + run.at(i) * in.row;
            for (int64_t d = 0; d < channels; d++) to[d] = factor * widen(from[d]);
        } else {
            const float* from = static_cast<const float*>(in.data) + base + run.at(i) * in.row;
            for (int64_t d = 0; d < channels; d++) to[d] = factor * from[d];
        }
    }
}

static inline void write_rows(const Rows& out, int64_t b, int64_t h, const Run& run, int64_t channels, const float* in, int64_t ld) {
    int64_t base = b * out.batch + h * out.head;
    for (int64_t i = 0; i < run.count; i++) {
        const float* from = in + i * ld;
        int64_t at = base + run.at(i) * out.row;
        if (out.bf16) {
            uint16_t* to = static_cast<uint16_t*>(out.data) + at;
            for (int64_t d = 0; d < channels; d++) to[d] = narrow(from[d]);
        } else {
            __builtin_memcpy(static_cast<float*>(out.data) + at, from, channels * 4);
        }
    }
}

// The same without conversion, from bfloat16.
static inline void copy_rows(uint16_t* out, int64_t ld, const Rows& in, int64_t b, int64_t h, const Run& run, int64_t channels) {
    const uint16_t* from = static_cast<const uint16_t*>(in.data) + b * in.batch + h * in.head;
    for (int64_t i = 0; i < run.count; i++) __builtin_memcpy(out + i * ld, from + run.at(i) * in.row, size_t(channels) * 2);
}

static constexpr int64_t WHOLE = -1;    // in place of a mask's number: all pairs of the block are kept
static const float MASKED = -1e30f;  // a bias (in log2) that leaves a key out

// Blocks of one problem. Key blocks: the image's, then the text's, then the extra keys'. Query blocks: the image's, then the text's.
struct Geometry {
    const Problem& p;
    int64_t channels, padded;     // D, and D rounded up to whole vectors
    int64_t width;                // panel rows per block, a multiple of ROWS and of LANES
    int64_t chunk;                // tokens per text or extra block
    int64_t text_blocks, extra_blocks, key_blocks, query_blocks;  // text_blocks: of keys
    int first_axis = 1;           // of the coordinates that differ at all: 0 in a video, 1 in an image
    Array<float> text_bias;       // [batch, text_blocks, rows()], base 2, zero past the text; null without a bias

    explicit Geometry(const Problem& p) : p(p), channels(p.channels), padded(round_up(p.channels, LANES)) {
        int64_t widest = 1;
        for (int64_t i = 0; i < p.q_blocks; i++) widest = std::max<int64_t>(widest, p.q_starts[i + 1] - p.q_starts[i]);
        for (int64_t i = 0; i < p.k_blocks; i++) widest = std::max<int64_t>(widest, p.k_starts[i + 1] - p.k_starts[i]);
        chunk = std::max<int64_t>(16, std::min<int64_t>(64, widest));
        width = round_up(std::max(widest, chunk), LANES);
        text_blocks = (p.text + chunk - 1) / chunk;
        extra_blocks = (p.extra + chunk - 1) / chunk;
        key_blocks = p.k_blocks + text_blocks + extra_blocks;
        query_blocks = p.q_blocks + (p.text_q + chunk - 1) / chunk;
        for (int64_t n = 0; n < p.image_k && p.windows; n++)
            if (p.coords[n]) first_axis = 0;
        if (p.text_bias) read_text_bias();
    }
    void read_text_bias() {
        text_bias.allocate(p.batch * text_blocks * rows());
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t n = 0; n < p.text; n++) text_bias[(b * text_blocks + n / chunk) * rows() + n % chunk] = p.text_bias[b * p.text + n] * LOG2E;
    }
    int64_t pools() const { return p.pools ? p.pools : p.k_blocks; }  // pooled keys
    bool listed() const { return p.pool_lists; }                         // query blocks see some of the units alone
    int64_t parts() const { return p.pool_slots ? p.pool_parts : p.pools ? p.pools / p.k_blocks : 1; }  // of a unit
    int64_t units() const { return pools() / parts(); }
    int64_t seen_pools() const { return listed() ? p.pool_width * p.pool_parts : pools(); }  // the most that a query block sees
    int64_t unit(int64_t j) const { return p.pool_slots ? p.pool_slots[j] : j; }             // of key block j
    int64_t states() const { return listed() ? (p.q_blocks + SPAN - 1) / SPAN : p.q_blocks; }
    int64_t state(int64_t i) const { return listed() ? i / SPAN : i; }  // whose slopes query block i reads, and whose list
    int64_t key_states() const { return p.k_blocks + (p.far_states ? 1 : 0); }  // of a linear rest: those of further keys are a last block, on no list
    int64_t queries() const { return p.text_q + p.image_q; }  // tokens in q, and below in k and v
    int64_t keys() const { return p.text + p.image_k; }
    int64_t rows() const { return round_up(width, ROWS); }  // of a row-major panel
    int64_t head(int64_t bh) const { return bh % p.heads; }

    // Block i of the text and tokens [first, end) of the image, in a sequence of `text` and `image` tokens.
    Run text_run(int64_t i, int64_t text, int64_t image) const {
        return {(p.text_first ? 0 : image) + i * chunk, -1, std::min(chunk, text - i * chunk)};
    }
    Run image_run(int64_t first, int64_t end, int64_t text, const int32_t* places) const {
        int64_t start = p.text_first ? text : 0;
        if (places) return {start, first, end - first, places + first};
        return {start + first, first, end - first};
    }
    Run query(int64_t i) const {
        if (i >= p.q_blocks) return text_run(i - p.q_blocks, p.text_q, p.image_q);
        return image_run(p.q_starts[i], p.q_starts[i + 1], p.text_q, p.places_q);
    }
    int64_t first_extra() const { return p.k_blocks + text_blocks; }
    bool is_extra(int64_t j) const { return j >= first_extra(); }
    Run key(int64_t j) const {  // for extra keys, `place` counts among them
        if (j < p.k_blocks) return image_run(p.k_starts[j], p.k_starts[j + 1], p.text, p.places_k);
        if (!is_extra(j)) return text_run(j - p.k_blocks, p.text, p.image_k);
        int64_t first = (j - first_extra()) * chunk;
        return {first, -1, std::min(chunk, p.extra - first)};
    }

    // What joins the logits of a block's keys, for a whole panel of them; null where nothing does.
    const float* key_bias(int64_t bh, int64_t j) const {
        if (!text_bias || j < p.k_blocks || is_extra(j)) return nullptr;
        return text_bias + (bh / p.heads * text_blocks + j - p.k_blocks) * rows();
    }

    // What is padded may hold anything, and 0 times NaN is NaN: rows `[count, ld]` of a masked key become zero, keys and values alike.
    template <class E>
    void clear_masked(E* rows, int64_t ld, int64_t bh, int64_t j) const {
        const float* bias = key_bias(bh, j);
        if (!bias) return;
        for (int64_t n = 0; n < key(j).count; n++)
            if (bias[n] <= MASKED) std::fill_n(rows + n * ld, channels, E(0));
    }

    // The lists of a query block of image tokens.
    struct List {
        const int32_t *blocks, *masks;
        int64_t count, full;
        int64_t mask(int64_t n) const { return n < full ? WHOLE : masks ? masks[n] : 0; }  // of entry n
    };
    List list(int64_t bh, int64_t i) const {
        int64_t at = bh * p.lists_per_head * p.q_blocks + i;
        return {p.lists + at * p.list_width, p.mask_of ? p.mask_of + at * p.list_width : nullptr, p.counts[at], p.full[at]};
    }

    // Calls body(key block, its mask) for all that query block i visits. The mask: WHOLE, or the number of the block's bit mask where the
    // problem has some.
    template <class Body>
    void for_visits(int64_t bh, int64_t i, Body&& body) const {
        if (i >= p.q_blocks) {
            for (int64_t j = 0; j < p.k_blocks + text_blocks; j++) body(j, WHOLE);
            return;
        }
        List l = list(bh, i);
        for (int64_t n = 0; n < l.count; n++) body(l.blocks[n], l.mask(n));
        for (int64_t j = p.k_blocks; j < key_blocks; j++) body(j, WHOLE);
    }

    // Whether a block's tokens lie as rows of a panel do, one after the other.
    bool lies_in_rows(const Rows& x) const { return !p.places_k && !x.bf16 && channels == padded; }
    const float* rows_of(const Rows& x, int64_t bh, int64_t j) const {
        return static_cast<const float*>(x.data) + bh / p.heads * x.batch + head(bh) * x.head + key(j).place * x.row;
    }

    void read_key(float* out, const Rows& from, const float* extra, int64_t bh, int64_t j) const {
        Run run = key(j);
        if (!is_extra(j)) {
            read_rows(out, padded, from, bh / p.heads, head(bh), run, channels, 1.f);
            return clear_masked(out, padded, bh, j);
        }
        const float* row = extra + (bh * p.extra + run.place) * channels;
        for (int64_t n = 0; n < run.count; n++) __builtin_memcpy(out + n * padded, row + n * channels, channels * 4);
    }
};

// One head's blocks from `first` on as panels: `rows` [blocks, panel rows, padded], `columns` [blocks, channels, width] (transposed). Zero past
// the end.
struct Panels {
    int64_t first, row_size, column_size;
    Array<float> rows, columns;
    Panels(const Geometry& g, int64_t first, int64_t blocks, bool with_rows, bool with_columns)
        : first(first), row_size(g.rows() * g.padded), column_size(g.channels * g.width) {
        if (with_rows) rows.allocate((blocks - first) * row_size);
        if (with_columns) columns.allocate((blocks - first) * column_size + ROWS * g.width);  // `outer` reads the last rows in groups of ROWS
    }
    float* row(int64_t i) const { return rows + (i - first) * row_size; }
    float* column(int64_t i) const { return columns + (i - first) * column_size; }
};

// One block of keys as the exact part reads it: transposed keys and rows of values. Entries are floats, or hold BF16_DOTS
// bfloat16: as many channels of a key in the columns, as many keys in the rows.
template <class E>
struct Block {
    const E* columns;
    int64_t columns_ld;
    const E* rows;
    int64_t rows_ld;
};

#if BF16_DOTS
// Blocks of such entries, from bfloat16 tensors: `columns` [blocks, channels / BF16_DOTS, width], `rows` [blocks, width / BF16_DOTS, padded].
struct Pairs {
    const Geometry& g;
    int64_t row_size, column_size;
    Array<Entry> rows, columns;
    explicit Pairs(const Geometry& g)
        : g(g), row_size(g.width / BF16_DOTS * g.padded), column_size(g.channels / BF16_DOTS * g.width), rows((g.p.k_blocks + g.text_blocks) * row_size),
          columns((g.p.k_blocks + g.text_blocks) * column_size) {}

    // `space`: width rows of channels
    void fill(int64_t bh, int64_t j, uint16_t* space) {
        Run run = g.key(j);
        int64_t d = g.channels;
        copy_rows(space, d, g.p.k, bh / g.p.heads, g.head(bh), run, d);
        g.clear_masked(space, d, bh, j);
        Entry* column = columns + j * column_size;
        for (int64_t c = 0; c < d / BF16_DOTS; c++)
            for (int64_t n = 0; n < run.count; n++) __builtin_memcpy(column + c * g.width + n, space + n * d + BF16_DOTS * c, sizeof(Entry));
        copy_rows(space, d, g.p.v, bh / g.p.heads, g.head(bh), run, d);
        g.clear_masked(space, d, bh, j);
        Entry* row = rows + j * row_size;
        for (int64_t n = 0; n < run.count; n += BF16_DOTS)
            join_rows(row + n / BF16_DOTS * g.padded, space + n * d, d, std::min<int64_t>(BF16_DOTS, run.count - n), d);
    }
    // Entries of `count` rows, zero for those that are missing.
    static void join_rows(Entry* out, const uint16_t* rows, int64_t ld, int64_t count, int64_t channels) {
        typedef std::make_unsigned<Entry>::type Bits;
        for (int64_t c = 0; c < channels; c++) {
            Bits joined = rows[c];
            for (int64_t i = 1; i < BF16_DOTS; i++) joined |= (i < count ? Bits(rows[i * ld + c]) : Bits(0)) << (16 * i);
            out[c] = Entry(joined);
        }
    }
    Block<Entry> block(int64_t j) const { return {columns + j * column_size, g.width, rows + j * row_size, g.padded}; }
};
#endif
