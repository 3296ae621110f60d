#pragma once
// Which instruction sets this build has kernels for, which of them this machine runs, and the one
// in force: the best available, or the one forced by name (tests; GOSSAMER_TARGET at start).
#include <string>
#include <vector>

namespace gossamer {

// Each includes those before.
enum class Target : int { kSerial = 0, kAVX2, kAVX512, kAVX512BF16, kAMXBF16 };

const char* name(Target target);
std::vector<std::string> targets_built();
std::vector<std::string> machine_targets();
Target target();                             // the one in force
void force_target(const std::string& name);  // empty: back to the best; ValueError if unavailable

// Whether the cores are Intel's: where choices were measured on two kinds of cores, Zen 5 speaks
// for all others.
bool intel_cores();

}  // namespace gossamer
