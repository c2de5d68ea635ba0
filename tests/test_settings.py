"""Settings from flags, the environment and ``.env``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from serving import ROOT

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
    (where,) = caught.value.errors()[0]["loc"]
    assert str(where).removeprefix(settings.PREFIX).lower() == name.lower()


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


def test_the_variables_of_other_programs_compose_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "API_HOST": "0.0.0.0",
        "API_PORT": "8001",
        "LOG_LEVEL": "INFO",
        "LOG_FILE": "logs/api.log",
        "RATE_LIMIT_REQUESTS": "100",
        "MODEL_CACHE_DIR": "/models",
        "LORA_ADAPTER_PATH": "./models/my_finetune",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    found = settings.load()
    assert (found.host, found.port, found.log_level, found.log_file) == (
        "0.0.0.0", 8001, "info", Path("logs/api.log")
    )  # fmt: skip
    assert (found.requests_per_minute, found.models_from, found.lora_adapter) == (
        100,
        (Path("/models"),),
        "my_finetune",
    )
    where = settings.sources(found, {})
    assert {where[name] for name in ("host", "port", "log_level", "log_file", "requests_per_minute")} == {
        "API_HOST", "API_PORT", "LOG_LEVEL", "LOG_FILE", "RATE_LIMIT_REQUESTS"
    }  # fmt: skip
    monkeypatch.setenv("DIFFUSION_API_PORT", "8002")
    found = settings.load()
    assert (found.port, settings.sources(found, {})["port"]) == (8002, "DIFFUSION_API_PORT")
    assert settings.load(port=8003).port == 8003


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/my_finetune", "my_finetune"),
        ("models/my_finetune/", "my_finetune"),
        ("models/my_finetune/pytorch_lora_weights.bin", "my_finetune"),
        ("my_finetune", "my_finetune"),
        ("", ""),
    ],
)
def test_an_adapter_is_named_by_its_folder(path: str, name: str) -> None:
    assert settings.load(lora_adapter=path).lora_adapter == name


@pytest.mark.parametrize("text", ["1234,7866", "1234, 7866", " 1234 7866 "])
def test_more_ports_stand_in_one_text(text: str) -> None:
    assert settings.load(also_listen=text).also_listen == (1234, 7866)
    assert settings.load(also_listen="").also_listen == ()
    for wrong in ("x", "65536", "1-2"):
        with pytest.raises(ValidationError):
            settings.load(also_listen=wrong)


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


@pytest.mark.parametrize(
    ("text", "on"),
    [(None, False), ("", False), *((yes, True) for yes in ("1", "true", "yes", "on")), ("0", False), ("off", False)],
)
def test_a_switch_of_the_task_api_is_on_when_it_says_so(
    monkeypatch: pytest.MonkeyPatch, text: str | None, on: bool
) -> None:
    for name in ("ENABLE_PUBLIC_ACCESS", "ENABLE_SIGNUP", "PRINT_LINK_WITH_TOKEN"):
        if text is not None:
            monkeypatch.setenv(name, text)
    found = settings.load()
    assert [found.enable_public_access, found.enable_signup, found.print_link_with_token] == [on] * 3


def test_every_name_in_the_example_is_a_setting_and_the_example_can_be_used() -> None:
    text = (ROOT / ".env.example").read_text("utf-8")
    named = re.findall(r"^(\w+)=", text, re.MULTILINE)
    known = {name for field in settings.Settings.model_fields for name in settings.names_of(field)}
    assert named
    assert [name for name in named if name not in known] == []
    for name in (
        "ENABLE_PUBLIC_ACCESS",
        "ENABLE_SIGNUP",
        "BASE_URL",
        "SECRET_KEY",
        "PRINT_LINK_WITH_TOKEN",
        "HUGGINGFACE_TOKEN",
    ):
        assert name in named
    Path(".env").write_text(text)
    found = settings.load()
    assert (found.print_link_with_token, found.enable_public_access, found.public_url) == (True, False, "")


def test_a_setting_with_several_names_says_which_one_it_came_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE_URL", "https://box.example")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_x")
    found = settings.load()
    assert (found.public_url, found.hf_token.get_secret_value()) == ("https://box.example", "hf_x")
    assert settings.sources(found, {})["public_url"] == "BASE_URL"
    assert settings.sources(found, {})["hf_token"] == "HUGGINGFACE_TOKEN"


def test_a_wrong_value_is_told_by_the_variable_that_has_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "PORT" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_api", "serve", "--home", str(tmp_path)],
        env=environment | {"SD_PORT": "x", "PYTHONPATH": str(Path(settings.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "setting port (SD_PORT) is 'x'" in done.stderr
