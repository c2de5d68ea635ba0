"""``diffusion-api pull``, from a hub and a host of large files on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, Hub, Repository, hub
from fake_models import EMBEDDING_KEYS, ESRGAN_KEYS, LORA_KEYS, SD1_KEYS, VAE_KEYS, checkpoint, diffusers_folder
from receiving import receiving
from serving import run

from diffusion_api import disk, downloads
from diffusion_api.catalog.library import Library
from diffusion_api.downloads import Downloads
from diffusion_api.errors import (
    BrokenDownload,
    Conflict,
    DiskFull,
    Gated,
    InvalidRequest,
    NotFound,
    Unreachable,
    UrlRefused,
)
from diffusion_api.fetch import Fetcher, origins
from diffusion_api.pull import Pulled, Puller

KINDS = {
    "models": SD1_KEYS, "loras": LORA_KEYS, "vae": VAE_KEYS, "upscalers": ESRGAN_KEYS, "embeddings": EMBEDDING_KEYS
}  # fmt: skip


def weights(tmp_path: Path, keys: dict[str, list[int]] = LORA_KEYS, *, padding: int = 0) -> bytes:
    """A safetensors file as bytes, larger by so many floats."""
    return checkpoint(tmp_path / "made.safetensors", keys | {"padding": [padding]}).read_bytes()


def folder_files(tmp_path: Path, **options: Any) -> dict[str, bytes]:
    """The files of a diffusers repository, with what else hubs have in one."""
    folder = diffusers_folder(tmp_path / "made", **options)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": [None, None], "_diffusers_version": "0.42"}
    (folder / "model_index.json").write_text(json.dumps(index))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    whole = files["unet/diffusion_pytorch_model.safetensors"]
    return files | {
        "README.md": b"# card",
        "v1-5-pruned.ckpt": b"PK\3\4",
        "v1-5-pruned.safetensors": weights(tmp_path, SD1_KEYS),
        "unet/diffusion_pytorch_model.bin": b"PK\3\4",
        "unet/diffusion_pytorch_model.fp16.safetensors": whole,
        "unet_onnx/model.onnx": b"x",
        "unet/../../../escape.json": b"{}",
        "unet/.hidden.json": b"{}",
    }


class Setup:
    """An installation that pulls from a hub; the seconds that it would have waited are in ``waited``."""

    def __init__(self, home: Path, state: Hub, *, token: str = "", allowed: str | None = None, **options: Any) -> None:
        self.home, self.hub = home, state
        self.waited: list[float] = []
        self.told: list[tuple[str, int, int | None]] = []
        hosts = f"{state.url},{state.cdn}" if allowed is None else allowed
        fetcher = Fetcher(origins(hosts), public=True, total=60, **options)
        self.puller = Puller(Downloads(fetcher, wait=self._wait), home, endpoint=state.url, token=token)

    async def _wait(self, seconds: float) -> None:
        self.waited.append(seconds)

    def pull(self, source: str, *, sha256: str | None = None) -> Pulled:
        async def both() -> Pulled:
            plan = await self.puller.plan(source, sha256=sha256)
            return await self.puller.fetch(plan, lambda *news: self.told.append(news))

        return asyncio.run(both())

    def files(self) -> list[str]:
        """What lies in the installation, unfinished things and all."""
        own = self.home / "stable_diffusion"
        return sorted(path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file())


@pytest.fixture
def style(tmp_path: Path) -> Repository:
    """A repository with one LoRA of 40 kB."""
    return Repository({"style.safetensors": weights(tmp_path, padding=10_000), "README.md": b"# card"})


@pytest.fixture
def setup(tmp_path: Path, style: Repository) -> Iterator[Setup]:
    """An installation, and a hub with ``org/style``."""
    with hub(org__style=style) as state:
        yield Setup(tmp_path / "home", state)


# What comes


def test_a_diffusers_folder_is_fetched_at_its_commit_without_what_it_does_not_need(tmp_path: Path) -> None:
    files = folder_files(tmp_path)
    with hub(org__model=Repository(files)) as state:
        setup = Setup(tmp_path / "home", state)
        pulled = setup.pull("org/model")
    snapshot = f"models/models--org--model/snapshots/{'c' * 40}"
    assert pulled.path == tmp_path / "home" / "stable_diffusion" / snapshot
    assert setup.files() == [
        "models/models--org--model/refs/main",
        *(
            f"{snapshot}/{name}"
            for name in (
                "model_index.json", "pulled.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
            )
        ),
    ]  # fmt: skip
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (pulled.path / name).read_bytes() == files[name]
    origin = json.loads((pulled.path / "pulled.json").read_text())
    assert (origin["source"], origin["revision"], origin["commit"], origin["licence"]) == (
        *("org/model", "main", "c" * 40, "mit"),
    )
    (model,) = Library(setup.home, setup.home / "stable_diffusion" / "models").models()
    assert (model.name, model.path) == ("models--org--model", pulled.path)


def test_weights_that_exist_in_one_precision_only_are_taken_in_that_one(tmp_path: Path) -> None:
    files = folder_files(tmp_path)
    del files["unet/diffusion_pytorch_model.safetensors"]
    with hub(org__model=Repository(files)) as state:
        pulled = Setup(tmp_path / "home", state).pull("org/model")
    assert (pulled.path / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()


@pytest.mark.parametrize("folder", KINDS)
def test_a_file_goes_where_its_kind_belongs(tmp_path: Path, folder: str) -> None:
    content = weights(tmp_path, KINDS[folder])
    with hub(org__one=Repository({"sub/one.v2.safetensors": content, "README.md": b""})) as state:
        setup = Setup(tmp_path / "home", state)
        pulled = setup.pull("org/one")
    assert setup.files() == [f"{folder}/one.v2.pulled.json", f"{folder}/one.v2.safetensors"]
    assert pulled.path.read_bytes() == content
    assert pulled.name == "one.v2"


def test_of_several_files_one_has_to_be_named(tmp_path: Path) -> None:
    files = {f"{name}.safetensors": weights(tmp_path, padding=size) for size, name in enumerate("ab")}
    with hub(org__two=Repository(files)) as state:
        setup = Setup(tmp_path / "home", state)
        with pytest.raises(
            InvalidRequest, match=r"several files; name one of org/two/a.safetensors, org/two/b.safetensors"
        ):
            setup.pull("org/two")
        assert setup.pull("org/two/b.safetensors").name == "b"
        with pytest.raises(NotFound, match=r"no file 'c.safetensors'; its safetensors files: a.safetensors, b.safe"):
            setup.pull("org/two/c.safetensors")
    assert setup.files() == ["loras/b.pulled.json", "loras/b.safetensors"]


def test_a_file_whose_name_says_nothing_is_called_after_its_repository(tmp_path: Path) -> None:
    with hub(org__lcm_lora=Repository({"pytorch_lora_weights.safetensors": weights(tmp_path)})) as state:
        assert Setup(tmp_path / "home", state).pull("org/lcm-lora").path.name == "lcm-lora.safetensors"


def test_a_revision_is_pinned_to_its_commit(tmp_path: Path, style: Repository) -> None:
    style.revisions = ("main", "refs/pr/1", "v2")
    style.commit = "d" * 40
    with hub(org__style=style) as state:
        setup = Setup(tmp_path / "home", state)
        pulled = setup.pull("org/style@refs/pr/1")
        with pytest.raises(NotFound, match="org/style has no revision 'v3'"):
            setup.pull("org/style@v3")
    origin = json.loads(pulled.path.with_suffix(".pulled.json").read_text())
    assert (origin["revision"], origin["commit"]) == ("refs/pr/1", "d" * 40)
    assert any(path.startswith(f"/org/style/resolve/{'d' * 40}/") for path, _ in state.heard)


def test_a_plain_url_is_fetched_too(setup: Setup) -> None:
    content = setup.hub.repositories["org/style"].files["style.safetensors"]
    digest = hashlib.sha256(content).hexdigest()
    pulled = setup.pull(f"{setup.hub.url}/org/style/resolve/main/my%20style.safetensors".replace("my%20", ""))
    assert pulled.path.read_bytes() == content
    setup.hub.faults = ["name:../../other name.safetensors"]
    named = setup.pull(f"{setup.hub.cdn}/blob/{digest}?token=secret", sha256=digest.upper())
    assert named.path == setup.home / "stable_diffusion" / "loras" / "other name.safetensors"
    assert "secret" not in named.path.with_suffix(".pulled.json").read_text()


def test_what_is_there_is_not_fetched_again(setup: Setup, tmp_path: Path) -> None:
    assert not setup.pull("org/style").already
    assert setup.pull("org/style").already
    setup.hub.repositories["org/model"] = Repository(folder_files(tmp_path))
    setup.pull("org/model")
    heard = len(setup.hub.ranges())
    assert setup.pull("org/model").already
    assert len(setup.hub.ranges()) == heard


def test_another_file_of_that_name_is_left_alone(setup: Setup) -> None:
    mine = setup.home / "stable_diffusion" / "loras" / "style.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(
        Conflict, match=r"stable_diffusion/loras/style.safetensors is there already, and is another file"
    ):
        setup.pull("org/style")
    assert mine.read_bytes() == b"mine"


def test_progress_is_told_from_nothing_to_all(setup: Setup) -> None:
    setup.pull("org/style")
    total = len(setup.hub.repositories["org/style"].files["style.safetensors"])
    assert setup.told[0] == ("style.safetensors", 0, total)
    assert setup.told[-1] == ("style.safetensors", total, total)


# What is cut, slow or wrong


def test_a_cut_connection_goes_on_where_it_was_cut(setup: Setup) -> None:
    setup.hub.faults = ["cut:1000", "cut:2000"]
    pulled = setup.pull("org/style")
    assert pulled.path.read_bytes() == setup.hub.repositories["org/style"].files["style.safetensors"]
    assert setup.hub.ranges() == ["", "bytes=1000-", "bytes=3000-"]
    assert setup.waited == [1, 1]


def test_another_process_goes_on_where_the_first_one_ended(setup: Setup) -> None:
    setup.hub.faults = ["cut:1000", *["cut:0"] * downloads.TRIES]
    with pytest.raises(Unreachable, match=r"style.safetensors .*asked again later, it goes on from there"):
        setup.pull("org/style")
    assert [name for name in setup.files() if name.endswith(".part")]
    assert Library(setup.home, setup.home / "stable_diffusion" / "models").assets("lora") == []
    setup.hub.faults, setup.hub.heard = [], []
    setup.pull("org/style")
    assert setup.hub.ranges() == ["bytes=1000-"]
    assert setup.files() == ["loras/style.pulled.json", "loras/style.safetensors"]


def test_a_host_without_ranges_sends_it_all_again(setup: Setup) -> None:
    setup.hub.faults = ["cut:1000", "no-range"]
    pulled = setup.pull("org/style")
    assert pulled.path.read_bytes() == setup.hub.repositories["org/style"].files["style.safetensors"]


def test_the_rest_of_another_version_is_never_joined_to_what_is_there(setup: Setup, tmp_path: Path) -> None:
    name = "org/style"
    url = f"{setup.hub.url}/{name}/resolve/main/style.safetensors"
    setup.hub.faults = ["cut:20000", *["cut:0"] * downloads.TRIES]
    with pytest.raises(Unreachable):
        setup.pull(url)
    newer = weights(tmp_path, VAE_KEYS, padding=10_003)
    setup.hub.repositories[name] = Repository({"style.safetensors": newer})
    assert setup.pull(url).path.read_bytes() == newer


def test_a_busy_host_is_asked_again_when_it_says(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.hub.faults = ["status:429", "status:503"]
    setup.pull("org/style")
    assert setup.waited == [7, 7]
    assert caplog.messages == [
        "style.safetensors: the host answered 429; again in 7 s (tries left: 5)",
        "style.safetensors: the host answered 503; again in 7 s (tries left: 4)",
    ]


def test_a_host_that_wants_to_be_left_alone_for_long_is_told(setup: Setup) -> None:
    setup.hub.faults, setup.hub.retry_after = ["status:429"], "3600"
    with pytest.raises(Unreachable, match="answered 429 and wants to be left alone for 3600 s"):
        setup.pull("org/style")
    assert setup.waited == []


def test_a_host_that_stays_broken_is_given_up(setup: Setup) -> None:
    setup.hub.faults, setup.hub.retry_after = ["status:500"] * 99, "later"
    with pytest.raises(Unreachable, match="the host answered 500"):
        setup.pull("org/style")
    assert setup.waited == [1, 2, 4, 8, 16]


def test_a_host_that_falls_silent_is_a_cut_connection(setup: Setup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        fetcher = Fetcher(origins(f"http://127.0.0.1:{port}"), total=0.2)
        puller = Puller(Downloads(fetcher, wait=setup._wait), setup.home, endpoint=setup.hub.url)

        async def pull() -> None:
            await puller.fetch(await puller.plan(f"http://127.0.0.1:{port}/x.safetensors"), lambda *news: None)

        with pytest.raises(Unreachable, match="no answer within"):
            asyncio.run(pull())


def test_a_wrong_hash_is_told_and_nothing_of_it_stays(setup: Setup) -> None:
    setup.hub.faults = ["wrong"]
    with pytest.raises(BrokenDownload, match=r"style.safetensors has the SHA-256 [0-9a-f]{64} and should have"):
        setup.pull("org/style")
    assert not [name for name in setup.files() if "safetensors" in name and not name.endswith(".etag")]
    setup.pull("org/style")
    with pytest.raises(InvalidRequest, match="sha256 is 'abc'; 64 hexadecimal digits are expected"):
        setup.pull("org/style", sha256="abc")


@pytest.mark.parametrize("kind", ["html", "html:application/octet-stream"])
def test_a_web_page_in_place_of_a_file_is_told(setup: Setup, kind: str) -> None:
    digest = hashlib.sha256(setup.hub.repositories["org/style"].files["style.safetensors"]).hexdigest()
    setup.hub.faults = [kind]
    with pytest.raises(BrokenDownload, match="is a web page and no file; does one have to sign in there"):
        setup.pull(f"{setup.hub.cdn}/blob/{digest}")


def test_a_file_that_is_no_safetensors_file_never_comes_into_place(setup: Setup) -> None:
    setup.hub.repositories["org/bad"] = Repository({"bad.safetensors": b"PK\3\4 a pickle, renamed"})
    with pytest.raises(BrokenDownload, match=r"bad.safetensors is no safetensors file.*; what came was removed"):
        setup.pull("org/bad")
    assert [name for name in setup.files() if name.endswith("safetensors")] == []


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.gguf"])
def test_other_formats_are_refused(setup: Setup, name: str) -> None:
    setup.hub.repositories["org/other"] = Repository({name: b"PK\3\4"})
    with pytest.raises(InvalidRequest, match=f"{name} is no .safetensors file, and nothing else is fetched") as caught:
        setup.pull(f"org/other/{name}")
    assert str(caught.value).endswith("read with DIFFUSION_API_ALLOW_PICKLE_MODELS=true") == (name == "model.ckpt")
    with pytest.raises(NotFound, match="holds no safetensors files and no diffusers folder"):
        setup.pull("org/other")


# Who may, and where to


def test_a_gated_model_says_what_to_do(setup: Setup) -> None:
    setup.hub.repositories["org/style"].gated = True
    with pytest.raises(Gated, match=r"accept its terms at http.*/org/style, then set HF_TOKEN to a token of yours"):
        setup.pull("org/style")
    other = Setup(setup.home, setup.hub, token="hf_other")
    with pytest.raises(Gated, match=r"org/style is gated, and your HF_TOKEN does not open it: accept its terms at"):
        other.pull("org/style")
    allowed = Setup(setup.home, setup.hub, token=TOKEN)
    assert allowed.pull("org/style").name == "style"


def test_the_token_goes_to_the_hub_and_to_no_other_host(setup: Setup) -> None:
    Setup(setup.home, setup.hub, token=TOKEN).pull("org/style")
    told = {path.split("/")[1]: headers.get("authorization") for path, headers in setup.hub.heard}
    assert told == {"api": f"Bearer {TOKEN}", "org": f"Bearer {TOKEN}", "blob": None}


def test_a_repository_that_is_not_there_is_told(setup: Setup) -> None:
    with pytest.raises(NotFound, match=r"the hub has no org/nothing, or it is private: then set HF_TOKEN"):
        setup.pull("org/nothing")


@pytest.mark.parametrize(
    "source",
    ["", "name", "org/name/", "../x/y", "org/../x", "org/name/../x", "org\\name", "file:///etc/passwd", "a/b@"],
)
def test_what_is_no_source_is_refused_with_the_choices(setup: Setup, source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"it may be org/name, org/name@revision"):
        setup.pull(source)
    assert setup.hub.heard == []


@pytest.mark.parametrize("url", ["http://example.com/x.safetensors", "https://10.0.0.1/x", "https://localhost/x"])
def test_no_host_is_called_that_is_neither_public_by_https_nor_named_by_the_operator(setup: Setup, url: str) -> None:
    with pytest.raises(UrlRefused, match="https:// and a public name"):
        setup.pull(url)


def test_a_public_name_that_leads_inside_is_not_called(setup: Setup) -> None:
    inside = Setup(setup.home, setup.hub, resolve=lambda host, port: ["127.0.0.1"])
    with pytest.raises(Unreachable, match="its name leads to no address that may be called"):
        inside.pull("https://models.example.com/x.safetensors")


def test_a_redirect_leads_nowhere_else_either(setup: Setup) -> None:
    narrow = Setup(setup.home, setup.hub, allowed=setup.hub.url)
    with pytest.raises(UrlRefused, match=f"leads to {setup.hub.cdn}; allowed: "):
        narrow.pull("org/style")


def test_redirects_in_a_circle_come_to_an_end(setup: Setup) -> None:
    with receiving(*[302] * 20) as host:
        host.location = host.url
        around = Setup(setup.home, setup.hub, allowed=host.host)
        with pytest.raises(UrlRefused, match="more than 3 redirects"):
            around.pull(host.url)


def test_a_proxy_that_the_operator_named_is_the_only_way(setup: Setup) -> None:
    with receiving(*[403] * 20) as proxy:
        proxied = Setup(setup.home, setup.hub, proxy=f"http://{proxy.host}")
        with pytest.raises((Unreachable, Gated, NotFound)):
            proxied.pull("org/style")
        assert proxy.heard[0].path.startswith(f"{setup.hub.url}/api/models/org/style")
    assert setup.hub.heard == []


# Room


def test_what_does_not_fit_is_refused_before_a_byte_of_it_comes(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free", lambda folder: 20_000)
    with pytest.raises(DiskFull, match=r"org/style needs 0.00 GiB, and 0.00 GiB are free"):
        setup.pull("org/style")
    assert setup.hub.ranges() == []
    with pytest.raises(DiskFull, match=r"style.safetensors needs 39.\d KiB more, and 0 bytes are free; make room"):
        setup.pull(f"{setup.hub.url}/org/style/resolve/main/style.safetensors")


def test_a_disk_that_fills_meanwhile_leaves_what_came(setup: Setup, small_disk: Path) -> None:
    content = setup.hub.repositories["org/style"].files["style.safetensors"]
    own = setup.home / "stable_diffusion"
    own.mkdir(parents=True)
    (own / ".pull").symlink_to(small_disk)
    (small_disk / "other").write_bytes(bytes(70_000))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(disk, "free", lambda folder: 10**9)
    with pytest.raises(DiskFull, match=r"the disk is full; .* of style.safetensors are there"):
        setup.pull("org/style")
    monkeypatch.undo()
    (small_disk / "other").unlink()
    monkeypatch.setattr(downloads, "RESERVE", 0)
    assert setup.pull("org/style").path.read_bytes() == content
    monkeypatch.undo()


def test_two_who_pull_the_same_do_not_meet(setup: Setup) -> None:
    async def both() -> None:
        plan = await setup.puller.plan("org/style")
        with setup.puller._staging(plan), pytest.raises(Conflict, match="is being fetched already"):
            await setup.puller.fetch(plan, lambda *news: None)

    asyncio.run(both())


# The command


def test_the_command_shows_the_licence_and_how_to_use_what_came(tmp_path: Path) -> None:
    repository = Repository(folder_files(tmp_path), licence={"license": "creativeml-openrail-m"})
    with hub(org__model=repository) as state:
        done = run("pull", "org/model", cwd=tmp_path, hf_endpoint=state.url, pull_hosts=state.cdn)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"org/model at commit {'c' * 40}: 3 files, ")
    assert lines[1] == "Licence: creativeml-openrail-m"
    assert lines[-2] == f"Fetched: stable_diffusion/models/models--org--model/snapshots/{'c' * 40} (model)"
    assert lines[-1] == 'Use it with "model": "models--org--model"'


def test_a_host_that_is_not_allowed_is_told_with_the_setting_that_allows_it(tmp_path: Path) -> None:
    done = run("pull", "http://192.168.3.4:8080/x.safetensors", "--home", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("diffusion-api: x.safetensors leads to http://192.168.3.4:8080; allowed: https://")
    assert done.stderr.endswith("the operator can allow more: DIFFUSION_API_PULL_HOSTS\n")


def test_an_endpoint_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    done = run("pull", "org/style", cwd=tmp_path, hf_endpoint="mirror:8080")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("diffusion-api: setting hf_endpoint (DIFFUSION_API_HF_ENDPOINT) is ")
    assert "'mirror:8080': String should match pattern '^https?://" in line


def test_a_refusal_of_the_hub_is_one_line(tmp_path: Path, style: Repository) -> None:
    style.gated = True
    with hub(org__style=style) as state:
        done = run("pull", "org/style", cwd=tmp_path, hf_endpoint=state.url, pull_hosts=state.cdn)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("diffusion-api: org/style is gated: accept its terms at ")
