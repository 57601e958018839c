#include "pool.hpp"

#include <algorithm>
#include <chrono>

namespace moe {

namespace {

// The time between two products of a token: a worker that slept would be woken too late for most.
// Longer pauses mean that the caller waits for the disk, and its readers need the processor.
constexpr auto kSpin = std::chrono::microseconds(120);

}  // namespace

Pool::Pool(int num_threads) {
    try {
        for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {  // the system has no more threads: those there are must not outlive the pool
        close();
        throw;
    }
}

Pool::~Pool() {
    end();
    close();
}

void Pool::close() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    wake_.notify_all();
    for (auto &worker : workers_) worker.join();
}

void Pool::run(int num_tasks, const std::function<void(int)> &task) {
    for (int start = 0; start < num_tasks; start += kMost)
        run_round(std::min(kMost, num_tasks - start), [&](int i) { task(start + i); });
}

void Pool::run_round(int num_tasks, const std::function<void(int)> &task) {
    if (workers_.empty() || num_tasks <= 1) {
        for (int i = 0; i < num_tasks; ++i) task(i);
        return;
    }
    start(num_tasks, task);
    finish(num_tasks);
}

void Pool::begin(int num_tasks, std::function<void(int)> task) {
    begun_ = std::move(task);
    num_begun_ = num_tasks;
    start(num_tasks, begun_);
}

void Pool::end() {
    if (num_begun_ > 0) finish(num_begun_);
    num_begun_ = 0;
}

void Pool::start(int num_tasks, const std::function<void(int)> &task) {
    task_ = &task;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t round = round_.load(std::memory_order_relaxed) + 1;
    next_.store(round << 32 | static_cast<uint64_t>(num_tasks) << 16, std::memory_order_release);
    round_.store(round);
    if (sleeping_.load() > 0) {
        // Taking the lock orders this after a worker that has looked and is about to sleep.
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
    }
}

void Pool::finish(int num_tasks) {
    help(round_.load(std::memory_order_relaxed));
    spin_until([&] { return done_.load(std::memory_order_acquire) == num_tasks; });
}

void Pool::help(uint64_t round) {
    uint64_t next = next_.load(std::memory_order_acquire);
    for (;;) {
        const uint64_t index = next & 0xffff, num_tasks = next >> 16 & 0xffff;
        if (next >> 32 != (round & 0xffffffff) || index >= num_tasks) return;
        if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
        (*task_)(static_cast<int>(index));  // valid: a round lasts until all of its tasks are done
        done_.fetch_add(1, std::memory_order_release);
        next = next_.load(std::memory_order_acquire);
    }
}

void Pool::work() {
    uint64_t seen = 0;
    while (wait_for_round(seen)) {
        seen = round_.load();
        help(seen);
    }
}

bool Pool::wait_for_round(uint64_t after) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    while (std::chrono::steady_clock::now() < deadline) {
        for (int i = 0; i < 32; ++i) {
            if (closing_.load(std::memory_order_relaxed)) return false;
            if (round_.load(std::memory_order_acquire) != after) return true;
            pause();
        }
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return closing_.load() || round_.load() != after; });
    sleeping_.fetch_sub(1);
    return !closing_.load();
}

}  // namespace moe
