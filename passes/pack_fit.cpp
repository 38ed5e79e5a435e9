// Best-fit heuristics for buffers with fixed lifetimes. First part of the compiled packing, whose parts are compiled as
// one file: see pack_search.py.
//
// All sizes and offsets are in units that the caller chooses (bytes, or multiples of the alignment); lifetimes are
// half-open and their ends are below 2^31. Nothing here reads a clock unless the caller gives a time limit, so with work
// limits alone results are deterministic.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <vector>

namespace {

using i64 = int64_t;
using i32 = int32_t;
constexpr i64 kInfinite = std::numeric_limits<i64>::max() / 4;

struct Deadline {
  bool limited = false;
  std::chrono::steady_clock::time_point end;
  explicit Deadline(double seconds) : limited(seconds > 0) {
    if (limited) {
      end = std::chrono::steady_clock::now() +
            std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
    }
  }
  bool passed() const { return limited && std::chrono::steady_clock::now() >= end; }
};

struct Problem {
  i32 count;
  const i32* lower;
  const i32* upper;
  const i64* size;
};

// Best fit: buffers one after the other, each into the smallest gap that holds it among those alive with it.

// Placed buffers sorted by offset, in blocks that remember the time they span, so that a query skips most of them.
class PlacedList {
 public:
  // Calls `visit(offset, top)` in the order of offsets until it returns false; adds to `work` what was looked at.
  template <typename Visit>
  void overlapping(i32 lower, i32 upper, i64& work, Visit visit) const {
    work += static_cast<i64>(blocks_.size());
    for (const Block& block : blocks_) {
      if (block.lower >= upper || block.upper <= lower) continue;
      const size_t count = block.begin.size();
      work += static_cast<i64>(count);
      const i32* begin = block.begin.data();
      const i32* end = block.end.data();
      for (size_t i = 0; i < count; ++i) {
        if ((begin[i] < upper) & (end[i] > lower)) {
          if (!visit(block.offset[i], block.top[i])) return;
        }
      }
    }
  }

  void insert(i32 lower, i32 upper, i64 offset, i64 top) {
    if (blocks_.empty()) blocks_.emplace_back();
    size_t which = 0;
    {  // the last block whose first offset is at most ours
      size_t low = 0, high = blocks_.size();
      while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        if (blocks_[middle].offset.front() <= offset) low = middle; else high = middle;
      }
      which = low;
    }
    Block& block = blocks_[which];
    const size_t at = std::upper_bound(block.offset.begin(), block.offset.end(), offset) - block.offset.begin();
    block.begin.insert(block.begin.begin() + at, lower);
    block.end.insert(block.end.begin() + at, upper);
    block.offset.insert(block.offset.begin() + at, offset);
    block.top.insert(block.top.begin() + at, top);
    block.lower = std::min(block.lower, lower);
    block.upper = std::max(block.upper, upper);
    if (block.offset.size() >= kBlock) split(which);
  }

 private:
  static constexpr size_t kBlock = 512;
  struct Block {
    i32 lower = std::numeric_limits<i32>::max();
    i32 upper = std::numeric_limits<i32>::min();
    std::vector<i32> begin, end;
    std::vector<i64> offset, top;
    void bounds() {
      lower = *std::min_element(begin.begin(), begin.end());
      upper = *std::max_element(end.begin(), end.end());
    }
  };
  std::vector<Block> blocks_;

  void split(size_t which) {
    Block second;
    Block& first = blocks_[which];
    const size_t half = first.offset.size() / 2;
    second.begin.assign(first.begin.begin() + half, first.begin.end());
    second.end.assign(first.end.begin() + half, first.end.end());
    second.offset.assign(first.offset.begin() + half, first.offset.end());
    second.top.assign(first.top.begin() + half, first.top.end());
    first.begin.resize(half);
    first.end.resize(half);
    first.offset.resize(half);
    first.top.resize(half);
    first.bounds();
    second.bounds();
    blocks_.insert(blocks_.begin() + which + 1, std::move(second));
  }
};

