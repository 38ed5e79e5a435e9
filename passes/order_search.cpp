// Orders of execution with a small peak of live bytes, and certified lower bounds on any order's peak.
//
// Plain C interface over arrays, so that it can be called through ctypes. Sizes are bytes. The model of memory is the
// one that order_model.py states: running an operation allocates its outputs and scratch while its inputs live, an
// output may take the storage of an input that dies there, and a buffer is freed after its last consumer.
// Work is counted in elementary steps and no clock is read unless a time limit is given: results are deterministic.
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

// ---------------------------------------------------------------------------------------------------------------
// Greedy orders.

// Ready operations in a tree over ranks: the least net change among those that fit, or the least transient.
class ReadyTree {
 public:
  explicit ReadyTree(i32 count) {
    while (leaves_ < count) leaves_ *= 2;
    transient_.assign(2 * leaves_, kInfinite);
    net_.assign(2 * leaves_, kInfinite);
  }
  void set(i32 rank, i64 transient, i64 net) {
    i32 node = rank + leaves_;
    transient_[node] = transient;
    net_[node] = net;
    for (node /= 2; node >= 1; node /= 2) {
      transient_[node] = std::min(transient_[2 * node], transient_[2 * node + 1]);
      net_[node] = std::min(net_[2 * node], net_[2 * node + 1]);
    }
  }
  void erase(i32 rank) { set(rank, kInfinite, kInfinite); }
  i32 least_net_within(i64 room) const {
    i64 best = kInfinite;
    i32 found = -1;
    visit(1, room, best, found);
    return found < 0 ? -1 : found - leaves_;
  }
  i32 least_transient() const {
    const i64 least = transient_[1];
    return least >= kInfinite ? -1 : least_net_within(least);
  }

 private:
  i32 leaves_ = 1;
  std::vector<i64> transient_, net_;
  void visit(i32 node, i64 room, i64& best, i32& found) const {
    if (transient_[node] > room || net_[node] >= best) return;
    if (node >= leaves_) {
      best = net_[node];
      found = node;
      return;
    }
    const i32 first = 2 * node + (net_[2 * node + 1] < net_[2 * node]);
    visit(first, room, best, found);
    visit(first ^ 1, room, best, found);
  }
};

