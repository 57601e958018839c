// The compiler's own vector instructions, without the warnings that GCC 12 gives about its own file
// (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593).
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

// What innermost loops are made of: a call takes longer there than what it does, and a row's state
// would lie in memory from one call to the next.
#define MOE_HOT __attribute__((always_inline)) inline
