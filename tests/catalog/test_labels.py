"""What the operator says of models in ``models.toml``."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_models import SD1_KEYS, checkpoint

from diffusion_api.catalog import library as catalog
from diffusion_api.catalog.labels import Profile
from diffusion_api.catalog.library import Library


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """The file, not there yet, of an installation with the models ``dream_8`` and ``bear.v1.5``."""
    for name in ("dream_8", "bear.v1.5"):
        checkpoint(tmp_path / "stable_diffusion" / "models" / f"{name}.safetensors", SD1_KEYS)
    return tmp_path / "stable_diffusion" / "models.toml"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Its models, looked up anew each time."""
    monkeypatch.setattr(catalog, "FRESH", -1000)
    return Library(tmp_path, tmp_path / "stable_diffusion" / "models")


WHOLE = """
[Dream-8]
label = "DreamShaper 8"
aliases = ["ds8", "dream"]
size = [640, 960]
steps = 25
sampler = "DPM++ 2M Karras"
clip_skip = 2
vae = "mse"
prediction = "v"
ztsnr = true

["bear.v1.5"]
size = 768
"""


def test_every_key_is_heard(toml: Path, library: Library) -> None:
    toml.write_text(WHOLE)
    model = library.resolve("dream_8")
    assert model.profile == Profile(
        label="DreamShaper 8",
        aliases=("ds8", "dream"),
        size=(640, 960),
        steps=25,
        sampler="DPM++ 2M Karras",
        clip_skip=2,
        vae="mse",
        prediction="v",
        ztsnr=True,
    )
    assert (model.label, model.default_size) == ("DreamShaper 8", (640, 960))
    bear = library.resolve("bear.v1.5")
    assert (bear.label, bear.default_size) == ("bear.v1.5", (768, 768))


@pytest.mark.parametrize("name", ["DreamShaper 8", "dreamshaper_8", "DREAMSHAPER-8", "ds8", "Dream", " dream "])
def test_a_model_is_found_by_its_label_and_its_aliases(toml: Path, library: Library, name: str) -> None:
    toml.write_text(WHOLE)
    assert library.resolve(name).name == "dream_8"


def test_labels_are_those_of_the_original_api_and_of_the_file(toml: Path, library: Library) -> None:
    before = library.labels()
    assert len(before) == 7
    assert [label for _, label in before] == sorted((label for _, label in before), key=str.lower)
    assert ("models--mirroring--pastel-mix", "Pastel Mix") in before
    toml.write_text(WHOLE)
    assert set(library.labels()) - set(before) == {("dream_8", text) for text in ("DreamShaper 8", "ds8", "dream")}


def test_the_file_is_read_again_when_it_changes(toml: Path, library: Library) -> None:
    assert library.resolve("dream_8").label == "dream_8"
    toml.write_text('[dream_8]\nlabel = "One"')
    assert library.resolve("dream_8").label == "One"
    toml.unlink()
    assert library.resolve("dream_8").label == "dream_8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dream_8\nsteps = 3", "models.toml is not used: Expected ']' at the end of a table declaration (at line 1,"),
        ("[dream_8]\nsteps = soon", "models.toml is not used: Invalid value (at line 2, column 9)"),
        (
            "[dream_8]\nsteps = 'soon'",
            "models.toml: [dream_8] is not used: steps is 'soon': Input should be a valid integer",
        ),
        (
            "[dream_8]\nstep = 3",
            "models.toml: [dream_8] is not used: 'step' is no key; one of label, aliases, size, steps,",
        ),
        (
            "[dream_8]\nsampler = 'Euler z'",
            "sampler is 'Euler z': sampler_name 'Euler z' is not known; did you mean 'Euler a'? One of Euler",
        ),
        ("[dream_8]\nprediction = 'vpred'", "prediction is 'vpred': Input should be 'epsilon' or 'v'"),
        ("[dream_8]\nsize = [500, 512]", "size is 500: Input should be a multiple of 8"),
        ("dream_8 = 3", "models.toml: [dream_8] is not used: it is no table of keys; write [name] above them"),
        ("\udc80", "models.toml is not used: 'utf-8' codec"),
    ],
)
def test_what_is_wrong_is_told_once_and_the_rest_goes_on(
    toml: Path, library: Library, caplog: pytest.LogCaptureFixture, text: str, message: str
) -> None:
    toml.write_bytes(text.encode(errors="surrogateescape"))
    for _ in range(3):
        assert [model.name for model in library.models()] == ["bear.v1.5", "dream_8"]
    (line,) = caplog.messages
    assert message in line


def test_a_mistake_in_one_table_leaves_the_others_in_force(toml: Path, library: Library) -> None:
    toml.write_text("[dream_8]\nsteps = 0\n['bear.v1.5']\nsteps = 7")
    assert library.resolve("bear.v1.5").profile.steps == 7
    assert library.resolve("dream_8").profile.steps is None


def test_a_file_that_may_not_be_read_is_told(toml: Path, library: Library, caplog: pytest.LogCaptureFixture) -> None:
    toml.mkdir()
    assert len(library.models()) == 2
    assert caplog.messages == ["models.toml is not used: Is a directory"]
