"""The site key and what is made with it: seals of fragments, tickets of endpoints.

A seal or ticket is keyed BLAKE3 over a label and the exact bytes: whoever lacks the key can neither make nor change
one.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat

import msgspec
from blake3 import blake3

from hpccr.errors import CorruptError, UsageError
from hpccr.model import Fragment, SealedFragment, StepKey
from hpccr.wire.messages import Endpoint

_KEY = re.compile(rb"^([0-9a-fA-F]{64})\s*$")
_FRAGMENT = b"hpccr fragment 1\x00"
_TICKET = b"hpccr ticket 1\x00"


class SiteKey:
    """The 32 bytes that all nodes of a site share. Never printed."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError("a site key has 32 bytes")
        self._key = key

    def __repr__(self) -> str:
        return "SiteKey(...)"

    @property
    def secret(self) -> bytes:
        """For handing it to our own transfer process, and nothing else."""
        return self._key

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that differ for different keys and tell nothing about the key."""
        return self._mac(b"hpccr fingerprint 1\x00", b"")[:8]

    def _mac(self, label: bytes, body: bytes) -> str:
        return blake3(label + body, key=self._key).hexdigest()

    def seal(self, fragment: Fragment) -> SealedFragment:
        body = msgspec.json.encode(fragment)
        return SealedFragment(body=body.decode(), seal=self._mac(_FRAGMENT, body))

    def open(self, text: bytes, where: str) -> Fragment:
        """The fragment in the text of a fragment.json; `where` names it in errors. Raises CorruptError."""
        try:
            sealed = msgspec.json.decode(text, type=SealedFragment)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CorruptError(f"{where} is not a sealed fragment: {error}") from None
        if not hmac.compare_digest(self._mac(_FRAGMENT, sealed.body.encode()), sealed.seal):
            raise CorruptError(
                f"the seal of {where} is wrong: it was changed, or was made at a site with another key",
                hint="`hpccr verify` tells whether it was changed; nodes of one site must share one key file",
            )
        try:
            return msgspec.json.decode(sealed.body, type=Fragment)
        except msgspec.MsgspecError as error:
            raise CorruptError(f"{where} was written by another version of hpccr: {error}") from None

    def ticket(self, *, capsule: int, address: str, vni: int, key: StepKey, uid: int) -> str:
        body = msgspec.msgpack.encode((capsule, address, vni, key.cluster, key.job, key.step, uid))
        return self._mac(_TICKET, body)

    def admits(self, endpoint: Endpoint, key: StepKey, uid: int) -> bool:
        """Whether the endpoint's ticket was made by an hpccrd of this site for this step of this user."""
        wanted = self.ticket(
            capsule=endpoint.capsule, address=endpoint.address, vni=endpoint.vni, key=key, uid=uid
        ).encode()
        return hmac.compare_digest(wanted, endpoint.ticket.encode())


def load(path: str, *, generate: bool = False, owner: int = 0) -> SiteKey:
    """The key in a file that must be a regular file of `owner` with no access for others, holding 64 hex digits.

    generate: make the file if it is not there (embedded mode). Raises UsageError saying what is wrong and what to do.
    """
    hint = f"as root: (umask 077; openssl rand -hex 32 > {path}), once, then copy it to every node"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if generate:
            return _generate(path)
        raise UsageError(f"there is no site key at {path}", hint=hint) from None
    except OSError as error:
        raise UsageError(f"cannot open the site key {path}: {error.strerror}", hint=hint) from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"the site key {path} is not a regular file", hint=hint)
        if status.st_uid != owner or status.st_mode & 0o077:
            raise UsageError(
                f"the site key {path} can be read by others than root "
                f"(owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})",
                hint=f"chown root {path}; chmod 0600 {path}; if it may have been read, make a new one for all nodes",
            )
        match = _KEY.match(file.read(256))
    if match is None:
        raise UsageError(f"the site key {path} is not 64 hex digits", hint=hint)
    return SiteKey(bytes.fromhex(match[1].decode()))


def _generate(path: str) -> SiteKey:
    text = secrets.token_hex(32)
    # Two embedded daemons may start at once: the link decides whose key it is, and no half-written key is ever seen.
    temporary = f"{path}.{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(fd)
        os.link(temporary, path)
    except FileExistsError:
        return load(path, owner=os.geteuid())
    finally:
        os.unlink(temporary)
    return SiteKey(bytes.fromhex(text))
