// What a decoder block of the usual kind does beside its experts, for one token.
#pragma once

#include "matrix.hpp"
#include "reads.hpp"

namespace moe {

// x / sqrt(mean(x^2) + eps), rounded, times weight.
struct Norm {
    const void *weight;  // of the model's type; null: there is no such norm
    float eps;
    uint32_t size;       // numbers that are normalised together
};
static_assert(sizeof(Norm) == 16, "Python packs it so");

// h = x + o(attention(q, k, v of norm(x))); normed = norm(h); the router's choice of experts for it.
// Values are rounded to `type` wherever the model's own code holds them. Plain data, written by
// Python with struct.
struct Block {
    Matrix q, k, v, o, router;
    const void *q_bias, *k_bias, *v_bias, *o_bias;  // of the model's type, or null
    Norm before, q_norm, k_norm, after;
    float scaling;
    uint32_t num_heads, num_kv_heads, head_dim;
    uint32_t rotary_dim;   // the first numbers of a head, turned in two halves
    Type type;
    uint32_t top_k;        // 0: there is no router, or not one of the usual kind
    uint32_t normalises;   // weights of the chosen experts add up to one
    uint32_t rounds;       // weights are rounded to `type`
    uint32_t unused;
};
static_assert(sizeof(Block) == 496, "Python packs it so");

// Of one token: where things come from and go to, all contiguous.
struct Token {
    const void *x;             // [H]
    const void *cos, *sin;     // [rotary_dim]
    void *keys, *values;       // [num_kv_heads, room, head_dim]; its own are written
    uint64_t room, position;   // position: tokens before this one
    void *h, *normed;          // [H]
    float *logits;             // [E]
    int64_t *ids;              // [top_k], the likeliest first
    float *weights;            // [top_k]
};

// One token's attention to latents: keys and values of every head are matrices times what is stored
// of an earlier token, and are never made. All of one type, contiguous but where strides are given.
struct Latent {
    const void *queries;   // [num_heads, plain + rotary]
    const void *weight;    // [num_heads, plain + values, rank]: of each head keys, then values
    const void *latents;   // [length, rank]
    const void *rotary;    // [length, rotary]: what all heads' keys have in common
    void *out;             // [num_heads, values]
    float scaling;
    uint32_t num_heads, num_plain, num_rotary, num_values, rank, length;
    Type type;
};
static_assert(sizeof(Latent) == 72, "Python packs it so");

// sum over k of weights[k] * outs[k], rounded, plus h: a block's output.
struct Sum {
    void *outs;            // [top_k, H]
    const float *weights;
    const void *h;
    void *out;             // [H]
    uint32_t size, top_k;
    Type type;
    uint32_t rounds;       // each product is rounded to `type`: the model holds weights of it
};

// The model's last norm and its head: head(norm(x)) + bias. A head without rows: the norm alone.
struct Tail {
    const void *x;         // [H]
    void *out;             // [rows], or [H] of the norm alone
    float *scores;         // [rows] the same once more; or null
    Matrix head;
    Norm norm;
    const void *bias;      // [rows] of the model's type, or null
    Type type;
    uint32_t unused;
};
static_assert(sizeof(Tail) == 128, "Python packs it so");

struct Call;

// Of an expert: it may be in memory or on its way there without its call being true.
enum class Place : uint8_t { nowhere = 0, noted = 1, coming = 2 };

// What a stage does about later ones: their routers are shown its own input, and where one of them
// then chooses an expert that is nowhere, somebody is told in time to load it.
struct Outlook {
    const float *changes;  // [reach, H] from this router's input to the later ones', or null
    float *said;           // written: what they say, [reach, stride]
    uint8_t *told;         // [num_experts] of this stage, that somebody was told of in this pass
    uint32_t reach;        // stages; 0: nobody looks ahead
    uint32_t stride;
};

// How far a stage is. chosen: its own experts are. begun: other threads compute them. news: so they
// do, and somebody has to see what later routers say, for of what they like something is nowhere.
// part: so they do with those of its experts that are noted, and there are others.
enum class Progress : uint32_t { none = 0, chosen = 1, begun = 2, news = 3, part = 4 };

// One of several blocks that follow one another, run in one call.
struct Stage {
    const Block *block;
    Token token;
    Sum sum;
    const Call *calls;     // [num_experts], each of one token; where from and to is filled in
    const uint8_t *known;  // [num_experts], of Place
    uint64_t num_experts;
    double experts_s;      // written: what its experts took, if they were done in the call
    double dense_s;        // written: what came before them in the call
    Outlook outlook;
    Progress progress;
    uint32_t is_said;      // written: whether its outlook's routers were asked
    const ReadPlan *plans; // [num_experts]
    EarlyReads *early;     // by which a missing one is begun at once; or null
    uint64_t first_key;    // flat, of expert 0
};
static_assert(sizeof(Stage) == 256, "Python packs it so");

}  // namespace moe
