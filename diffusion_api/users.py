"""Accounts of the task API: names with passwords, kept as hashes in a file that survives restarts."""

from __future__ import annotations

import re
import secrets
import time
import uuid
from functools import cached_property
from pathlib import Path

from pydantic import Field

from diffusion_api.errors import Conflict, Forbidden, InvalidRequest
from diffusion_api.keys import hashed, matches
from diffusion_api.ledger import Ledger, Page
from diffusion_api.schema.caller import Caller, Role
from diffusion_api.schema.request import Frozen

NAME = re.compile(r"[\w@.+-]{1,64}")
MAX_PASSWORD = 1024
MAX_USERS = 10_000

EVERYBODY = Caller(id="user:all", role=Role.USER, name="all")
"""Who calls without a token, or with one of ``/token/all``, where the operator allows that."""

STARTER = "default_"
"""How the name begins of the account that the link of the start belongs to."""


class User(Frozen):
    """One account. An empty ``hash`` is a password that nobody has. ``created`` is epoch seconds."""

    name: str
    hash: str = ""
    created: float = Field(default_factory=time.time)

    @property
    def caller(self) -> Caller:
        """Who calls with a token of it."""
        return Caller(id=f"user:{self.name}", role=Role.USER, name=self.name)


class _File(Page):
    users: tuple[User, ...] = ()


class Users:
    """The accounts that are kept in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._ledger = Ledger(
            folder / "users.json", _File, what="the accounts", unreadable="remove it to have no accounts"
        )

    def find(self, name: str) -> User | None:
        """The account of that name. Raises KeysUnreadable."""
        return next((user for user in self._ledger.read().users if user.name == name), None)

    def verify(self, name: str, password: str) -> Caller | None:
        """Whose name and password these are; takes tens of milliseconds, whether there is such a name or not.

        Raises KeysUnreadable.
        """
        user = self.find(name)
        right = matches(user.hash if user and user.hash else self._nobodys, password[: MAX_PASSWORD + 1])
        return user.caller if user and user.hash and right else None

    def add(self, name: str, password: str) -> Caller:
        """Make an account; takes as long. Raises InvalidRequest, Forbidden, Conflict, Misconfigured, KeysUnreadable."""
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"username is {name[:80]!r}; letters, digits and _ @ . + - are allowed, 1 to 64", field="username"
            )
        if name == EVERYBODY.name or name.startswith(STARTER):
            raise Forbidden(f"the name {name!r} is the service's own; take another")
        if not 1 <= len(password) <= MAX_PASSWORD:
            raise InvalidRequest(
                f"password has {len(password)} characters; 1 to {MAX_PASSWORD} are allowed", field="password"
            )
        return self._added(User(name=name, hash=hashed(password))).caller

    def starter(self) -> Caller:
        """The account that the link of the start belongs to, made where there is none yet. Raises Misconfigured,
        KeysUnreadable.
        """
        with self._ledger.changing():
            page = self._ledger.read()
            found = next((user for user in page.users if user.name.startswith(STARTER)), None)
            if found is None:
                found = User(name=f"{STARTER}{uuid.uuid4()}")
                self._ledger.write(_File(users=(*page.users, found)))
        return found.caller

    def _added(self, user: User) -> User:
        with self._ledger.changing():
            users = self._ledger.read().users
            if any(other.name == user.name for other in users):
                raise Conflict(f"the name {user.name!r} is taken")
            if len(users) >= MAX_USERS:
                raise Forbidden(f"there are {MAX_USERS} accounts, and no more are made")
            self._ledger.write(_File(users=(*users, user)))
        return user

    @cached_property
    def _nobodys(self) -> str:
        return hashed(secrets.token_hex(16))
