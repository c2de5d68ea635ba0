"""The folders of other programs, as trees of real files, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_models import EMBEDDING_KEYS, ESRGAN_KEYS, LORA_KEYS, SD1_KEYS, VAE_KEYS, checkpoint, diffusers_folder

from diffusion_api.catalog import layouts
from diffusion_api.catalog import library as catalog
from diffusion_api.catalog.library import Library

Listed = dict[str, list[str]]
A_FILE = {
    "model": SD1_KEYS, "lora": LORA_KEYS, "vae": VAE_KEYS, "upscaler": ESRGAN_KEYS, "embedding": EMBEDDING_KEYS
}  # fmt: skip


def library(tmp_path: Path, *roots: Path) -> Library:
    home = tmp_path / "home"
    return Library(home, home / "stable_diffusion" / "models", models_from=roots)


def listed(found: Library) -> Listed:
    """The shown paths of all that was found, by kind."""
    rows: Listed = {kind: sorted(row.shown_path for row in found.assets(kind)) for kind in A_FILE}  # type: ignore[arg-type]
    return {kind: paths for kind, paths in rows.items() if paths}


def fill(root: Path, files: dict[str, str]) -> None:
    """Files of weights by path, each of the kind that is named; ``pickle`` for one that nobody opens."""
    for path, kind in files.items():
        if kind == "pickle":
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"PK\3\4")
        else:
            checkpoint(root / path, A_FILE[kind])


def test_a1111_and_forge(tmp_path: Path) -> None:
    root = tmp_path / "stable-diffusion-webui"
    fill(
        root,
        {
            "models/Stable-diffusion/dream.safetensors": "model",
            "models/Stable-diffusion/anime/dream2.safetensors": "model",
            "models/Stable-diffusion/dream.vae.pt": "pickle",
            "models/Lora/style.safetensors": "lora",
            "models/Lora/people/face.safetensors": "lora",
            "models/LyCORIS/old.pt": "pickle",
            "models/VAE/mse.safetensors": "vae",
            "models/ESRGAN/4x.pth": "pickle",
            "models/RealESRGAN/real.pth": "pickle",
            "models/SwinIR/swin.safetensors": "upscaler",
            "models/DAT/dat.pth": "pickle",
            "embeddings/bad-hands.pt": "pickle",
            "embeddings/sub/good.safetensors": "embedding",
            # and what else lies in there, which is nobody's model
            "models/ControlNet/canny.pth": "pickle",
            "models/VAE-approx/model.pt": "pickle",
            "models/Codeformer/codeformer-v0.1.0.pth": "pickle",
            "extensions/some/models/net.pth": "pickle",
            "venv/lib/torch/x.bin": "pickle",
        },
    )
    (root / "styles.csv").write_text("name,prompt,negative_prompt\n")
    found = library(tmp_path, root)
    name = root.name
    assert listed(found) == {
        "model": [
            f"{name}/models/Stable-diffusion/anime/dream2.safetensors",
            f"{name}/models/Stable-diffusion/dream.safetensors",
        ],
        "lora": [
            f"{name}/models/Lora/people/face.safetensors",
            f"{name}/models/Lora/style.safetensors",
            f"{name}/models/LyCORIS/old.pt",
        ],
        "vae": [f"{name}/models/Stable-diffusion/dream.vae.pt", f"{name}/models/VAE/mse.safetensors"],
        "upscaler": [
            f"{name}/models/DAT/dat.pth",
            f"{name}/models/ESRGAN/4x.pth",
            f"{name}/models/RealESRGAN/real.pth",
            f"{name}/models/SwinIR/swin.safetensors",
        ],
        "embedding": [f"{name}/embeddings/bad-hands.pt", f"{name}/embeddings/sub/good.safetensors"],
    }
    assert found.styles_files() == [root / "styles.csv"]
    assert found.resolve("anime/dream2").name == "dream2"
    assert found.resolve("dream.safetensors").path == root / "models/Stable-diffusion/dream.safetensors"


COMFY = {
    "checkpoints/base.safetensors": "model",
    "loras/xl/style.safetensors": "lora",
    "vae/mse.safetensors": "vae",
    "embeddings/easy.pt": "pickle",
    "upscale_models/4x.pth": "pickle",
    "diffusion_models/dit.safetensors": "model",
    "clip_vision/vision.safetensors": "embedding",
}
COMFY_LISTED = {
    "model": ["checkpoints/base.safetensors", "diffusion_models/dit.safetensors"],
    "lora": ["loras/xl/style.safetensors"],
    "vae": ["vae/mse.safetensors"],
    "upscaler": ["upscale_models/4x.pth"],
    "embedding": ["embeddings/easy.pt"],
}


def below(prefix: str, rows: Listed) -> Listed:
    return {kind: [f"{prefix}/{path}" for path in paths] for kind, paths in rows.items()}


def test_comfyui(tmp_path: Path) -> None:
    fill(tmp_path / "ComfyUI" / "models", COMFY)
    fill(tmp_path / "ComfyUI", {"output/old.safetensors": "model", "custom_nodes/x/net.bin": "pickle"})
    assert listed(library(tmp_path, tmp_path / "ComfyUI")) == below("ComfyUI/models", COMFY_LISTED)


EXTRA = """\
# as ComfyUI's own example has it
a111:
    base_path: ../webui/
    checkpoints: models/Stable-diffusion
    configs: models/Stable-diffusion
    loras: |
         models/Lora
         models/LyCORIS

    embeddings: embeddings
