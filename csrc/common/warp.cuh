#pragma once
// The threads that run in step.

namespace gossamer {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp, as masks of votes and shuffles

}  // namespace gossamer
