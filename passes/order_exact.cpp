// Search for an order of a small graph whose peak stays within a threshold, or the proof that there is none: depth first
// over the sets of operations that have run, from the start or from the end, each set once.
#include <algorithm>
#include <set>
#include <utility>
#include <vector>

namespace {

constexpr size_t kMostSets = 4'000'000;  // some 300 MB

class Exact {
 public:
  Exact(const Graph& graph, bool reversed, i64 threshold, i64 work, Budget& budget)
      : graph_(graph), reversed_(reversed), threshold_(threshold), budget_(budget),
        limit_(std::min(budget.limit, budget.used + work)), done_(graph.ops, 0), waiting_(graph.ops),
        used_(graph.buffers, 0), forced_(graph.ops) {
    const Rows& needs = reversed_ ? graph_.after : graph_.before;
    for (i32 v = 0; v < graph_.ops; ++v) waiting_[v] = needs.start[v + 1] - needs.start[v];
    live_ = reversed_ ? 0 : graph_.initial;
    for (i32 b = 0; b < graph_.buffers && reversed_; ++b) {
      if (graph_.kept[b] || (graph_.producer[b] < 0 && graph_.consumer_count(b) == 0)) live_ += graph_.size[b];
    }
    over_ = kInfinite;
    set_forced();
    budget_.used += static_cast<i64>(graph_.ops) * (graph_.ops + graph_.buffers);
  }

  // Whether it found an order; `order()` has it then.
  bool run() {
    for (const i64 bytes : forced_) note(bytes);
    if (graph_.initial > threshold_) note(graph_.initial);
    return over_ == kInfinite && visit();
  }
  std::vector<i32> order() const {
    std::vector<i32> order = path_;
    if (reversed_) std::reverse(order.begin(), order.end());
    return order;
  }
  // Whether a limit ended the search; otherwise every order's peak is at least `over()`, the least that was refused.
  bool stopped() const { return stopped_; }
  i64 over() const { return over_; }

 private:
  using Key = std::pair<u64, u64>;  // of 128 bits: two sets with one key would be a false proof
  const Graph& graph_;
  const bool reversed_;
  const i64 threshold_;
  Budget& budget_;
  const i64 limit_;
  std::vector<char> done_;
  std::vector<i32> waiting_;  // operations that stand between v and its being ready
  std::vector<i32> used_;     // consumers of each buffer that have run, in the direction of the search
  std::vector<i64> forced_;   // bytes that live while v runs whatever comes between now and then
  std::vector<std::vector<i32>> held_;  // what else a buffer lives through once the search has made it live
  i64 live_ = 0, over_ = 0;
  Key key_{0, 0};
  std::set<Key> seen_;
  std::vector<i32> path_;
  bool stopped_ = false;

  bool note(i64 bytes) {
    if (bytes > threshold_) over_ = std::min(over_, bytes);
    return bytes <= threshold_;
  }

  void set_forced() {
    std::vector<std::vector<char>> after(graph_.ops, std::vector<char>(graph_.ops, 0));
    for (i32 v = graph_.ops - 1; v >= 0; --v) {  // operations are numbered in a valid order
      after[v][v] = 1;
      for (const i32 next : graph_.after_of(v)) {
        for (i32 u = next; u < graph_.ops; ++u) after[v][u] |= after[next][u];
      }
    }
    held_.resize(graph_.buffers);
    for (i32 v = 0; v < graph_.ops; ++v) forced_[v] = Bound(graph_, v).forced();
    for (i32 b = 0; b < graph_.buffers; ++b) {
      const i32 producer = graph_.producer[b];
      for (i32 v = 0; v < graph_.ops; ++v) {
        const bool made = producer < 0 || after[producer][v];
        bool wanted = graph_.kept[b];
        for (const i32 u : graph_.consumers_of(b)) wanted |= after[v][u] != 0;
        // forwards it is made before v, though it need not be; from the end it is wanted after v, though it need not be
        const bool more = reversed_ ? made && !wanted : !made && wanted && !(producer >= 0 && after[v][producer]);
        if (more) held_[b].push_back(v);
      }
    }
  }

