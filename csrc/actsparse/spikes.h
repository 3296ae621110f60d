#pragma once
// Binary inputs, eight to a byte: input k of a token is bit k mod 8 of its byte k / 8. The bits
// past the last input are 0.
//
//   x = 0 1 1 0 0 0 0 0 1   bits = 0b00000110 0b00000001
//
// A linear layer of them only adds: y[t] is the sum of the rows of W [K, N] whose bits are set, a
// bag of topk.h with scales of 1.
#include <cstdint>
#include <vector>

namespace pybind11 {
class module_;
}

namespace gossamer::actsparse::spikes {

// The inputs that are set, token by token.
struct Set {
  std::vector<int64_t> begins;  // [tokens + 1]
  std::vector<uint32_t> inputs;
};
Set find_set(const uint8_t* bits, int64_t tokens, int64_t features, int threads);

// Packs x [tokens, features], its rows `stride` apart; returns the first place whose entry is
// neither 0 nor 1, or -1.
template <class Word>
int64_t pack(const Word* x, int64_t stride, int64_t tokens, int64_t features, Word one,
             uint8_t* bits, int threads);

void bind(pybind11::module_& m);

}  // namespace gossamer::actsparse::spikes
