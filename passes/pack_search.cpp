// Offsets for buffers with fixed lifetimes: best-fit heuristics for large problems and an exact search for tight ones.
//
// Plain C interface over arrays, so that it can be called through ctypes. All sizes and offsets are in units that the
// caller chooses (bytes, or multiples of the alignment); lifetimes are half-open and their ends are below 2^31.
// Nothing here reads a clock unless the caller gives a time limit, so with work limits alone results are deterministic.
//
// The exact search follows the ideas of MiniMalloc (Moffitt, ASPLOS 2023): buffers are placed in the order of their
// offsets, each on the floor that the earlier ones leave; a node is cut when some section cannot hold what remains,
// when a hole stays open that an unplaced buffer would fit in, or when an unplaced buffer can no longer be supported.
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

// ---------------------------------------------------------------------------------------------------------------
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

struct Problem {
  i32 count;
  const i32* lower;
  const i32* upper;
  const i64* size;
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

// ---------------------------------------------------------------------------------------------------------------
// Exact search for one capacity.

constexpr i64 kRoundsPerLength = 32;  // rounds of restarts before searches become longer
constexpr i64 kSharePerBuffer = 160;  // work of the shortest search, per buffer: a few dives

enum class Outcome { kFits, kImpossible, kUnknown };

class Search {
 public:
  Search(const Problem& problem, const std::vector<i32>& order, i64 capacity, i64 work, const Deadline& deadline)
      : capacity_(capacity), limit_(work), deadline_(deadline), original_(order) {
    const i32 count = static_cast<i32>(order.size());
    lower_.resize(count);
    upper_.resize(count);
    size_.resize(count);
    std::vector<i32> ends;
    for (const i32 buffer : order) {
      ends.push_back(problem.lower[buffer]);
      ends.push_back(problem.upper[buffer]);
    }
    std::sort(ends.begin(), ends.end());
    ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
    const auto section = [&](i32 time) {
      return static_cast<i32>(std::lower_bound(ends.begin(), ends.end(), time) - ends.begin());
    };
    for (i32 i = 0; i < count; ++i) {
      lower_[i] = section(problem.lower[order[i]]);
      upper_[i] = section(problem.upper[order[i]]);
      size_[i] = problem.size[order[i]];
    }
    const size_t sections = ends.empty() ? 0 : ends.size() - 1;
    remaining_.assign(sections, 0);
    crossing_.resize(sections);
    neighbours_.resize(count);
    for (i32 i = 0; i < count; ++i) {
      for (i32 s = lower_[i]; s < upper_[i]; ++s) {
        remaining_[s] += size_[i];
        crossing_[s].push_back(i);
      }
      for (i32 j = 0; j < count; ++j) {
        if (i != j && lower_[j] < upper_[i] && upper_[j] > lower_[i]) neighbours_[i].push_back(j);
      }
    }
    failures_.assign(count, 0);
    rest_.assign(count, 0);
    low_.assign(count, 0);
    high_.resize(count);
    for (i32 i = 0; i < count; ++i) high_[i] = capacity - size_[i];
    placed_.assign(count, 0);
    buffer_dirty_.assign(count, 0);
    section_dirty_.assign(sections, 0);
  }

  Outcome run() {
    for (const i64 load : remaining_) {
      if (load > capacity_) return Outcome::kImpossible;
    }
    std::vector<i32> all(size_.size());
    std::iota(all.begin(), all.end(), 0);
    std::sort(all.begin(), all.end(), [&](i32 a, i32 b) { return lower_[a] < lower_[b]; });
    for (const i32 buffer : all) touch(buffer);
    if (!propagate()) return Outcome::kImpossible;
    const bool found = decompose(all, -1, -1);
    if (found) return Outcome::kFits;
    return stopped_ ? Outcome::kUnknown : Outcome::kImpossible;
  }

  void write(i64* offsets) const {
    for (size_t i = 0; i < original_.size(); ++i) offsets[original_[i]] = low_[i];
  }
  i64 used() const { return used_; }

  // How often each buffer took part in a contradiction, added to `weights` with the most frequent at one.
  void weigh(std::vector<double>& weights) const {
    const double most = std::max<i64>(1, *std::max_element(failures_.begin(), failures_.end()));
    for (size_t i = 0; i < original_.size(); ++i) {
      weights[original_[i]] = kMemory * weights[original_[i]] + failures_[i] / most;
    }
  }

