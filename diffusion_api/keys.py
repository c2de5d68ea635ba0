"""The keys of an installation: who has one, as what, and the hash that tells a key from a guess."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from diffusion_api.errors import Misconfigured
from diffusion_api.ledger import Ledger, Page
from diffusion_api.schema.caller import Caller, Role
from diffusion_api.schema.request import Frozen

if TYPE_CHECKING:
    from argon2 import PasswordHasher

FORM = re.compile(r"dapi_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
NAME = re.compile(r"[\w@.+-][\w @.+-]{0,63}")


class Key(Frozen):
    """One key: its hash, never the key itself. ``created`` is epoch seconds."""

    id: str
    name: str
    role: Role
    hash: str
    created: float = Field(default_factory=time.time)

    @property
    def caller(self) -> Caller:
        """Who calls with it."""
        return Caller(id=f"key:{self.id}", role=self.role, name=self.name)


class _File(Page):
    keys: tuple[Key, ...] = ()


class Keyring:
    """The keys that are kept in ``folder``, and those that the settings list, as ``(role, key)``.

    Commands of other processes may change the file at any time; what they do holds from the next call on. A key that was
    right once is known again without its slow hash, for as long as it is in the file.
    """

    def __init__(self, folder: Path, listed: Iterable[tuple[Role, str]] = ()) -> None:
        self._ledger = Ledger(
            folder / "keys.json",
            _File,
            what="the keys",
            unreadable="remove it and make new keys",
            unwritable=", or list keys in ADMIN_API_KEY and API_KEY",
        )
        self._listed = tuple((_digest(text), _listed_caller(role, text)) for role, text in listed)
        self._file = _File()
        self._keys: dict[str, Key] = {}
        self._right: dict[bytes, Key] = {}
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return len(self._listed) + len(self.kept())

    @property
    def has_admin(self) -> bool:
        """Whether there is any key of an admin."""
        return any(caller.admin for caller in self._callers())

    def kept(self) -> tuple[Key, ...]:
        """The keys in the file, oldest first. Raises KeysUnreadable."""
        file = self._ledger.read()
        with self._turn:
            if file is not self._file:
                self._file, self._keys = file, {key.id: key for key in file.keys}
                self._right = {digest: key for digest, key in self._right.items() if self._keys.get(key.id) == key}
        return file.keys

    def holder(self, caller_id: str) -> Caller | None:
        """The caller with that id, while the key is valid. Raises KeysUnreadable."""
        return next((caller for caller in self._callers() if caller.id == caller_id), None)

    def known(self, text: str) -> Caller | None:
        """Whose key this is, if it is a listed one or was verified before; costs next to nothing. Raises KeysUnreadable."""
        digest, found = _digest(text), None
        for other, caller in self._listed:
            if hmac.compare_digest(digest, other):
                found = caller
        self.kept()
        right = self._right.get(digest)
        return found or (right.caller if right else None)

    def verify(self, text: str) -> Caller | None:
        """Whose key this is, by its hash, which takes tens of milliseconds; None for nobody's. Raises KeysUnreadable."""
        form = FORM.fullmatch(text)
        key = next((key for key in self.kept() if form and key.id == form[1]), None)
        if key is None or not matches(key.hash, text):
            return None
        with self._turn:
            if self._keys.get(key.id) == key:
                self._right[_digest(text)] = key
        return key.caller

    def add(self, name: str, role: Role) -> str:
        """Make a key, and return what to send: it is nowhere else. Raises Misconfigured, KeysUnreadable."""
        if not NAME.fullmatch(name):
            raise Misconfigured(
                f"a key's name is {name[:80]!r}; letters, digits, spaces and _ @ . + - are allowed, 1 to 64"
            )
        with self._ledger.changing():
            if any(key.name == name for key in self.kept()):
                raise Misconfigured(f"there is a key named {name!r} already: revoke it first, or take another name")
            key_id = secrets.token_hex(4)
            text = f"dapi_{key_id}_{secrets.token_urlsafe(32)}"
            key = Key(id=key_id, name=name, role=role, hash=hashed(text))
            self._ledger.write(_File(keys=(*self.kept(), key)))
        return text

    def revoke(self, name: str) -> Key:
        """Take away the key of that name or id; it opens nothing from now on. Raises Misconfigured, KeysUnreadable."""
        with self._ledger.changing():
            kept = self.kept()
            found = [key for key in kept if name in (key.name, key.id)]
            if not found:
                names = ", ".join(repr(key.name) for key in kept) or "there is none"
                raise Misconfigured(f"no key is named {name[:80]!r}; the keys are: {names}")
            self._ledger.write(_File(keys=tuple(key for key in kept if key is not found[0])))
        return found[0]

    def _callers(self) -> list[Caller]:
        return [*(caller for _, caller in self._listed), *(key.caller for key in self.kept())]


def hashed(text: str) -> str:
    """The hash by which a key or a password is known again; takes tens of milliseconds."""
    return _hasher().hash(text)


def matches(hash: str, text: str) -> bool:
    """Whether it is the hash of that text; takes as long."""
    from argon2.exceptions import InvalidHashError, VerificationError

    try:
        return _hasher().verify(hash, text)
    except (VerificationError, InvalidHashError):
        return False


@cache
def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher  # not for those who have no keys

    return PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)  # OWASP's least


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


def _listed_caller(role: Role, text: str) -> Caller:
    """Who calls with a key of the settings: the same one after a restart, wherever in the list the key stands then."""
    return Caller(id=f"key:listed-{_digest(text).hex()[:16]}", role=role, name=f"listed {role}")
