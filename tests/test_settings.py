"""Settings from flags, the environment and ``.env``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from diffusion_api import settings
from diffusion_api.errors import Misconfigured


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and no setting in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)


def test_defaults_are_those_of_the_manual() -> None:
    found = settings.load()
    assert (found.host, found.port, found.engine, found.device) == ("127.0.0.1", 8000, "diffusers", "auto")
    assert (found.max_steps, found.max_attempts, found.grace) == (150, 3, 30)
    assert found.models_dir == Path("stable_diffusion/models")
    assert (found.queue_dir, found.outputs_dir) == (Path("queue"), Path("outputs"))
    assert found.loras_dir == Path("stable_diffusion/loras")
    assert found.upscalers_dir == Path("stable_diffusion/upscalers")


def test_a_flag_beats_the_environment_which_beats_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("DIFFUSION_API_PORT=1\nDIFFUSION_API_HOST=a\nDIFFUSION_API_ENGINE=stub\n")
    monkeypatch.setenv("DIFFUSION_API_PORT", "2")
    monkeypatch.setenv("DIFFUSION_API_HOST", "b")
    flags = {"port": 3, "host": None}
    found = settings.load(**flags)
    assert (found.port, found.host, found.engine, found.device) == (3, "b", "stub", "auto")
    sources = settings.sources(found, flags)
    assert sources["port"] == "flag"
    assert sources["host"] == "DIFFUSION_API_HOST"
    assert sources["engine"] == ".env"
    assert sources["device"] == "default"
    assert sources.keys() == settings.Settings.model_fields.keys()


def test_variables_of_others_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("HF_HOME=/somewhere\nPORT=1\nDIFFUSION_API_UNKNOWN=1\n")
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("DIFFUSION_API_NOPE", "2")
    assert settings.load().port == 8000


@pytest.mark.parametrize("text", ["/a:~/b", "/a,~/b", " /a , ~/b ", "/a::~/b:"])
def test_several_folders_stand_in_one_variable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(settings.PREFIX + "MODELS_FROM", text)
    assert settings.load().models_from == (Path("/a"), Path.home() / "b")
    assert settings.load(models_from=[Path("c:d,e")]).models_from == (Path("c:d,e"),)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "x"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("ENGINE", "torch"),
        ("DEVICE", "tpu"),
        ("LOG_LEVEL", "loud"),
        ("MAX_ATTEMPTS", "0"),
        ("GRACE", "-1"),
        ("MAX_BODY", "10"),
        ("SHIPPED_MODELS", "perhaps"),
    ],
)
def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(settings.PREFIX + name, value)
    with pytest.raises(ValidationError) as caught:
        settings.load()
    assert caught.value.errors()[0]["loc"] == (name.lower(),)


def test_folders_are_made_and_may_be_there_already(tmp_path: Path) -> None:
    found = settings.load(home=tmp_path / "new" / "home")
    for _ in range(2):
        found.create_folders()
    made = sorted(p.relative_to(found.home).as_posix() for p in found.home.rglob("*"))
    assert made == [
        *("outputs", "queue", "stable_diffusion"),
        *("stable_diffusion/loras", "stable_diffusion/models", "stable_diffusion/upscalers"),
    ]


def test_a_folder_that_cannot_be_made_is_a_matter_of_the_operator(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match=r"home .*file: .* cannot be made: Not a directory"):
        settings.load(home=tmp_path / "file").create_folders()


def test_what_says_who_may_call_has_the_names_of_the_documents_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ADMIN_API_KEY", "SECRET_KEY", "REQUIRE_AUTH"):
        monkeypatch.delenv(name, raising=False)
    assert settings.load().require_auth is True
    Path(".env").write_text("API_KEY=one,two\nREQUIRE_AUTH=False\n")
    monkeypatch.setenv("ADMIN_API_KEY", "boss")
    monkeypatch.setenv("DIFFUSION_API_SECRET_KEY", "s")
    found = settings.load()
    assert (found.api_key.get_secret_value(), found.admin_api_key.get_secret_value()) == ("one,two", "boss")
    assert (found.secret_key.get_secret_value(), found.require_auth) == ("s", False)
    assert "one" not in str(found.api_key)
    where = settings.sources(found, {})
    assert (where["api_key"], where["require_auth"]) == (".env", ".env")
    assert (where["admin_api_key"], where["secret_key"]) == ("ADMIN_API_KEY", "DIFFUSION_API_SECRET_KEY")


@pytest.mark.parametrize("url", ["box.example", "ftp://box", "https://box?x=1", "https:// box"])
def test_a_public_url_is_one(url: str) -> None:
    with pytest.raises(ValidationError):
        settings.load(public_url=url)


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [("", "", ""), ("https://box:8443/sd/", "https://box:8443", "/sd"), ("http://box", "http://box", "")],
)
def test_a_public_url_says_where_pages_are_and_what_stands_before_paths(url: str, origin: str, path: str) -> None:
    found = settings.load(public_url=url)
    assert (found.public_origin, found.root_path) == (origin, path)


@pytest.mark.parametrize(
    ("variable", "value", "field", "meant"),
    [
        ("DEFAULT_SD_MODEL", "stabilityai/stable-diffusion-2-1", "model", "stabilityai/stable-diffusion-2-1"),
        ("SD_HOST", "0.0.0.0", "host", "0.0.0.0"),
        ("SD_PORT", "1234", "port", 1234),
        ("MAX_UPLOAD_SIZE", "104857600", "max_body", 104857600),
        ("REQUEST_TIMEOUT", "12.5", "llm_seconds", 12.5),
        ("LLM_MIXTRAL_HOST", "box", "llm_host", "box"),
        ("LLM_MIXTRAL_PORT", "8001", "llm_port", 8001),
        ("OLLAMA_HOST", "http://10.0.0.2:9/", "llm_host", "http://10.0.0.2:9/"),
    ],
)
@pytest.mark.parametrize("file", [False, True])
def test_settings_have_the_names_of_the_configuration_api_too(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, field: str, meant: object, file: bool
) -> None:
    if file:
        Path(".env").write_text(f"{variable}={value}\n")
    else:
        monkeypatch.setenv(variable, value)
    found = settings.load()
    assert getattr(found, field) == meant
    assert settings.sources(found, {})[field] == (".env" if file else variable)
    monkeypatch.setenv(settings.PREFIX + field.upper(), "7777")
    assert str(getattr(settings.load(), field)).removesuffix(".0") == "7777", "our own name goes first"


@pytest.mark.parametrize("name", ["HF_TOKEN", "hf_token"])
def test_a_token_may_be_written_in_small_letters(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv(name, "hf_x")
    found = settings.load()
    assert found.hf_token.get_secret_value() == "hf_x"
    assert settings.sources(found, {})["hf_token"] == name


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("box", 8001, "http://box:8001"),
        ("10.0.0.2:9", 0, "http://10.0.0.2:9"),
        ("https://llm.example/", 0, "https://llm.example"),
        ("http://box", 80, "http://box:80"),
    ],
)
def test_host_and_port_of_a_language_model_make_a_url(host: str, port: int, url: str) -> None:
    assert settings.load(llm_host=host, llm_port=port).llm_url == url


@pytest.mark.parametrize("host", ["box/path", "a@b", "a b", "ftp://box"])
def test_a_language_model_is_a_host(host: str) -> None:
    with pytest.raises(ValidationError):
        settings.load(llm_host=host)


@pytest.mark.parametrize(
    ("text", "meant"), [("True", True), ("true", True), ("1", True), ("yes", True), ("False", False), ("0", False)]
)
def test_a_switch_is_a_word_for_yes_or_no(monkeypatch: pytest.MonkeyPatch, text: str, meant: bool) -> None:
    monkeypatch.setenv("REQUIRE_AUTH", text)
    assert settings.load().require_auth is meant


@pytest.mark.parametrize("text", ["perhaps", "2", "tru"])
def test_any_other_word_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("REQUIRE_AUTH", text)
    with pytest.raises(ValidationError) as caught:
        settings.load()
    assert caught.value.errors()[0]["loc"] == ("require_auth",)