 private:
  static constexpr double kMemory = 0.8;  // what a restart keeps of the weights of the ones before
  const i64 capacity_;
  const i64 limit_;
  const Deadline& deadline_;
  const std::vector<i32>& original_;
  i64 used_ = 0;
  bool stopped_ = false;
  std::vector<i32> lower_, upper_;
  std::vector<i64> size_, remaining_, failures_;
  std::vector<i64> rest_;        // the highest top among placed neighbours: where a buffer would come to rest now
  std::vector<i64> low_, high_;  // bounds on the offset that a buffer can have in any completion of this node
  std::vector<char> placed_, buffer_dirty_, section_dirty_;
  std::vector<std::vector<i32>> crossing_, neighbours_;
  std::vector<i32> buffer_queue_, section_queue_;

  enum class Kind : char { kRest, kLow, kHigh, kPlaced };
  struct Undo {
    i64 value;
    i32 buffer;
    Kind kind;
  };
  std::vector<Undo> trail_;

  void touch(i32 buffer) {
    if (!buffer_dirty_[buffer]) {
      buffer_dirty_[buffer] = 1;
      buffer_queue_.push_back(buffer);
    }
    for (i32 s = lower_[buffer]; s < upper_[buffer]; ++s) {
      if (!section_dirty_[s]) {
        section_dirty_[s] = 1;
        section_queue_.push_back(s);
      }
    }
  }
  bool raise(i32 buffer, i64 low) {
    if (low <= low_[buffer]) return true;
    trail_.push_back({low_[buffer], buffer, Kind::kLow});
    low_[buffer] = low;
    touch(buffer);
    return low <= high_[buffer];
  }
  bool reduce(i32 buffer, i64 high) {
    if (high >= high_[buffer]) return true;
    trail_.push_back({high_[buffer], buffer, Kind::kHigh});
    high_[buffer] = high;
    touch(buffer);
    return low_[buffer] <= high;
  }
  void clear_queues() {
    for (const i32 buffer : buffer_queue_) buffer_dirty_[buffer] = 0;
    for (const i32 section : section_queue_) section_dirty_[section] = 0;
    buffer_queue_.clear();
    section_queue_.clear();
  }

  // Two buffers alive together: when one cannot lie below the other, it lies above it.
  bool propagate_pairs(i32 a) {
    for (const i32 b : neighbours_[a]) {
      if (placed_[b]) continue;
      const bool a_below = low_[a] + size_[a] <= high_[b];
      const bool b_below = low_[b] + size_[b] <= high_[a];
      if (a_below && b_below) continue;
      if (a_below) {
        if (!raise(b, low_[a] + size_[a]) || !reduce(a, high_[b] - size_[a])) return false;
      } else if (b_below) {
        if (!raise(a, low_[b] + size_[b]) || !reduce(b, high_[a] - size_[b])) return false;
      } else {
        return false;
      }
    }
    return true;
  }

  // In one section the open buffers are stacked: the lowest must start early enough, the highest end late enough.
  bool propagate_section(i32 section) {
    const i64 rest = remaining_[section];
    if (rest == 0) return true;
    const i64 latest = capacity_ - rest;
    i64 floor = kInfinite, roof = 0;
    i32 lowest = -1, lowest_count = 0;
    for (const i32 buffer : crossing_[section]) {
      if (placed_[buffer]) continue;
      floor = std::min(floor, low_[buffer]);
      roof = std::max(roof, high_[buffer] + size_[buffer]);
      if (low_[buffer] <= latest) {
        lowest = buffer;
        ++lowest_count;
      }
    }
    if (lowest_count == 0 || floor + rest > roof) return false;
    if (lowest_count == 1 && !reduce(lowest, std::min(latest, roof - rest))) return false;
    i32 highest = -1, highest_count = 0;
    for (const i32 buffer : crossing_[section]) {
      if (!placed_[buffer] && high_[buffer] + size_[buffer] >= floor + rest) {
        highest = buffer;
        if (++highest_count > 1) break;
      }
    }
    if (highest_count == 0) return false;
    return highest_count > 1 || raise(highest, floor + rest - size_[highest]);
  }

  bool propagate() {
    while (true) {
      bool good = true;
      if (!section_queue_.empty()) {
        const i32 section = section_queue_.back();
        section_queue_.pop_back();
        section_dirty_[section] = 0;
        ++used_;
        good = propagate_section(section);
        if (!good) {
          for (const i32 buffer : crossing_[section]) {
            if (!placed_[buffer]) ++failures_[buffer];
          }
        }
      } else if (!buffer_queue_.empty()) {
        const i32 buffer = buffer_queue_.back();
        buffer_queue_.pop_back();
        buffer_dirty_[buffer] = 0;
        ++used_;
        good = placed_[buffer] || propagate_pairs(buffer);
        if (!good) ++failures_[buffer];
      } else {
        return true;
      }
      if (!good) {
        clear_queues();
        return false;
      }
    }
  }

