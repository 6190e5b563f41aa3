"""Mutual authentication over TCP by a shared secret, before the first frame.

Each side sends MAGIC and a 32-byte nonce, then keyed BLAKE3 over (role, own nonce, peer's nonce). The secret never
crosses the network and neither side can be talked to by anyone who does not know it. It authenticates the opening of
the connection; the TCP stream itself is trusted like the cluster's network (see docs/internals/threats.md).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets

from blake3 import blake3

from hpccr.errors import HpccrError

MAGIC = b"hpccr\x00\x00\x01"
NONCE = 32
TIMEOUT = 10.0
"""Seconds a peer has to finish the handshake: strangers may not hold connections open."""


class HandshakeError(HpccrError):
    """The peer does not know the secret, or is not hpccr."""


def new_secret() -> str:
    """64 hex digits of fresh randomness."""
    return secrets.token_hex(32)


def proof(secret: bytes, role: bytes, own: bytes, peer: bytes) -> bytes:
    """What a side in `role` (b"server" or b"client") sends to prove that it knows the 32-byte secret."""
    return blake3(b"hpccr handshake 1 " + role + own + peer, key=secret).digest()


async def authenticate(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, *, server: bool
) -> None:
    """Run the handshake; the same call on both ends but for `server`.

    Raises HandshakeError (also after TIMEOUT) and closes nothing: that is the caller's.
    """
    key = bytes.fromhex(secret)
    own_role, peer_role = (b"server", b"client") if server else (b"client", b"server")
    own = secrets.token_bytes(NONCE)
    try:
        async with asyncio.timeout(TIMEOUT):
            writer.write(MAGIC + own)
            if await reader.readexactly(len(MAGIC)) != MAGIC:
                raise HandshakeError("the peer is not hpccr or has another protocol version")
            peer = await reader.readexactly(NONCE)
            # The client proves itself first: a stranger learns nothing from the server, not even a proof to replay.
            if server:
                await _check(reader, key, peer_role, peer, own)
                writer.write(proof(key, own_role, own, peer))
            else:
                writer.write(proof(key, own_role, own, peer))
                await _check(reader, key, peer_role, peer, own)
    except TimeoutError:
        raise HandshakeError(f"no handshake within {TIMEOUT:.0f} s") from None
    except (asyncio.IncompleteReadError, OSError) as error:
        raise HandshakeError(f"the connection ended during the handshake: {error}") from None


async def _check(reader: asyncio.StreamReader, key: bytes, role: bytes, peer: bytes, own: bytes) -> None:
    received = await reader.readexactly(32)
    if not hmac.compare_digest(received, proof(key, role, peer, own)):
        raise HandshakeError("the peer does not know the step's secret")
