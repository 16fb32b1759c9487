// Matryoshka levels of masked_lse: heads that see only the first `end` features, from prefix sums of one product.
//
// Rows are packed over the norm of all their features, u = x / |x|, and f_k = |x| / |x[:end_k]| makes unit rows of
// their prefixes. With the running product S_k = S_{k-1} + U[:, begin_k:end_k] V[:, begin_k:end_k]^T,
//
//     scores of level k = f_k,i f_k,j S_k,ij,      dL/dS_k = f_k,i f_k,j dL/d(scores of level k) = W_k
//
// and features [begin_k, end_k) are in S_k and every wider one: G_k = sum over k' >= k of W_k' is what multiplies them.
// A prefix's norm takes the radial part out of the gradient. Per row: r_k,i = sum over j of W_k,ij S_k,ij, and
//
//     dx_i[begin_k:end_k] = (du_i - u_i sum over k' >= k of r_k',i f_k',i^2)[begin_k:end_k] / |x_i|.
#pragma once
#include "masked_lse.h"
#include "pack.h"
#include "simd.h"
#include "tiles.h"

FASTRET_ISA_BEGIN

// Norm of the first `width` features of the row x = norm * u; above eps, x's own norm is its divisor.
template <class T> T prefix_norm(const T* u, T norm, int64_t width) { return norm_of(u, width) * norm; }

// By all threads of a parallel region, after rows [begin, end) are packed.
template <class T>
void level_factors(const T* rows, const T* norms, int64_t begin, int64_t end, int64_t d, int64_t width,
                   const LseLevelWork::Side& side) {
  if (!side.factor) return;
#pragma omp for schedule(static)
  for (int64_t p = begin; p < end; ++p)
    static_cast<T*>(side.factor)[p] = norms[p] / std::max(prefix_norm(rows + p * d, norms[p], width), T(kNormEps));
}

// scores = products, both padded to whole vectors, times the factors of the level, where it has some
template <class T>
void scale_products(const Tile& t, const LseLevelWork& level, const T* products, int64_t stride, T* scores) {
  const T *f = static_cast<const T*>(level.x.factor), *g = static_cast<const T*>(level.y.factor);
  for (int64_t r = 0; r < t.rows(); ++r, products += stride, scores += stride) {
    const T own = f ? f[t.row + r] : T(1);
    for (int64_t j = 0; j < t.cols(); j += lanes<T>) {
      const Vec<T> v = load<T>(products + j);
      store<T>(scores + j, g ? v * own * load<T>(g + t.col + j) : v);
    }
  }
}

// dL/d(scores) becomes dL/d(products), in place, and its radial parts are added to those of rows and columns; nothing
// to do where scores are products.
template <class T>
void slopes_of_products(const Tile& t, const LseLevelWork& level, const T* products, int64_t stride, T* slopes) {
  const T *f = static_cast<const T*>(level.x.factor), *g = static_cast<const T*>(level.y.factor);
  if (!f) return;
  T *of_rows = static_cast<T*>(level.x.radial), *of_cols = static_cast<T*>(level.y.radial);
  for (int64_t r = 0; r < t.rows(); ++r, products += stride, slopes += stride) {
    const T own = f[t.row + r];
    Vec<T> total{};
    for (int64_t j = 0; j < t.cols(); j += lanes<T>) {
      const Vec<T> w = load<T>(slopes + j) * own * load<T>(g + t.col + j), radial = w * load<T>(products + j);
      store<T>(slopes + j, w);
      total += radial;
      if (of_cols) store<T>(of_cols + t.col + j, load<T>(of_cols + t.col + j) + radial);
    }
    if (of_rows) of_rows[t.row + r] += sum<T>(total);
  }
}

template <class T> void add_slopes(const Tile& t, const T* wider, int64_t stride, T* slopes) {
  for (int64_t r = 0; r < t.rows(); ++r, wider += stride, slopes += stride)
    for (int64_t j = 0; j < t.cols(); j += lanes<T>) store<T>(slopes + j, load<T>(slopes + j) + load<T>(wider + j));
}

// du of row p, whose scores went through the prefixes' norms, becomes the gradient of x, in place (project_row).
template <class T>
void project_prefixes(T* du, const T* u, T norm, int64_t p, const LseLevelWork* levels, int64_t count,
                      LseLevelWork::Side LseLevelWork::*side) {
  T radial = 0;
  for (int64_t k = count - 1; k >= 0; --k) {
    const LseLevelWork& level = levels[k];
    const T factor = static_cast<const T*>((level.*side).factor)[p];
    if (prefix_norm(u, norm, level.end) > T(kNormEps))
      radial += static_cast<const T*>((level.*side).radial)[p] * factor * factor;
    for (int64_t j = level.begin; j < level.end; ++j) du[j] = (du[j] - radial * u[j]) / norm;
  }
}

FASTRET_ISA_END
