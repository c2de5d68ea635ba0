"""The models of an installation, found in folders of real files."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

import fake_models
import pytest
from fake_models import checkpoint, diffusers_folder, transformer_folder

from diffusion_api.catalog import library as catalog
from diffusion_api.catalog.library import Library
from diffusion_api.errors import InvalidRequest, UnknownModel

NewLibrary = Callable[..., Library]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The user's models folder, empty."""
    folder = tmp_path / "home" / "stable_diffusion" / "models"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """The folder of a package that ships one model."""
    diffusers_folder(tmp_path / "shipped" / "shapes", sample_size=32)
    return tmp_path / "shipped"


@pytest.fixture
def new_library(tmp_path: Path, models: Path) -> NewLibrary:
    """Makes a library on that folder; ``shipped`` and ``default`` are its own parameters."""

    def make(*, shipped: Path | None = None, default: str | None = None) -> Library:
        return Library(tmp_path / "home", models, shipped, default)

    return make


def names(library: Library) -> list[str]:
    return [model.name for model in library.models()]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == catalog.__name__]


# What is listed


def test_folders_and_files_are_listed_by_name(models: Path, new_library: NewLibrary) -> None:
    diffusers_folder(models / "zebra", sample_size=32)
    checkpoint(models / "Aardvark.safetensors", fake_models.SD1_KEYS)
    checkpoint(models / "bear.v1.5.safetensors", fake_models.SD1_KEYS)
    found = new_library().models()
    assert [(m.name, m.family, m.native_size, m.type) for m in found] == [
        ("Aardvark", "sd1", 512, "standard"),
        ("bear.v1.5", "sd1", 512, "standard"),
        ("zebra", "sd1", 256, "standard"),
    ]
    assert [m.shown_path for m in found] == [
        "stable_diffusion/models/Aardvark.safetensors",
        "stable_diffusion/models/bear.v1.5.safetensors",
        "stable_diffusion/models/zebra",
    ]
    assert [m.single_file for m in found] == [True, True, False]


SPELLINGS = ("org/name-v1", "models--org--name-v1", "org__name-v1", "org--name-v1", "ORG/Name_v1")


@pytest.mark.parametrize("installed", ["models--org--name-v1", "org__name-v1", "org/name-v1", "name-v1"])
@pytest.mark.parametrize("spelling", SPELLINGS[:2])
def test_a_repository_of_the_hub_is_found_however_it_was_put_there(
    models: Path, new_library: NewLibrary, installed: str, spelling: str
) -> None:
    diffusers_folder(models / installed)
    diffusers_folder(models / "models--other--name-v1")
    assert new_library().resolve(spelling).path == models / installed


