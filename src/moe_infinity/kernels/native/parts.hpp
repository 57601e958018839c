// Tokens of one product in parts that scratch memory can bear.
#pragma once

#include <algorithm>

#include "matrix.hpp"

namespace moe {

// Bound scratch memory; weights are read again beyond.
constexpr uint32_t kTokensAtOnce = 192, kValuesAtOnce = 4 << 20;

// Tokens of a call that are computed together. Parts are of nearly the same size: a last one of a
// few tokens would be computed in another way than the others.
class Parts {
public:
    Parts(uint32_t num_tokens, uint32_t most_rows) : num_tokens_(num_tokens) {
        const uint32_t bearable = std::max(2 * kManyFloating, kValuesAtOnce / std::max(1u, most_rows));
        const uint32_t at_once = std::min(kTokensAtOnce, bearable);
        count_ = (num_tokens + at_once - 1) / at_once;
    }

    uint32_t count() const { return count_; }
    uint32_t start(uint32_t part) const {
        return static_cast<uint32_t>(uint64_t(num_tokens_) * part / count_);
    }
    uint32_t size(uint32_t part) const { return start(part + 1) - start(part); }

private:
    uint32_t num_tokens_, count_;
};

}  // namespace moe
