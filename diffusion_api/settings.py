"""Every setting of an installation: flags, then ``DIFFUSION_API_*`` variables, then ``.env``, then these defaults."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

from diffusion_api.errors import Misconfigured
from diffusion_api.schema.request import Policy

DATA = Path(__file__).parent / "data"
PREFIX = "DIFFUSION_API_"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}


def _paths(value: Any) -> Any:
    """One text of several paths, as a variable has it, in parts."""
    if not isinstance(value, str):
        return value
    parts = re.split(f"[,{os.pathsep}]", value)
    return tuple(Path(part.strip()).expanduser() for part in parts if part.strip())


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise ValueError("one of auto, cpu, cuda, cuda:0, cuda:1, ..., mps is allowed")
    return name


def _empty_is_off(value: Any) -> Any:
    """A switch whose variable is there without a value, as in ``.env.example``."""
    return False if value == "" else value


def _adapter(path: str) -> str:
    """The name that the library gives to a LoRA which lies there: its folder's, where its file has the name of any LoRA."""
    place = Path(path)
    return place.parent.name if place.stem == "pytorch_lora_weights" else place.name


def _ports(value: Any) -> Any:
    """One text of several ports in parts."""
    return tuple(part for part in value.replace(",", " ").split()) if isinstance(value, str) else value


Port: TypeAlias = Annotated[int, Field(ge=0, le=65535)]
Ports: TypeAlias = Annotated[tuple[Port, ...], NoDecode, BeforeValidator(_ports)]
Switch: TypeAlias = Annotated[bool, BeforeValidator(_empty_is_off)]
Paths: TypeAlias = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_paths)]


