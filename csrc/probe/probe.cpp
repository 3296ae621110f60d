#include "probe/probe.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/target.h"
#include "probe/probe_loops.h"

namespace gossamer::probe {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line, and the alignment of the widest load

// A trial is long against the start of a parallel region and the timer's step, short against a
// time slice taken away by the system; the best of some is what the machine can do undisturbed.
constexpr double kTrialSeconds = 0.01;
constexpr int kTrials = 12;

struct Chains {
  float (*run)(int64_t steps);
  int64_t flops_per_step;
};

using ReadLines = uint64_t (*)(const void* data, int64_t lines);

[[maybe_unused]] bool machine_has(const std::string& target) {
  const std::vector<std::string> targets = machine_targets();
  return std::find(targets.begin(), targets.end(), target) != targets.end();
}

Chains choose_chains([[maybe_unused]] const std::string& dtype) {
#ifdef GOSSAMER_AMX
  if (dtype == "bfloat16" && machine_has("amx_bf16")) return {tiles_amx_bf16, kFlopsAMXBF16};
#endif
#ifdef GOSSAMER_X86
  if (dtype == "bfloat16" && machine_has("avx512_bf16")) {
    return {chains_avx512_bf16, kFlopsAVX512BF16};
  }
  if (machine_has("avx512")) return {chains_avx512, kFlopsAVX512};
  if (machine_has("avx2")) return {chains_avx2, kFlopsAVX2};
#endif
  return {chains_serial, kFlopsSerial};
}

ReadLines choose_read() {
#ifdef GOSSAMER_X86
  if (machine_has("avx512")) return read_avx512;
  if (machine_has("avx2")) return read_avx2;
#endif
  return read_serial;
}

// Calls work(repeats), which does the same work `repeats` times over and returns how many units of
// it were done, with enough repeats for a trial; the best rate of all trials, in units a second.
template <class Work>
double best_rate(const Work& work) {
  using Clock = std::chrono::steady_clock;
  int64_t repeats = 1;
  double best = 0.0;
  for (int trial = 0; trial < kTrials;) {
    const auto start = Clock::now();
    const double units = work(repeats);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (seconds < kTrialSeconds / 2) {
      repeats = seconds < kTrialSeconds / 20
                    ? repeats * 10
                    : static_cast<int64_t>(static_cast<double>(repeats) * kTrialSeconds / seconds);
      continue;
    }
    best = std::max(best, units / seconds);
    ++trial;
  }
  return best;
}

}  // namespace

double measure_peak(const std::string& dtype, int threads) {
  GOSSAMER_CHECK(dtype == "float32" || dtype == "bfloat16" || dtype == "float16",
                 "measure_peak: dtype must be float32, bfloat16 or float16, got ", dtype);
  GOSSAMER_CHECK(threads >= 1, "measure_peak: threads must be at least 1, got ", threads);
  // About a millisecond, so that a team that once waits for a thread which the system holds up does
  // not pass for a trial of full length.
  const Chains chains = choose_chains(dtype);
  const int64_t steps = 150'000'000 / chains.flops_per_step;
  volatile float sink = 0.0f;
  return best_rate([&](int64_t repeats) {
    int team_size = 1;
    parallel_run(threads, [&](int thread, int team) {
      const float sum = chains.run(steps * repeats);
      if (thread != 0) return;
      sink = sum;
      team_size = team;
    });
    return static_cast<double>(chains.flops_per_step * steps) * static_cast<double>(repeats) *
           team_size;
  });
}

double measure_read_bandwidth(int64_t bytes, int threads) {
  GOSSAMER_CHECK(bytes >= kLine, "measure_read_bandwidth: bytes must be at least ", kLine, ", got ",
                 bytes);
  GOSSAMER_CHECK(threads >= 1, "measure_read_bandwidth: threads must be at least 1, got ", threads);
  struct alignas(kLine) Line {
    uint64_t words[kLine / sizeof(uint64_t)];
  };
  const int64_t lines = bytes / kLine;
  const auto count = static_cast<size_t>(lines);
  const std::unique_ptr<Line[]> buffer(new Line[count]);
  // Pages that were never written may all be one page of zeros, which would be read from cache.
  parallel_ranges(threads, lines, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      for (uint64_t& word : buffer[static_cast<size_t>(line)].words)
        word = static_cast<uint64_t>(line);
    }
  });
  const ReadLines read = choose_read();
  volatile uint64_t sink = 0;
  return best_rate([&](int64_t repeats) {
    parallel_ranges(threads, lines, [&](int64_t begin, int64_t end) {
      uint64_t checksum = 0;
      for (int64_t pass = 0; pass < repeats; ++pass) {
        checksum += read(buffer.get() + begin, end - begin);
      }
      if (begin == 0) sink = checksum;
    });
    return static_cast<double>(lines * kLine) * static_cast<double>(repeats);
  });
}

}  // namespace gossamer::probe
