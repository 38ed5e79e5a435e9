// Certified lower bounds on the peak of any order.
#include <algorithm>
#include <vector>

namespace {

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
  // Whether what is left of the capacities leads from the source to the node: the source's side of the cut.
  bool reached(i32 node) const { return static_cast<size_t>(node) < level_.size() && level_[node] >= 0; }

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

  bool may_run_on_either_side(i32 u) const { return side_[u] == Side::kFree; }

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
  // `before`, if given, is filled with such a set, whatever the cut was.
  i64 cut(Budget& budget, std::vector<char>* before = nullptr) const {
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
    const i64 least = fixed + flow.maximum(source, sink, budget);
    if (before != nullptr) {
      before->assign(graph_.ops, 0);
      for (i32 u = 0; u < graph_.ops; ++u) (*before)[u] = node[u] < 0 ? side_[u] == Side::kBefore : flow.reached(node[u]);
    }
    return least;
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

}  // namespace
