// Blocks that follow one another, and what comes behind the last one.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "engine.hpp"

namespace moe {

namespace {

double seconds_from(Clock::time_point start, Clock::time_point end) {
    return std::chrono::duration<double>(end - start).count();
}

double seconds_since(Clock::time_point start) { return seconds_from(start, Clock::now()); }

bool is_at(const Stage &s, uint64_t id, Place place) {
    return s.known[id] == static_cast<uint8_t>(place);
}

// Whether an expert is nowhere that nobody was told of in this pass.
bool is_news(const Stage &s, uint64_t id) {
    return is_at(s, id, Place::nowhere) && !s.outlook.told[id];
}

bool has_news(const Stage &s) {
    for (uint64_t id = 0; id < s.num_experts; ++id)
        if (is_news(s, id)) return true;
    return false;
}

// Of the experts that a later stage's router likes best: whether one is news. All such are told of.
bool tell_chosen(const Stage &later, const float *said, std::vector<uint32_t> &order) {
    order.resize(later.block->router.rows);
    std::iota(order.begin(), order.end(), 0);
    const auto last = order.begin() + std::min<size_t>(later.block->top_k, order.size());
    const auto liking = [said](uint32_t id) { return std::isnan(said[id]) ? -INFINITY : said[id]; };
    std::partial_sort(order.begin(), last, order.end(),
                      [&](uint32_t a, uint32_t b) { return liking(a) > liking(b); });
    bool is_any = false;
    for (auto id = order.begin(); id != last; ++id) {
        if (*id >= later.num_experts || !is_news(later, *id)) continue;
        later.outlook.told[*id] = is_any = true;
    }
    return is_any;
}

// Whether one of its chosen experts is there.
bool chose_any(const Stage &s, Place place) {
    return std::any_of(s.token.ids, s.token.ids + s.sum.top_k, [&](int64_t id) {
        const auto number = static_cast<uint64_t>(id);
        return number < s.num_experts && is_at(s, number, place);
    });
}

void begin_missing(const Stage &s) {
    if (!s.early) return;
    for (uint32_t k = 0; k < s.sum.top_k; ++k) {
        const auto id = static_cast<uint64_t>(s.token.ids[k]);
        if (id < s.num_experts && is_at(s, id, Place::nowhere))
            begin_read(*s.early, s.plans[id], s.first_key + id);
    }
}

// The calls of its chosen experts, as far as they are noted; whether all of them are.
bool gather_noted(const Stage &s, std::vector<Call> &calls) {
    calls.clear();
    const size_t row_bytes = s.sum.size * size_of(s.sum.type);
    for (uint32_t k = 0; k < s.sum.top_k; ++k) {
        const auto id = static_cast<uint64_t>(s.token.ids[k]);
        if (id >= s.num_experts || !is_at(s, id, Place::noted)) continue;
        calls.push_back(s.calls[id]);
        calls.back().x = s.token.normed;
        calls.back().out = static_cast<uint8_t *>(s.sum.outs) + k * row_bytes;
    }
    return calls.size() == s.sum.top_k;
}

}  // namespace

size_t Engine::run_ahead(Stage *stages, size_t count, const Tail *tail) {
    std::vector<Call> calls;
    for (size_t i = 0; i < count; ++i) {
        Stage &s = stages[i];
        const Progress before = s.progress;
        s.progress = Progress::none;
        s.is_said = 0;
        s.dense_s = 0;
        if (before == Progress::begun) {
            s.experts_s = settle().experts_s;
            continue;
        }
        Clock::time_point start = Clock::now();
        if (before == Progress::none) {
            attend(*s.block, s.token);
            begin_missing(s);
        }
        s.dense_s = seconds_since(start);
        const bool are_noted = gather_noted(s, calls);
        if (!are_noted && before == Progress::none && chose_any(s, Place::coming)) return i;
        const bool has_news = look_ahead(&s, count - i);
        s.dense_s = seconds_since(start);
        if (!are_noted) {
            if (!calls.empty()) begin_experts(calls, nullptr, nullptr);
            s.progress = Progress::part;
            return i;
        }
        s.experts_s = 0;
        if (has_news) {
            begin_experts(calls, &s.sum, nullptr);
            s.progress = Progress::news;
            return i;
        }
        if (tail && i + 1 == count) {
            begin_experts(calls, &s.sum, tail);
            continue;
        }
        start = Clock::now();
        const auto turn = take_turn();
        run_group(calls.data(), calls.size(), &s.sum);
        s.experts_s = seconds_since(start);
    }
    return count;
}

// Shows the routers of the next stages what this one's was shown; whether there is news.
bool Engine::look_ahead(Stage *stages, size_t count) {
    const Outlook &outlook = stages[0].outlook;
    const size_t reach = std::min({size_t(outlook.reach), count - 1, kTogether});
    if (std::none_of(stages + 1, stages + 1 + reach, has_news)) return false;
    const auto turn = take_turn();
    BlockWork &w = block_work_;
    const Type type = stages[0].block->type;
    const size_t hidden = stages[0].block->router.cols;
    w.make_room(*stages[0].block);
    kernels_.widen(type, stages[0].token.normed, w.x, hidden);
    void *narrow = w.narrow.reserve(hidden * 4);
    uint32_t step = 1;
    rows_.clear();
    for (size_t d = 0; d < reach; ++d) {
        const Matrix &router = stages[1 + d].block->router;
        const float *change = outlook.changes ? outlook.changes + d * hidden : nullptr;
        for (size_t i = 0; i < hidden; ++i) w.normed[i] = w.x[i] + (change ? change[i] : 0);
        kernels_.narrow(type, w.normed, narrow, hidden);
        prepare(prepared_[d], router.format, type, narrow, 1, router.cols);
        step = std::max(step, rows_at_once(router.format, false));
        rows_.push_back(router.rows);
    }
    const auto said = [&](size_t d) { return outlook.said + d * outlook.stride; };
    share(rows_, step, [&](size_t d, uint32_t first, uint32_t last) {
        const Matrix &router = stages[1 + d].block->router;
        multiply(router, prepared_[d].tokens, first, last, said(d), router.rows);
    });
    bool is_any = false;
    stages[0].is_said = 1;
    for (size_t d = 0; d < reach; ++d) is_any |= tell_chosen(stages[1 + d], said(d), order_);
    return is_any;
}

void Engine::begin_experts(std::vector<Call> &calls, const Sum *sum, const Tail *tail) {
    const auto turn = take_turn();
    begun_calls_.swap(calls);
    const Clock::time_point start = Clock::now();
    prepare_group(begun_calls_.data(), begun_calls_.size(), sum);
    begun_ = {sum ? std::optional<Sum>(*sum) : std::nullopt,
              tail ? std::optional<Tail>(*tail) : std::nullopt, start, start};
    num_begun_left_ = static_cast<int>(pieces_.size());
    pool_.begin(num_begun_left_, [this](int task) {
        run_piece(task, begun_calls_.data(), begun_->sum ? &*begun_->sum : nullptr);
        if (--num_begun_left_ == 0) begun_->end = Clock::now();
    });
}

Spent Engine::settle() {
    const std::lock_guard<std::mutex> turn(turn_);
    return end_begun();
}

std::unique_lock<std::mutex> Engine::take_turn() {
    std::unique_lock<std::mutex> turn(turn_);
    end_begun();
    return turn;
}

Spent Engine::end_begun() {
    if (!begun_) return {};
    pool_.end();
    const Clock::time_point start = Clock::now();
    const Begun begun = *begun_;
    begun_.reset();
    if (begun.tail) run_tail(*begun.tail);
    return {seconds_from(begun.start, begun.end), seconds_since(start)};
}

}  // namespace moe
