// Products and whole experts over several threads.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "block.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace moe {

// What is added to a product, one number for each row; null: nothing.
struct Bias {
    const uint8_t *data;
    uint32_t stride_bytes;
    Type type;
};

// One expert over some tokens: out = down(activation(gate x) * (up x)), or down(activation(up x)).
// After every step values are rounded to `type`, as the model's own code does. Plain data, written
// by Python with struct; x and out are [num_tokens, cols] and [num_tokens, rows], contiguous.
struct Call {
    const void *x;
    void *out;
    uint32_t num_tokens;
    Type type;
    Activation activation;
    uint32_t has_gate;
    Matrix gate, up, down;
    Bias gate_bias, up_bias, down_bias;
};
static_assert(sizeof(Call) == 296, "Python packs it so");

// Memory that only grows, aligned to cache lines.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    ~Scratch() { std::free(data_); }

    void *reserve(size_t num_bytes);  // what was there before is lost
    void *data() const { return data_; }

private:
    void *data_ = nullptr;
    size_t size_ = 0;
};

// Tokens and the memory they are made ready in.
struct Prepared {
    Tokens tokens;
    Scratch values, scales, sums;
};

// One token's way through a block in floats, rounded to the model's type.
struct BlockWork {
    float *x, *normed, *q, *k, *v, *context, *cos, *sin, *spare;
    Scratch floats, narrow, partial;  // partial: what each task of attention found
    std::deque<Prepared> queries;     // by key-value head

    void make_room(const Block &block);
    void make_room(const Tail &tail);
};

// Of attention to latents: heads in chunks, each with its tokens.
struct LatentWork {
    Scratch floats, narrow, partial;
    std::deque<Prepared> plain, rotary, context;
};

// Whether tokens made ready for one format serve the other.
bool same_kind(Format a, Format b);

// Ranges of a product's rows begin at multiples of this.
uint32_t rows_at_once(Format format, bool is_many);

using Clock = std::chrono::steady_clock;

// On what was begun: by its experts, from their beginning to their end, whoever computed them; and
// by the caller behind that.
struct Spent {
    double experts_s, dense_s;
};

class Engine {
public:
    Engine(int num_threads, const Kernels &kernels);
    ~Engine();  // what was begun is done first

    // All calls at once: their rows are shared out together. Callers take turns.
    void run(const Call *calls, size_t count);

    // out [num_tokens, rows] = x [num_tokens, cols] . m^T + bias [rows]; bias may be null
    void product(const Matrix &m, const void *x, uint32_t num_tokens, Type type, void *out,
                 const void *bias);

    // One token through a block, up to the choice of its experts; and what comes after them.
    void attend(const Block &block, const Token &token);
    void sum(const Sum &sum);
    void attend_latents(const Latent &latent);
    void finish(const Tail &tail);

    // As many stages as have all of their chosen experts in memory, and see none missing that later
    // ones will choose; returns how many. The one after them, if there is one, is run up to the
    // choice of its experts, and told to go on from there by its progress; where it has news its
    // experts are begun: other threads compute them. So are those that are noted where others are
    // missing, and the last one's with a tail, which follows it.
    size_t run_ahead(Stage *stages, size_t count, const Tail *tail);
    // What was begun is done, and what follows it; until then all memory of it has to stay. Whatever
    // else is asked of the engine does that first.
    Spent settle();

private:
    struct Work;

    // Of calls: what lies between their products, their results, the sum of those.
    enum class Step { inner, outer, sum };

    // Rows of one of several products, or columns of a sum.
    struct Piece {
        uint32_t index, first, last;
        Step step;
    };

    // Experts that were begun: their sum, if all of a block's were, what follows that, and when they
    // began and ended.
    struct Begun {
        std::optional<Sum> sum;
        std::optional<Tail> tail;
        Clock::time_point start, end;
    };

    bool look_ahead(Stage *stages, size_t count);
    void begin_experts(std::vector<Call> &calls, const Sum *sum, const Tail *tail);
    Spent end_begun();
    void run_tail(const Tail &tail);
    void add_up(const Sum &sum, uint32_t first, uint32_t last) const;  // of its columns
    std::unique_lock<std::mutex> take_turn();  // and end what was begun in the turn before
    void cut(const std::vector<uint32_t> &rows, uint32_t at_once, Step step);  // adds to pieces_

    void products(const Matrix *const *matrices, const void *const *biases, float *const *outs,
                  size_t count, Type type, const float *x, BlockWork &work);
    void normalise(const Norm &norm, Type type, float *x, size_t count, BlockWork &work) const;
    void rotate(const Block &block, float *x, uint32_t num_heads, BlockWork &work) const;
    void look_back(const Block &block, const Token &token, BlockWork &work);
    void route(const Block &block, const Token &token, BlockWork &work);
    void look_back(const Latent &latent, uint32_t part, uint32_t parts, LatentWork &work) const;

    // sum: of what the calls say, or null.
    void run_group(const Call *calls, size_t count, const Sum *sum);
    void prepare_group(const Call *calls, size_t count, const Sum *sum);
    void run_piece(int index, const Call *calls, const Sum *sum);
    void cut_calls(const Call *calls, size_t count);
    bool are_many(Format weights, uint32_t num_tokens) const;
    // Room for what prepare makes of so many tokens: it asks for none then, on whichever thread.
    void reserve(Prepared &room, Format weights, Type type, uint32_t num_tokens, uint32_t cols) const;
    void prepare_call(const Call &call, const Work *same, Work &work);
    void prepare(Prepared &room, Format weights, Type type, const void *x, uint32_t num_tokens,
                 uint32_t cols);
    void prepare_grouped(Prepared &room, Format weights, Type type, const void *x, uint32_t cols);
    void multiply(const Matrix &m, const Tokens &x, uint32_t first, uint32_t last, float *out,
                  size_t out_stride) const;
    // scores: what goes to out in floats, of one token; or null.
    void multiply_all(const Matrix &m, const void *x, uint32_t num_tokens, Type type, void *out,
                      const void *bias, float *scores);
    void prepare_inner(const Call &call, Work &work);
    void add_bias(const Bias &bias, Type type, float *x, uint32_t first, size_t count) const;
    void clamp(Type type, float *gate, float *up, size_t count) const;
    void inner(const Call &call, Work &work, uint32_t first, uint32_t last) const;
    void outer(const Call &call, const Work &work, uint32_t first, uint32_t last) const;
    using Rows = std::function<void(size_t matrix, uint32_t first, uint32_t last)>;
    void share(const std::vector<uint32_t> &rows, uint32_t at_once, const Rows &body);

    const Kernels &kernels_;
    Pool pool_;
    std::mutex turn_;
    std::vector<std::unique_ptr<Work>> works_;
    std::vector<Piece> pieces_;  // of what runs together
    std::atomic<uint32_t> num_outer_left_{0};  // of them
    std::optional<Begun> begun_;
    std::vector<Call> begun_calls_;
    std::atomic<int> num_begun_left_{0};  // pieces of them
    BlockWork block_work_;
    LatentWork latent_work_;
    static constexpr size_t kTogether = 3;  // products of the same tokens: q, k and v
    Prepared prepared_[kTogether];
    Scratch result_, bias_;
    std::vector<uint32_t> rows_, order_;
};

}  // namespace moe