u64 mix(u64 x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Ranks by transient, so that what fits stands together in the tree.
std::vector<i32> ranks_by_transient(const Graph& graph) {
  std::vector<i64> transient(graph.ops);
  for (i32 v = 0; v < graph.ops; ++v) {
    transient[v] = forward_effect(graph, v, [](i32) { return false; }).transient;
  }
  std::vector<i32> sorted(graph.ops), rank(graph.ops);
  std::iota(sorted.begin(), sorted.end(), 0);
  std::stable_sort(sorted.begin(), sorted.end(), [&](i32 a, i32 b) { return transient[a] < transient[b]; });
  for (i32 i = 0; i < graph.ops; ++i) rank[sorted[i]] = i;
  return rank;
}

i64 with_noise(i64 net, i32 v, u64 seed) {
  if (seed == 0) return net;
  const double factor = 0.5 + static_cast<double>(mix(seed ^ mix(static_cast<u64>(v))) >> 11) / 9007199254740992.0;
  return static_cast<i64>(static_cast<double>(net) * factor);
}

// Least peak memory first: run what lowers live bytes most among what does not raise the peak; where everything
// raises it, what raises it least. Non-zero seeds weigh the changes by random factors between 0.5 and 1.5.
std::vector<i32> least_peak_first(const Graph& graph, i64 threshold, u64 seed) {
  const std::vector<i32> rank = ranks_by_transient(graph);
  std::vector<i32> at(graph.ops);
  for (i32 v = 0; v < graph.ops; ++v) at[rank[v]] = v;
  ReadyTree ready(graph.ops);
  std::vector<i32> left(graph.buffers), waiting(graph.ops), order;
  std::vector<char> done(graph.ops, 0);
  for (i32 b = 0; b < graph.buffers; ++b) left[b] = graph.consumer_count(b);
  const auto enter = [&](i32 v) {
    const Effect effect = forward_effect(graph, v, [&](i32 b) { return left[b] == 1; });
    ready.set(rank[v], effect.transient, with_noise(effect.net, v, seed));
  };
  for (i32 v = 0; v < graph.ops; ++v) {
    waiting[v] = graph.before.start[v + 1] - graph.before.start[v];
    if (waiting[v] == 0) enter(v);
  }
  i64 live = graph.initial, peak = std::max(threshold, live);
  while (static_cast<i32>(order.size()) < graph.ops) {
    i32 chosen = ready.least_net_within(peak - live);
    if (chosen < 0) chosen = ready.least_transient();
    const i32 v = at[chosen];
    const Effect effect = forward_effect(graph, v, [&](i32 b) { return left[b] == 1; });
    peak = std::max(peak, live + effect.transient);
    live += effect.net;
    ready.erase(chosen);
    done[v] = 1;
    order.push_back(v);
    for (const i32 b : graph.inputs_of(v)) {
      if (--left[b] != 1) continue;
      for (const i32 other : graph.consumers_of(b)) {
        if (!done[other] && waiting[other] == 0) enter(other);
      }
    }
    for (const i32 next : graph.after_of(v)) {
      if (--waiting[next] == 0) enter(next);
    }
  }
  return order;
}

// The same from the end: backwards, an operation makes those of its inputs live that no later one needs.
std::vector<i32> least_peak_first_reversed(const Graph& graph, i64 threshold, u64 seed) {
  const std::vector<i32> rank = ranks_by_transient(graph);
  std::vector<i32> at(graph.ops);
  for (i32 v = 0; v < graph.ops; ++v) at[rank[v]] = v;
  ReadyTree ready(graph.ops);
  std::vector<i32> waiting(graph.ops), order;
  std::vector<char> done(graph.ops, 0), live_buffer(graph.buffers, 0);
  i64 live = 0;
  for (i32 b = 0; b < graph.buffers; ++b) {
    live_buffer[b] = graph.kept[b] || (graph.producer[b] < 0 && graph.consumer_count(b) == 0);
    if (live_buffer[b]) live += graph.size[b];
  }
  const auto effect_of = [&](i32 v) {
    Effect effect{graph.scratch[v], 0};
    for (const i32 b : graph.inputs_of(v)) {
      if (!live_buffer[b]) effect.net += graph.size[b];
    }
    effect.transient += effect.net;
    for (const i32 b : graph.outputs_of(v)) {
      if (live_buffer[b]) effect.net -= graph.size[b];
      else effect.transient += graph.size[b];
    }
    effect.transient -= graph.reused(v, [&](i32 b) { return !live_buffer[b]; });
    return effect;
  };
  const auto enter = [&](i32 v) {
    const Effect effect = effect_of(v);
    ready.set(rank[v], effect.transient, with_noise(effect.net, v, seed));
  };
  for (i32 v = 0; v < graph.ops; ++v) {
    waiting[v] = graph.after.start[v + 1] - graph.after.start[v];
    if (waiting[v] == 0) enter(v);
  }
  i64 peak = std::max(threshold, live);
  while (static_cast<i32>(order.size()) < graph.ops) {
    i32 chosen = ready.least_net_within(peak - live);
    if (chosen < 0) chosen = ready.least_transient();
    const i32 v = at[chosen];
    const Effect effect = effect_of(v);
    peak = std::max(peak, live + effect.transient);
    live += effect.net;
    ready.erase(chosen);
    done[v] = 1;
    order.push_back(v);
    for (const i32 b : graph.inputs_of(v)) {
      if (live_buffer[b]) continue;
      live_buffer[b] = 1;
      for (const i32 other : graph.consumers_of(b)) {
        if (!done[other] && waiting[other] == 0) enter(other);
      }
    }
    for (const i32 earlier : graph.before_of(v)) {
      if (--waiting[earlier] == 0) enter(earlier);
    }
  }
  std::reverse(order.begin(), order.end());
  return order;
}

std::vector<i32> depth_first(const Graph& graph) {
  std::vector<i32> order;
  std::vector<char> seen(graph.ops, 0);
  std::vector<std::pair<i32, const i32*>> stack;
  for (i32 root = 0; root < graph.ops; ++root) {
    if (seen[root] || graph.after.start[root + 1] != graph.after.start[root]) continue;
    seen[root] = 1;
    stack.emplace_back(root, graph.before.begin(root));
    while (!stack.empty()) {
      auto& [v, next] = stack.back();
      if (next == graph.before.end(v)) {
        order.push_back(v);
        stack.pop_back();
      } else {
        const i32 earlier = *next++;
        if (!seen[earlier]) {
          seen[earlier] = 1;
          stack.emplace_back(earlier, graph.before.begin(earlier));
        }
      }
    }
  }
  return order;
}

std::vector<i32> breadth_first(const Graph& graph) {
  std::vector<i32> order, waiting(graph.ops);
  for (i32 v = 0; v < graph.ops; ++v) {
    waiting[v] = graph.before.start[v + 1] - graph.before.start[v];
    if (waiting[v] == 0) order.push_back(v);
  }
  for (size_t i = 0; i < order.size(); ++i) {
    for (const i32 next : graph.after_of(order[i])) {
      if (--waiting[next] == 0) order.push_back(next);
    }
  }
  return order;
}

// ---------------------------------------------------------------------------------------------------------------
// Lower bounds.

// Maximum flow by Dinic's algorithm. What has flowed when the budget ends is a feasible flow, so it bounds the
// minimum cut from below all the same.
class Flow {
 public:
  i32 node() {
    head_.push_back(-1);
    return static_cast<i32>(head_.size()) - 1;
  }
  void arc(i32 from, i32 to, i64 capacity) {
    arcs_.push_back({to, head_[from], capacity});
    head_[from] = static_cast<i32>(arcs_.size()) - 1;
    arcs_.push_back({from, head_[to], 0});
    head_[to] = static_cast<i32>(arcs_.size()) - 1;
  }
  i64 maximum(i32 source, i32 sink, Budget& budget) {
    i64 total = 0;
    while (!budget.spent() && layers(source, sink, budget)) {
      next_ = head_;
      total += augment(source, sink, budget);
    }
    return total;
  }

 private:
  struct Arc {
    i32 to, next;
    i64 capacity;
  };
  std::vector<Arc> arcs_;
  std::vector<i32> head_, level_, next_;

  bool layers(i32 source, i32 sink, Budget& budget) {
    level_.assign(head_.size(), -1);
    std::vector<i32> queue{source};
    level_[source] = 0;
    for (size_t i = 0; i < queue.size() && level_[sink] < 0; ++i) {
      for (i32 a = head_[queue[i]]; a >= 0; a = arcs_[a].next) {
        ++budget.used;
        if (arcs_[a].capacity > 0 && level_[arcs_[a].to] < 0) {
          level_[arcs_[a].to] = level_[queue[i]] + 1;
          queue.push_back(arcs_[a].to);
        }
      }
    }
    return level_[sink] >= 0;
  }

  // One blocking flow, by advancing and retreating along a path of arcs (no recursion: graphs are deep).
  i64 augment(i32 source, i32 sink, Budget& budget) {
    i64 total = 0;
    std::vector<i32> path;
    i32 at = source;
    while (true) {
      if (at == sink) {
        i64 most = kInfinite;
        for (const i32 a : path) most = std::min(most, arcs_[a].capacity);
        size_t keep = path.size();
        for (size_t i = path.size(); i-- > 0;) {
          arcs_[path[i]].capacity -= most;
          arcs_[path[i] ^ 1].capacity += most;
          if (arcs_[path[i]].capacity == 0) keep = i;
        }
        budget.used += static_cast<i64>(path.size());
        total += most;
        path.resize(keep);
        at = path.empty() ? source : arcs_[path.back()].to;
        if (budget.used >= budget.limit) return total;
        continue;
      }
      i32& a = next_[at];
      while (a >= 0 && !(arcs_[a].capacity > 0 && level_[arcs_[a].to] == level_[at] + 1)) {
        a = arcs_[a].next;
        ++budget.used;
      }
      if (a >= 0) {
        path.push_back(a);
        at = arcs_[a].to;
      } else if (path.empty()) {
        return total;
      } else {
        level_[at] = -1;
        at = arcs_[path.back() ^ 1].to;
        path.pop_back();
      }
    }
  }
};

enum class Side : char { kFree, kBefore, kAfter };

// When v runs, what has run is closed under predecessors, contains v's ancestors and none of its descendants.
class Bound {
 public:
  Bound(const Graph& graph, i32 v) : graph_(graph), v_(v), side_(graph.ops, Side::kFree) {
    spread(graph.before, Side::kBefore);
    spread(graph.after, Side::kAfter);
    side_[v] = Side::kAfter;
    own_ = graph.scratch[v];
    for (const i32 b : graph.outputs_of(v)) own_ += graph.size[b];
    savings();
  }

  // Live bytes that every order has while v runs: a quick bound.
  i64 forced() const {
    i64 bytes = own_ - unconditional_;
    for (const auto& saving : conditional_) bytes -= saving.second;
    for (i32 b = 0; b < graph_.buffers; ++b) {
      if (begun(b) && must_stay(b)) bytes += graph_.size[b];
    }
    return bytes;
  }

  // The least live bytes over all sets that may have run before v: a minimum cut.
  i64 cut(Budget& budget) const {
    Flow flow;
    const i32 source = flow.node(), sink = flow.node();
    std::vector<i32> node(graph_.ops, -1);
    for (i32 u = 0; u < graph_.ops; ++u) {
      if (side_[u] == Side::kFree) node[u] = flow.node();
    }
    for (i32 u = 0; u < graph_.ops; ++u) {
      if (node[u] < 0) continue;
      for (const i32 earlier : graph_.before_of(u)) {
        if (node[earlier] >= 0) flow.arc(node[u], node[earlier], kInfinite);
      }
    }
    i64 fixed = own_ - unconditional_;
    for (i32 b = 0; b < graph_.buffers; ++b) {
      const i32 producer = graph_.producer[b];
      const bool begins = begun(b);
      if (!begins && (producer == v_ || side_[producer] == Side::kAfter)) continue;
      if (!graph_.kept[b] && !begins && graph_.consumer_count(b) == 0) continue;
      const i32 from = begins ? source : node[producer];
      if (must_stay(b)) {
        if (begins) fixed += graph_.size[b];
        else flow.arc(from, sink, graph_.size[b]);
        continue;
      }
      i32 held = -1;
      for (const i32 u : graph_.consumers_of(b)) {
        if (node[u] < 0) continue;
        if (held < 0) {
          held = flow.node();
          flow.arc(from, held, graph_.size[b]);
        }
        flow.arc(held, node[u], kInfinite);
      }
    }
    for (const auto& [input, bytes] : conditional_) {  // paid back unless every other consumer has run
      fixed -= bytes;
      i32 held = -1;
      for (const i32 u : graph_.consumers_of(input)) {
        if (u == v_ || node[u] < 0) continue;
        if (held < 0) {
          held = flow.node();
          flow.arc(source, held, bytes);
        }
        flow.arc(held, node[u], kInfinite);
      }
    }
    budget.used += graph_.ops + graph_.buffers;
    return fixed + flow.maximum(source, sink, budget);
  }

 private:
  const Graph& graph_;
  const i32 v_;
  std::vector<Side> side_;
  i64 own_ = 0;
  i64 unconditional_ = 0;                          // the most that in-place outputs can save, where it is unclear
  std::vector<std::pair<i32, i64>> conditional_;  // (input, bytes): saved if all its other consumers have run

  void spread(const Rows& rows, Side side) {
    std::vector<i32> stack{v_};
    while (!stack.empty()) {
      const i32 u = stack.back();
      stack.pop_back();
      for (const i32* next = rows.begin(u); next != rows.end(u); ++next) {
        if (side_[*next] == Side::kFree) {
          side_[*next] = side;
          stack.push_back(*next);
        }
      }
    }
  }
  bool begun(i32 b) const {
    return graph_.producer[b] < 0 || (graph_.producer[b] != v_ && side_[graph_.producer[b]] == Side::kBefore);
  }
  bool must_stay(i32 b) const {
    if (graph_.kept[b] || (graph_.producer[b] < 0 && graph_.consumer_count(b) == 0)) return true;
    for (const i32 u : graph_.consumers_of(b)) {
      if (side_[u] == Side::kAfter) return true;  // v itself stands on this side
    }
    return false;
  }
  void savings() {
    const i32 count = graph_.reuse_count(v_);
    std::vector<i32> outputs, usable_output, usable_input;
    for (i32 k = 0; k < count; ++k) {
      const i32 output = graph_.reuse_output.begin(v_)[k], input = graph_.reuse_input.begin(v_)[k];
      bool possible = !graph_.kept[input];
      for (const i32 u : graph_.consumers_of(input)) possible &= u == v_ || side_[u] != Side::kAfter;
      if (!possible) continue;
      usable_output.push_back(output);
      usable_input.push_back(input);
      if (std::find(outputs.begin(), outputs.end(), output) == outputs.end()) outputs.push_back(output);
    }
    for (const i32 output : outputs) {
      i64 most = 0;
      i32 choices = 0, only = -1;
      for (size_t k = 0; k < usable_output.size(); ++k) {
        if (usable_output[k] != output) continue;
        most = std::max(most, std::min(graph_.size[output], graph_.size[usable_input[k]]));
        only = usable_input[k];
        ++choices;
      }
      if (choices == 1) conditional_.emplace_back(only, most);
      else unconditional_ += most;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------
// Beam search over the sets of operations that have run, within a stretch of an order that is already there.

class Beam {
 public:
  Beam(const Graph& graph, const std::vector<i32>& order, size_t from, size_t to, i64 bound, i64 target,
       Budget& budget)
      : graph_(graph), order_(order), from_(from), to_(to), bound_(bound), target_(target), budget_(budget),
        local_(graph.ops, -1), words_((to - from + 63) / 64) {
    for (size_t i = from; i < to; ++i) local_[order[i]] = static_cast<i32>(i - from);
    earlier_.assign(graph.ops, 0);
    for (size_t i = 0; i < from; ++i) earlier_[order[i]] = 1;
  }

  // Whether nothing was dropped for lack of width, so that no order of the stretch beats what was found.
  bool complete() const { return complete_; }

  // Looks for an order of the stretch whose peak is below the target; true if it wrote one into `result`.
  bool run(size_t width, std::vector<i32>& result) {
    complete_ = true;
    const size_t count = to_ - from_;
    std::vector<std::vector<std::unique_ptr<State>>> levels(count + 1);
    auto start = std::make_unique<State>(initial_state());
    settle(*start);
    levels[start->count].push_back(std::move(start));
    for (size_t level = 0; level < count; ++level) {
      auto& states = levels[level];
      if (states.empty()) continue;
      narrow(states, width);
      std::vector<Child> children = expand(states, width);
      for (const Child& child : children) {
        auto next = std::make_unique<State>(*states[child.parent]);
        run_operation(*next, states[child.parent]->ready[child.slot]);
        settle(*next);
        if (next->peak < target_) levels[next->count].push_back(std::move(next));
      }
      states.clear();
      states.shrink_to_fit();
      if (budget_.spent()) {
        complete_ = false;
        return false;
      }
    }
    const State* best = nullptr;
    for (const auto& state : levels[count]) {
      if (best == nullptr || state->peak < best->peak) best = state.get();
    }
    if (best == nullptr) return false;
    for (size_t i = count, at = best->path; i-- > 0; at = paths_[at].previous) result[from_ + i] = paths_[at].op;
    return true;
  }

 private:
  struct Ready {
    i32 op;
    Effect effect;
  };
  struct State {
    std::vector<u64> done;
    std::vector<Ready> ready;
    i64 live = 0, peak = 0;
    u64 hash = 0;
    size_t count = 0, path = 0;
  };
  struct Child {
    i64 peak, live;
    u64 hash;
    size_t parent, slot;
  };
  struct Path {
    size_t previous;
    i32 op;
  };
  const Graph& graph_;
  const std::vector<i32>& order_;
  const size_t from_, to_;
  const i64 bound_, target_;
  Budget& budget_;
  std::vector<i32> local_;  // position in the stretch, or -1
  std::vector<char> earlier_;
  const size_t words_;
  std::vector<Path> paths_{{0, -1}};
  bool complete_ = true;

  bool has_run(const State& state, i32 u) const {
    const i32 at = local_[u];
    return at >= 0 ? (state.done[at / 64] >> (at % 64)) & 1 : earlier_[u];
  }
  Effect effect_of(const State& state, i32 v) const {
    return forward_effect(graph_, v, [&](i32 b) {
      for (const i32 u : graph_.consumers_of(b)) {
        ++budget_.used;
        if (u != v && !has_run(state, u)) return false;
      }
      return true;
    });
  }
  bool is_ready(const State& state, i32 v) const {
    for (const i32 u : graph_.before_of(v)) {
      ++budget_.used;
      if (!has_run(state, u)) return false;
    }
    return true;
  }
  State initial_state() const {
    State state;
    state.done.assign(words_, 0);
    std::vector<i32> left(graph_.buffers);
    for (i32 b = 0; b < graph_.buffers; ++b) left[b] = graph_.consumer_count(b);
    state.live = graph_.initial;
    for (size_t i = 0; i < from_; ++i) {
      state.live += forward_effect(graph_, order_[i], [&](i32 b) { return left[b] == 1; }).net;
      for (const i32 b : graph_.inputs_of(order_[i])) --left[b];
    }
    state.peak = bound_;
    for (size_t i = from_; i < to_; ++i) {
      if (is_ready(state, order_[i])) state.ready.push_back({order_[i], effect_of(state, order_[i])});
    }
    return state;
  }

  void run_operation(State& state, Ready ready) {
    const i32 v = ready.op, at = local_[v];
    state.done[at / 64] |= u64{1} << (at % 64);
    state.hash ^= mix(static_cast<u64>(at));
    state.peak = std::max(state.peak, state.live + ready.effect.transient);
    state.live += ready.effect.net;
    ++state.count;
    paths_.push_back({state.path, v});
    state.path = paths_.size() - 1;
    budget_.used += static_cast<i64>(words_ / 8 + state.ready.size() + 16);
    state.ready.erase(std::find_if(state.ready.begin(), state.ready.end(), [&](const Ready& r) { return r.op == v; }));
    for (const i32 b : graph_.inputs_of(v)) {  // a last consumer that is left now frees its input
      i32 last = -1, count = 0;
      for (const i32 u : graph_.consumers_of(b)) {
        if (!has_run(state, u)) {
          last = u;
          if (++count > 1) break;
        }
      }
      if (count != 1) continue;
      for (Ready& other : state.ready) {
        if (other.op == last) other.effect = effect_of(state, last);
      }
    }
    for (const i32 next : graph_.after_of(v)) {
      if (local_[next] >= 0 && is_ready(state, next)) state.ready.push_back({next, effect_of(state, next)});
    }
  }

  // Runs at once what costs nothing: neither raises the peak nor leaves more bytes live. Every order can be changed
  // so, one such operation at a time, without getting worse, so no choice is lost.
  void settle(State& state) {
    while (true) {
      const auto free = std::find_if(state.ready.begin(), state.ready.end(), [&](const Ready& ready) {
        return ready.effect.net <= 0 && state.live + ready.effect.transient <= state.peak;
      });
      if (free == state.ready.end()) return;
      run_operation(state, *free);
    }
  }

  void narrow(std::vector<std::unique_ptr<State>>& states, size_t width) {
    const auto better = [](const auto& a, const auto& b) {
      if (a->peak != b->peak) return a->peak < b->peak;
      return a->live != b->live ? a->live < b->live : a->hash < b->hash;
    };
    std::sort(states.begin(), states.end(), better);
    std::unordered_map<u64, char> seen;
    auto kept = states.begin();
    for (auto& state : states) {
      if (static_cast<size_t>(kept - states.begin()) >= width) {
        complete_ = false;
        break;
      }
      if (!seen.emplace(state->hash, 1).second) continue;
      if (&*kept != &state) *kept = std::move(state);
      ++kept;
    }
    states.erase(kept, states.end());
  }

  std::vector<Child> expand(const std::vector<std::unique_ptr<State>>& states, size_t width) {
    std::vector<Child> children;
    std::unordered_map<u64, size_t> seen;
    for (size_t parent = 0; parent < states.size(); ++parent) {
      const State& state = *states[parent];
      budget_.used += 4 * static_cast<i64>(state.ready.size());
      for (size_t slot = 0; slot < state.ready.size(); ++slot) {
        const Effect& effect = state.ready[slot].effect;
        const i64 peak = std::max(state.peak, state.live + effect.transient);
        if (peak >= target_) continue;
        const u64 hash = state.hash ^ mix(static_cast<u64>(local_[state.ready[slot].op]));
        const Child child{peak, state.live + effect.net, hash, parent, slot};
        const auto [found, fresh] = seen.emplace(hash, children.size());
        if (fresh) children.push_back(child);
        else if (peak < children[found->second].peak) children[found->second] = child;
      }
    }
    const auto better = [](const Child& a, const Child& b) {
      if (a.peak != b.peak) return a.peak < b.peak;
      return a.live != b.live ? a.live < b.live : a.hash < b.hash;
    };
    if (children.size() > width) {
      complete_ = false;
      std::nth_element(children.begin(), children.begin() + width, children.end(), better);
      children.resize(width);
    }
    return children;
  }
};

// ---------------------------------------------------------------------------------------------------------------
// The portfolio.

class Planner {
 public:
  Planner(const Graph& graph, double tolerance, Budget budget)
      : graph_(graph), tolerance_(tolerance), budget_(budget), best_(graph.ops) {
    std::iota(best_.begin(), best_.end(), 0);
    profile_ = simulate(graph_, best_);
    program_peak_ = profile_.peak;
    lower_bound_ = graph_.initial;
    if (graph_.ops > 0) raise_forced(16);
  }

  void run(size_t widest) {
    if (graph_.ops == 0 || good()) return;
    const i64 pass = 16 * (graph_.ops + static_cast<i64>(graph_.inputs.items.size()));
    offer(least_peak_first(graph_, lower_bound_, 0), pass);
    if (!good()) offer(least_peak_first_reversed(graph_, lower_bound_, 0), pass);
    if (!good()) raise_forced(8);
    if (!good()) raise_cuts(4);
    if (!good()) offer(depth_first(graph_), pass);
    if (!good()) offer(breadth_first(graph_), pass);
    for (u64 seed = 1; seed <= 15 && !good() && !budget_.spent(); ++seed) {
      offer(least_peak_first(graph_, lower_bound_, seed), pass);
      if (!good() && !budget_.spent()) offer(least_peak_first_reversed(graph_, lower_bound_, seed), pass);
    }
    if (!good()) raise_cuts(8);
    for (size_t width = 8; width <= widest && !good() && !budget_.spent(); width *= 4) improve(width);
    if (!good()) raise_cuts(32);
  }

  const std::vector<i32>& order() const { return best_; }
  i64 peak() const { return profile_.peak; }
  i64 program_peak() const { return program_peak_; }
  i64 lower_bound() const { return std::min(lower_bound_, profile_.peak); }
  i64 used() const { return budget_.used; }

 private:
  const Graph& graph_;
  const double tolerance_;
  Budget budget_;
  std::vector<i32> best_;
  Profile profile_;
  i64 program_peak_ = 0, lower_bound_ = 0;
  std::vector<char> cut_done_;

  bool good() const {
    return static_cast<double>(profile_.peak - lower_bound_) <= tolerance_ * static_cast<double>(lower_bound_);
  }
  void offer(const std::vector<i32>& order, i64 work) {
    budget_.used += work;
    Profile profile = simulate(graph_, order);
    if (profile.peak >= profile_.peak) return;
    best_ = order;
    profile_ = std::move(profile);
  }
  // The operations whose steps are highest in the best order so far, highest first.
  std::vector<i32> highest(size_t count) const {
    std::vector<i32> steps(best_.size());
    std::iota(steps.begin(), steps.end(), 0);
    count = std::min(count, steps.size());
    std::partial_sort(steps.begin(), steps.begin() + count, steps.end(), [&](i32 a, i32 b) {
      return profile_.step[a] != profile_.step[b] ? profile_.step[a] > profile_.step[b] : a < b;
    });
    steps.resize(count);
    for (i32& step : steps) step = best_[step];
    return steps;
  }
  void raise_forced(size_t count) {
    for (const i32 v : highest(count)) {
      lower_bound_ = std::max(lower_bound_, Bound(graph_, v).forced());
      budget_.used += graph_.ops + graph_.buffers;
      if (good() || budget_.spent()) return;
    }
  }
  void raise_cuts(size_t count) {
    cut_done_.resize(graph_.ops, 0);
    for (const i32 v : highest(count)) {
      if (good() || budget_.spent()) return;
      if (cut_done_[v]) continue;
      cut_done_[v] = 1;
      lower_bound_ = std::max(lower_bound_, Bound(graph_, v).cut(budget_));
    }
  }
  // Beams over growing stretches around the steps that are above the bound.
  void improve(size_t width) {
    for (size_t margin = 64;; margin *= 8) {
      if (good() || budget_.spent()) return;
      size_t first = best_.size(), last = 0;
      for (size_t i = 0; i < best_.size(); ++i) {
        if (profile_.step[i] > lower_bound_) {
          first = std::min(first, i);
          last = i + 1;
        }
      }
      const size_t from = first > margin ? first - margin : 0;
      const size_t to = std::min(best_.size(), last + margin);
      std::vector<i32> order = best_;
      Beam beam(graph_, best_, from, to, lower_bound_, profile_.peak, budget_);
      const bool whole = from == 0 && to == best_.size();
      const bool found = beam.run(width, order);
      if (found) offer(order, 0);
      if (whole && beam.complete()) lower_bound_ = profile_.peak;  // every order was looked at
      raise_cuts(2);
      if (whole) return;
    }
  }
};

}  // namespace

extern "C" {

// The graph comes as arrays: per buffer its size, producer (-1: an input) and whether it is kept; consumers as rows;
// edges and in-place pairs (operation, output, input) as flat tuples. Operations are numbered in a valid order.
// `limits`: work limit in, work used out. `bounds`: peak, peak of the given order, lower bound. Returns 0, or 1 if an
// edge or a consumer goes backwards.
int32_t memplan_order(int32_t ops, int32_t buffers, const int64_t* size, const int32_t* producer, const uint8_t* kept,
                      const int32_t* consumer_start, const int32_t* consumers, int32_t edge_count,
                      const int32_t* edges, const int64_t* scratch, int32_t reuse_count, const int32_t* reuse,
                      double tolerance, int64_t widest, double seconds, int64_t* work, int32_t* order,
                      int64_t* bounds) {
  Graph graph;
  graph.ops = ops;
  graph.buffers = buffers;
  graph.size.assign(size, size + buffers);
  graph.producer.assign(producer, producer + buffers);
  graph.kept.assign(kept, kept + buffers);
  graph.scratch.assign(scratch, scratch + ops);
  std::vector<std::pair<i32, i32>> uses, inputs, outputs, before, after, reuse_output, reuse_input;
  const auto precede = [&](i32 a, i32 b) {
    before.emplace_back(b, a);
    after.emplace_back(a, b);
    return a < b;
  };
  bool forward = true;
  for (i32 b = 0; b < buffers; ++b) {
    if (producer[b] >= 0) outputs.emplace_back(producer[b], b);
    else graph.initial += size[b];
    for (i32 k = consumer_start[b]; k < consumer_start[b + 1]; ++k) {
      uses.emplace_back(b, consumers[k]);
      inputs.emplace_back(consumers[k], b);
      if (producer[b] >= 0) forward = precede(producer[b], consumers[k]) && forward;
    }
  }
  for (i32 k = 0; k < edge_count; ++k) forward = precede(edges[2 * k], edges[2 * k + 1]) && forward;
  if (!forward) return 1;
  for (i32 k = 0; k < reuse_count; ++k) {
    reuse_output.emplace_back(reuse[3 * k], reuse[3 * k + 1]);
    reuse_input.emplace_back(reuse[3 * k], reuse[3 * k + 2]);
  }
  graph.consumers = rows_of(buffers, uses, true);
  graph.inputs = rows_of(ops, inputs, true);
  graph.outputs = rows_of(ops, outputs, false);
  graph.before = rows_of(ops, before, true);
  graph.after = rows_of(ops, after, true);
  graph.reuse_output = rows_of(ops, reuse_output, false);
  graph.reuse_input = rows_of(ops, reuse_input, false);
  Budget budget;
  budget.limit = *work;
  budget.timed = seconds > 0;
  if (budget.timed) {
    budget.end = std::chrono::steady_clock::now() +
                 std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
  }
  Planner planner(graph, tolerance, budget);
  planner.run(static_cast<size_t>(widest));
  std::copy(planner.order().begin(), planner.order().end(), order);
  bounds[0] = planner.peak();
  bounds[1] = planner.program_peak();
  bounds[2] = planner.lower_bound();
  *work = planner.used();
  return 0;
}

}  // extern "C"
