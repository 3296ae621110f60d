#pragma once
// User mistakes become ValueError (pybind11 maps std::invalid_argument) with the values in the
// text.
#include <sstream>
#include <stdexcept>

namespace gossamer {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace gossamer

#define GOSSAMER_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::gossamer::fail(__VA_ARGS__); \
  } while (false)