  void undo(size_t mark) {
    while (trail_.size() > mark) {
      const Undo& last = trail_.back();
      const i32 buffer = last.buffer;
      switch (last.kind) {
        case Kind::kRest: rest_[buffer] = last.value; break;
        case Kind::kLow: low_[buffer] = last.value; break;
        case Kind::kHigh: high_[buffer] = last.value; break;
        case Kind::kPlaced:
          placed_[buffer] = 0;
          for (i32 s = lower_[buffer]; s < upper_[buffer]; ++s) remaining_[s] += size_[buffer];
          break;
      }
      trail_.pop_back();
    }
  }

  // Puts `buffer` where it rests, as the next of the part `open` in the order of offsets.
  bool place(i32 buffer, const std::vector<i32>& open) {
    const i64 offset = rest_[buffer];
    const i64 top = offset + size_[buffer];
    trail_.push_back({0, buffer, Kind::kPlaced});
    placed_[buffer] = 1;
    if (low_[buffer] != offset) {
      trail_.push_back({low_[buffer], buffer, Kind::kLow});
      low_[buffer] = offset;
    }
    for (i32 s = lower_[buffer]; s < upper_[buffer]; ++s) {
      remaining_[s] -= size_[buffer];
      if (!section_dirty_[s]) {
        section_dirty_[s] = 1;
        section_queue_.push_back(s);
      }
    }
    bool good = true;
    for (const i32 other : neighbours_[buffer]) {
      if (placed_[other]) continue;
      if (rest_[other] < top) {
        trail_.push_back({rest_[other], other, Kind::kRest});
        rest_[other] = top;
      }
      good = good && raise(other, top);
    }
    // What rests below this offset can only come later, on top of an open neighbour.
    for (const i32 other : open) {
      if (!good) break;
      if (placed_[other] || rest_[other] > offset || (rest_[other] == offset && other > buffer)) continue;
      i64 lift = kInfinite;
      for (const i32 support : neighbours_[other]) {
        if (!placed_[support]) lift = std::min(lift, std::max(low_[support], offset) + size_[support]);
      }
      good = raise(other, lift);
    }
    if (!good) {
      clear_queues();
      return false;
    }
    return propagate();
  }

  // Splits `open` (sorted by lower end) where no lifetime crosses, and solves each part on its own.
  bool decompose(const std::vector<i32>& open, i64 last_offset, i32 last_index) {
    size_t begin = 0;
    std::vector<std::pair<size_t, size_t>> parts;
    i32 reach = open.empty() ? 0 : upper_[open[0]];
    for (size_t i = 1; i < open.size(); ++i) {
      if (lower_[open[i]] >= reach) {
        parts.emplace_back(begin, i);
        begin = i;
      }
      reach = std::max(reach, upper_[open[i]]);
    }
    if (parts.empty()) return open.empty() || solve(open, last_offset, last_index);
    parts.emplace_back(begin, open.size());
    // The smallest part first: where one fails, it fails soonest.
    std::sort(parts.begin(), parts.end(), [](auto a, auto b) {
      return std::make_pair(a.second - a.first, a.first) < std::make_pair(b.second - b.first, b.first);
    });
    const size_t mark = trail_.size();
    for (const auto& [from, to] : parts) {
      const std::vector<i32> part(open.begin() + from, open.begin() + to);
      if (!solve(part, last_offset, last_index)) {
        undo(mark);
        return false;
      }
    }
    return true;
  }