disk:
    checkpoints: {absolute}
    is_default: true
empty:
"""


def test_comfyuis_own_list_of_more_folders_is_followed(tmp_path: Path) -> None:
    fill(tmp_path / "ComfyUI" / "models", COMFY)
    fill(
        tmp_path / "webui",
        {
            "models/Stable-diffusion/dream.safetensors": "model",
            "models/Lora/a.safetensors": "lora",
            "models/LyCORIS/b.safetensors": "lora",
            "embeddings/c.pt": "pickle",
        },
    )
    fill(tmp_path / "disk", {"big.safetensors": "model"})
    file = tmp_path / "ComfyUI" / "extra_model_paths.yaml"
    file.write_text(EXTRA.format(absolute=tmp_path / "disk"))
    extra = {
        "model": ["ComfyUI/disk/big.safetensors", "webui/Stable-diffusion/dream.safetensors"],
        "lora": ["webui/Lora/a.safetensors", "webui/LyCORIS/b.safetensors"],
        "embedding": ["webui/embeddings/c.pt"],
    }
    own = below("ComfyUI/models", COMFY_LISTED)
    both = {kind: sorted(rows + extra.get(kind, [])) for kind, rows in own.items()}
    assert listed(library(tmp_path, tmp_path / "ComfyUI")) == both
    assert listed(library(tmp_path, file)) == extra


@pytest.mark.parametrize("text", ["a: [", "just words", "- 1\n- 2", "a:\n  base_path: 7\n  loras: [1]", "\0", ""])
def test_a_broken_list_of_more_folders_does_no_harm(tmp_path: Path, text: str) -> None:
    fill(tmp_path / "ComfyUI" / "models", COMFY)
    (tmp_path / "ComfyUI" / "extra_model_paths.yaml").write_text(text)
    assert listed(library(tmp_path, tmp_path / "ComfyUI")) == below("ComfyUI/models", COMFY_LISTED)


def hub_repository(cache: Path, name: str, make: Callable[[Path], object], revision: str = "a" * 40) -> Path:
    """A repository as huggingface_hub leaves it: files are links into ``blobs/``."""
    folder = cache / name
    snapshot = folder / "snapshots" / revision
    make(snapshot)
    (folder / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        blob = folder / "blobs" / f"{revision[:4]}{number:060}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    return folder


@pytest.mark.parametrize("root", ["huggingface", "huggingface/hub"])
def test_the_cache_of_the_hub(tmp_path: Path, root: str) -> None:
    cache = tmp_path / "huggingface" / "hub"
    hub_repository(cache, "models--org--model", diffusers_folder)
    hub_repository(cache, "models--org--lcm", lambda f: checkpoint(f / "pytorch_lora_weights.safetensors", LORA_KEYS))
    hub_repository(cache, "models--org--files", lambda f: checkpoint(f / "dream.safetensors", SD1_KEYS))
    hub_repository(cache, "models--openai--clip", lambda f: checkpoint(f / "model.safetensors", {"x": [1]}))
    hub_repository(cache, "datasets--org--pictures", lambda f: checkpoint(f / "x.safetensors", {"x": [1]}))
    (cache / "models--org--unfinished" / "blobs").mkdir(parents=True)
    found = library(tmp_path, tmp_path / root)
    prefix = root.replace("huggingface/", "") + ("" if root.endswith("hub") else "/hub")
    assert listed(found) == {
        "model": [f"{prefix}/models--org--files/dream.safetensors", f"{prefix}/models--org--model"],
        "lora": [f"{prefix}/models--org--lcm/pytorch_lora_weights.safetensors"],
    }
    assert [row.name for row in found.assets("lora")] == ["models--org--lcm"]
    assert found.resolve("org/model").name == "models--org--model"


def test_of_a_repository_its_main_revision_is_taken(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    for age, revision in enumerate(("c" * 40, "b" * 40, "a" * 40)):
        folder = hub_repository(cache, "models--org--model", diffusers_folder, revision)
        os.utime(folder / "snapshots" / revision, (1e9 - age, 1e9 - age))
    (model,) = library(tmp_path, cache).models()
    assert model.path.name == "c" * 40
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    (model,) = library(tmp_path, cache).models()
    assert model.path.name == "b" * 40


def test_a_folder_of_ones_own_is_told_by_headers_and_by_the_names_of_its_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "weights"
    fill(
        root,
        {
            "dream.safetensors": "model",
            "mixed/style.safetensors": "lora",
            "mixed/mse.safetensors": "vae",
            "mixed/unknown.pth": "pickle",
            "ESRGAN/4x.pth": "pickle",
            "Embeddings/deep/bad.pt": "pickle",
        },
    )
    diffusers_folder(root / "sd15" / "folder")
    checkpoint(root / "text_encoder.safetensors", {"text_model.final_layer_norm.weight": [8]})
    assert listed(library(tmp_path, root)) == {
        "model": ["weights/dream.safetensors", "weights/sd15/folder"],
        "lora": ["weights/mixed/style.safetensors"],
        "vae": ["weights/mixed/mse.safetensors"],
        "upscaler": ["weights/ESRGAN/4x.pth"],
        "embedding": ["weights/Embeddings/deep/bad.pt"],
    }
    assert caplog.text == ""


def test_the_home_of_another_installation(tmp_path: Path) -> None:
    root = tmp_path / "other"
    fill(root, {"stable_diffusion/models/a.safetensors": "model", "stable_diffusion/loras/b.pt": "pickle"})
    fill(root, {"outputs/x.safetensors": "model"})
    assert listed(library(tmp_path, root)) == {
        "model": ["other/stable_diffusion/models/a.safetensors"],
        "lora": ["other/stable_diffusion/loras/b.pt"],
    }


def test_a_root_that_is_one_model_itself(tmp_path: Path) -> None:
    (model,) = library(tmp_path, diffusers_folder(tmp_path / "mine")).models()
    assert (model.name, model.shown_path) == ("mine", "mine")


def test_the_same_name_in_two_roots_is_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "home" / "stable_diffusion" / "models", {"a.safetensors": "model"})
    fill(tmp_path / "one" / "webui", {"a.safetensors": "model", "x/b.safetensors": "model"})
    fill(tmp_path / "two" / "webui", {"a.safetensors": "model", "y/b.safetensors": "model"})
    found = library(tmp_path, tmp_path / "one" / "webui", tmp_path / "two" / "webui")
    assert {model.name: model.shown_path for model in found.models()} == {
        "a": "stable_diffusion/models/a.safetensors",
        "webui/a": "webui/a.safetensors",
        "webui-2/a": "webui-2/a.safetensors",
        "b": "webui/x/b.safetensors",
        "y/b": "webui-2/y/b.safetensors",
    }
    assert (
        "webui/a.safetensors is listed as 'webui/a', since 'a' is stable_diffusion/models/a.safetensors" in caplog.text
    )
    assert str(tmp_path) not in caplog.text


def test_one_file_that_two_ways_lead_to_is_listed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "webui"
    fill(root, {"models/Stable-diffusion/dream.safetensors": "model"})
    models = tmp_path / "home" / "stable_diffusion" / "models"
    models.mkdir(parents=True)
    (models / "dream.safetensors").symlink_to(root / "models/Stable-diffusion/dream.safetensors")
    found = library(tmp_path, root, root / "models", root / "models" / "Stable-diffusion")
    assert [model.name for model in found.models()] == ["dream"]
    assert caplog.text == ""


def test_links_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    root = tmp_path / "weights"
    fill(root, {"deep/er/dream.safetensors": "model"})
    (root / "deep" / "up").symlink_to(root)
    (root / "deep" / "er" / "self").symlink_to(root / "deep" / "er")
    (root / "loop").symlink_to(root / "loop")
    assert listed(library(tmp_path, root)) == {"model": ["weights/deep/er/dream.safetensors"]}


def test_folders_are_followed_only_so_deep(tmp_path: Path) -> None:
    deep = "/".join("x" for _ in range(layouts.MAX_DEPTH))
    fill(tmp_path / "weights", {f"{deep}/in.safetensors": "model", f"{deep}/y/out.safetensors": "model"})
    assert [model.name for model in library(tmp_path, tmp_path / "weights").models()] == ["in"]


@pytest.fixture
def nobody() -> Iterator[None]:
    """The rights of no particular user: tests may run as root, whom no folder refuses."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_folder_that_may_not_be_read_is_told_and_the_others_are_listed(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "weights"
    fill(root, {"open/a.safetensors": "model", "shut/b.safetensors": "model", "open/c.safetensors": "model"})
    (root / "shut").chmod(0)
    (root / "open" / "c.safetensors").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o711)
    request.getfixturevalue("nobody")
    assert listed(library(tmp_path, root)) == {"model": ["weights/open/a.safetensors"]}
    assert "weights/shut is not listed: Permission denied" in caplog.text
    assert "open/c.safetensors is not listed: open/c.safetensors cannot be read: Permission denied" in caplog.text


