"""A policy that breaks the disk: named on a command line, it makes a request's reads fail."""

from bad_reads import fail_reads  # beside this file: it is found by its folder alone

from moe_infinity.policies.lru import Policy as LruPolicy

_NUM_READS = 20  # that still succeed


class Policy(LruPolicy):
    """LRU, in a process whose disk fails in its first request. For processes that end soon."""

    def begin_request(self) -> None:
        super().begin_request()
        fail_reads(setattr, _NUM_READS)
