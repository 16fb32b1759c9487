// A borrowed, row-strided matrix as Python describes it: the only form in which memory enters the C++ side.
// The caller states how many bytes may be touched; every entry point checks shapes against that before use.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastret {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, i64 = 4, u8 = 5, u16 = 6 };

inline bool is_float(DType t) { return t < DType::i64; }

inline int64_t item_size(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32: return 4;
    case DType::u8: return 1;
    default: return 2;
  }
}

struct Array {
  void* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;  // stride: elements between the starts of two rows
  DType dtype = DType::f32;
  int64_t bytes = 0;  // bytes that may be touched from data on

  template <class T> T* as() const { return static_cast<T*>(data); }
  bool empty() const { return rows == 0 || cols == 0; }
};

inline void require(bool ok, const char* name, const std::string& what) {
  if (!ok) throw std::invalid_argument(std::string(name) + ": " + what);
}

// Refuses an array whose shape, type or extent is not what the kernel is going to read or write.
inline void check(const Array& a, const char* name, int64_t rows, int64_t cols) {
  require(a.rows == rows && a.cols == cols, name,
          "expected shape (" + std::to_string(rows) + ", " + std::to_string(cols) + "), got (" +
              std::to_string(a.rows) + ", " + std::to_string(a.cols) + ")");
  require(a.rows >= 0 && a.cols >= 0 && a.stride >= (a.rows > 1 ? a.cols : 0), name, "rows overlap");
  if (a.empty()) return;
  require(a.data != nullptr, name, "null pointer");
  require(((a.rows - 1) * a.stride + a.cols) * item_size(a.dtype) <= a.bytes, name, "reaches beyond its storage");
}

inline void check(const Array& a, const char* name, int64_t rows, int64_t cols, DType dtype) {
  require(a.dtype == dtype, name, "unexpected dtype code " + std::to_string(static_cast<int>(a.dtype)));
  check(a, name, rows, cols);
}

}  // namespace fastret
