// Everything that is compiled once per instruction set. The including file sets TARGET (a namespace), LANES, ROWS, STRIP and BF16_DOTS.

namespace TARGET {

static constexpr int64_t POOL = 64, MAX_CHANNELS = 256;

#include "simd.h"
#include "tile.h"

alignas(64) static const int32_t LANE_NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#define LANE load(LANE_NUMBERS)

#include "pack.h"
#include "mask.h"
#include "softmax.h"
#include "pooled.h"
#include "linear.h"
#include "forward.h"
#include "backward.h"
#include "select.h"

}  // namespace TARGET
