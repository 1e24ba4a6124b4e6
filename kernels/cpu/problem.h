// One call of the operator, as Python fills it in (native.py mirrors these structs field by field, arguments in the order of arguments.py). Plain C: no torch, no C++ types.
#pragma once
#include <cstdint>

// Whether there is code for AMX: the compiler must know it, and Linux is asked for the permission to use it.
#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define WITH_AMX 1
#else
#define WITH_AMX 0
#endif

// Whether there is code for bfmmla: the assembler must know it, and Linux says whether the CPU has it.
#if defined(__aarch64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 10))
#define WITH_BFMMLA 1
#else
#define WITH_BFMMLA 0
#endif

struct Rows {  // `[B, H, N, D]` by strides in elements; channels are contiguous
    void* data;
    int64_t batch, head, row;
    int32_t bf16;  // 1: bfloat16, 0: float32
    int32_t unused;
};

enum Rest { REST_NONE = 0, REST_POOLED = 1, REST_LINEAR = 2 };
enum FeatureMap { PHI_SOFTMAX = 0, PHI_ELU = 1, PHI_RELU = 2 };

struct Problem {
    int64_t batch, heads, channels;
    int64_t image_q, image_k;                                // image tokens in q, and in k and v
    int64_t q_blocks, k_blocks, list_width, lists_per_head;  // lists_per_head 0: one set of lists for all heads
    int64_t extra, n_windows, pools;                         // pools: pooled keys that are given, 0: the kernel pools, one for a block
    int64_t pool_width;                                      // of pool_lists
    // the arguments
    Rows q, k, v;
    const int32_t *lists, *counts, *full;     // [L, q_blocks, list_width], [L, q_blocks]: visited blocks, the `full` ones first
    const int32_t *q_starts, *k_starts;       // [q_blocks + 1], [k_blocks + 1]: first image token of each block
    const int32_t* coords;                    // [3, image_k + PADDING]: frame, row, column of each image key, in the blocks' order, read with windows alone
    int64_t q_width, k_width;                 // the most tokens that a block holds
    int64_t text;                             // tokens of k and v that are text
    int32_t text_first;                       // 1: the text's tokens come before the image's
    float scale;
    int64_t text_q;                           // tokens of q that are text
    const int32_t* windows;                   // [n_windows, 3 axes, (first, last, residue), image_q + PADDING], in the blocks' order
    const int32_t* residues;                  // [n_windows, 3 axes, image_k + PADDING]: the keys' own; null: those of the windows
    const int64_t *masks, *masks_t;           // [M, q_width, ceil(k_width / 64)], [M, k_width, ceil(q_width / 64)]: bits, see mask.h; or null
    const int32_t* mask_of;                   // as `lists`: which of the masks an entry from `full` on has; null without masks
    const int32_t *places_q, *places_k;       // [image_q], [image_k]: where each token of the blocks' order is among the image's; null: in that order
    const float *extra_k, *extra_v;           // [B, H, extra, D]: keys that all image queries see in addition to the text's
    const float *pooled_k, *pooled_v, *pooled_bias;  // [B, H, pools, D], [B, H, pools], natural logarithm: pooled keys as they are given, block by block
    const float* pooled_var;                  // [B, H, pools, D]: variances of their keys, where there is a variance term
    const float* slopes;                      // [B, H, q_blocks or spans, D of q, D of out], or null: times scale · q and the share of pooled keys, joins the output
    const int32_t *pool_lists, *pool_counts;  // [B, H, spans, pool_width], [B, H, spans]: units that SPAN query blocks in a row see; null: all key blocks
    const int32_t* pool_slots;                // [k_blocks]: the unit that a key block is, or null: they are the units
    const float* far_states;                  // [B, H, D + 1, D]: Σ phi(k) vᵀ, then Σ phi(k), of keys in addition to those of all blocks, of a linear rest; or null
    const float *offset, *weight, *bias;      // [H] log mass offset; [D, D] and [D] projection; null where absent
    const float* text_bias;                   // [batch, text], natural logarithm, added to the logits of the text's keys; null where absent
    int32_t rest, feature_map, log_count, variance, linear_all, residual;
    int64_t pool_parts;                       // pooled keys of a unit, read with pool_slots
    float cap;
    // the results
    Rows out;
    float* lse;                               // [B, H, text_q + image_q], natural logarithm
    int64_t threads;
    // backward only
    Rows dout;
    const float* dlse;                        // [B, H, text_q + image_q] or null
    float *dq, *dk, *dv;                      // contiguous, in the shapes of q, k and v
    float *dextra_k, *dextra_v;               // [B, H, extra, D]
    float *dpooled_k, *dpooled_v, *dpooled_bias, *dpooled_var, *dslopes, *dfar_states;  // in the shapes of pooled_k, ...
    float *doffset, *dweight, *dbias;         // [B, H], [B, H, D, D], [B, H, D]: one part per head, summed by the caller
};