// Returns the arena, or -1 when the work or the time ended first.
i64 best_fit(const Problem& problem, const std::vector<i32>& order, i64* offsets, i64& work, const Deadline& deadline) {
  PlacedList placed;
  i64 arena = 0, used = 0;
  for (const i32 buffer : order) {
    if (used > work || ((++used & 255) == 0 && deadline.passed())) {
      work = 0;
      return -1;
    }
    const i64 size = problem.size[buffer];
    i64 top = 0, best_gap = kInfinite, best_offset = -1;
    placed.overlapping(problem.lower[buffer], problem.upper[buffer], used, [&](i64 offset, i64 end) {
      const i64 gap = offset - top;
      if (gap >= size && gap < best_gap) {
        best_gap = gap;
        best_offset = top;
      }
      if (end > top) top = end;
      return best_gap != size;
    });
    const i64 offset = best_offset >= 0 ? best_offset : top;
    offsets[buffer] = offset;
    placed.insert(problem.lower[buffer], problem.upper[buffer], offset, offset + size);
    arena = std::max(arena, offset + size);
  }
  work -= used;
  return arena;
}

// What an allocator would do that knows nothing of the future: by time, the best fitting hole, else at the top.
// O(n log n), so it always ends; the others start from its result.
i64 sweep(const Problem& problem, i64* offsets) {
  std::vector<i32> starts(problem.count), ends(problem.count);
  std::iota(starts.begin(), starts.end(), 0);
  std::iota(ends.begin(), ends.end(), 0);
  std::sort(starts.begin(), starts.end(), [&](i32 a, i32 b) {
    if (problem.lower[a] != problem.lower[b]) return problem.lower[a] < problem.lower[b];
    if (problem.upper[a] != problem.upper[b]) return problem.upper[a] > problem.upper[b];
    return a < b;
  });
  std::sort(ends.begin(), ends.end(), [&](i32 a, i32 b) {
    return problem.upper[a] != problem.upper[b] ? problem.upper[a] < problem.upper[b] : a < b;
  });
  std::map<i64, i64> holes;                 // offset -> size
  std::set<std::pair<i64, i64>> by_size;    // (size, offset)
  i64 top = 0, arena = 0;
  const auto release = [&](i64 offset, i64 size) {
    auto next = holes.lower_bound(offset);
    if (next != holes.end() && next->first == offset + size) {
      size += next->second;
      by_size.erase({next->second, next->first});
      next = holes.erase(next);
    }
    if (next != holes.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        offset = before->first;
        size += before->second;
        by_size.erase({before->second, before->first});
        holes.erase(before);
      }
    }
    if (offset + size == top) {
      top = offset;
      return;
    }
    holes.emplace(offset, size);
    by_size.emplace(size, offset);
  };
  size_t ended = 0;
  for (const i32 buffer : starts) {
    while (problem.upper[ends[ended]] <= problem.lower[buffer]) {
      release(offsets[ends[ended]], problem.size[ends[ended]]);
      ++ended;
    }
    const i64 size = problem.size[buffer];
    const auto hole = by_size.lower_bound({size, 0});
    if (hole == by_size.end()) {
      offsets[buffer] = top;
      top += size;
    } else {
      const auto [room, offset] = *hole;
      by_size.erase(hole);
      holes.erase(offset);
      offsets[buffer] = offset;
      if (room > size) {
        holes.emplace(offset + size, room - size);
        by_size.emplace(room - size, offset + size);
      }
    }
    arena = std::max(arena, top);
  }
  return arena;
}

// The squeaky wheel (Joslin and Clements): what ended above the target is moved to the front, in its old order.
bool promote(const Problem& problem, i64 target, const i64* offsets, std::vector<i32>& order) {
  const auto high = [&](i32 buffer) { return offsets[buffer] + problem.size[buffer] > target; };
  const auto middle = std::stable_partition(order.begin(), order.end(), high);
  return middle != order.begin() && middle != order.end();
}

// Lowest floor first: always place, among the buffers with the lowest possible offset, the earliest in `order`.
i64 lowest_floor(const Problem& problem, const std::vector<i32>& order, i64* offsets) {
  const i32 count = problem.count;
  std::vector<i64> floor(count, 0);
  std::vector<i32> open = order;
  i64 arena = 0;
  while (!open.empty()) {
    size_t chosen = 0;
    for (size_t i = 1; i < open.size(); ++i) {
      if (floor[open[i]] < floor[open[chosen]]) chosen = i;
    }
    const i32 buffer = open[chosen];
    open.erase(open.begin() + chosen);
    offsets[buffer] = floor[buffer];
    const i64 top = floor[buffer] + problem.size[buffer];
    arena = std::max(arena, top);
    for (const i32 other : open) {
      if (problem.lower[other] < problem.upper[buffer] && problem.upper[other] > problem.lower[buffer]) {
        floor[other] = std::max(floor[other], top);
      }
    }
  }
  return arena;
}

}  // namespace
