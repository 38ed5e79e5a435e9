// The CUDA caching allocator's default rules over one step's requests, several steps in a row.
// The same rules as allocator.py, for one stream and segments that lie above those before them.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kRounding = 512, kMiB = 1 << 20, kSmallSegment = 2 * kMiB, kLargeSegment = 20 * kMiB;
constexpr int64_t kSmallestOwnSegment = 10 * kMiB, kOwnSegmentRounding = 2 * kMiB;
constexpr int64_t kCountedPart = 64;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Block {
  int64_t address, size;
  bool free, small;
  Block *before, *after;
};

struct ByFit {
  bool operator()(const Block *a, const Block *b) const {
    return a->size != b->size ? a->size < b->size : a->address < b->address;
  }
};

struct Allocator {
  std::set<Block *, ByFit> pools[2];
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Block *> spare;
  int64_t allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0, segments = 0;

  Block *make(Block value) {
    if (spare.empty()) {
      blocks.push_back(std::make_unique<Block>());
      spare.push_back(blocks.back().get());
    }
    Block *block = spare.back();
    spare.pop_back();
    *block = value;
    return block;
  }

  Block *alloc(int64_t size) {
    if (size == 0) return nullptr;
    size = std::max(kRounding, round_up(size, kRounding));
    const bool small = size <= kMiB;
    auto &pool = pools[small];
    Block key{0, size, true, small, nullptr, nullptr};
    key.address = -1;
    auto found = pool.lower_bound(&key);
    Block *block;
    if (found != pool.end()) {
      block = *found;
      pool.erase(found);
    } else {
      const int64_t segment = small                        ? kSmallSegment
                              : size < kSmallestOwnSegment ? kLargeSegment
                                                           : round_up(size, kOwnSegmentRounding);
      reserved += segment;
      peak_reserved = std::max(peak_reserved, reserved);
      block = make({++segments << 44, segment, true, small, nullptr, nullptr});
    }
    const int64_t left = block->size - size;
    if (small ? left >= kRounding : left > kMiB) {
      Block *rest = make({block->address + size, left, true, small, block, block->after});
      if (block->after) block->after->before = rest;
      block->after = rest;
      block->size = size;
      pool.insert(rest);
    }
    block->free = false;
    allocated += block->size;
    peak_allocated = std::max(peak_allocated, allocated);
    return block;
  }

  void release(Block *block) {
    if (!block) return;
    allocated -= block->size;
    auto &pool = pools[block->small];
    if (Block *before = block->before; before && before->free) {
      pool.erase(before);
      block->address = before->address;
      block->size += before->size;
      block->before = before->before;
      if (block->before) block->before->after = block;
      spare.push_back(before);
    }
    if (Block *after = block->after; after && after->free) {
      pool.erase(after);
      block->size += after->size;
      block->after = after->after;
      if (block->after) block->after->before = block;
      spare.push_back(after);
    }
    block->free = true;
    pool.insert(block);
  }

  // Segments without a live block go back to the device.
  void empty_cache() {
    for (auto &pool : pools) {
      for (auto at = pool.begin(); at != pool.end();) {
        Block *block = *at;
        if (block->before || block->after) {
          ++at;
          continue;
        }
        reserved -= block->size;
        spare.push_back(block);
        at = pool.erase(at);
      }
    }
  }

  int64_t lacking(int64_t wanted) const {
    int64_t usable = 0;
    for (auto at = pools[0].rbegin(); at != pools[0].rend() && (*at)->size >= wanted / kCountedPart; ++at)
      usable += (*at)->size;
    return (wanted - usable) / kOwnSegmentRounding * kOwnSegmentRounding;
  }

  // See top_up in allocator_replay.py.
  void reserve(int64_t wanted) {
    if (lacking(wanted) <= 0) return;
    empty_cache();
    release(alloc(lacking(wanted)));
  }
};

}  // namespace

// Events: size >= 0 allocates under the key, -1 frees it, -2 makes the reserve free; what a step does not free stays.
// out: the most reserved, the most allocated.
extern "C" void memplan_replay(int32_t events, const int32_t *key, const int64_t *size, int32_t keys, int32_t residents,
                               const int64_t *resident, int64_t reserve, int32_t steps, int64_t *out) {
  Allocator allocator;
  for (int32_t k = 0; k < residents; ++k) allocator.alloc(resident[k]);
  std::vector<Block *> live(keys, nullptr);
  for (int32_t step = 0; step < steps; ++step) {
    for (int32_t k = 0; k < events; ++k) {
      if (size[k] >= 0) {
        live[key[k]] = allocator.alloc(size[k]);
      } else if (size[k] == -1) {
        allocator.release(live[key[k]]);
      } else if (reserve > 0) {
        allocator.reserve(reserve);
      }
    }
  }
  out[0] = allocator.peak_reserved;
  out[1] = allocator.peak_allocated;
}
