#pragma once
// The asynchronous matrix products of one warp: each of the four warps of a warpgroup computes its
// own 16 rows, so no meeting of the warpgroup is needed, only that all four ask for the same.
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "runtime/fault.h"

namespace gossamer::emulation {

struct Product {
  std::function<void(Product&)> compute;  // from shared memory and `sum`, into `sum`
  std::shared_ptr<Product> before;        // still under way: adds to its sum
  std::vector<uint32_t> sum;              // bits of D, [lane][registers]
  std::array<uint32_t*, 32> to;           // each lane's registers of D
  int registers = 0;
  bool computed = false;
  Site site;

  void finish();
  void check_untouched() const;  // throws if a lane has written to its registers since the issue
};

class Products {
 public:
  void fence() { fenced_ = true; }
  void issue(std::shared_ptr<Product> product, bool accumulate);
  void commit();
  void wait(size_t pending);
  bool fenced() const { return fenced_; }
  const Product* first_pending() const;
  size_t issued() const { return issued_; }

 private:
  std::shared_ptr<Product> latest_on(const uint32_t* registers) const;
  bool fenced_ = false;
  size_t issued_ = 0;
  std::vector<std::shared_ptr<Product>> open_;
  std::deque<std::vector<std::shared_ptr<Product>>> groups_;  // committed, oldest first
};

}  // namespace gossamer::emulation