def test_a_root_may_come_and_go_while_the_service_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog, "FRESH", -1000)
    root = tmp_path / "disk"
    found = library(tmp_path, root)
    assert listed(found) == {}
    assert caplog.messages == ["disk (models_from) is not there"]
    fill(root, {"models/Lora/a.safetensors": "lora"})
    assert listed(found) == {"lora": ["disk/models/Lora/a.safetensors"]}
    root.rename(tmp_path / "away")
    assert listed(found) == {}


def test_ten_thousand_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "weights"
    content = checkpoint(root / "0" / "0.safetensors", LORA_KEYS).read_bytes()
    for number in range(1, 10_000):
        folder = root / str(number // 1000)
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.safetensors").write_bytes(content)
    found = library(tmp_path, root)
    assert len(found.assets("lora")) == 10_000
    monkeypatch.setattr(catalog, "FRESH", -1_000_000)
    monkeypatch.setattr(catalog.detect, "safetensors_header", lambda path: pytest.fail("a file was read again"))
    assert len(found.assets("lora")) == 10_000


def test_a_disk_is_no_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layouts, "MAX_ENTRIES", 20)
    root = tmp_path / "disk"
    fill(root, {f"{folder}/{file}.safetensors": "lora" for folder in "abc" for file in range(9)})
    assert len(library(tmp_path, root).assets("lora")) == 9
    assert "disk is not listed: it holds more than 20 files; the rest of them were not looked at" in caplog.text


def test_nothing_is_written_below_the_roots(tmp_path: Path) -> None:
    fill(tmp_path / "ComfyUI" / "models", COMFY)

    def state() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in (tmp_path / "ComfyUI").rglob("*"))

    before = state()
    rows = [row for kind in A_FILE for row in library(tmp_path, tmp_path / "ComfyUI").assets(kind)]  # type: ignore[arg-type]
    assert all(row.hash for row in rows)
    assert state() == before