class Settings(BaseSettings):
    """The settings of one installation. Sizes in pixels or bytes, times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True, populate_by_name=True, loc_by_alias=False
    )

    home: Path = Field(default=Path("."), description="folder that holds stable_diffusion/, queue/ and outputs/")
    host: str = Field(
        default="127.0.0.1",
        validation_alias=AliasChoices(PREFIX + "HOST", "API_HOST", "SD_HOST"),
        description="address to listen on",
    )
    port: Port = Field(
        default=8000,
        validation_alias=AliasChoices(PREFIX + "PORT", "API_PORT", "SD_PORT"),
        description="port to listen on; 0 takes a free one",
    )
    also_listen: Ports = Field(default=(), description="more ports that answer in the same way, with commas")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info",
        validation_alias=AliasChoices(PREFIX + "LOG_LEVEL", "LOG_LEVEL"),
        description="how much is logged",
    )
    log_format: Literal["plain", "json"] = Field(default="plain", description="form of a log line")
    log_prompts: bool = Field(default=False, description="let prompts into the log")
    log_file: Path | None = Field(
        default=None,
        validation_alias=AliasChoices(PREFIX + "LOG_FILE", "LOG_FILE"),
        description="a file that gets the log too, below home if relative",
    )
    log_file_mb: int = Field(default=10, ge=1, description="MiB after which a new log file is begun")
    log_file_count: int = Field(default=5, ge=1, description="older log files that are kept")

    allowed_hosts: str = Field(
        default="",
        description="names that the Host header may have, with commas; * is any. Empty: loopback's and host, "
        "or any when bound to every address",
    )
    allowed_origins: str = Field(
        default="", description="origins of web pages that may call and read, with commas, beside the service's own"
    )
    public_url: str = Field(
        default="",
        pattern=r"^(https?://[^/?#\s]+(/[^?#\s]*)?)?$",
        validation_alias=AliasChoices(PREFIX + "PUBLIC_URL", "BASE_URL"),
        description="URL under which callers reach the service, where a proxy is before it",
    )
    trusted_proxies: str = Field(
        default="127.0.0.1,::1",
        description="addresses and networks of proxies that are believed who calls (X-Forwarded-For), with commas",
    )
    ssl_keyfile: Path | None = Field(default=None, description="private key, to serve https")
    ssl_certfile: Path | None = Field(default=None, description="certificate, to serve https")
    header_seconds: float = Field(default=20, gt=0, description="seconds that a client may take to send its headers")
    body_seconds: float = Field(
        default=60, gt=0, description="seconds that a client may take to send a body or read an answer, and by min_rate"
    )
    min_rate: int = Field(default=8192, ge=1, description="bytes a second that prolong body_seconds")
    max_connections: int = Field(default=800, ge=1, description="connections at a time")
    max_connections_per_client: int = Field(
        default=200, ge=0, description="connections of one address at a time, but for proxies; 0 is no limit"
    )

    require_auth: bool = Field(
        default=True,
        validation_alias=AliasChoices(PREFIX + "REQUIRE_AUTH", "REQUIRE_AUTH"),
        description="ask for a key wherever there are keys, and on every address but loopback",
    )
    api_key: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices(PREFIX + "API_KEY", "API_KEY"),
        description="keys of users, with commas, beside those of `keys add`",
    )
    admin_api_key: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices(PREFIX + "ADMIN_API_KEY", "ADMIN_API_KEY"),
        description="keys of admins, with commas, beside those of `keys add`",
    )
    secret_key: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices(PREFIX + "SECRET_KEY", "SECRET_KEY"),
        description="what tokens are signed with; empty: one that is made and kept in access/",
    )
    enable_public_access: Switch = Field(
        default=False,
        validation_alias=AliasChoices(PREFIX + "ENABLE_PUBLIC_ACCESS", "ENABLE_PUBLIC_ACCESS"),
        description="let everybody use the task API without a token, and get one at /token/all",
    )
    enable_signup: Switch = Field(
        default=False,
        validation_alias=AliasChoices(PREFIX + "ENABLE_SIGNUP", "ENABLE_SIGNUP"),
        description="let everybody make an account of the task API at /user",
    )
    print_link_with_token: Switch = Field(
        default=False,
        validation_alias=AliasChoices(PREFIX + "PRINT_LINK_WITH_TOKEN", "PRINT_LINK_WITH_TOKEN"),
        description="print a link at the start that makes a picture when it is opened in a browser",
    )
    requests_per_minute: int = Field(
        default=0,
        ge=0,
        validation_alias=AliasChoices(PREFIX + "REQUESTS_PER_MINUTE", "RATE_LIMIT_REQUESTS"),
        description="requests of one caller in a minute; 0 is no limit",
    )
    pixels_per_minute: int = Field(
        default=0, ge=0, description="pixels that one caller may ask for in a minute; 0 is no limit"
    )
    max_queue_per_caller: int = Field(default=0, ge=0, description="jobs of one caller that may wait; 0 is no limit")

    engine: Literal["diffusers", "stub"] = Field(default="diffusers", description="what makes the pictures")
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto", description="where the engine runs: auto, cpu, cuda, cuda:1 (the second card), mps"
    )
    max_vram: float = Field(default=0, ge=0, description="GiB of a card that are used; 0 is all but a reserve")
    max_ram: float = Field(default=0, ge=0, description="GiB of RAM that models take; 0 is all but a reserve")
    idle_unload: float = Field(
        default=10, ge=0, description="minutes without a job after which models leave the memory; 0 is never"
    )
    warm_up: str = Field(default="", description="models that are loaded at the start, with commas")
    model: str | None = Field(
        default=None,
        validation_alias=AliasChoices(PREFIX + "MODEL", "DEFAULT_SD_MODEL"),
        description="model of requests that name none",
    )
    model_fallback: Literal["", "default"] = Field(
        default="", description="what a model that is not installed is replaced by, with a warning: default, or nothing"
    )
    lora_adapter: Annotated[str, AfterValidator(_adapter)] = Field(
        default="stable_diffusion_finetune_v1",
        validation_alias=AliasChoices(PREFIX + "LORA_ADAPTER", "LORA_ADAPTER_PATH"),
        description="the LoRA that /generate applies where it is installed: its name, or a path that ends with it",
    )
    models_from: Paths = Field(
        default=(),
        validation_alias=AliasChoices(PREFIX + "MODELS_FROM", "MODEL_CACHE_DIR"),
        description="folders of other programs whose models, LoRAs and so on are listed too, and only read; "
        f"separated by {os.pathsep!r} or commas",
    )
    allow_pickle_models: bool = Field(
        default=False, description="list checkpoints in formats that can hold code (.ckpt), and read them as data"
    )
    shipped_models: bool = Field(default=True, description="list the models that come with the package")

    isolated: bool = Field(
        default=False, description="run the jobs in a process of their own, kept running by this one"
    )

    max_attempts: int = Field(default=3, ge=1, description="how often a job may be started before it ends as an error")
    pause_after_crashes: int = Field(
        default=0,
        ge=0,
        description="crashes in a row while running jobs, after which the queue pauses itself; 0 is never",
    )
    max_queue: int = Field(default=1000, ge=0, description="jobs that may wait; 0 is no limit")
    disk_reserve_mb: int = Field(
        default=64, ge=0, description="MiB left on a disk below which no job is taken or begun"
    )
    grace: float = Field(default=30, ge=0, description="seconds that a running job may go on when the service stops")

    stuck_after: float = Field(
        default=300, gt=0, description="seconds without a word of a running job after which it counts as stuck"
    )

    keep_results_hours: float = Field(default=168, ge=0, description="hours that results are kept; 0 is for ever")
    keep_results: int = Field(default=10_000, ge=0, description="results that are kept; 0 is all")
    delete_after_read: bool = Field(default=False, description="a result can be fetched once")
    keep_blobs_hours: float = Field(
        default=168, ge=0, description="hours that a blob's URL opens it, if it is kept as long; 0 is for ever"
    )
    keep_outputs_days: float = Field(default=0, ge=0, description="days that pictures are kept; 0 is for ever")
    keep_outputs: int = Field(default=0, ge=0, description="pictures that are kept; 0 is all")
    keep_outputs_mb: float = Field(default=0, ge=0, description="MiB of pictures that are kept; 0 is all")

    apply_loras: bool = Field(
        default=False, description="let the field loras work on /img2img, where it is ignored otherwise"
    )

    max_steps: int = Field(default=150, ge=1, description="steps of one job")
    max_pixels: int = Field(default=2048 * 2048, ge=64, description="width x height of one picture")
    max_input_pixels: int = Field(
        default=32 * 2**20, ge=64, description="width x height of a picture that a request brings along"
    )
    max_upscaled_pixels: int = Field(default=8192 * 8192, ge=64, description="width x height of an upscaled picture")
    max_batch: int = Field(default=16, ge=1, description="pictures of one job")
    max_seconds: float = Field(default=0, ge=0, description="seconds that one job may run; 0 is no limit")
    max_work: float = Field(default=1000, gt=0, description="width x height x steps x n of one job, in megapixel-steps")
    max_prompt: int = Field(default=20_000, ge=1, description="characters of a prompt")
    max_body: int = Field(
        default=64 * 2**20,
        ge=1024,
        validation_alias=AliasChoices(PREFIX + "MAX_BODY", "MAX_UPLOAD_SIZE"),
        description="bytes of a request body",
    )

    safety: Policy = Field(
        default="off",
        description="what becomes of pictures that the safety checker flags: off, blur, refuse, or required: as refuse, and "
        "no job without a checker",
    )
    picture_hosts: str = Field(
        default="", description="hosts that pictures in requests may be fetched from, separated by commas; empty: none"
    )
    webhook_hosts: str = Field(
        default="", description="hosts that webhooks may go to, separated by commas; empty: none"
    )
    webhook_secret: SecretStr = Field(default=SecretStr(""), description="what webhooks are signed with")

    hf_endpoint: str = Field(
        default="https://huggingface.co",
        pattern=r"^https?://[^/]+",
        validation_alias=AliasChoices(PREFIX + "HF_ENDPOINT", "HF_ENDPOINT"),
        description="the hub that `pull` fetches from, or a mirror of it",
    )
    hf_token: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices(PREFIX + "HF_TOKEN", "HF_TOKEN", "HUGGINGFACE_TOKEN"),
        description="what opens gated and private models of the hub",
    )
    civitai_url: str = Field(
        default="https://civitai.com",
        pattern=r"^https?://[^/]+",
        description="where LoRAs are looked up and fetched from, or a mirror of it",
    )
    civit_key: SecretStr = Field(
        default=SecretStr(""),
        validation_alias=AliasChoices(PREFIX + "CIVIT_KEY", "CIVIT_KEY", "CIVITAI_API_KEY"),
        description="what opens LoRAs there that are for those who sign in",
    )
    max_lora_mb: float = Field(default=2048, gt=0, description="MiB of one LoRA that is fetched from there")
    lora_seconds: float = Field(default=1800, gt=0, description="seconds that one of them may take to come")
    pull_hosts: str = Field(
        default="",
        description="hosts that `pull` may be led to beside public ones, separated by commas: private mirrors",
    )
    pull_proxy: str = Field(default="", description="URL of the HTTP proxy that `pull` goes through; empty: none")

    llm_host: str = Field(
        default="",
        pattern=r"^((https?://)?[^/?#\s@]+/?)?$",
        validation_alias=AliasChoices(PREFIX + "LLM_HOST", "LLM_MIXTRAL_HOST", "OLLAMA_HOST"),
        description="where /llm_interface and /llm_prompt_assistance forward to; empty: nowhere",
    )
    llm_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        validation_alias=AliasChoices(PREFIX + "LLM_PORT", "LLM_MIXTRAL_PORT", "OLLAMA_PORT"),
        description="port there; 0: as llm_host says",
    )
    llm_seconds: float = Field(
        default=300,
        gt=0,
        validation_alias=AliasChoices(PREFIX + "LLM_SECONDS", "REQUEST_TIMEOUT"),
        description="seconds that an answer from there may take",
    )

    @property
    def llm_url(self) -> str:
        """The URL that ``llm_host`` and ``llm_port`` mean."""
        host = self.llm_host.rstrip("/")
        host = host if "://" in host else f"http://{host}"
        return f"{host}:{self.llm_port}" if self.llm_port else host

    @property
    def root_path(self) -> str:
        """What stands before every path in the URL that callers use: the path of ``public_url``."""
        return urlsplit(self.public_url).path.rstrip("/")

    @property
    def public_origin(self) -> str:
        """The part of ``public_url`` before that, as browsers name the origin of a page; empty without one."""
        url = urlsplit(self.public_url)
        return f"{url.scheme}://{url.netloc}" if self.public_url else ""

    @property
    def models_dir(self) -> Path:
        """The user's models: diffusers folders and single files."""
        return self.home / "stable_diffusion" / "models"

    @property
    def loras_dir(self) -> Path:
        """The user's LoRA files."""
        return self.home / "stable_diffusion" / "loras"

    @property
    def upscalers_dir(self) -> Path:
        """The user's upscaler files."""
        return self.home / "stable_diffusion" / "upscalers"

    @property
    def queue_dir(self) -> Path:
        """The file queue."""
        return self.home / "queue"

    @property
    def access_dir(self) -> Path:
        """The keys' hashes, and what tokens are signed with; made when there is something to keep."""
        return self.home / "access"

    @property
    def outputs_dir(self) -> Path:
        """The pictures."""
        return self.home / "outputs"

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders of this installation."""
        return (self.models_dir, self.loras_dir, self.upscalers_dir, self.queue_dir, self.outputs_dir)

    def create_folders(self) -> None:
        """Make the folders of this installation where they are missing. Raises Misconfigured."""
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Misconfigured(f"home {self.home}: {folder} cannot be made: {error.strerror}") from error


def keep_offline() -> None:
    """Have diffusers and transformers, imported after this, fetch nothing and run no code that comes with a model."""
    os.environ.update(OFFLINE)


def load(**flags: Any) -> Settings:
    """The settings in force; flags that are None were not given."""
    return Settings(**{name: value for name, value in flags.items() if value is not None})


def sources(settings: Settings, flags: dict[str, Any]) -> dict[str, str]:
    """Where each setting came from: ``flag``, its environment variable, ``.env`` or ``default``."""
    dotenv = set(DotEnvSettingsSource(Settings)())
    found = {}
    for name in Settings.model_fields:
        if flags.get(name) is not None:
            found[name] = "flag"
        elif held := variable(name):
            found[name] = held
        else:
            found[name] = ".env" if {name, PREFIX + name.upper()} & dotenv else "default"
    return found


def variable(name: str) -> str | None:
    """The environment variable that a setting has its value from, in whichever case it is written; None where there is none."""
    environment = {written.lower(): written for written in os.environ}
    return next((environment[each.lower()] for each in names_of(name) if each.lower() in environment), None)


def names_of(name: str) -> list[str]:
    """The variables that may hold a setting, first the one that counts."""
    alias = Settings.model_fields[name].validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [PREFIX + name.upper()]
