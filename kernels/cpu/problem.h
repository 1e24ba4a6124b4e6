// One call of the operator, as Python fills it in (native.py mirrors this struct field by field). Plain C: no torch, no C++ types.
#pragma once
#include <cstdint>

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
    int64_t text, text_start, image, image_start;  // tokens; where each run begins in the sequence
    int64_t q_blocks, k_blocks, list_width, lists_per_head;  // lists_per_head 0: one set of lists for all heads
    int64_t extra;                                           // keys that all image queries see beside the text's
    Rows q, k, v, out;
    const int32_t *q_starts, *k_starts;      // [q_blocks + 1], [k_blocks + 1]: first image token of each block
    const int32_t *lists, *counts, *full;    // [L, q_blocks, list_width], [L, q_blocks]: visited blocks, the `full` ones first
    const int32_t* places;                   // [image]: where each token of the blocks' order is among the image's tokens; null: in that order
    const int32_t* coords;                   // [3, image]: frame, row, column of each image token, in the blocks' order as all below
    const int32_t* windows;                  // [n_windows, 3 axes, (first, last, residue), image]
    int64_t n_windows, reach;                // reach: largest squared distance inside the disc, -1 for no disc
    const float *extra_k, *extra_v;          // [B, H, extra, D]
    const float *offset, *weight, *bias;     // [H] log mass offset; [D, D] and [D] projection; null where absent
    const float* text_bias;                  // [batch, text], natural logarithm, added to the logits of the text's keys; null where absent
    int32_t rest, log_count, variance, feature_map, linear_all, residual;
    float scale, cap;
    float* lse;  // [B, H, text + image], natural logarithm
    int64_t threads;
    // backward only
    Rows dout;
    const float* dlse;                       // [B, H, text + image] or null
    float *dq, *dk, *dv;                     // [B, H, text + image, D]
    float *dextra_k, *dextra_v;              // [B, H, extra, D]
    float *doffset, *dweight, *dbias;        // [B, H], [B, H, D, D], [B, H, D]: one part per head, summed by the caller
};

struct Selection {
    int64_t batch, heads, channels, q_blocks, k_blocks, top;
    Rows q, k;  // image tokens only
    const int32_t *q_starts, *k_starts;
    const int32_t* places;  // [image] as in a problem, or null
    const float* weight;  // [k_blocks] factor of each block's score, or null
    int32_t* lists;       // [B, H, q_blocks, top], ascending
    int64_t threads;
};
