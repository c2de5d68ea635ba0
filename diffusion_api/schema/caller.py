"""Who asks, once that is known."""

from __future__ import annotations

from enum import StrEnum

from diffusion_api.schema.request import Frozen


class Role(StrEnum):
    """What somebody may do: an admin all that a user may, and nobody only what needs no credential."""

    NOBODY = "nobody"
    USER = "user"
    ADMIN = "admin"


class Caller(Frozen):
    """Who asks. Jobs are kept, counted and limited under ``id``: ``key:<id>`` for a key, ``user:<name>`` for an account,
    for others their address.

    ``name`` is that of the key or the account, empty for those without one. ``token`` tells one token of a caller from
    another, empty where none was sent.
    """

    id: str
    role: Role
    name: str = ""
    token: str = ""

    @property
    def admin(self) -> bool:
        """True for one who may see and do all."""
        return self.role is Role.ADMIN

    @property
    def session(self) -> str:
        """What events are sent to: those of one token go to those who listen with it."""
        return self.token or self.id

    def may_see(self, owner: str) -> bool:
        """Whether the jobs of the caller with the id ``owner`` are this one's matter."""
        return self.admin or self.id == owner
