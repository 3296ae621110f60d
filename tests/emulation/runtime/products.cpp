#include "runtime/products.h"

#include <algorithm>
#include <utility>

#include "runtime/schedule.h"
#include "runtime/shared_memory.h"

namespace gossamer::emulation {

void Product::finish() {
  if (computed) return;
  if (before != nullptr) {
    before->finish();
    sum = before->sum;
    before.reset();
  }
  compute(*this);
  computed = true;
}

void Product::check_untouched() const {
  for (size_t lane = 0; lane < to.size(); ++lane) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(to[lane]);
    const auto* end = bytes + registers * sizeof(uint32_t);
    if (std::all_of(bytes, end, [](unsigned char byte) { return byte == kPoison; })) continue;
    fault(site, "lane ", lane, " wrote to the registers of this wgmma before the wait for it");
  }
}

void Products::issue(std::shared_ptr<Product> product, bool accumulate) {
  ++issued_;
  if (accumulate) product->before = latest_on(product->to[0]);
  if (!accumulate) {
    std::fill(product->sum.begin(), product->sum.end(), 0u);
  } else if (product->before == nullptr) {
    for (size_t lane = 0; lane < product->to.size(); ++lane) {
      std::copy_n(product->to[lane], product->registers,
                  product->sum.begin() + static_cast<ptrdiff_t>(lane) * product->registers);
    }
  }
  // Until the wait, the registers may be anything.
  for (uint32_t* registers : product->to) poison(registers, product->registers * sizeof(uint32_t));
  if (schedule.early) product->finish();
  open_.push_back(std::move(product));
}

void Products::commit() { groups_.push_back(std::exchange(open_, {})); }

void Products::wait(size_t pending) {
  fenced_ = false;  // from here on, the kernel may touch registers
  while (groups_.size() > pending) {
    const auto group = std::move(groups_.front());
    groups_.pop_front();
    for (const std::shared_ptr<Product>& product : group) {
      product->check_untouched();
      product->finish();
      const uint32_t* own = product->to[0];
      const auto same = [own](const auto& later) { return later->to[0] == own; };
      const bool overtaken =
          latest_on(own) != nullptr ||
          std::find_if(group.rbegin(), group.rend(), same)->get() != product.get();
      if (overtaken) continue;  // a later one on the same registers is not done
      for (size_t lane = 0; lane < product->to.size(); ++lane) {
        std::copy_n(product->sum.begin() + static_cast<ptrdiff_t>(lane) * product->registers,
                    product->registers, product->to[lane]);
      }
    }
  }
}

const Product* Products::first_pending() const {
  for (const auto& group : groups_) {
    if (!group.empty()) return group.front().get();
  }
  return open_.empty() ? nullptr : open_.front().get();
}

std::shared_ptr<Product> Products::latest_on(const uint32_t* registers) const {
  const auto same = [registers](const auto& product) { return product->to[0] == registers; };
  const auto open = std::find_if(open_.rbegin(), open_.rend(), same);
  if (open != open_.rend()) return *open;
  for (auto group = groups_.rbegin(); group != groups_.rend(); ++group) {
    const auto found = std::find_if(group->rbegin(), group->rend(), same);
    if (found != group->rend()) return *found;
  }
  return nullptr;
}

}  // namespace gossamer::emulation
