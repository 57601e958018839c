"""What a server may be told, validated once."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from moe_infinity.errors import ConfigError

# A body is as large as its text, and what is not text beside it: schemas, escapes, roles.
_BODY_BYTES, _BODY_BYTES_PER_TOKEN = 1024**2, 64


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of ``moe-infinity serve`` beside the model's; the command line is derived from these
    names and defaults. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # any of them opens; none: whoever reaches the port may ask
    insecure: bool = False  # listen beyond this machine without a key
    origins: tuple[str, ...] = ()  # of web pages elsewhere that may call this server
    names: tuple[str, ...] = ()  # what requests may call the model beside its own name; *: anything
    max_waiting: int = 64  # requests in the queue; more are told to come back
    max_new_tokens: int | None = None  # of answers whose request names no limit; None: the context
    request_timeout_s: float = 3600.0  # of one request, waiting included
    body_timeout_s: float = 30.0  # until a request has arrived whole
    shutdown_s: float = 20.0  # that running requests get to finish when the server is stopped
    max_body_bytes: int | None = None  # None: what a text of the whole context may take

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"port: got {self.port}, expected 0 (any free one) to 65535")
        for name in ("max_waiting", "max_body_bytes", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        for name in ("request_timeout_s", "body_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected seconds above 0")
        if not 0 <= self.shutdown_s < math.inf:
            raise ConfigError(f"shutdown_s: got {self.shutdown_s}, expected seconds")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    "api_key: got one that is empty or holds other characters than visible ASCII, "
                    "which no HTTP header can carry"
                )
        if not (self.is_local or self.api_keys or self.insecure):
            raise ConfigError(
                f"host: got {self.host!r}, which other machines may reach, without a key; give "
                f"--api-key (or MOE_INFINITY_API_KEY), or --insecure to let anybody in"
            )

    def body_bytes(self, max_context: int) -> int:
        """The largest body that is read: reading it may take a hundred times as much memory."""
        return self.max_body_bytes or _BODY_BYTES + _BODY_BYTES_PER_TOKEN * max_context

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
