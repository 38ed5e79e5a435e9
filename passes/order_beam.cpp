// Beam search over the sets of operations that have run, within a stretch of an order that is already there.
#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

namespace {

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

}  // namespace
