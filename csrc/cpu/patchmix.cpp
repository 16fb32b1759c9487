// patchmix line by line: neighbours of one group are copied together.
#include "patchmix.h"

#include <cstring>
#include <vector>

namespace fastret {
namespace {

struct Run {
  int64_t offset, bytes, group;  // of a line
};

// Of each row of patches, pieces of a line that come from the same image.
std::vector<std::vector<Run>> runs_of(const PatchMixProblem& p) {
  std::vector<std::vector<Run>> rows(p.down);
  const int64_t* groups = p.groups.as<int64_t>();
  for (int64_t i = 0; i < p.down; ++i)
    for (int64_t j = 0; j < p.across; ++j) {
      const int64_t group = ((groups[i * p.across + j] % p.x.rows) + p.x.rows) % p.x.rows;
      if (!rows[i].empty() && rows[i].back().group == group) rows[i].back().bytes += p.piece;
      else rows[i].push_back({j * p.piece, p.piece, group});
    }
  return rows;
}

// Runs are short, often a patch of 16 pixels: a call costs as much as the copy.
inline void copy(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) std::memcpy(to, from, kLine);
  if (bytes) std::memcpy(to, from, bytes);
}

}  // namespace

void patchmix(const PatchMixProblem& p, const Array& out) {
  require(p.planes >= 0 && p.down >= 0 && p.lines >= 0 && p.across >= 0 && p.piece >= 0, "x", "negative size");
  const int64_t line = p.across * p.piece, image = p.planes * p.down * p.lines * line;
  check(p.x, "x", p.x.rows, image, DType::u8);
  check(out, "out", p.x.rows, image, DType::u8);
  check(p.groups, "groups", 1, p.down * p.across, DType::i64);
  require(p.threads >= 1, "threads", "must be at least 1");
  if (p.x.empty()) return;
  const auto rows = runs_of(p);
  const int64_t batch = p.x.rows, bands = p.planes * p.down;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t task = 0; task < batch * bands; ++task) {
    const int64_t b = task / bands, band = task % bands, at = band * p.lines * line;
    char* to = out.as<char>() + b * out.stride + at;
    for (int64_t y = 0; y < p.lines; ++y, to += line)
      for (const Run& run : rows[band % p.down]) {
        const int64_t source = b + run.group < batch ? b + run.group : b + run.group - batch;
        copy(to + run.offset, p.x.as<char>() + source * p.x.stride + at + y * line + run.offset, run.bytes);
      }
  }
}

}  // namespace fastret
