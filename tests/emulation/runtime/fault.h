#pragma once
// What is wrong with a kernel becomes a Fault: an exception whose text names the block, the thread
// and the line of the kernel that asked for the operation.
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace gossamer::emulation {

// Every twin of an instruction takes one as its last, defaulted argument: the caller's line.
using Site = std::source_location;

inline bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name());
}

inline std::string text_of(const Site& site) {
  const std::string_view path = site.file_name();
  const std::string_view file = path.substr(path.rfind('/') + 1);  // npos + 1 is 0
  return std::string(file) + ":" + std::to_string(site.line());
}

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string where_running();  // "block (0, 0, 0) thread (5, 0, 0)", or nothing outside a launch

template <class... Parts>
[[noreturn]] void fault(const Site& site, const Parts&... parts) {
  std::ostringstream text;
  text << where_running() << text_of(site) << ": ";
  (text << ... << parts);
  throw Fault(text.str());
}

}  // namespace gossamer::emulation
