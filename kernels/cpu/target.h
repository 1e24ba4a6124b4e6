// Everything that is compiled once per instruction set. The including file sets TARGET (a namespace), LANES, ROWS, STRIP,
// BF16_DOTS (how many bfloat16 an instruction multiplies and adds up, 0: it has none) and AMX (bfloat16 is multiplied in tiles).

namespace TARGET {

static constexpr int64_t POOL = 64, SPAN = 4, MAX_CHANNELS = 256;

#include "simd.h"
#include "tile.h"

alignas(64) static const int32_t LANE_NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#define LANE load(LANE_NUMBERS)
alignas(64) static const int32_t LANE_BITS[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

#include "pack.h"
#include "mask.h"
#include "softmax.h"
#if AMX
#include "amx.h"
#endif
#include "pooled.h"
#include "linear.h"
#if AMX
#include "amx_rest.h"
#endif
#include "forward.h"
#include "backward.h"
#include "summaries.h"
#include "select.h"
#include "backward_summaries.h"
#include "slopes.h"
#include "groups.h"
#include "backward_groups.h"

}  // namespace TARGET
