"""The hold: nothing goes in or out of the capsule's network namespace, loopback included.

libnftables is called in this process: starting `nft` costs 3.5 ms to set the hold and 12-20 ms to lift it (it waits for
the kernel to free what it removed), the library 0.5 ms for either, and both lie inside the time the job stands still.
The library refuses to work when real and effective ids differ; init's are equal.
"""

from __future__ import annotations

import ctypes
import functools

from hpccr.errors import HpccrError

LIBRARY = "libnftables.so.1"

_TABLE = "inet hpccr_hold"
_REMOVE = f"add table {_TABLE}\ndelete table {_TABLE}\n"
_CRIU = 0xC114
"""Mark (SOCCR_MARK of CRIU's soccr.h) of the packets by which CRIU brings a half closed TCP socket into its state. They
go from the socket's own address to it; jobs cannot mark packets, having no capability."""
# Before conntrack (-200) and everything else: a packet that a rule of anybody's has seen is one that has moved.
_INSTALL = (
    _REMOVE
    + f"""table {_TABLE} {{
    chain input {{ type filter hook input priority -500; policy drop; meta mark {_CRIU} accept; }}
    chain output {{ type filter hook output priority -500; policy drop; meta mark {_CRIU} accept; }}
}}
"""
)


@functools.cache
def library() -> ctypes.CDLL:
    """libnftables, loaded at the first call. Raises HpccrError if it is not installed."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise HpccrError(f"cannot load {LIBRARY}: {error}", hint="install nftables on this node") from None


class Nft:
    """A libnftables context; belongs to the network namespace it is made in. Each run() is one transaction."""

    def __init__(self) -> None:
        self._library = library()
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._library.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> None:
        """Execute in nft's own language, all or nothing. Raises HpccrError with the library's words."""
        if self._library.nft_run_cmd_from_buffer(self._context, commands.encode()):
            words = self._library.nft_ctx_get_error_buffer(self._context) or b""
            raise HpccrError(
                f"nftables refused: {words.decode(errors='replace').strip()}",
                hint="the kernel needs nf_tables with the inet family and nat chains",
            )


class Hold:
    """The hold of this network namespace; off at first. on() and off() may be called in any state."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft
        self.active = False

    def on(self) -> None:
        self._nft.run(_INSTALL)
        self.active = True

    def off(self) -> None:
        if self.active:
            self._nft.run(_REMOVE)
            self.active = False
