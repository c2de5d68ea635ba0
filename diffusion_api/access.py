"""Who may call: from credentials to a caller, and what each route asks of one. The same for every dialect."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from starlette.requests import HTTPConnection

from diffusion_api import disk
from diffusion_api.errors import Forbidden, KeysUnreadable, Misconfigured, NoAdminKey, Unauthenticated
from diffusion_api.quotas import Minutes
from diffusion_api.schema.caller import Caller, Role
from diffusion_api.users import EVERYBODY

if TYPE_CHECKING:
    from jwt.types import Options

    from diffusion_api.keys import Keyring
    from diffusion_api.settings import Settings
    from diffusion_api.users import Users

log = logging.getLogger(__name__)

POLICY: tuple[tuple[str, str, Role], ...] = (
    # The documentation, and whether the service is up
    ("GET", r"/|/docs|/docs/oauth2-redirect|/redoc|/openapi\.json|/static-offline-docs/.*", Role.NOBODY),
    ("GET", r"/hello|/ready|/health", Role.NOBODY),
    # Where people come to get a credential, and pictures whose address is the credential: they have rules of their own
    ("GET POST", r"/(token|user)(/[^/]+)?", Role.NOBODY),
    ("GET", r"/(blob|image)/[^/]+", Role.NOBODY),
    # What is done to all callers
    ("POST", r"/queue/(pause|resume)|/models/.+/load", Role.ADMIN),
    # What fetches files from other hosts and keeps them; the original asks by GET, too
    ("GET POST", r"/add_new_lora", Role.ADMIN),
)
"""What a request needs, by its method and its path; the first row that fits. What is not here needs a user."""

_RULES = tuple((methods.split(), re.compile(rf"(/compat/\w+)?({path})"), role) for methods, path, role in POLICY)

_TASKS = "(/compat/tasks)?"
TASK_API = re.compile(rf"GET {_TASKS}/(txt2img|img2img|inpaint|events)|(POST|GET|DELETE) {_TASKS}/task(/[^/]+)?")
"""Where a token is asked for even if nothing else here asks for a credential, unless ``enable_public_access``."""

PUBLIC = re.compile(rf"(?!.*/events)({TASK_API.pattern}|POST {_TASKS}/blob)")
"""What everybody may do then. Who has no token has nothing to listen to."""

TOKEN_IN_QUERY = re.compile(rf"{_TASKS}/(txt2img|img2img|inpaint|events|blob|task(/[^/]+)?)")
"""Where ``?token=`` may stand for the header: the task API has links that people open in a browser."""

MISSING = "Missing API key. Provide X-API-Key header."
MISSING_ADMIN = "Missing admin API key. Provide X-API-Key header."
INVALID = "Invalid API key"
INVALID_ADMIN = "Invalid admin API key. Admin access required."
NO_ADMIN = "Admin API key not configured on server"
NO_CREDENTIALS = "Could not validate credentials"
NO_PUBLIC_TOKEN = "Public token is disabled"  # noqa: S105 - a message
NO_SIGNUP = "Signup is disabled"
WRONG_PASSWORD = "Incorrect username or password"  # noqa: S105 - a message

WRONG_A_MINUTE = 30
"""Wrong credentials of one address, after which it is told to wait: each costs the service a slow hash."""

SIGNUPS_A_MINUTE = 30
"""New accounts of one address, after which it is told to wait."""

TOKEN_SECONDS = 240 * 60
ALGORITHM = "HS256"


class Scheme(StrEnum):
    """How a credential is sent: as a key, which may be refused with 403, or as a token, with 401."""

    KEY = "ApiKey"
    BEARER = "Bearer"


@dataclass(frozen=True)
class Credential:
    """What a request has to say for itself."""

    text: str
    scheme: Scheme


def needed(method: str, path: str) -> Role:
    """What a request needs. HEAD is GET without the body."""
    method = "GET" if method == "HEAD" else method
    return next((role for methods, rule, role in _RULES if method in methods and rule.fullmatch(path)), Role.USER)


def asks_for_token(method: str, path: str) -> bool:
    """Whether a route is one of those that speak the task API, and have its rule of who may call."""
    return TASK_API.fullmatch(_line(method, path)) is not None


def _line(method: str, path: str) -> str:
    return f"{'GET' if method == 'HEAD' else method} {path}"


def is_loopback(host: str) -> bool:
    """True for an address or a name that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Access:
    """Lets callers in, or not.

    Without any key, and on loopback, everybody is let in to everything: whoever can call there has an account on this
    machine. ``require_auth=False`` does the same for every address, and where there are keys it lets those without one do
    what a user may.

    The routes of the task API want a token or a key even then, unless ``require_auth=False`` or ``enable_public_access``.
    """

    def __init__(self, settings: Settings, keyring: Keyring, users: Users) -> None:
        self.keyring = keyring
        self._users = users
        self._public, self._signup = settings.enable_public_access, settings.enable_signup
        self._required = settings.require_auth
        self._loopback = is_loopback(settings.host)
        self._told_secret = settings.secret_key.get_secret_value()
        self._secret_path = settings.access_dir / "secret"
        self._requests = Minutes(settings.requests_per_minute, "requests")
        self._wrong = Minutes(WRONG_A_MINUTE, "wrong credentials")
        self._signups = Minutes(SIGNUPS_A_MINUTE, "new accounts")
        self._hashing = anyio.CapacityLimiter(1)
        self._warned = False

    @property
    def open(self) -> bool:
        """Whether everybody who reaches the address that the settings name may do everything. Raises KeysUnreadable."""
        return not len(self.keyring) and (self._loopback or not self._required)

    def first_key(self) -> str | None:
        """The key of an admin, made where one is needed and there is none yet. Raises Misconfigured, KeysUnreadable."""
        if len(self.keyring) or self.open:
            return None
        return self.keyring.add("first", Role.ADMIN)

    async def admit(self, connection: HTTPConnection, path: str) -> Caller:
        """Who asks; may be nobody where nobody needs to be known. ``path`` is the route's, without what a proxy adds.

        Raises Unauthenticated, Forbidden, NoAdminKey, RateLimited, KeysUnreadable.
        """
        method = connection.scope.get("method", "GET")
        need = needed(method, path)
        address = connection.client.host if connection.client else ""
        caller = await self._caller(connection, method, path, need, address)
        if need is not Role.NOBODY:
            self._requests.take(caller.id)
        return caller

    async def _caller(self, connection: HTTPConnection, method: str, path: str, need: Role, address: str) -> Caller:
        credential = credential_of(connection, path)
        if need is Role.NOBODY:
            with suppress(KeysUnreadable):
                if self._lets_in_all(connection, address):
                    return Caller(id=address, role=Role.ADMIN)
                if credential and (known := self._known(credential)):
                    return known
            return Caller(id=address, role=Role.NOBODY)
        if self._public and credential is None and PUBLIC.fullmatch(_line(method, path)):
            return EVERYBODY.model_copy(update={"token": secrets.token_hex(8)})
        strict = self._required and asks_for_token(method, path)
        if not strict and self._lets_in_all(connection, address):
            return Caller(id=address, role=Role.ADMIN)
        if credential is None and not self._required:
            caller = Caller(id=address, role=Role.USER)
        elif credential is None:
            raise self._nothing_sent(need, address, strict=strict)
        else:
            caller = await self._identify(credential, need, address)
        if need is Role.ADMIN and not caller.admin:
            raise Forbidden(INVALID_ADMIN) if self.keyring.has_admin else NoAdminKey(NO_ADMIN)
        return caller

    def _nothing_sent(self, need: Role, address: str, *, strict: bool) -> Unauthenticated:
        if strict:
            return Unauthenticated(NO_CREDENTIALS, scheme=Scheme.BEARER)
        if not len(self.keyring):
            self._warn("%s was refused, and there are no keys: `diffusion-api keys add NAME` makes one", address)
        return Unauthenticated(MISSING_ADMIN if need is Role.ADMIN else MISSING, scheme=Scheme.KEY)

    def _lets_in_all(self, connection: HTTPConnection, address: str) -> bool:
        if not self.open or (self._required and not _is_local(connection)):
            return False
        if self._required and address and not is_loopback(address):
            self._warn("a proxy lets %s call: whoever it lets in may do everything here, as there are no keys", address)
        return True

    async def _identify(self, credential: Credential, need: Role, address: str) -> Caller:
        caller = self._known(credential)
        if caller is None:
            # One at a time, and not on the event loop: this is made to be slow.
            caller = await anyio.to_thread.run_sync(self._verify, credential.text, address, limiter=self._hashing)
        if caller:
            return caller
        if credential.scheme is Scheme.BEARER:
            raise Unauthenticated(NO_CREDENTIALS, scheme=Scheme.BEARER)
        raise Forbidden(INVALID_ADMIN if need is Role.ADMIN else INVALID)

    def _known(self, credential: Credential) -> Caller | None:
        return self.keyring.known(credential.text) or self._holder(credential)

    def _verify(self, text: str, address: str) -> Caller | None:
        if caller := self.keyring.known(text):  # by a request that was before this one
            return caller
        self._wrong.check(address)
        caller = self.keyring.verify(text)
        if caller is None:
            self._wrong.take(address)
            log.warning("%s: a wrong credential", address)
        return caller

    def _warn(self, message: str, address: str) -> None:
        """Once: it would be said of every request."""
        if not self._warned:
            self._warned = True
            log.warning(message, address)

    # tokens

    def token(self, caller: Caller, seconds: float = TOKEN_SECONDS) -> str:
        """A text that stands for the caller, for so long. One of a key ends with its key. Raises Misconfigured."""
        import jwt

        now = time.time()
        claims = {
            "sub": caller.id,
            "role": caller.role,
            "name": caller.name,
            "iat": int(now),
            "exp": int(now + seconds),
        }
        return jwt.encode(claims | {"jti": secrets.token_hex(8)}, self.secret, ALGORITHM)

    def _holder(self, credential: Credential) -> Caller | None:
        """Whom a token stands for, None if it is none of ours, or no longer."""
        if credential.scheme is not Scheme.BEARER or credential.text.count(".") != 2:
            return None
        import jwt  # with the library under it, a fifth of a second

        try:
            required: Options = {"require": ["sub", "role", "exp"]}
            claims: dict[str, Any] = jwt.decode(credential.text, self.secret, algorithms=[ALGORITHM], options=required)
            caller = Caller(
                id=claims["sub"], role=claims["role"], name=claims.get("name", ""), token=claims.get("jti", "")
            )
        except (jwt.InvalidTokenError, ValueError):
            return None
        return caller if self._exists(caller) else None

    def _exists(self, caller: Caller) -> bool:
        """Whether whom a token was made for may still call."""
        kind, _, name = caller.id.partition(":")
        if caller.id == EVERYBODY.id:
            return self._public
        if kind == "user":
            return self._users.find(name) is not None
        return kind != "key" or self.keyring.holder(caller.id) is not None

    def public_token(self) -> str:
        """A token of everybody, with events of its own. Raises Forbidden, Misconfigured."""
        if not self._public:
            raise Forbidden(NO_PUBLIC_TOKEN)
        return self.token(EVERYBODY)

    def starter_token(self) -> str:
        """A token for the link of the start. Raises Misconfigured, KeysUnreadable."""
        return self.token(self._users.starter())

    # accounts

    async def log_in(self, name: str, password: str, address: str) -> str:
        """A token for who has that name and password. Raises Unauthenticated, RateLimited, Misconfigured, KeysUnreadable."""
        return self.token(await anyio.to_thread.run_sync(self._log_in, name, password, address, limiter=self._hashing))

    def _log_in(self, name: str, password: str, address: str) -> Caller:
        self._wrong.check(address)
        caller = self._users.verify(name, password)
        if caller is None:
            self._wrong.take(address)
            log.warning("%s: a wrong password", address)
            raise Unauthenticated(WRONG_PASSWORD, scheme=Scheme.BEARER)
        return caller

    async def sign_up(self, name: str, password: str, address: str) -> Caller:
        """A new account. Raises Forbidden, Conflict, InvalidRequest, RateLimited, Misconfigured, KeysUnreadable."""
        if not self._signup:
            raise Forbidden(NO_SIGNUP)
        self._signups.take(address)
        return await anyio.to_thread.run_sync(self._users.add, name, password, limiter=self._hashing)

    @cached_property
    def secret(self) -> str:
        """What tokens and links are signed with, made when there is none yet. Raises Misconfigured."""
        return self._told_secret or _kept_secret(self._secret_path)