  Effect effect_of(i32 v) const {
    if (!reversed_) return forward_effect(graph_, v, [&](i32 b) { return used_[b] + 1 == graph_.consumer_count(b); });
    const auto dead = [&](i32 b) { return !graph_.kept[b] && used_[b] == 0; };
    Effect effect{graph_.scratch[v], 0};
    for (const i32 b : graph_.inputs_of(v)) {
      if (dead(b)) effect.net += graph_.size[b];
    }
    effect.transient += effect.net - graph_.reused(v, dead);
    for (const i32 b : graph_.outputs_of(v)) {
      if (dead(b)) effect.transient += graph_.size[b];
      else effect.net -= graph_.size[b];
    }
    return effect;
  }

  // Adds (or takes back) what the buffers that v makes live hold; false if some operation cannot run any more.
  bool hold(i32 v, i64 sign) {
    bool good = true;
    for (const i32 b : reversed_ ? graph_.inputs_of(v) : graph_.outputs_of(v)) {
      if (reversed_ && (graph_.kept[b] || used_[b] > 0)) continue;
      budget_.used += static_cast<i64>(held_[b].size() / 4);
      for (const i32 u : held_[b]) {
        forced_[u] += sign * graph_.size[b];
        if (sign > 0 && !done_[u] && u != v) good = note(forced_[u]) && good;
      }
    }
    return good;
  }
  void step(i32 v, i64 net, i32 by) {
    done_[v] = by > 0;
    live_ += by * net;
    key_.first ^= mix(static_cast<u64>(v));
    key_.second ^= mix(~static_cast<u64>(v));
    for (const i32 b : graph_.inputs_of(v)) used_[b] += by;
    for (const i32 u : reversed_ ? graph_.before_of(v) : graph_.after_of(v)) waiting_[u] -= by;
    if (by > 0) path_.push_back(v);
    else path_.pop_back();
    budget_.used += 16;
  }
  void undo_to(size_t mark, std::vector<i64>& nets) {
    while (path_.size() > mark) {
      const i32 v = path_.back();
      step(v, nets.back(), -1);
      nets.pop_back();
      hold(v, -1);
    }
  }
  bool advance(i32 v, i64 net, std::vector<i64>& nets) {
    const bool good = hold(v, 1);
    step(v, net, 1);
    nets.push_back(net);
    return good;
  }

  // Everything that is ready and fits; what costs nothing is run at once. False if the set leads nowhere.
  bool settle(std::vector<std::pair<i64, i32>>& choices, std::vector<i64>& nets) {
    while (true) {
      choices.clear();
      bool ran = false;
      for (i32 v = 0; v < graph_.ops && !ran; ++v) {
        if (done_[v] || waiting_[v] > 0) continue;
        const Effect effect = effect_of(v);
        budget_.used += 8;
        if (!note(live_ + effect.transient)) continue;
        if (effect.net <= 0) {
          if (!advance(v, effect.net, nets)) return false;
          ran = true;
        } else {
          choices.emplace_back(effect.net, v);
        }
      }
      if (!ran) return true;
    }
  }

  bool visit() {
    const size_t mark = path_.size();
    budget_.used += 32;
    std::vector<std::pair<i64, i32>> choices;
    std::vector<i64> nets;
    if (!settle(choices, nets)) {
      undo_to(mark, nets);
      return false;
    }
    if (static_cast<i32>(path_.size()) == graph_.ops) return true;
    if (budget_.used >= limit_ || budget_.spent() || seen_.size() >= kMostSets) stopped_ = true;
    if (!stopped_ && seen_.insert(key_).second) {
      std::sort(choices.begin(), choices.end());
      for (const auto& [net, v] : choices) {
        const size_t here = path_.size();
        if (advance(v, net, nets) && visit()) return true;
        undo_to(here, nets);
        if (stopped_) break;
      }
    }
    undo_to(mark, nets);
    return false;
  }
};

}  // namespace
