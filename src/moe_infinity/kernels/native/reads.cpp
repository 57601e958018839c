#include "reads.hpp"

#include <algorithm>

#if defined(__linux__) && __has_include(<linux/aio_abi.h>)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MOE_HAS_QUEUES
#endif

namespace moe {

#ifdef MOE_HAS_QUEUES

void begin_read(EarlyReads &early, const ReadPlan &plan, uint64_t flat_key) {
    Spare *const end = early.spares + kMostSpares;
    Spare *const spare = std::find_if(early.spares, end,
                                      [](const Spare &s) { return s.buffer && !s.is_taken; });
    if (spare == end || !*early.context || !plan.num_pieces) return;
    iocb requests[kMostPieces] = {};
    iocb *pointers[kMostPieces];
    const uint64_t number = early.first_number + (spare - early.spares) * kMostPieces;
    for (uint64_t i = 0; i < plan.num_pieces; ++i) {
        const ReadPiece &piece = plan.pieces[i];
        iocb &request = requests[i];
        request.aio_data = number + i;
        request.aio_lio_opcode = IOCB_CMD_PREAD;
        request.aio_fildes = static_cast<uint32_t>(piece.fd);
        request.aio_buf = reinterpret_cast<uint64_t>(spare->buffer + piece.slot_offset);
        request.aio_nbytes = piece.num_bytes;
        request.aio_offset = static_cast<int64_t>(piece.offset);
        request.aio_flags = IOCB_FLAG_RESFD;
        request.aio_resfd = static_cast<uint32_t>(early.bell);
        pointers[i] = &request;
    }
    const long taken = syscall(SYS_io_submit, *early.context, plan.num_pieces, pointers);
    if (taken <= 0) return;
    *early.num_begun += static_cast<unsigned long>(taken);
    *spare = {spare->buffer, 1, flat_key, static_cast<uint64_t>(taken)};
}

#else

void begin_read(EarlyReads &, const ReadPlan &, uint64_t) {}

#endif

}  // namespace moe
