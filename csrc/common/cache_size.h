#pragma once
#include <cstdint>

#ifdef __linux__
#include <unistd.h>
#endif

namespace gossamer {

// Bytes of a core's second-level cache; where the system does not tell, what most have at least.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (known > 0) return known;
#endif
  return 512 << 10;
}

}  // namespace gossamer
