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
    """Who asks. Jobs are kept, counted and limited under ``id``: ``key:<id>`` for a key, for others their address.

    ``name`` is the key's, empty for those without one.
    """

    id: str
    role: Role
    name: str = ""

    @property
    def admin(self) -> bool:
        """True for one who may see and do all."""
        return self.role is Role.ADMIN

    def may_see(self, owner: str) -> bool:
        """Whether the jobs of the caller with the id ``owner`` are this one's matter."""
        return self.admin or self.id == owner
