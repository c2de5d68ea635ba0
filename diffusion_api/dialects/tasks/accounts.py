"""Where people get a token, and an account to get one with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion_api.dialects._forms import FORMS, refusals
from diffusion_api.dialects.tasks.bodies import TokenBody, UserBody
from diffusion_api.dialects.tasks.route import form_only

if TYPE_CHECKING:
    from diffusion_api.access import Access

TOKEN: dict[int | str, dict[str, Any]] = refusals(401, 415, 422, 429, 503)
USER: dict[int | str, dict[str, Any]] = refusals(403, 409, 415, 422, 429, 503)

Password = Annotated[str | None, Form(description="the password")]
PasswordInUrl = Annotated[
    str | None, Query(alias="password", description="the same in the URL, where proxies may log it: use the form")
]


class Credentials(BaseModel):
    """A name and a password, for a new account."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"username": "ada", "password": "a long sentence that only she knows"}}
    )

    username: str = Field(description="letters, digits and _ @ . + -")
    password: str


BOTH = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": Credentials.model_json_schema()} for kind in ("application/json", *FORMS)},
    }
}


def add(router: APIRouter, access: Access) -> None:
    """Add the routes of tokens and accounts."""

    async def token(name: str, password: str, http: Request) -> TokenBody:
        return TokenBody(access_token=await access.log_in(name, password, _address(http)))

    @router.post(
        "/token", tags=["tasks"], summary="A token for a name and a password", dependencies=[Depends(form_only)],
        responses=TOKEN,
    )  # fmt: skip
    async def post_token(
        http: Request,
        username: Annotated[str, Form()],
        password: Annotated[str, Form()],
        grant_type: Annotated[Literal["password"], Form(description="OAuth2's, as the next three")] = "password",
        scope: Annotated[str, Form()] = "",
        client_id: Annotated[str, Form()] = "",
        client_secret: Annotated[str, Form()] = "",
    ) -> TokenBody:
        return await token(username, password, http)

    @router.post("/token/all", tags=["tasks"], summary="A token for everybody", responses=refusals(403, 503))
    def post_token_all() -> TokenBody:
        return TokenBody(access_token=access.public_token())

    @router.post(
        "/token/{username}", tags=["tasks"], summary="A token for an account", dependencies=[Depends(form_only)],
        responses=TOKEN,
    )  # fmt: skip
    async def post_token_of(
        username: str, http: Request, password: Password = None, in_url: PasswordInUrl = None
    ) -> TokenBody:
        return await token(username, _given(password, in_url), http)

    @router.post("/user", tags=["tasks"], summary="A new account", responses=USER, openapi_extra=BOTH)
    async def post_user(http: Request) -> UserBody:
        told = await _credentials(http)
        return UserBody(username=(await access.sign_up(told.username, told.password, _address(http))).name)

    @router.post(
        "/user/{username}", tags=["tasks"], summary="A new account of that name", dependencies=[Depends(form_only)],
        responses=USER,
    )  # fmt: skip
    async def post_user_of(
        username: str, http: Request, password: Password = None, in_url: PasswordInUrl = None
    ) -> UserBody:
        return UserBody(username=(await access.sign_up(username, _given(password, in_url), _address(http))).name)


def _given(in_form: str | None, in_url: str | None) -> str:
    """The password, wherever it stands. Raises RequestValidationError."""
    password = in_form if in_form is not None else in_url
    if password is None:
        raise RequestValidationError([{"type": "missing", "loc": ("body", "password"), "msg": "Field required"}])
    return password


async def _credentials(http: Request) -> Credentials:
    """Those of a form, or of JSON. Raises HTTPException, RequestValidationError."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", *FORMS):
        raise HTTPException(415, "the body must be JSON or a form, and say so in its Content-Type")
    sent = await http.json() if kind == "application/json" else dict(await http.form())
    try:
        return Credentials.model_validate(sent)
    except ValidationError as error:
        raise RequestValidationError(
            [{"type": e["type"], "loc": ("body", *e["loc"]), "msg": e["msg"]} for e in error.errors()]
        ) from error


def _address(http: Request) -> str:
    return http.client.host if http.client else ""
