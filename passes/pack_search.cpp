// Restarts of the exact search, and the plain C interface of packing over arrays, so that it can be called through
// ctypes. Last part: it stands behind pack_fit and pack_exact in one file, see pack_search.py.

namespace {

constexpr i64 kRoundsPerLength = 32;  // rounds of restarts before searches become longer
constexpr i64 kSharePerBuffer = 160;  // work of the shortest search, per buffer: a few dives

// Short searches over several orders in turn. What took part in contradictions comes earlier in the next search from
// the same order (as in dom/wdeg, Boussemart et al., ECAI 2004), which mends early mistakes that one search would
// only undo after exhausting everything below them.
Outcome search_with_restarts(const Problem& problem, const std::vector<std::vector<i32>>& orders, i64 capacity,
                             const Deadline& deadline, i64* work, i64* offsets) {
  const i64 limit = *work;
  const i64 share = kSharePerBuffer * std::max(problem.count, 64);
  std::vector<std::vector<i32>> sequences = orders;
  std::vector<std::vector<double>> weights(orders.size(), std::vector<double>(problem.count, 0.0));
  *work = 0;
  for (i64 round = 0; *work < limit && !deadline.passed(); ++round) {
    for (size_t which = 0; which < orders.size() && *work < limit; ++which) {
      Search search(problem, sequences[which], capacity, std::min(limit - *work, share * (1 + round / kRoundsPerLength)), deadline);
      const Outcome outcome = search.run();
      *work += search.used();
      if (outcome == Outcome::kFits) search.write(offsets);
      if (outcome != Outcome::kUnknown) return outcome;
      std::vector<double>& weight = weights[which];
      search.weigh(weight);
      sequences[which] = orders[which];
      std::stable_sort(sequences[which].begin(), sequences[which].end(),
                       [&](i32 a, i32 b) { return weight[a] > weight[b]; });
    }
  }
  return Outcome::kUnknown;
}

}  // namespace

extern "C" {

// By time, as an allocator would; returns the arena.
int64_t memplan_sweep(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                      int64_t* offsets) {
  return sweep(Problem{count, lower, upper, size}, offsets);
}

// Best fit, then up to `passes` rounds of the squeaky wheel towards `target`; the best result stays in `offsets`.
// `work` is the limit of entries looked at in, what is left of it out. Returns -1 if not even one pass ended in time.
int64_t memplan_squeaky(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                        const int32_t* order, int64_t target, int64_t passes, int64_t* work, double seconds,
                        int64_t* offsets) {
  const Problem problem{count, lower, upper, size};
  const Deadline deadline(seconds);
  std::vector<i32> sequence(order, order + count);
  i64 best = best_fit(problem, sequence, offsets, *work, deadline);
  std::vector<i64> trial(offsets, offsets + count);
  for (i64 pass = 0; pass < passes && best > target; ++pass) {
    if (!promote(problem, target, trial.data(), sequence)) break;
    const i64 arena = best_fit(problem, sequence, trial.data(), *work, deadline);
    if (arena < 0) break;
    if (arena < best) {
      best = arena;
      std::copy(trial.begin(), trial.end(), offsets);
    }
  }
  return best;
}

int64_t memplan_lowest_floor(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                             const int32_t* order, int64_t* offsets) {
  const Problem problem{count, lower, upper, size};
  return lowest_floor(problem, std::vector<i32>(order, order + count), offsets);
}

// Searches for offsets within `capacity`, starting from each of the `order_count` orders in turn.
// Returns 1: found (in `offsets`), 0: proved impossible, -1: stopped at a limit. `work` is the limit in, used out.
int32_t memplan_pack_search(int32_t count, const int32_t* lower, const int32_t* upper, const int64_t* size,
                            int32_t order_count, const int32_t* orders, int64_t capacity, double seconds,
                            int64_t* work, int64_t* offsets) {
  const Problem problem{count, lower, upper, size};
  const Deadline deadline(seconds);
  std::vector<std::vector<i32>> sequences;
  for (i32 i = 0; i < order_count; ++i) {
    sequences.emplace_back(orders + static_cast<size_t>(i) * count, orders + static_cast<size_t>(i + 1) * count);
  }
  const Outcome outcome = search_with_restarts(problem, sequences, capacity, deadline, work, offsets);
  return outcome == Outcome::kFits ? 1 : outcome == Outcome::kImpossible ? 0 : -1;
}

}  // extern "C"
