// Standard headers, read before a translation unit turns its instruction set on, so that no shared inline function is compiled for it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory.h"
#include "problem.h"
