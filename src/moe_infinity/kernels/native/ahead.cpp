// Blocks that follow one another, and what comes behind the last one.
#include <chrono>

#include "engine.hpp"

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

size_t Engine::run_ahead(Stage *stages, size_t count, const Tail *tail) {
    std::vector<Call> calls;
    for (size_t i = 0; i < count; ++i) {
        Stage &s = stages[i];
        attend(*s.block, s.token);
        const Clock::time_point start = Clock::now();
        calls.clear();
        for (uint32_t k = 0; k < s.sum.top_k; ++k) {
            const auto id = static_cast<uint64_t>(s.token.ids[k]);
            if (id >= s.num_experts || !s.known[id]) return i;
            const size_t row_bytes = s.sum.size * size_of(s.sum.type);
            calls.push_back(s.calls[id]);
            calls.back().x = s.token.normed;
            calls.back().out = static_cast<uint8_t *>(s.sum.outs) + k * row_bytes;
        }
        if (tail && i + 1 == count) {
            begin_end(calls, s.sum, *tail);
        } else {
            const auto turn = take_turn();
            run_group(calls.data(), calls.size(), &s.sum);
        }
        s.experts_s = seconds_since(start);
    }
    return count;
}

void Engine::begin_end(std::vector<Call> &calls, const Sum &sum, const Tail &tail) {
    const auto turn = take_turn();
    last_calls_.swap(calls);
    prepare_group(last_calls_.data(), last_calls_.size(), &sum);
    ending_ = {sum, tail};
    pool_.begin(static_cast<int>(pieces_.size()),
                [this](int task) { run_piece(task, last_calls_.data(), &ending_->sum); });
}

double Engine::settle() {
    const std::lock_guard<std::mutex> turn(turn_);
    return end_begun();
}

std::unique_lock<std::mutex> Engine::take_turn() {
    std::unique_lock<std::mutex> turn(turn_);
    end_begun();
    return turn;
}

double Engine::end_begun() {
    if (!ending_) return 0;
    const Clock::time_point start = Clock::now();
    pool_.end();
    const double experts_s = seconds_since(start);
    const Tail tail = ending_->tail;
    ending_.reset();
    run_tail(tail);
    return experts_s;
}

}  // namespace moe