  bool solve(const std::vector<i32>& open, i64 last_offset, i32 last_index) {
    if (stopped_) return false;
    if (used_ > limit_ || deadline_.passed()) {
      stopped_ = true;
      return false;
    }
    i64 lowest_top = kInfinite, latest = kInfinite;
    for (const i32 buffer : open) {
      lowest_top = std::min(lowest_top, rest_[buffer] + size_[buffer]);
      latest = std::min(latest, high_[buffer]);
    }
    std::vector<i32> candidates;
    for (const i32 buffer : open) {
      const i64 rest = rest_[buffer];
      if (rest >= lowest_top || rest > latest || rest < low_[buffer]) continue;
      if (rest < last_offset || (rest == last_offset && buffer < last_index)) continue;
      candidates.push_back(buffer);
    }
    std::sort(candidates.begin(), candidates.end(), [&](i32 a, i32 b) {
      return rest_[a] != rest_[b] ? rest_[a] < rest_[b] : a < b;
    });
    std::vector<i32> left(open.size() - 1);
    for (const i32 buffer : candidates) {
      const i64 offset = rest_[buffer];
      const size_t mark = trail_.size();
      bool covered = false;
      for (const i32 other : neighbours_[buffer]) covered |= !placed_[other];
      if (place(buffer, open)) {
        std::copy_if(open.begin(), open.end(), left.begin(), [&](i32 other) { return other != buffer; });
        if (decompose(left, offset, buffer)) return true;
      }
      undo(mark);
      // Nothing open lies over this buffer, so placing it here took nothing from anyone: no other choice is better.
      if (!covered || stopped_) return false;
    }
    return false;
  }
};

// Short searches over several orders in turn. What took part in contradictions comes earlier in the next search from
// the same order (as in dom/wdeg, Boussemart et al., ECAI 2004), which mends early mistakes that one search would
// only undo after exhausting everything below them.
Outcome search_with_restarts(const Problem& problem, const std::vector<std::vector<i32>>& orders, i64 capacity,
                             const Deadline& deadline, i64* work, i64* offsets) {
  const i64 limit = *work;
  const i64 share = kSharePerBuffer * std::max(problem.count, 64);
  std::vector<std::vector<i32>> sequences = orders;
  std::vector<std::vector<double>> weights(orders.size(), std::vector<double>(problem.count, 0.0));
  *work = 0;
  for (i64 round = 0; *work < limit && !deadline.passed(); ++round) {
    for (size_t which = 0; which < orders.size() && *work < limit; ++which) {
      Search search(problem, sequences[which], capacity, std::min(limit - *work, share * (1 + round / kRoundsPerLength)), deadline);
      const Outcome outcome = search.run();
      *work += search.used();
      if (outcome == Outcome::kFits) search.write(offsets);
      if (outcome != Outcome::kUnknown) return outcome;
      std::vector<double>& weight = weights[which];
      search.weigh(weight);
      sequences[which] = orders[which];
      std::stable_sort(sequences[which].begin(), sequences[which].end(),
                       [&](i32 a, i32 b) { return weight[a] > weight[b]; });
    }
  }
  return Outcome::kUnknown;
}

}  // namespace

extern "C" {

// By time, as an allocator would; returns the arena.
int64_t memplan_sweep(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                      int64_t* offsets) {
  return sweep(Problem{count, lower, upper, size}, offsets);
}

// Best fit, then up to `passes` rounds of the squeaky wheel towards `target`; the best result stays in `offsets`.
// `work` is the limit of entries looked at in, what is left of it out. Returns -1 if not even one pass ended in time.
int64_t memplan_squeaky(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                        const int32_t* order, int64_t target, int64_t passes, int64_t* work, double seconds,
                        int64_t* offsets) {
  const Problem problem{count, lower, upper, size};
  const Deadline deadline(seconds);
  std::vector<i32> sequence(order, order + count);
  i64 best = best_fit(problem, sequence, offsets, *work, deadline);
  std::vector<i64> trial(offsets, offsets + count);
  for (i64 pass = 0; pass < passes && best > target; ++pass) {
    if (!promote(problem, target, trial.data(), sequence)) break;
    const i64 arena = best_fit(problem, sequence, trial.data(), *work, deadline);
    if (arena < 0) break;
    if (arena < best) {
      best = arena;
      std::copy(trial.begin(), trial.end(), offsets);
    }
  }
  return best;
}

int64_t memplan_lowest_floor(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                             const int32_t* order, int64_t* offsets) {
  const Problem problem{count, lower, upper, size};
  return lowest_floor(problem, std::vector<i32>(order, order + count), offsets);
}

// Searches for offsets within `capacity`, starting from each of the `order_count` orders in turn.
// Returns 1: found (in `offsets`), 0: proved impossible, -1: stopped at a limit. `work` is the limit in, used out.
int32_t memplan_pack_search(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                            int32_t order_count, const int32_t* orders, int64_t capacity, double seconds,
                            int64_t* work, int64_t* offsets) {
  const Problem problem{count, lower, upper, size};
  const Deadline deadline(seconds);
  std::vector<std::vector<i32>> sequences;
  for (i32 i = 0; i < order_count; ++i) {
    sequences.emplace_back(orders + static_cast<size_t>(i) * count, orders + static_cast<size_t>(i + 1) * count);
  }
  const Outcome outcome = search_with_restarts(problem, sequences, capacity, deadline, work, offsets);
  return outcome == Outcome::kFits ? 1 : outcome == Outcome::kImpossible ? 0 : -1;
}

}  // extern "C"
