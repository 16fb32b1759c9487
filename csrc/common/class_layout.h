// Rows in class order: which queries share a class, where their positives lie, where each positive pair is kept.
#pragma once
#include <cstdint>
#include <vector>

namespace fastret {

// Sorted queries [query, query_end) all have the sorted gallery rows [item, item_end) as positives.
struct ClassBlock {
  int64_t query, query_end, item, item_end;
};

struct ClassLayout {
  std::vector<int64_t> query_order;  // sorted place -> row of x
  std::vector<int64_t> start, end;   // by sorted place: its positives are the sorted gallery rows [start, end)
  std::vector<int64_t> pair;         // by sorted place: first pair in sorted order; one more entry than queries
  std::vector<int64_t> out;          // by sorted place: first pair in the caller's order
  std::vector<ClassBlock> by_query, by_item;  // classes cut into pieces of <= kClassRows queries, or gallery rows
  int64_t largest = 0;  // rows of the largest class
  bool queries_in_order = true, items_in_order = true;
  int64_t pairs() const { return pair.back(); }
};

constexpr int64_t kClassRows = 64;

// order (m), start (n), count (n) as backends/segments.py makes them; symmetric: queries are sorted like the gallery.
// Throws std::invalid_argument when they do not describe disjoint classes.
ClassLayout class_layout(const int64_t* order, const int64_t* start, const int64_t* count, int64_t n, int64_t m,
                         bool symmetric);

// Leaders of the cycles of p -> order[p] longer than one, to permute rows in place.
std::vector<int64_t> cycle_leaders(const int64_t* order, int64_t n);

}  // namespace fastret
