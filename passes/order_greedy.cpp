// Greedy orders: least peak memory first from both ends, depth first, breadth first.
#include <algorithm>
#include <numeric>
#include <vector>

namespace {

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

}  // namespace
