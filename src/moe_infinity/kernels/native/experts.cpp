// Whole experts: two products, and what is done to values between them.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>

#include "engine.hpp"
#include "parts.hpp"

namespace moe {

namespace {

constexpr uint32_t kSumAtOnce = 256;  // columns

// The same calls, each in its parts.
std::vector<Call> in_parts(const Call *calls, size_t count) {
    std::vector<Call> all;
    for (size_t i = 0; i < count; ++i) {
        const Parts parts(calls[i].num_tokens, std::max(calls[i].up.rows, calls[i].down.rows));
        for (uint32_t p = 0; p < parts.count(); ++p) {
            Call part = calls[i];
            const size_t item = size_of(part.type), start = parts.start(p);
            part.x = static_cast<const uint8_t *>(part.x) + start * item * part.up.cols;
            part.out = static_cast<uint8_t *>(part.out) + start * item * part.down.rows;
            part.num_tokens = parts.size(p);
            all.push_back(part);
        }
    }
    return all;
}

// Whether what one call's first product is made ready with serves the other's.
bool share_tokens(const Call &a, const Call &b) {
    return a.x == b.x && a.num_tokens == b.num_tokens && a.type == b.type &&
           a.up.cols == b.up.cols && same_kind(a.up.format, b.up.format);
}

}  // namespace

// What one call holds between its two products. inner is made ready by the thread that was the last
// to compute rows of it.
struct Engine::Work {
    Prepared x, x_gate, inner;
    std::atomic<uint32_t> num_left{0};  // pieces of the first product
    std::atomic<bool> is_ready{false};
    Scratch gate, up, narrow, out;
    float *gate_values, *up_values, *out_values;  // [T, I] twice, [T, H]
    size_t stride;
    bool gate_apart;
};

Engine::Engine(int num_threads, const Kernels &kernels) : kernels_(kernels), pool_(num_threads) {}

Engine::~Engine() {
    try {
        settle();
    } catch (const std::exception &) {  // no memory for what follows the experts: nobody waits for it
    }
}

void Engine::run(const Call *calls, size_t count) {
    const auto turn = take_turn();
    const std::vector<Call> parts = in_parts(calls, count);
    // Parts of one call one after the other, or scratch memory would grow with the prompt.
    if (parts.size() == count) {
        run_group(parts.data(), parts.size(), nullptr);
    } else {
        for (const Call &part : parts) run_group(&part, 1, nullptr);
    }
}

// Threads go from the first products to the second ones, and to the sum, without meeting: each
// call's own waits only for what it multiplies.
void Engine::run_group(const Call *calls, size_t count, const Sum *sum) {
    prepare_group(calls, count, sum);
    pool_.run(static_cast<int>(pieces_.size()), [&](int task) { run_piece(task, calls, sum); });
}

void Engine::prepare_group(const Call *calls, size_t count, const Sum *sum) {
    while (works_.size() < count) works_.push_back(std::make_unique<Work>());
    for (size_t i = 0; i < count; ++i) {
        const bool is_shared = i > 0 && share_tokens(calls[0], calls[i]);
        prepare_call(calls[i], is_shared ? works_[0].get() : nullptr, *works_[i]);
    }
    cut_calls(calls, count);
    if (!sum) return;
    rows_.assign(1, sum->size);
    cut(rows_, kSumAtOnce, Step::sum);
}

void Engine::run_piece(int index, const Call *calls, const Sum *sum) {
    const Piece &piece = pieces_[index];
    if (piece.step == Step::sum) {
        spin_until([&] { return !num_outer_left_.load(std::memory_order_acquire); });
        add_up(*sum, piece.first, piece.last);
        return;
    }
    const Call &call = calls[piece.index];
    Work &work = *works_[piece.index];
    if (piece.step == Step::inner) {
        inner(call, work, piece.first, piece.last);
        if (work.num_left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        prepare_inner(call, work);
        work.is_ready.store(true, std::memory_order_release);
        return;
    }
    spin_until([&] { return work.is_ready.load(std::memory_order_acquire); });
    outer(call, work, piece.first, piece.last);
    num_outer_left_.fetch_sub(1, std::memory_order_release);
}

// All pieces of first products come before those of second ones: these wait for the others.
void Engine::cut_calls(const Call *calls, size_t count) {
    uint32_t inner_step = 1, outer_step = 1;
    for (size_t i = 0; i < count; ++i) {
        const Call &call = calls[i];
        const auto step = [&](const Matrix &m) {
            return rows_at_once(m.format, are_many(m.format, call.num_tokens));
        };
        inner_step = std::max(inner_step, step(call.up));
        if (works_[i]->gate_apart) inner_step = std::max(inner_step, step(call.gate));
        outer_step = std::max(outer_step, step(call.down));
        works_[i]->num_left = 0;
    }
    pieces_.clear();
    rows_.clear();
    for (size_t i = 0; i < count; ++i) rows_.push_back(calls[i].up.rows);
    cut(rows_, inner_step, Step::inner);
    const size_t num_inner = pieces_.size();
    for (const Piece &piece : pieces_) ++works_[piece.index]->num_left;
    for (size_t i = 0; i < count; ++i) {
        works_[i]->is_ready = !works_[i]->num_left;  // there is nothing to wait for
        rows_[i] = calls[i].down.rows;
    }
    cut(rows_, outer_step, Step::outer);
    num_outer_left_ = static_cast<uint32_t>(pieces_.size() - num_inner);
}

// What the first product needs, and room for what comes after it. same: who has these tokens ready.
void Engine::prepare_call(const Call &call, const Work *same, Work &work) {
    if (same)
        work.x.tokens = same->x.tokens;
    else
        prepare(work.x, call.up.format, call.type, call.x, call.num_tokens, call.up.cols);
    work.gate_apart = call.has_gate && !same_kind(call.gate.format, call.up.format);
    if (work.gate_apart)
        prepare(work.x_gate, call.gate.format, call.type, call.x, call.num_tokens, call.gate.cols);
    work.stride = call.up.rows;
    const size_t bytes = call.num_tokens * work.stride * 4;
    work.up_values = static_cast<float *>(work.up.reserve(bytes));
    work.gate_values = call.has_gate ? static_cast<float *>(work.gate.reserve(bytes)) : nullptr;
    work.out_values =
        static_cast<float *>(work.out.reserve(size_t(call.num_tokens) * call.down.rows * 4));
    if (call.type != Type::f32) work.narrow.reserve(bytes / 2);
    reserve(work.inner, call.down.format, call.type, call.num_tokens, call.down.cols);
}

// After a product's own rounding; the sum is rounded, too.
void Engine::add_bias(const Bias &bias, Type type, float *x, uint32_t first, size_t count) const {
    if (!bias.data) return;
    float values[64];
    for (size_t start = 0; start < count; start += 64) {
        const size_t some = std::min<size_t>(64, count - start);
        for (size_t i = 0; i < some; ++i)
            kernels_.widen(bias.type, bias.data + (first + start + i) * bias.stride_bytes, values + i, 1);
        kernels_.round(type, values, some);  // as the model holds it
        for (size_t i = 0; i < some; ++i) x[start + i] += values[i];
    }
    kernels_.round(type, x, count);
}

// gpt-oss: (up + 1) * gate * sigmoid(1.702 * gate) of bounded gate and up, into up.
void Engine::clamp(Type type, float *gate, float *up, size_t count) const {
    float scratch[64];
    for (size_t start = 0; start < count; start += 64, gate += 64, up += 64) {
        const size_t some = std::min<size_t>(64, count - start);
        for (size_t i = 0; i < some; ++i) {  // what is not a number stays so
            gate[i] = gate[i] > 7.0f ? 7.0f : gate[i];
            up[i] = (up[i] > 7.0f ? 7.0f : up[i] < -7.0f ? -7.0f : up[i]) + 1.0f;
            scratch[i] = gate[i] * 1.702f;
        }
        kernels_.round(type, scratch, some);
        kernels_.activate(Activation::clamped, scratch, some);
        kernels_.round(type, scratch, some);
        for (size_t i = 0; i < some; ++i) gate[i] *= scratch[i];
        kernels_.round(type, gate, some);
        kernels_.round(type, up, some);
        for (size_t i = 0; i < some; ++i) up[i] *= gate[i];
        kernels_.round(type, up, some);
    }
}

void Engine::inner(const Call &call, Work &work, uint32_t first, uint32_t last) const {
    multiply(call.up, work.x.tokens, first, last, work.up_values, work.stride);
    if (call.has_gate) {
        const Tokens &x = work.gate_apart ? work.x_gate.tokens : work.x.tokens;
        multiply(call.gate, x, first, last, work.gate_values, work.stride);
    }
    const size_t count = last - first;
    for (uint32_t t = 0; t < call.num_tokens; ++t) {
        float *up = work.up_values + t * work.stride + first;
        kernels_.round(call.type, up, count);
        add_bias(call.up_bias, call.type, up, first, count);
        if (!call.has_gate) {
            kernels_.activate(call.activation, up, count);
            kernels_.round(call.type, up, count);
            continue;
        }
        float *gate = work.gate_values + t * work.stride + first;
        kernels_.round(call.type, gate, count);
        add_bias(call.gate_bias, call.type, gate, first, count);
        if (call.activation == Activation::clamped) {
            clamp(call.type, gate, up, count);
            continue;
        }
        kernels_.activate(call.activation, gate, count);
        kernels_.round(call.type, gate, count);
        for (size_t i = 0; i < count; ++i) up[i] *= gate[i];
        kernels_.round(call.type, up, count);
    }
}

// On whichever thread: room for it is there.
void Engine::prepare_inner(const Call &call, Work &work) {
    const size_t count = call.num_tokens * work.stride;
    if (call.type == Type::f32) {
        prepare(work.inner, call.down.format, call.type, work.up_values, call.num_tokens,
                call.down.cols);
        return;
    }
    // They are rounded to the model's type already: narrowing them loses nothing.
    auto *narrow = static_cast<uint16_t *>(work.narrow.data());
    kernels_.narrow(call.type, work.up_values, narrow, count);
    prepare(work.inner, call.down.format, call.type, narrow, call.num_tokens, call.down.cols);
}

void Engine::outer(const Call &call, const Work &work, uint32_t first, uint32_t last) const {
    const size_t stride = call.down.rows, item = size_of(call.type);
    multiply(call.down, work.inner.tokens, first, last, work.out_values, stride);
    for (uint32_t t = 0; t < call.num_tokens; ++t) {
        float *values = work.out_values + t * stride + first;
        if (call.down_bias.data) {
            kernels_.round(call.type, values, last - first);
            add_bias(call.down_bias, call.type, values, first, last - first);
        }
        kernels_.narrow(call.type, values,
                        static_cast<uint8_t *>(call.out) + (t * stride + first) * item, last - first);
    }
}

}  // namespace moe
