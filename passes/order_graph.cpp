// Graphs of operations and buffers, and the live bytes of an order. First part of the compiled order search, whose
// parts are compiled as one file: see order_search.py.
//
// Sizes are bytes. The model of memory is the one that order_model.py states: running an operation allocates its outputs
// and scratch while its inputs live, an output may take the storage of an input that dies there, and a buffer is freed
// after its last consumer. Work is counted in elementary steps and no clock is read unless a time limit is given:
// results are deterministic.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <queue>
#include <unordered_map>
#include <vector>

namespace {

using i64 = int64_t;
using i32 = int32_t;
using u64 = uint64_t;
constexpr i64 kInfinite = std::numeric_limits<i64>::max() / 4;

struct Budget {
  i64 limit = 0;
  i64 used = 0;
  bool timed = false;
  std::chrono::steady_clock::time_point end;
  bool spent() const { return used >= limit || (timed && std::chrono::steady_clock::now() >= end); }
  // A budget that ends after a part of what is left of this one.
  Budget share(double part) const {
    Budget made = *this;
    made.limit = used + static_cast<i64>(part * static_cast<double>(limit - used));
    if (timed) {
      const auto now = std::chrono::steady_clock::now();
      made.end = now + std::chrono::duration_cast<std::chrono::steady_clock::duration>(part * (end - now));
    }
    return made;
  }
};

struct Rows {  // compressed rows: row i is items[start[i] .. start[i + 1])
  std::vector<i32> start, items;
  const i32* begin(i32 row) const { return items.data() + start[row]; }
  const i32* end(i32 row) const { return items.data() + start[row + 1]; }
};

struct Range {
  const i32* first;
  const i32* last;
  const i32* begin() const { return first; }
  const i32* end() const { return last; }
};

Rows rows_of(i32 count, std::vector<std::pair<i32, i32>> pairs, bool unique) {
  std::stable_sort(pairs.begin(), pairs.end(), [unique](const auto& a, const auto& b) {
    return unique ? a < b : a.first < b.first;
  });
  if (unique) pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  Rows rows;
  rows.start.assign(count + 1, 0);
  for (const auto& [row, item] : pairs) {
    ++rows.start[row + 1];
    rows.items.push_back(item);
  }
  for (i32 i = 0; i < count; ++i) rows.start[i + 1] += rows.start[i];
  return rows;
}

struct Graph {
  i32 ops = 0, buffers = 0;
  std::vector<i64> size, scratch;
  std::vector<i32> producer;
  std::vector<char> kept;  // stays after its last consumer
  Rows consumers, inputs, outputs, before, after, reuse_output, reuse_input;
  i64 initial = 0;  // bytes live before the first operation

  Range consumers_of(i32 b) const { return {consumers.begin(b), consumers.end(b)}; }
  Range inputs_of(i32 v) const { return {inputs.begin(v), inputs.end(v)}; }
  Range outputs_of(i32 v) const { return {outputs.begin(v), outputs.end(v)}; }
  Range before_of(i32 v) const { return {before.begin(v), before.end(v)}; }
  Range after_of(i32 v) const { return {after.begin(v), after.end(v)}; }
  i32 consumer_count(i32 b) const { return consumers.start[b + 1] - consumers.start[b]; }
  i32 reuse_count(i32 v) const { return reuse_output.start[v + 1] - reuse_output.start[v]; }

  // Bytes that outputs of `v` take over from inputs for which `dies` holds: each output and each input once, in the
  // order in which the pairs were given.
  template <typename Dies>
  i64 reused(i32 v, Dies dies) const {
    const i32 count = reuse_count(v);
    if (count == 0) return 0;
    i64 bytes = 0;
    std::vector<i32> taken;
    for (i32 k = 0; k < count; ++k) {
      const i32 output = reuse_output.begin(v)[k], input = reuse_input.begin(v)[k];
      if (kept[input] || !dies(input)) continue;
      if (std::find(taken.begin(), taken.end(), output) != taken.end()) continue;
      if (std::find(taken.begin(), taken.end(), input) != taken.end()) continue;
      taken.push_back(output);
      taken.push_back(input);
      bytes += std::min(size[output], size[input]);
    }
    return bytes;
  }
};

struct Effect {
  i64 transient;  // bytes above what is live before, while the operation runs
  i64 net;        // change of live bytes once it has run
};

// The effect of running `v` next, where `dies(b)` says whether input b has no other consumer left.
template <typename Dies>
Effect forward_effect(const Graph& graph, i32 v, Dies dies) {
  Effect effect{graph.scratch[v], 0};
  for (const i32 b : graph.outputs_of(v)) {
    effect.transient += graph.size[b];
    if (graph.kept[b] || graph.consumer_count(b) > 0) effect.net += graph.size[b];
  }
  for (const i32 b : graph.inputs_of(v)) {
    if (!graph.kept[b] && dies(b)) effect.net -= graph.size[b];
  }
  effect.transient -= graph.reused(v, dies);
  return effect;
}

struct Profile {
  i64 peak = 0;
  std::vector<i64> step;  // live bytes while each step runs
};

Profile simulate(const Graph& graph, const std::vector<i32>& order) {
  Profile profile;
  profile.step.reserve(order.size());
  std::vector<i32> left(graph.buffers);
  for (i32 b = 0; b < graph.buffers; ++b) left[b] = graph.consumer_count(b);
  i64 live = graph.initial;
  profile.peak = live;
  for (const i32 v : order) {
    const Effect effect = forward_effect(graph, v, [&](i32 b) { return left[b] == 1; });
    profile.step.push_back(live + effect.transient);
    profile.peak = std::max(profile.peak, live + effect.transient);
    live += effect.net;
    for (const i32 b : graph.inputs_of(v)) --left[b];
  }
  return profile;
}

u64 mix(u64 x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

}  // namespace
