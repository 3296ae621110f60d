#include "common/target.h"

#include <atomic>
#include <cstdlib>

#include "common/check.h"

namespace gossamer {
namespace {

constexpr const char* kNames[] = {"serial", "avx2", "avx512", "avx512_bf16"};

Target detect() {
#ifdef GOSSAMER_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Target::kAVX512BF16;
  if (avx512) return Target::kAVX512;
  if (avx2) return Target::kAVX2;
#endif
  return Target::kSerial;
}

Target best() {
  static const Target detected = detect();
  return detected;
}

Target parse(const std::string& wanted, const char* source) {
  std::string available;
  for (int t = 0; t <= static_cast<int>(best()); ++t) {
    if (wanted == kNames[t]) return static_cast<Target>(t);
    available += std::string(t ? ", " : "") + kNames[t];
  }
  fail(source, ": target '", wanted, "' is not available here; available: ", available);
}

std::atomic<Target>& in_force() {
  static std::atomic<Target> current = [] {
    const char* wanted = std::getenv("GOSSAMER_TARGET");
    return wanted != nullptr && *wanted != '\0' ? parse(wanted, "GOSSAMER_TARGET") : best();
  }();
  return current;
}

std::vector<std::string> names_up_to(Target last) {
  return {kNames, kNames + static_cast<int>(last) + 1};
}

}  // namespace

const char* name(Target target) { return kNames[static_cast<int>(target)]; }

std::vector<std::string> targets_built() {
#ifdef GOSSAMER_X86
  return names_up_to(Target::kAVX512BF16);
#else
  return names_up_to(Target::kSerial);
#endif
}

std::vector<std::string> machine_targets() { return names_up_to(best()); }

Target target() { return in_force().load(std::memory_order_relaxed); }

bool intel_cores() {
#ifdef GOSSAMER_X86
  static const bool intel = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
  }();
  return intel;
#else
  return false;
#endif
}

void force_target(const std::string& wanted) {
  in_force().store(wanted.empty() ? best() : parse(wanted, "force_target"),
                   std::memory_order_relaxed);
}

}  // namespace gossamer
