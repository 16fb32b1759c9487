// Arrays and masks as Python describes them, for the one pybind11 file of each extension. Tensors come as plain tuples
// of integers, so that nothing here depends on PyTorch's headers or ABI; every one is checked against the sizes it
// states before a pointer is used. A struct has a caster, where a tuple would do: pybind11 spells out the types of all
// arguments as it compiles, and tuples of tuples of them took half a minute and 2.4 GB.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "array.h"
#include "pair_mask.h"

namespace fastret {

using MaybeArray = std::optional<Array>;  // None: there is none, or it is not wanted

inline Array array(const MaybeArray& a) { return a.value_or(Array{}); }

}  // namespace fastret

namespace pybind11::detail {

// Calls `use` with the parts of a Python tuple; false: it is none of these types.
template <class... Parts, class Use> bool load_parts(handle source, bool convert, Use use) {
  make_caster<std::tuple<Parts...>> parts;
  if (!parts.load(source, convert)) return false;
  std::apply(use, cast_op<std::tuple<Parts...>>(std::move(parts)));
  return true;
}

// (address, rows, cols, row stride, dtype code, bytes that may be touched); see fastret/backends/cpu/array.py
template <> struct type_caster<fastret::Array> {
  PYBIND11_TYPE_CASTER(fastret::Array, const_name("Array"));
  bool load(handle source, bool convert) {
    return load_parts<uintptr_t, int64_t, int64_t, int64_t, int, int64_t>(
        source, convert,
        [this](uintptr_t address, int64_t rows, int64_t cols, int64_t stride, int dtype, int64_t bytes) {
          fastret::require(dtype >= 0 && dtype <= static_cast<int>(fastret::DType::u16), "dtype",
                           "unknown code " + std::to_string(dtype));
          value = {reinterpret_cast<void*>(address), rows, cols, stride, static_cast<fastret::DType>(dtype), bytes};
        });
  }
};

template <> struct type_caster<fastret::PairMask::Relation> {
  PYBIND11_TYPE_CASTER(fastret::PairMask::Relation, const_name("Relation"));
  bool load(handle source, bool convert) {
    return load_parts<fastret::Array, fastret::Array>(
        source, convert, [this](const fastret::Array& row, const fastret::Array& col) { value = {row, col}; });
  }
};

// same, different, distinct, offset, period (0: none), above, below
template <> struct type_caster<fastret::PairMask> {
  PYBIND11_TYPE_CASTER(fastret::PairMask, const_name("PairMask"));
  bool load(handle source, bool convert) {
    using Relation = fastret::PairMask::Relation;
    using MaybeRelation = std::optional<Relation>;
    using fastret::MaybeArray;
    return load_parts<MaybeRelation, MaybeRelation, MaybeRelation, std::optional<int64_t>, int64_t, MaybeArray,
                      MaybeArray>(
        source, convert,
        [this](const MaybeRelation& same, const MaybeRelation& different, const MaybeRelation& distinct,
               std::optional<int64_t> offset, int64_t period, const MaybeArray& above, const MaybeArray& below) {
          value = {same.value_or(Relation{}), different.value_or(Relation{}), distinct.value_or(Relation{}),
                   offset.has_value(), offset.value_or(0), period, array(above), array(below)};
        });
  }
};

}  // namespace pybind11::detail