@pytest.mark.parametrize("installed", ["models--org--name-v1", "org__name-v1"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_repository_means_it(
    models: Path, new_library: NewLibrary, installed: str, spelling: str
) -> None:
    diffusers_folder(models / installed)
    diffusers_folder(models / "another")
    assert new_library().resolve(spelling).path == models / installed


@pytest.mark.parametrize("name", ["runwayml/stable-diffusion-v1-5", "sd-legacy/stable-diffusion-v1-5"])
def test_a_file_with_the_name_of_a_repository_is_meant_by_it_whoever_owns_that(
    models: Path, new_library: NewLibrary, name: str
) -> None:
    checkpoint(models / "stable-diffusion-v1-5.safetensors", fake_models.SD1_KEYS)
    assert new_library().resolve(name).name == "stable-diffusion-v1-5"


@pytest.mark.parametrize("name", ["other/name-v1", "models--other--name-v1", "name", "org/name", "org"])
def test_a_repository_of_another_owner_is_another_model(models: Path, new_library: NewLibrary, name: str) -> None:
    diffusers_folder(models / "models--org--name-v1")
    with pytest.raises(UnknownModel, match="one of models--org--name-v1"):
        new_library().resolve(name)


def test_nothing_and_no_folder_are_no_models(models: Path, new_library: NewLibrary) -> None:
    assert names(new_library()) == []
    models.rmdir()
    assert names(new_library()) == []


def test_the_hash_is_that_of_the_file(models: Path, new_library: NewLibrary) -> None:
    path = checkpoint(models / "one.safetensors", fake_models.SD1_KEYS)
    diffusers_folder(models / "two")
    one, two = new_library().models()
    assert one.hash == hashlib.sha256(path.read_bytes()).hexdigest()[:10]
    assert two.hash is None


def test_shipped_models_are_listed_and_give_way_to_the_users(
    models: Path, shipped: Path, new_library: NewLibrary
) -> None:
    (model,) = new_library(shipped=shipped).models()
    assert (model.name, model.shipped, model.shown_path) == ("shapes", True, "shipped/shapes")
    diffusers_folder(models / "shapes", sample_size=64)
    (model,) = new_library(shipped=shipped).models()
    assert (model.shipped, model.native_size) == (False, 512)


def test_the_newest_snapshot_of_a_hub_folder_is_the_model(models: Path, new_library: NewLibrary) -> None:
    hub = models / "models--Meina--MeinaMix_V11"
    for age, name in enumerate(("newest", "older", "oldest")):
        folder = diffusers_folder(hub / "snapshots" / name)
        os.utime(folder, (1e9 - age, 1e9 - age))
    (hub / "snapshots" / "unfinished").mkdir()
    (model,) = new_library().models()
    assert (model.name, model.label) == ("models--Meina--MeinaMix_V11", "MeinaMix V11")
    assert model.path == hub / "snapshots" / "newest"
    assert model.shown_path == "stable_diffusion/models/models--Meina--MeinaMix_V11"


def test_a_model_behind_a_link_is_listed(tmp_path: Path, models: Path, new_library: NewLibrary) -> None:
    (models / "linked").symlink_to(diffusers_folder(tmp_path / "elsewhere" / "model"))
    (models / "file.safetensors").symlink_to(checkpoint(tmp_path / "elsewhere" / "x", fake_models.SD1_KEYS))
    assert names(new_library()) == ["file", "linked"]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (fake_models.VAE | {fake_models.UNET: [8, 4, 3, 3]}, "it holds no text encoder"),
        ({"text_model.embeddings.token_embedding.weight": [8]}, "it is no checkpoint"),
    ],
)
def test_what_cannot_run_is_not_listed_and_told_once(
    models: Path,
    new_library: NewLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    keys: dict[str, list[int]],
    reason: str,
) -> None:
    monkeypatch.setattr(catalog, "FRESH", -1000)
    diffusers_folder(models / "good")
    checkpoint(models / "other.safetensors", keys)
    library = new_library()
    for _ in range(3):
        assert names(library) == ["good"]
    (line,) = told(caplog)
    assert line.startswith(f"other.safetensors is not listed: {reason}")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.safetensors", struct.pack("<Q", 2) + b"{", "length of its header"),
        ("page.safetensors", b"<html><body>Sign in to download this model</body></html>", "length of its header"),
        ("bomb.safetensors", struct.pack("<Q", 2**63) + b"{}", "length of its header"),
        ("empty.safetensors", b"", "length of its header"),
        ("old.ckpt", b"PK\3\4", "can run code when loaded; convert it to .safetensors"),
    ],
)
def test_a_file_that_is_no_model_is_not_listed_and_told_once(
    models: Path,
    new_library: NewLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    content: bytes,
    reason: str,
) -> None:
    monkeypatch.setattr(catalog, "FRESH", -1000)
    diffusers_folder(models / "good")
    (models / name).write_bytes(content)
    library = new_library()
    for _ in range(3):
        assert names(library) == ["good"]
    (line,) = told(caplog)
    assert line.startswith(f"{name} is not listed: ")
    assert reason in line


