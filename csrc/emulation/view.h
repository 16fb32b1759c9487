// A pointer that knows its bounds: what kernels get in place of global and shared memory. Every access is checked, and
// told to the shadow of the launch.
#pragma once
#include <type_traits>

#include "machine.h"

namespace fastret {
namespace emulation {

template <class T> class View;

// What indexing a View gives: reading and writing are different things to the shadow. Name the type of a value that is
// read (`const float v = x[i];`): `auto` would keep the reference.
template <class T> class Element {
 public:
  Element(const View<T>& view, int64_t index) : view_(view), index_(index) {}
  operator T() const { return *view_.at(index_, 1, Access::read); }
  const Element& operator=(T value) const {
    *view_.at(index_, 1, Access::write) = value;
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = T(other); }
  const Element& operator+=(T value) const { return *this = T(T(*this) + value); }

 private:
  const View<T>& view_;
  int64_t index_;
};

template <class T> class View {
 public:
  using Type = T;
  using Value = std::remove_const_t<T>;

  View() = default;
  View(T* data, int64_t size, const char* name, bool shared = false)
      : data_(data), size_(size), name_(name), shared_(shared) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  View(const View<U>& o) : data_(o.data_), size_(o.size_), offset_(o.offset_), name_(o.name_), shared_(o.shared_) {}

  std::conditional_t<std::is_const_v<T>, Value, Element<Value>> operator[](int64_t i) const {
    if constexpr (std::is_const_v<T>) return *at(i, 1, Access::read);
    else return {*this, i};
  }
  View operator+(int64_t i) const {
    View v = *this;
    v.offset_ += i;
    return v;
  }
  explicit operator bool() const { return data_ != nullptr; }

  // `count` elements of another type, from a byte on.
  template <class U> View<U> part(int64_t byte, int64_t count, const char* name) const {
    const int64_t end = byte + count * int64_t(sizeof(U)), bytes = size_ * int64_t(sizeof(T));
    if (byte < 0 || byte % int64_t(alignof(U)) != 0 || end > bytes)
      machine().fail(std::string(name) + ": bytes " + std::to_string(byte) + " to " + std::to_string(end) + " of " +
                     name_ + ", which has " + std::to_string(bytes));
    return {reinterpret_cast<U*>(reinterpret_cast<char*>(data_) + byte), count, name, shared_};
  }

  // The address of `count` elements from the i-th on, after all checks.
  T* at(int64_t i, int64_t count, Access access, size_t alignment = alignof(T)) const {
    const int64_t element = offset_ + i;
    const char* verb = access == Access::read ? "reads" : "writes";
    const auto name = [&] { return std::string(shared_ ? "shared " : "") + name_; };
    if (element < 0 || element > size_ - count)
      machine().fail(std::string(verb) + " element " + std::to_string(element) +
                     (count > 1 ? " to " + std::to_string(element + count - 1) : "") + " of " + name() +
                     ", which has " + std::to_string(size_));
    T* address = data_ + element;
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
      machine().fail(std::string(verb) + " element " + std::to_string(element) + " of " + name() + ", which is not at " +
                     "a multiple of " + std::to_string(alignment) + " bytes");
    machine().touch(address, size_t(count) * sizeof(T), access, shared_, name_, element);
    return address;
  }

 private:
  template <class> friend class View;
  T* data_ = nullptr;
  int64_t size_ = 0, offset_ = 0;
  const char* name_ = "a null view";
  bool shared_ = false;
};

// A __shared__ array of the running block. Key: one address a declaration. Asked: it is the launch's.
template <class T> View<T> shared_array(const void* key, int64_t count, const char* name, bool asked = false) {
  return {static_cast<T*>(machine().shared(key, size_t(count) * sizeof(T), name, asked)), count, name, true};
}

// The dynamic shared memory that the launch asked for.
template <class T> View<T> dynamic_shared(const char* name) {
  static const char key = 0;
  return shared_array<T>(&key, int64_t(machine().launch().shared_bytes / sizeof(T)), name, true);
}

}  // namespace emulation
}  // namespace fastret
