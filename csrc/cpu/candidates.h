// Candidates of a search for the best, as integers: score above and column below, greater where it is better: of equal
// scores the lowest column. That order is total, so which thread met a candidate when, and in which part of the columns,
// changes nothing.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/array.h"
#include "best_first.h"
#include "simd.h"

FASTRET_ISA_BEGIN

template <class T> using Key = std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>;

// Of a score that is not NaN. Both zeros are one score. Negative numbers turned over, all integers ascend with scores.
template <class T> inline Key<T> key_of(T score, int64_t column) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Word sign = Word(1) << (8 * sizeof(T) - 1);
  Word bits = 0;
  if (score != T(0)) std::memcpy(&bits, &score, sizeof bits);
  bits ^= bits & sign ? ~Word(0) : sign;
  return Key<T>(bits) << (8 * sizeof(T)) | uint32_t(~uint32_t(column));
}

template <class T> inline int64_t column_of(Key<T> key) { return uint32_t(~uint32_t(key)); }

template <class T> inline T score_of(Key<T> key) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Word sign = Word(1) << (8 * sizeof(T) - 1);
  Word bits = Word(key >> (8 * sizeof(T)));
  bits ^= bits & sign ? sign : ~Word(0);
  T score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The best `keep` come first, the worst of them last; returns how many there are.
template <class Key> int64_t keep_best(Key* candidates, int64_t count, int64_t keep) {
  if (count > keep) select_best(candidates, count, keep);
  return std::min(count, keep);
}

// Lists of parts, each with `keep` places, become one without gaps; returns its length.
template <class Key> int64_t join(Key* lists, const int64_t* counts, int64_t parts, int64_t keep) {
  int64_t count = 0;
  for (int64_t part = 0; part < parts; ++part) {
    std::memmove(lists + count, lists + part * keep, counts[part] * sizeof *lists);
    count += counts[part];
  }
  return count;
}

// Row i of the results: the best `keep`, sorted, then nobody. sign: turns what was great back into a score.
template <class T>
void deliver(Key<T>* candidates, int64_t count, int64_t keep, T sign, int64_t first_column, int64_t i,
             const Array& scores, const Array& indices) {
  const int64_t kept = keep_best(candidates, count, keep);
  sort_best(candidates, kept);
  T* score = scores.as<T>() + i * scores.stride;
  int64_t* index = indices.as<int64_t>() + i * indices.stride;
  for (int64_t c = 0; c < kept; ++c) {
    score[c] = sign * score_of<T>(candidates[c]);
    index[c] = first_column + column_of<T>(candidates[c]);
  }
  std::fill(score + kept, score + scores.cols, sign * kNothing<T>);
  std::fill(index + kept, index + indices.cols, int64_t(-1));
}

FASTRET_ISA_END
