// Bounds, and orders, by cases: of two operations that no edge orders, one runs first. In each case a minimum cut sees one
// edge more, so that the lesser of the two bounds, which holds for all orders, can be above the bound without cases.
#include <algorithm>
#include <queue>
#include <utility>
#include <vector>

namespace {

constexpr size_t kBranchSteps = 4;       // highest steps of a case's order whose cuts bound it
constexpr size_t kBranchCandidates = 16;  // pairs of which the best is taken
constexpr size_t kMostHeld = 50'000'000;  // operations in the orders of the cases that wait to be divided

using Edge = std::pair<i32, i32>;

// Rows of neighbours with some more of them.
Rows with_more(const Rows& rows, i32 count, std::vector<Edge> more) {
  std::sort(more.begin(), more.end());
  Rows made;
  made.start.assign(count + 1, 0);
  made.items.reserve(rows.items.size() + more.size());
  auto next = more.begin();
  for (i32 row = 0; row < count; ++row) {
    made.items.insert(made.items.end(), rows.begin(row), rows.end(row));
    for (; next != more.end() && next->first == row; ++next) made.items.push_back(next->second);
    made.start[row + 1] = static_cast<i32>(made.items.size());
  }
  return made;
}

// The graph with edges more, none of which closes a cycle. Operations keep their numbers, which are no valid order then.
Graph with_edges(const Graph& graph, const std::vector<Edge>& edges) {
  Graph made = graph;
  std::vector<Edge> backwards;
  for (const auto& [a, b] : edges) backwards.emplace_back(b, a);
  made.before = with_more(graph.before, graph.ops, backwards);
  made.after = with_more(graph.after, graph.ops, edges);
  return made;
}

// The order closest to a given one that the graph allows: always the first of it that is ready.
std::vector<i32> mended(const Graph& graph, const std::vector<i32>& order) {
  std::vector<i32> place(graph.ops), waiting(graph.ops), result;
  for (i32 i = 0; i < graph.ops; ++i) place[order[i]] = i;
  std::priority_queue<i32, std::vector<i32>, std::greater<i32>> ready;
  for (i32 v = 0; v < graph.ops; ++v) {
    waiting[v] = graph.before.start[v + 1] - graph.before.start[v];
    if (waiting[v] == 0) ready.push(place[v]);
  }
  while (!ready.empty()) {
    const i32 v = order[ready.top()];
    ready.pop();
    result.push_back(v);
    for (const i32 next : graph.after_of(v)) {
      if (--waiting[next] == 0) ready.push(place[next]);
    }
  }
  return result;
}

// Divides the case with the least bound until a limit ends it, or the bound is good enough.
class Branch {
 public:
  Branch(const Graph& graph, std::vector<i32> order, i64 bound, double tolerance, Budget& budget)
      : graph_(graph), best_(std::move(order)), peak_(simulate(graph, best_).peak), tolerance_(tolerance),
        budget_(budget) {
    Case all;
    all.bound = bound;
    all.order = best_;
    open_.push(std::move(all));
  }

  void run() {
    while (!open_.empty() && open_.top().bound < undivided_ && !good() && !budget_.spent() && open_.size() * best_.size() < kMostHeld) {
      Case least = open_.top();
      open_.pop();
      divide(least);
    }
  }

  const std::vector<i32>& order() const { return best_; }
  // No order has a peak below this.
  i64 bound() const {
    const i64 least = std::min(peak_, undivided_);
    return open_.empty() ? least : std::min(least, open_.top().bound);
  }

 private:
  struct Case {
    std::vector<Edge> edges;
    std::vector<i32> order;
    i64 bound = 0;
  };
  struct Less {  // the least bound on top; between equals the case with more edges, which is nearer to its end
    bool operator()(const Case& a, const Case& b) const {
      return a.bound != b.bound ? a.bound > b.bound : a.edges.size() < b.edges.size();
    }
  };
  const Graph& graph_;
  std::vector<i32> best_;
  i64 peak_;
  i64 undivided_ = kInfinite;  // the least bound of a case in which no pair is left to decide
  const double tolerance_;
  Budget& budget_;
  std::priority_queue<Case, std::vector<Case>, Less> open_;

  bool good() const {
    return static_cast<double>(peak_ - bound()) <= tolerance_ * static_cast<double>(bound());
  }

  static std::vector<i32> highest(const Profile& profile, size_t count) {
    std::vector<i32> steps(profile.step.size());
    std::iota(steps.begin(), steps.end(), 0);
    count = std::min(count, steps.size());
    std::partial_sort(steps.begin(), steps.begin() + count, steps.end(), [&](i32 a, i32 b) {
      return profile.step[a] != profile.step[b] ? profile.step[a] > profile.step[b] : a < b;
    });
    steps.resize(count);
    return steps;
  }

  i64 cut(const Graph& graph, i32 v, std::vector<char>* before = nullptr) {
    return Bound(graph, v).cut(budget_, before);
  }

