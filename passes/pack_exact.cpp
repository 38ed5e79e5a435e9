// Exact search for one capacity, where heuristics leave a gap.
//
// It follows the ideas of MiniMalloc (Moffitt, ASPLOS 2023): buffers are placed in the order of their offsets, each on
// the floor that the earlier ones leave; a node is cut when some section cannot hold what remains, when a hole stays
// open that an unplaced buffer would fit in, or when an unplaced buffer can no longer be supported.
#include <algorithm>
#include <numeric>
#include <vector>

namespace {

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

}  // namespace
