#pragma once
// The portable form of panels, for the serial kernels, which read no other. Not for units of one
// instruction set: it has standard templates.
#include <vector>

#include "sparse24/sparse24.h"

namespace gossamer::sparse24 {

class PortableForm {
 public:
  explicit PortableForm(const Weight& panels)
      : values_(panels.n * panels.value_columns() * size_of(panels.dtype)),
        indices_(panels.n * panels.index_bytes()) {
    from_panels(panels, 0, panels.blocks(), values_.data(), indices_.data());
  }
  // Makes a weight that has the panels, and may say more than they do, read this form.
  void give_to(Weight& weight) const {
    weight.values = values_.data();
    weight.indices = indices_.data();
    weight.panels = nullptr;
  }

 private:
  std::vector<char> values_;
  std::vector<uint8_t> indices_;
};

}  // namespace gossamer::sparse24
