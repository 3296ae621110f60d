#pragma once
#include <cstdint>

#ifdef __linux__
#include <unistd.h>
#endif

namespace gossamer {

// Bytes of a core's first-level cache of data; where the system does not tell, what most have at
// least.
inline int64_t l1_bytes() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const long known = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (known > 0) return known;
#endif
  return 32 << 10;
}

// The same of its second-level cache.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long known = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (known > 0) return known;
#endif
  return 512 << 10;
}

}  // namespace gossamer