def credential_of(connection: HTTPConnection, path: str) -> Credential | None:
    """The credential that a request brings: ``X-API-Key``, else ``Authorization``, else ``?token=`` where that is read.

    Of HTTP Basic the password is the key, or the name where there is no password. A key in a URL is none: URLs stand in
    the logs of every proxy on the way.
    """
    if key := connection.headers.get("x-api-key"):
        return Credential(key.strip(), Scheme.KEY)
    scheme, _, value = connection.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return Credential(value.strip(), Scheme.BEARER)
    if scheme.lower() == "basic":
        return Credential(_password(value.strip()), Scheme.KEY)
    token = connection.query_params.get("token")
    if token and token.count(".") == 2 and TOKEN_IN_QUERY.fullmatch(path):
        return Credential(token, Scheme.BEARER)
    return None


def _password(encoded: str) -> str:
    try:
        name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return password or name


def _is_local(connection: HTTPConnection) -> bool:
    """Whether the request came to an address that only this machine reaches: loopback, or a socket in a folder.

    The settings do not know where uvicorn listens when it was started without us.
    """
    server = connection.scope.get("server")
    return not server or server[1] is None or is_loopback(server[0])


def _kept_secret(path: Path) -> str:
    """The secret of this installation, made when there is none yet. Raises Misconfigured."""
    try:
        disk.make_folder(path.parent)
        while (held := disk.lock(path)) is None:
            time.sleep(0.02)
        try:
            kept = disk.content(held, 1024).decode(errors="replace").strip()
            if len(kept) < 64:  # new, or torn by a crash before anybody was given a token
                kept = secrets.token_hex(32)
                disk.rewrite(held, kept.encode())
            return kept
        finally:
            disk.unlock(held)
    except OSError as error:
        raise Misconfigured(
            f"what tokens are signed with cannot be kept in {path.parent}: {error.strerror}; set SECRET_KEY, to what "
            "`openssl rand -hex 32` prints"
        ) from error
