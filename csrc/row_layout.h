// Tensors of one shape as rows along their last dim: (outer, mid, inner, columns), whatever their strides.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "params.h"

namespace fastattn {

template <size_t Count>
struct RowLayout {
  RowSizes sizes;
  std::array<RowStrides, Count> strides;      // of each tensor
  std::array<int64_t, Count> column_strides;  // 1 where there is one column
};

// The tensors in the memory order of the last one; none if they need more than three row dims. `inner_alone`: the last
// dim but one has to be the inner one, by itself.
template <size_t Count>
std::optional<RowLayout<Count>> row_layout(const std::array<at::Tensor, Count>& tensors, bool inner_alone) {
  struct Group {
    int64_t size;
    std::array<int64_t, Count> strides;
  };
  const at::Tensor& model = tensors.back();
  const int64_t last = model.dim() - 1;
  const auto group_of = [&](int64_t dim) {
    Group group = {model.size(dim), {}};
    for (size_t t = 0; t < Count; ++t) {
      group.strides[t] = group.size == 1 ? 0 : tensors[t].stride(dim);
    }
    return group;
  };
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < last - static_cast<int64_t>(inner_alone); ++dim) {
    if (model.size(dim) != 1) {
      dims.push_back(dim);
    }
  }
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return model.stride(a) > model.stride(b); });
  std::vector<Group> groups;
  for (const int64_t dim : dims) {
    const Group group = group_of(dim);
    bool joins = !groups.empty();
    for (size_t t = 0; joins && t < Count; ++t) {
      joins = groups.back().strides[t] == group.strides[t] * group.size;
    }
    if (joins) {
      groups.back() = {groups.back().size * group.size, group.strides};
    } else {
      groups.push_back(group);
    }
  }
  if (inner_alone) {
    groups.push_back(group_of(last - 1));
  }
  if (groups.size() > 3) {
    return std::nullopt;
  }
  groups.insert(groups.begin(), 3 - groups.size(), Group{1, {}});
  RowLayout<Count> layout;
  layout.sizes = RowSizes(groups[0].size, groups[1].size, groups[2].size, model.size(last));
  for (size_t t = 0; t < Count; ++t) {
    layout.strides[t] = {groups[0].strides[t], groups[1].strides[t], groups[2].strides[t]};
    layout.column_strides[t] = model.size(last) == 1 ? 1 : tensors[t].stride(last);
  }
  return layout;
}

}  // namespace fastattn
