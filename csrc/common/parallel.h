#pragma once
// The one place that starts threads. The caller says how many (torch.get_num_threads() read at the
// border: a fresh thread would otherwise get the runtime's default); a forked child runs serially,
// because an OpenMP region started before the fork would hang in it.
#include <algorithm>
#include <cstdint>
#include <functional>

namespace gossamer {

// Calls body(thread, team) once on each thread of a team of at most `threads`. An exception thrown
// by any of them is rethrown to the caller.
void parallel_run(int threads, const std::function<void(int thread, int team)>& body);

// How many of `threads` are worth waking for so many bytes of memory traffic: a thread takes some
// microseconds to join, in which another moves about this much.
inline int threads_for_bytes(int threads, int64_t bytes) {
  constexpr int64_t kBytesPerThread = 64 << 10;
  return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max(threads, 1)));
}

// The same for so many multiply-adds: below 65,536 a second thread costs more than it brings.
inline int threads_for_work(int threads, double multiply_adds) {
  constexpr int kWorkPerThread = 1 << 16;
  return static_cast<int>(
      std::clamp<double>(multiply_adds / kWorkPerThread, 1, std::max(threads, 1)));
}

// Splits [0, count) into one contiguous range a thread, the first ones longer by one.
template <class Body>
void parallel_ranges(int threads, int64_t count, const Body& body) {
  const auto team_wanted = static_cast<int>(std::min<int64_t>(threads, count));
  if (count == 0) return;
  parallel_run(team_wanted, [&](int thread, int team) {
    const int64_t share = count / team, longer = count % team;
    const int64_t begin = share * thread + std::min<int64_t>(thread, longer);
    body(begin, begin + share + (thread < longer ? 1 : 0));
  });
}

}  // namespace gossamer