  void divide(const Case& all) {
    const Graph graph = with_edges(graph_, all.edges);
    const Profile profile = simulate(graph, all.order);
    std::vector<i32> place(graph.ops);
    for (i32 i = 0; i < graph.ops; ++i) place[all.order[i]] = i;
    const std::vector<i32> steps = highest(profile, kBranchSteps);
    Case better = all;
    std::vector<Edge> pairs;
    for (const i32 step : steps) {
      if (budget_.spent()) break;
      const i32 v = all.order[step];
      std::vector<char> before;
      better.bound = std::max(better.bound, cut(graph, v, &before));
      if (better.bound >= peak_) return;
      if (pairs.empty() && !budget_.spent()) pairs = disputed(graph, all.order, place, step, before);
    }
    for (size_t k = 0; k < steps.size() && pairs.empty() && !budget_.spent(); ++k) {
      pairs = undecided(graph, all.order, steps[k]);
    }
    if (budget_.spent()) return keep(better);
    if (pairs.empty()) {
      undivided_ = std::min(undivided_, better.bound);
      return;
    }
    Edge chosen{-1, -1};
    i64 best = -1, best_first = 0, best_second = 0;
    for (const auto& [a, b] : pairs) {
      const i64 first = std::max(better.bound, bound_with(all.edges, {a, b}));
      const i64 second = std::max(better.bound, bound_with(all.edges, {b, a}));
      const i64 least = std::min(first, second);
      if (least > best || (least == best && std::max(first, second) > std::max(best_first, best_second))) {
        chosen = {a, b};
        best = least;
        best_first = first;
        best_second = second;
      }
      if (budget_.spent()) return keep(better);
      if (best >= peak_) return;  // neither way round is better than what was found
    }
    half(all, chosen, best_first);
    half(all, {chosen.second, chosen.first}, best_second);
  }
  void keep(const Case& unfinished) { open_.push(unfinished); }

  // Pairs of the operation at `step` and one whose side of it differs between the order and the set that the cut found:
  // the bound is below the step because of them. The nearest first.
  std::vector<Edge> disputed(const Graph& graph, const std::vector<i32>& order, const std::vector<i32>& place,
                             i32 step, const std::vector<char>& before) {
    std::vector<std::pair<i32, i32>> found;  // (distance, operation)
    const i32 v = order[step];
    for (i32 u = 0; u < graph.ops; ++u) {
      const i32 distance = std::abs(place[u] - step);
      if (u == v || (before[u] != 0) == (place[u] < step)) continue;
      i64 bytes = graph.scratch[u];
      for (const i32 b : graph.outputs_of(u)) bytes += graph.size[b];
      if (bytes > 0) found.emplace_back(distance, u);  // what makes nothing runs whenever it can
    }
    std::sort(found.begin(), found.end());
    if (found.size() > kBranchCandidates) found.resize(kBranchCandidates);
    std::vector<Edge> pairs;
    for (const auto& [distance, u] : found) pairs.emplace_back(v, u);
    return pairs;
  }

  // Pairs of the operation at `step` and one that may run before or after it, the nearest first.
  std::vector<Edge> undecided(const Graph& graph, const std::vector<i32>& order, i32 step) {
    const Bound bound(graph, order[step]);
    budget_.used += graph.ops;
    std::vector<Edge> pairs;
    for (i32 by = 1; by < graph.ops && pairs.size() < kBranchCandidates; ++by) {
      for (const i32 at : {step - by, step + by}) {
        if (at >= 0 && at < graph.ops && bound.may_run_on_either_side(order[at])) pairs.emplace_back(order[step], order[at]);
      }
    }
    return pairs;
  }

  // A bound on all orders of the case with one edge more, from the two operations of the edge.
  i64 bound_with(const std::vector<Edge>& edges, Edge edge) {
    std::vector<Edge> all = edges;
    all.push_back(edge);
    const Graph graph = with_edges(graph_, all);
    budget_.used += graph.ops;
    const i64 first = cut(graph, edge.first);
    return first >= peak_ ? first : std::max(first, cut(graph, edge.second));
  }

  void half(const Case& all, Edge edge, i64 bound) {
    if (bound >= peak_) return;
    Case made;
    made.edges = all.edges;
    made.edges.push_back(edge);
    made.bound = bound;
    const Graph graph = with_edges(graph_, made.edges);
    budget_.used += 3 * (graph.ops + static_cast<i64>(graph.inputs.items.size()));
    i64 least = kInfinite;
    for (const std::vector<i32>& order : {mended(graph, all.order), least_peak_first(graph, bound, 0),
                                          least_peak_first_reversed(graph, bound, 0)}) {
      const i64 peak = simulate(graph, order).peak;
      if (peak >= least) continue;
      least = peak;
      made.order = order;
    }
    if (least < peak_) {
      peak_ = least;
      best_ = made.order;
    }
    open_.push(std::move(made));
  }
};

}  // namespace
