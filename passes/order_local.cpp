// Simulated annealing (Kirkpatrick et al., Science 1983) over the orders of a small graph: one operation at a time
// moves to another place between those that it needs and those that need it. Runs start from the best order so far, each
// twice as long as the one before. Deterministic: chance is a counter, mixed.
#include <cmath>
#include <vector>

namespace {

constexpr i64 kFirstRun = 100'000;          // moves
constexpr double kHot = 0.5, kCold = 0.01;  // of the logarithm of the cost, which is some 16 times that of the peak

class Anneal {
 public:
  Anneal(const Graph& graph, const std::vector<i32>& order, i64 bound, Budget& budget)
      : graph_(graph), bound_(bound), budget_(budget), best_(order), place_(graph.ops), last_(graph.buffers),
        step_(graph.ops), live_(graph.ops + 1), weight_(graph.ops) {
    start();
    best_peak_ = *std::max_element(step_.begin(), step_.end());
  }

  // Until the budget is spent or the bound is met.
  void run() {
    if (graph_.ops < 3) return;
    for (i64 length = kFirstRun; !done(); length *= 2) {
      start();
      const double cooling = std::pow(kCold / kHot, 1.0 / static_cast<double>(length));
      double heat = kHot;
      for (i64 k = 0; k < length; ++k, heat *= cooling) {
        if ((k & 255) == 0 && done()) return;
        try_move(heat);
      }
    }
  }

  const std::vector<i32>& order() const { return best_; }

 private:
  const Graph& graph_;
  const i64 bound_;
  Budget& budget_;
  std::vector<i32> best_, order_, place_;
  std::vector<i32> last_;           // for each buffer its consumer that comes last, or -1
  std::vector<i64> step_, live_;    // bytes while each step runs, and before it
  std::vector<double> weight_;      // of each step
  std::vector<i64> old_step_, old_live_;
  std::vector<double> old_weight_;
  i64 best_peak_ = 0;
  double unit_ = 1, cost_ = 0;
  u64 counter_ = 0;

  bool done() const { return best_peak_ <= bound_ || budget_.spent(); }
  double chance() { return static_cast<double>(mix(++counter_) >> 11) * 0x1.0p-53; }

  void start() {
    order_ = best_;
    for (i32 i = 0; i < graph_.ops; ++i) place_[order_[i]] = i;
    for (i32 b = 0; b < graph_.buffers; ++b) find_last(b);
    live_[0] = graph_.initial;
    unit_ = 1;
    walk(0, graph_.ops);
    unit_ = static_cast<double>(std::max<i64>(1, *std::max_element(step_.begin(), step_.end())));
    cost_ = 0;
    walk(0, graph_.ops);
    for (const double weight : weight_) cost_ += weight;
  }
  void find_last(i32 b) {
    last_[b] = -1;
    for (const i32 u : graph_.consumers_of(b)) {
      if (last_[b] < 0 || place_[u] > place_[last_[b]]) last_[b] = u;
    }
  }
  // Simulates the steps [from, to); what lives before and after them does not depend on the order among them.
  void walk(i32 from, i32 to) {
    i64 live = live_[from];
    for (i32 i = from; i < to; ++i) {
      const i32 v = order_[i];
      const Effect effect = forward_effect(graph_, v, [&](i32 b) { return last_[b] == v; });
      live_[i] = live;
      step_[i] = live + effect.transient;
      live += effect.net;
      // nearly the peak in the sum, which is less where fewer steps are near to it
      double x = static_cast<double>(step_[i]) / unit_;
      x *= x, x *= x, x *= x;
      weight_[i] = x * x;
    }
    budget_.used += 4 * (to - from) + 8;
  }
  void move(i32 from, i32 to) {
    const auto at = order_.begin();
    if (from < to) std::rotate(at + from, at + from + 1, at + to + 1);
    else std::rotate(at + to, at + from, at + from + 1);
    for (i32 i = std::min(from, to); i <= std::max(from, to); ++i) place_[order_[i]] = i;
    for (const i32 b : graph_.inputs_of(order_[to])) find_last(b);
  }
  void try_move(double heat) {
    const i32 v = order_[static_cast<size_t>(chance() * graph_.ops)];
    i32 low = 0, high = graph_.ops - 1;
    for (const i32 u : graph_.before_of(v)) low = std::max(low, place_[u] + 1);
    for (const i32 u : graph_.after_of(v)) high = std::min(high, place_[u] - 1);
    if (low == high) return;
    const i32 from = place_[v];
    i32 to = low + static_cast<i32>(chance() * (high - low));
    if (to >= from) ++to;
    const i32 first = std::min(from, to), end = std::max(from, to) + 1;
    old_step_.assign(step_.begin() + first, step_.begin() + end);
    old_live_.assign(live_.begin() + first, live_.begin() + end);
    old_weight_.assign(weight_.begin() + first, weight_.begin() + end);
    move(from, to);
    walk(first, end);
    double found = cost_;
    for (i32 i = first; i < end; ++i) found += weight_[i] - old_weight_[i - first];
    if (found <= cost_ || std::log(found / cost_) < -heat * std::log(chance() + 1e-300)) {
      cost_ = found;
      const i64 peak = *std::max_element(step_.begin(), step_.end());
      if (peak < best_peak_) {
        best_peak_ = peak;
        best_ = order_;
      }
      return;
    }
    move(to, from);
    std::copy(old_step_.begin(), old_step_.end(), step_.begin() + first);
    std::copy(old_live_.begin(), old_live_.end(), live_.begin() + first);
    std::copy(old_weight_.begin(), old_weight_.end(), weight_.begin() + first);
  }
};

}  // namespace
