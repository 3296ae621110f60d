#pragma once
// The loops that the probe times, one set per instruction set. Plain functions only: the per-ISA
// units must not emit code that another unit could be linked against.
#include <cstdint>

namespace gossamer::probe {

// A chain's multiply-add waits for the one before it: 4 cycles, 6 for a bfloat16 dot product. Two
// may start per cycle, so 12 chains are the least that keeps every multiplier busy; 16 registers
// hold no more, the 32 of AVX-512 hold twice that. Every chain starts from another value that the
// arithmetic moves (so not from 1): of equal chains the compiler would run one, and of a constant
// one none.
constexpr int kChains = 12;
constexpr int kChainsAVX512 = 24;

// Floating-point operations of one step: chains x lanes x products a lane x 2.
constexpr int64_t kFlopsSerial = kChains * 4 * 1 * 2;
constexpr int64_t kFlopsAVX2 = kChains * 8 * 1 * 2;
constexpr int64_t kFlopsAVX512 = kChainsAVX512 * 16 * 1 * 2;
constexpr int64_t kFlopsAVX512BF16 = kChainsAVX512 * 16 * 2 * 2;
constexpr int64_t kFlopsAMXBF16 = 4 * 16 * 16 * 32 * 2;  // four products of 16 x 32 by 32 x 16

// Run `steps` steps of every chain; the result depends on all of them.
float chains_serial(int64_t steps);
float chains_avx2(int64_t steps);
float chains_avx512(int64_t steps);
float chains_avx512_bf16(int64_t steps);
float tiles_amx_bf16(int64_t steps);

// Read `lines` cache lines of 64 bytes from `data`, which is aligned to one; return a checksum.
uint64_t read_serial(const void* data, int64_t lines);
uint64_t read_avx2(const void* data, int64_t lines);
uint64_t read_avx512(const void* data, int64_t lines);

}  // namespace gossamer::probe
