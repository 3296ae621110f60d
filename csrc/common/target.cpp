#include "common/target.h"

#include <atomic>
#include <cstdlib>

#include "common/check.h"

#ifdef GOSSAMER_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace gossamer {
namespace {

constexpr const char* kNames[] = {"serial", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// The tiles are 8 KiB more to save for each thread, so Linux lets a process use them on request
// only.
[[maybe_unused]] bool may_use_amx() {
#if defined(GOSSAMER_AMX) && defined(__linux__)
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;  // of leaf 7, edx
  constexpr unsigned kAll = kBF16 | kTile | kInt8;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Target detect() {
#ifdef GOSSAMER_EMULATES_X86
  return Target::kAMXBF16;
#elif defined(GOSSAMER_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  // All that have the one have the other.
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    return may_use_amx() ? Target::kAMXBF16 : Target::kAVX512BF16;
  }
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
#ifdef GOSSAMER_AMX
  return names_up_to(Target::kAMXBF16);
#elif defined(GOSSAMER_X86)
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
