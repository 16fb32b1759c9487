#include "class_layout.h"

#include "array.h"
#include "plan.h"

namespace fastret {
namespace {

// Places 0..size-1 sorted by key, stable; keys lie in [0, keys).
std::vector<int64_t> counting_sort(const int64_t* key, int64_t size, int64_t keys) {
  std::vector<int64_t> at(keys + 1, 0), sorted(size);
  for (int64_t i = 0; i < size; ++i) ++at[key[i] + 1];
  for (int64_t k = 0; k < keys; ++k) at[k + 1] += at[k];
  for (int64_t i = 0; i < size; ++i) sorted[at[key[i]]++] = i;
  return sorted;
}

bool is_identity(const int64_t* order, int64_t size) {
  for (int64_t i = 0; i < size; ++i)
    if (order[i] != i) return false;
  return true;
}

}  // namespace

ClassLayout class_layout(const int64_t* order, const int64_t* start, const int64_t* count, int64_t n, int64_t m,
                         bool symmetric) {
  std::vector<bool> seen(m, false);
  for (int64_t j = 0; j < m; ++j) {
    require(order[j] >= 0 && order[j] < m && !seen[order[j]], "order", "not a permutation of the gallery rows");
    seen[order[j]] = true;
  }
  for (int64_t i = 0; i < n; ++i)
    require(start[i] >= 0 && count[i] >= 0 && start[i] <= m - count[i], "start, count", "reach beyond the gallery");

  ClassLayout layout;
  if (symmetric) {
    layout.query_order.assign(order, order + n);
  } else {
    std::vector<int64_t> key(n);  // queries without a match go last, where they cannot split a class
    for (int64_t i = 0; i < n; ++i) key[i] = count[i] ? start[i] : m;
    layout.query_order = counting_sort(key.data(), n, m + 1);
  }
  layout.items_in_order = is_identity(order, m);
  layout.queries_in_order = is_identity(layout.query_order.data(), n);

  std::vector<int64_t> first_pair(n + 1, 0);
  for (int64_t i = 0; i < n; ++i) first_pair[i + 1] = first_pair[i] + count[i];
  layout.start.resize(n);
  layout.end.resize(n);
  layout.out.resize(n);
  layout.pair.assign(n + 1, 0);
  for (int64_t p = 0; p < n; ++p) {
    const int64_t i = layout.query_order[p];
    layout.start[p] = start[i];
    layout.end[p] = start[i] + count[i];
    layout.out[p] = first_pair[i];
    layout.pair[p + 1] = layout.pair[p] + count[i];
    layout.largest = std::max(layout.largest, count[i]);
    if (symmetric) require(layout.start[p] <= p && p < layout.end[p], "start, count", "a row lies outside its own class");
  }

  int64_t covered = 0;  // classes must be disjoint: two threads add to the rows of two classes
  for (int64_t p = 0; p < n;) {
    int64_t last = p + 1;
    while (last < n && layout.start[last] == layout.start[p] && layout.end[last] == layout.end[p]) ++last;
    const ClassBlock block{p, last, layout.start[p], layout.end[p]};
    if (block.item < block.item_end) {
      require(block.item >= covered, "start, count", "classes overlap");
      covered = block.item_end;
      for_chunks(last - p, kClassRows, [&](int64_t a, int64_t b) {
        layout.by_query.push_back({p + a, p + b, block.item, block.item_end});
      });
      for_chunks(block.item_end - block.item, kClassRows, [&](int64_t a, int64_t b) {
        layout.by_item.push_back({p, last, block.item + a, block.item + b});
      });
    }
    p = last;
  }
  return layout;
}

std::vector<int64_t> cycle_leaders(const int64_t* order, int64_t n) {
  std::vector<bool> seen(n, false);
  std::vector<int64_t> leaders;
  for (int64_t p = 0; p < n; ++p) {
    if (seen[p] || order[p] == p) continue;
    leaders.push_back(p);
    for (int64_t q = p; !seen[q]; q = order[q]) seen[q] = true;
  }
  return leaders;
}

}  // namespace fastret
