// The portfolio of order searches, and its plain C interface over arrays, so that it can be called through ctypes.
// Last part: it stands behind the other parts in one file, see order_search.py.

namespace {

constexpr i32 kLargestExact = 256;       // operations of a graph that is searched exactly
constexpr i32 kLargestAnnealed = 512;    // operations of a graph whose orders are annealed
constexpr size_t kNarrow = 32;           // width of beams from which on cases are tried in between
constexpr i64 kExactWork = 500'000;            // of the first search for one threshold
constexpr i64 kLongestExact = 8'000'000'000;  // of the last one: by then there are as many sets as it may keep

class Planner {
 public:
  Planner(const Graph& graph, double tolerance, Budget budget, i64 bound)
      : graph_(graph), tolerance_(tolerance), budget_(budget), best_(graph.ops) {
    std::iota(best_.begin(), best_.end(), 0);
    profile_ = simulate(graph_, best_);
    program_peak_ = profile_.peak;
    lower_bound_ = std::max(graph_.initial, bound);
    if (graph_.ops > 0) raise_forced(16);
  }

  void run(size_t widest, bool exact) {
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
    const bool small = exact && graph_.ops <= kLargestExact;
    for (size_t width = 8; width <= widest && !good() && !budget_.spent(); width *= 4) {
      improve(width);
      if (width == kNarrow) anneal(0.4);
      if (width >= kNarrow) branch(0.25);
    }
    if (!small && !good()) branch(1.0);
    if (!good()) raise_cuts(32);
    for (i64 work = kExactWork; small && !good() && !budget_.spent() && work <= kLongestExact; work *= 4) prove(work);
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
  // Simulated annealing of a small graph, within a part of what is left.
  void anneal(double part) {
    if (graph_.ops > kLargestAnnealed || good() || budget_.spent()) return;
    Budget share = budget_.share(part);
    Anneal moved(graph_, best_, lower_bound_, share);
    moved.run();
    budget_.used = share.used;
    offer(moved.order(), 0);
  }
  // Cases, within a part of what is left.
  void branch(double part) {
    if (good() || budget_.spent()) return;
    Budget share = budget_.share(part);
    Branch cases(graph_, best_, lower_bound_, tolerance_, share);
    cases.run();
    budget_.used = share.used;
    offer(cases.order(), 0);
    lower_bound_ = std::max(lower_bound_, cases.bound());
  }
  // Halves what lies between the bound and the best order, from both ends; where neither end decides within `work`, it
  // goes on above.
  void prove(i64 work) {
    i64 floor = lower_bound_ - 1;  // at most this: no order, or not decided
    while (!good() && !budget_.spent() && floor + 1 < profile_.peak) {
      const i64 threshold = floor + (profile_.peak - floor) / 2;
      bool decided = false;
      for (const bool reversed : {false, true}) {
        Exact exact(graph_, reversed, threshold, work, budget_);
        if (exact.run()) offer(exact.order(), 0);
        else if (!exact.stopped()) lower_bound_ = std::max(lower_bound_, std::min(exact.over(), profile_.peak));
        decided = !exact.stopped();
        if (decided) break;
      }
      floor = std::max(lower_bound_ - 1, decided ? floor : threshold);
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
// `work`: limit in, work used out. `bounds`: peak, peak of the given order, lower bound; in it comes what peak is as good
// as any lower one. Returns 0, or 1 if an edge or a consumer goes backwards.
int32_t memplan_order(int32_t ops, int32_t buffers, const int64_t* size, const int32_t* producer, const uint8_t* kept,
                      const int32_t* consumer_start, const int32_t* consumers, int32_t edge_count,
                      const int32_t* edges, const int64_t* scratch, int32_t reuse_count, const int32_t* reuse,
                      double tolerance, int64_t widest, int32_t exact, double seconds, int64_t* work, int32_t* order,
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
  Planner planner(graph, tolerance, budget, bounds[2]);
  planner.run(static_cast<size_t>(widest), exact != 0);
  std::copy(planner.order().begin(), planner.order().end(), order);
  bounds[0] = planner.peak();
  bounds[1] = planner.program_peak();
  bounds[2] = planner.lower_bound();
  *work = planner.used();
  return 0;
}

}  // extern "C"