struct Selection {
    int64_t batch, heads, channels, q_blocks, k_blocks;
    // the arguments
    Rows q, k;  // image tokens only
    const int32_t *q_starts, *k_starts;
    int64_t q_width, k_width, top;
    const float* weight;                 // [k_blocks] factor of each block's score, or null
    const float* bias;                   // [B, H, k_blocks] joins each block's score, or null
    const int32_t *places_q, *places_k;  // as in a problem
    Rows v;                              // image tokens only, or null: then blocks are scored by the error that they would leave
    float scale, score_cap;              // as in a summary, read with v
    // the result
    int32_t* chosen;                     // [B, H, q_blocks, top], ascending
    int64_t threads;
};

struct Summary {
    int64_t batch, heads, channels, q_blocks, k_blocks;
    // the arguments
    Rows q, k, v;  // text and image
    const int32_t *q_starts, *k_starts;
    int64_t q_width, k_width, parts, text, text_q;
    int32_t text_first;
    float scale, cap, score_cap;
    int32_t log_count, first_order;
    const int32_t *places_q, *places_k;  // as in a problem
    // the results, contiguous
    float *q_mean, *k_mean, *score_bias;             // [B, H, q_blocks, D], [B, H, k_blocks, D], [B, H, k_blocks]
    float *pooled_k, *pooled_v, *pooled_bias;        // [B, H, k_blocks · parts, D], [B, H, k_blocks · parts]
    float *slope, *second;                           // [B, H, D of k, k_blocks, D of v], null where it is not asked for; [B, H, D]
    float* metric;                                   // [B, H, D, D], null with one part
    float *tokens, *spread, *v_spread;                // [B, H, k_blocks · parts]
    uint8_t* part;                                   // [B, H, k_blocks, k_width]
    int64_t threads;
    // backward only
    const float *dq_mean, *dpooled_k, *dpooled_v, *dpooled_bias, *dslope, *dsecond, *dspread;  // null where nothing depends on them
    Rows dq, dk, dv;  // in the shapes of q, k and v; the image's rows alone are written
};

struct Mixture {
    int64_t batch, heads, channels, mixtures, units;
    // the arguments
    const float *weight, *slope;  // [B, H, mixtures, units]; as in a summary
    // the result
    float* out;  // [B, H, mixtures, D of k, D of v]
    int64_t threads;
    // backward only
    const float* dout;
    float *dweight, *dslope;
};

struct Grouping {
    int64_t batch, heads, channels, q_blocks, k_blocks, slots, list_width, lists_per_head;  // lists as in a problem
    int64_t width;                                    // of the lists that are made
    // the arguments, contiguous
    const float *q_mean, *pooled_k, *pooled_v;        // as in a summary of the slots of level 0
    const float *slope, *second, *metric, *tokens, *spread, *v_spread;
    const int32_t *lists, *counts, *place, *q_starts;  // place [k_blocks]: the slot of each key block
    int64_t parts, roots, opened;
    float scale, cap, score_cap;
    int32_t log_count;
    // the results, contiguous; units: of all levels, spans: SPAN query blocks each
    float *joined_k, *joined_v, *joined_bias;         // [B, H, units · parts, D], [B, H, units · parts]
    float* slopes;                                    // [B, H, spans, D, D]; it, `above` and `shares` are null where there is no slope
    int32_t *pool_lists, *pool_counts;                // [B, H, spans, width], [B, H, spans]
    float *above, *joined_tokens, *joined_spread;     // [B, H, D, units - slots, D]: slopes of groups; [B, H, units · parts]
    float* shares;                                    // [B, H, spans, width, parts]
    uint8_t* part;                                    // [B, H, units - slots, 4 · parts]
    int64_t threads;
    // backward only
    const float *djoined_k, *djoined_v, *djoined_bias, *dslopes;  // null where nothing depends on them
    float *dq_mean, *dpooled_k, *dpooled_v, *dslope, *dsecond, *dspread;
};
