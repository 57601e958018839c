// A few threads that share out the rows of a product, and sleep when there is nothing to do.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace moe {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// For what other threads are about to finish.
template <class Done>
void spin_until(const Done &is_done) {
    for (int spins = 0; !is_done(); ++spins) {
        // One may have been put aside in mid-task by whatever else the machine runs.
        if (spins < 20000) pause(); else std::this_thread::yield();
    }
}

class Pool {
public:
    explicit Pool(int num_threads);  // the caller of run is one of them
    ~Pool();                         // joins
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

    // task(i) for every i below num_tasks, each once, on any thread; returns when all are done. They
    // are begun in their order, so that one may wait for those before it. One caller at a time.
    void run(int num_tasks, const std::function<void(int)> &task);

    // The same in two steps: other threads are called when begin returns, and the caller of end takes
    // what they have not come to. Nothing may be run between the two. At most kMost tasks.
    void begin(int num_tasks, std::function<void(int)> task);
    void end();  // nothing, if nothing was begun

    static constexpr int kMost = 65535;  // a round's tasks are counted in 16 bits

private:
    void run_round(int num_tasks, const std::function<void(int)> &task);
    void start(int num_tasks, const std::function<void(int)> &task);
    void finish(int num_tasks);
    void close();
    void work();
    void help(uint64_t round);
    bool wait_for_round(uint64_t after);

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> round_{0};   // counts rounds
    std::atomic<bool> closing_{false};
    // Round (32 bits), its tasks (16) and the next of them (16) in one word: a late worker can
    // neither take a task of another round nor one too many of its own.
    std::atomic<uint64_t> next_{0};
    std::atomic<int> done_{0};
    std::atomic<int> sleeping_{0};
    const std::function<void(int)> *task_ = nullptr;
    std::function<void(int)> begun_;
    int num_begun_ = 0;
};

}  // namespace moe