def test_a_download_that_goes_on_is_listed_once_it_is_whole(
    models: Path, new_library: NewLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog, "FRESH", -1000)
    path = checkpoint(models / "one.safetensors", fake_models.SD1_KEYS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    library = new_library()
    assert names(library) == []
    assert "unfinished download" in told(caplog)[0]
    path.write_bytes(whole)
    assert names(library) == ["one"]


def test_what_is_hidden_or_of_another_kind_is_passed_over_in_silence(
    models: Path, new_library: NewLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    diffusers_folder(models / ".hidden")
    checkpoint(models / ".hidden.safetensors", fake_models.SD1_KEYS)
    (models / "readme.txt").write_text("put models here")
    (models / "model.yaml").touch()
    assert names(new_library()) == []
    assert told(caplog) == []


def test_a_link_to_nowhere_is_told(models: Path, new_library: NewLibrary, caplog: pytest.LogCaptureFixture) -> None:
    (models / "gone.safetensors").symlink_to(models / "nowhere")
    assert names(new_library()) == []
    assert told(caplog) == [
        "gone.safetensors is not listed: models/gone.safetensors cannot be read: No such file or directory"
    ]


def test_a_folder_that_is_no_model_is_told(
    models: Path, new_library: NewLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    (diffusers_folder(models / "notes") / "model_index.json").unlink()
    assert names(new_library()) == []
    assert told(caplog) == ["notes is not listed: notes/model_index.json cannot be read"]


def test_a_scan_is_believed_for_a_moment_and_then_made_again(
    models: Path, new_library: NewLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models / "deep").mkdir()
    library = new_library()
    assert names(library) == []
    diffusers_folder(models / "deep" / "new")
    assert names(library) == []
    monkeypatch.setattr(catalog, "FRESH", -1000)
    assert names(library) == ["new"]


def test_what_comes_into_a_folder_of_the_home_is_found_at_once(models: Path, new_library: NewLibrary) -> None:
    library = new_library()
    assert library.find_asset("lora", "new") is None
    checkpoint(models.with_name("loras") / "new.safetensors", fake_models.LORA_KEYS)
    assert library.find_asset("lora", "new")
    (models.with_name("loras") / "new.safetensors").unlink()
    assert library.find_asset("lora", "new") is None


# What a name means


def test_a_model_is_found_by_name_file_name_and_label(models: Path, new_library: NewLibrary) -> None:
    diffusers_folder(models / "models--mirroring--pastel-mix")
    diffusers_folder(models / "stable-diffusion-v1-5")
    checkpoint(models / "My_Model.safetensors", fake_models.SD1_KEYS)
    library = new_library()
    wanted = {
        "models--mirroring--pastel-mix": [
            *("models--mirroring--pastel-mix", "Pastel Mix", "pastel_mix", "PASTEL-MIX", " pastel mix "),
        ],
        "stable-diffusion-v1-5": ["stable-diffusion-v1-5", "Stable Diffusion v1_5"],
        "My_Model": ["My_Model", "My_Model.safetensors", "my model", "MY-MODEL"],
    }
    for name, spellings in wanted.items():
        for spelling in spellings:
            assert library.resolve(spelling).name == name


def test_an_exact_name_goes_before_a_loose_one(models: Path, new_library: NewLibrary) -> None:
    for name in ("my-model", "My Model", "my_model"):
        diffusers_folder(models / name)
    library = new_library()
    for name in ("my-model", "My Model", "my_model"):
        assert library.resolve(name).name == name


@pytest.mark.parametrize("name", ["", "nope", "../good", "good/", "good/../good", "*", "\0"])
def test_an_unknown_model_is_refused_with_the_choices(models: Path, new_library: NewLibrary, name: str) -> None:
    diffusers_folder(models / "good")
    diffusers_folder(models / "better")
    with pytest.raises(UnknownModel) as caught:
        new_library().resolve(name)
    assert str(caught.value) == f"model {name!r} is not installed; one of better, good"
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("org/name", "org/name"),
        ("models--org--some-name.v2", "org/some-name.v2"),
        ("John6666__amanatsu-illustrious-v11-sdxl", "John6666/amanatsu-illustrious-v11-sdxl"),
        ("pastel_mix", "mirroring/pastel-mix"),
        ("stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_a_model_of_the_hub_that_is_not_there_is_refused_with_the_line_that_fetches_it(
    models: Path, new_library: NewLibrary, name: str, repository: str
) -> None:
    diffusers_folder(models / "good")
    with pytest.raises(UnknownModel) as caught:
        new_library().resolve(name)
    assert str(caught.value) == (
        f"model {name!r} is not installed; one of good; the operator can fetch it: diffusion-api pull {repository}"
    )


def test_without_any_model_the_caller_is_told_where_they_go(new_library: NewLibrary) -> None:
    for name in ("nope", None):
        with pytest.raises(InvalidRequest, match="no model is installed: put one into stable_diffusion/models"):
            new_library().resolve(name)


@pytest.mark.parametrize("name", ["half", "half.safetensors"])
def test_a_model_that_is_there_and_cannot_be_used_is_refused_with_the_reason(
    models: Path, new_library: NewLibrary, name: str
) -> None:
    path = checkpoint(models / "half.safetensors", fake_models.SD1_KEYS)
    path.write_bytes(path.read_bytes()[:-4])
    diffusers_folder(models / "good")
    with pytest.raises(UnknownModel) as caught:
        new_library().resolve(name)
    size = path.stat().st_size
    assert str(caught.value) == (
        f"model {name!r} cannot be used: models/half.safetensors has {size} bytes and should have {size + 4} "
        "(an unfinished download?); one of good"
    )


def test_a_model_that_was_mended_is_found(
    models: Path, new_library: NewLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "FRESH", -1000)
    path = checkpoint(models / "half.safetensors", fake_models.SD1_KEYS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    library = new_library()
    assert library.find("half") is None
    path.write_bytes(whole)
    assert library.resolve("half").name == "half"
    path.unlink()
    with pytest.raises(UnknownModel, match="model 'half' is not installed"):
        library.resolve("half")


# What no name means


def test_the_configured_model_is_the_default(models: Path, new_library: NewLibrary) -> None:
    for name in ("stable-diffusion-v1-5", "other"):
        diffusers_folder(models / name)
    assert new_library(default="Other").resolve(None).name == "other"


def test_a_configured_model_that_is_not_installed_is_refused(models: Path, new_library: NewLibrary) -> None:
    diffusers_folder(models / "one")
    with pytest.raises(UnknownModel, match="model 'gone' is not installed; one of one"):
        new_library(default="gone").resolve(None)


def test_stable_diffusion_1_5_is_the_default_where_it_is_installed(
    models: Path, shipped: Path, new_library: NewLibrary
) -> None:
    for name in ("another", "stable-diffusion-v1-5"):
        diffusers_folder(models / name)
    assert new_library(shipped=shipped).default().name == "stable-diffusion-v1-5"


def test_the_users_only_model_is_the_default(models: Path, shipped: Path, new_library: NewLibrary) -> None:
    diffusers_folder(models / "mine")
    assert new_library(shipped=shipped).default().name == "mine"


def test_a_shipped_model_is_the_default_where_there_is_no_other(shipped: Path, new_library: NewLibrary) -> None:
    assert new_library(shipped=shipped).default().name == "shapes"


def test_the_caller_has_to_choose_between_several(models: Path, shipped: Path, new_library: NewLibrary) -> None:
    for name in ("mine", "other"):
        diffusers_folder(models / name)
    with pytest.raises(InvalidRequest) as caught:
        new_library(shipped=shipped).default()
    assert str(caught.value) == (
        "no model was named and there is no default; one of mine, other, shapes; "
        "the operator can set one: DIFFUSION_API_MODEL"
    )
    assert caught.value.field == "model"


def test_of_several_shipped_models_shapes_is_the_default(shipped: Path, new_library: NewLibrary) -> None:
    for name in ("another", "shapes-xl", "shapes-xl-refiner"):
        diffusers_folder(shipped / name)
    assert new_library(shipped=shipped).default().name == "shapes"


@pytest.mark.parametrize("keys", [fake_models.REFINER_KEYS, fake_models.INPAINTING_KEYS])
def test_a_model_that_does_not_begin_with_words_is_no_default(
    models: Path, shipped: Path, new_library: NewLibrary, keys: dict[str, list[int]]
) -> None:
    checkpoint(models / "other.safetensors", keys)
    assert new_library(shipped=shipped).default().name == "shapes"
    with pytest.raises(InvalidRequest, match="no default; one of other; the operator can set one"):
        new_library().default()
    checkpoint(models / "mine.safetensors", fake_models.SD1_KEYS)
    assert new_library(shipped=shipped).default().name == "mine"


def test_a_folder_tells_whether_it_changes_pictures(models: Path, new_library: NewLibrary) -> None:
    diffusers_folder(models / "a", pipeline="StableDiffusionInpaintPipeline", unet={"in_channels": 9})
    diffusers_folder(models / "b", unet={"in_channels": 4})
    transformer_folder(models / "c", pipeline="FluxFillPipeline")
    transformer_folder(models / "d")
    assert [(m.name, m.inpaints) for m in new_library().models()] == [
        ("a", True), ("b", False), ("c", True), ("d", False),
    ]  # fmt: skip


def test_the_log_names_no_folder_of_the_host(
    models: Path, new_library: NewLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (models / "x.safetensors").write_bytes(b"")
    (diffusers_folder(models / "y") / "model_index.json").unlink()
    assert names(new_library()) == []
    assert len(told(caplog)) == 2
    assert str(models) not in caplog.text
