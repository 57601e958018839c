// Reads of experts that compiled code begins itself, so that the disk works while Python decides
// whose place they take: they go into memory that is spare, and the decision says which is spare
// then. cache/early_reads.py owns all of this; plain data.
#pragma once

#include <cstdint>

namespace moe {

constexpr uint64_t kMostPieces = 8, kMostSpares = 2;

// Of a file, to somewhere in a slot; as direct I/O wants it.
struct ReadPiece {
    uint64_t fd, offset, num_bytes, slot_offset;
};

// How an expert is read; no pieces: not by compiled code.
struct ReadPlan {
    uint64_t num_pieces;
    ReadPiece pieces[kMostPieces];
};

// Memory of a slot that nobody uses.
struct Spare {
    uint8_t *buffer;      // null: there is none
    uint64_t is_taken;    // written: what follows is true, and nobody else begins anything here
    uint64_t flat_key;    // written: the expert that is read into it
    uint64_t num_begun;   // written: of its pieces, the first ones
};

struct EarlyReads {
    const unsigned long *context;  // of the kernel's queue; 0: there is none
    unsigned long *num_begun;      // added to: reads that are in the queue
    uint64_t bell;                 // rung where one is over
    uint64_t first_number;         // of the first spare's first piece; kMostPieces to each
    Spare spares[kMostSpares];
};

// Begins to read an expert, if there is a spare and the queue takes it.
void begin_read(EarlyReads &early, const ReadPlan &plan, uint64_t flat_key);

}  // namespace moe
