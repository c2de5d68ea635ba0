"""Pickles are listed by what they hold, and neither listing nor loading runs anything in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from ldm_layout import write_checkpoint
from safetensors.torch import load_file

from diffusion_api.catalog import detect, pickles
from diffusion_api.catalog.library import Library
from diffusion_api.engine import devices
from diffusion_api.engine.families.base import read_checkpoint, read_weights
from diffusion_api.settings import DATA


class Evil:
    """What a pickle of this would do when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.file),)


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as one safetensors file."""
    path = tmp_path_factory.mktemp("single") / "shapes.safetensors"
    write_checkpoint(DATA / "models" / "shapes", DATA / "clip" / "vocab.json", path)
    return path


def test_names_and_shapes_are_read_without_loading(tmp_path: Path, single: Path) -> None:
    tensors = load_file(single)
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.empty(0), "half": torch.ones(2, 3).half()}
    view = torch.ones(4, 5)
    tensors |= {"view": view[1:, 2:], "again": view, "parameter": torch.nn.Parameter(torch.ones(3))}
    expected = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert pickles.shapes(save(tmp_path / "plain.ckpt", tensors)) == expected
    nested = {"epoch": 3, "global_step": 840000, "state_dict": tensors, "note": "x"}
    assert pickles.shapes(save(tmp_path / "nested.ckpt", nested)) == expected


def test_a_checkpoint_is_listed_and_read_only_where_the_operator_allows_it(
    tmp_path: Path, single: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = tmp_path / "stable_diffusion" / "models"
    save(models / "old.ckpt", {"state_dict": load_file(single)})
    closed = Library(tmp_path, models)
    assert closed.models() == []
    assert (
        "old.ckpt is not listed: .ckpt files can run code when loaded; convert it to .safetensors, or allow them"
        in caplog.text
    )
    (model,) = Library(tmp_path, models, pickle_models=True).models()
    assert (model.name, model.family, model.pickled, model.single_file) == ("old", "sd1", True, True)
    ours, theirs = (read_checkpoint(path, devices.choose("cpu")) for path in (model.path, single))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_pickle_holds_tells_its_kind_wherever_it_lies(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    lora = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    save(root / "style.pt", {lora: torch.ones(4, 768)})
    save(root / "4x.pth", {"params_ema": {"conv_first.weight": torch.ones(8, 3, 3, 3)}})
    save(
        root / "bad-hands.pt",
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(3, 768)}, "name": "x"},
    )
    save(root / "unknown.bin", {"x": torch.ones(1)})
    found = Library(tmp_path / "home", tmp_path / "home" / "models", models_from=[root])
    listed = {
        kind: [(row.name, row.family) for row in found.assets(kind)] for kind in ("lora", "upscaler", "embedding")
    }  # type: ignore[arg-type]
    assert listed == {"lora": [("style", "sd1")], "upscaler": [("4x", None)], "embedding": [("bad-hands", "sd1")]}


def test_a_pickle_that_would_run_something_is_told_and_runs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loras = tmp_path / "stable_diffusion" / "loras"
    save(loras / "evil.pt", {"x": torch.ones(1), "y": Evil(tmp_path / "ran")})
    found = Library(tmp_path, tmp_path / "stable_diffusion" / "models", pickle_models=True)
    assert found.assets("lora") == []
    assert "evil.pt is not listed: loras/evil.pt cannot be used: it names posix.mkdir, which is no data" in caplog.text
    with pytest.raises(pickle.UnpicklingError):
        read_weights(loras / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"x": 1}, protocol=4), "STACK_GLOBAL|no file of torch.save"),
        (b"\x80\x02cposix\nsystem\nq\x00.", "it names posix.system, which is no data"),
        (b"\x80\x02cos\nsystem\n.", "it names os.system, which is no data"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it has the instruction STACK_GLOBAL"),
        (b"\x80\x02(ios\nsystem\n.", "it has the instruction INST"),
        (b"\x80\x02ctorch\nload\n.", "it names torch.load, which is no data"),
        (b"garbage", "cannot be used"),
        (b"", "cannot be used"),
    ],
)
def test_an_archive_with_something_else_in_it_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
    if reason.startswith("STACK"):
        assert pickles.shapes(path) == {}
        return
    with pytest.raises(detect.Unrecognised, match=reason):
        detect.contents(path)


def test_a_file_that_is_no_archive_or_cut_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.pt", {"x": torch.ones(1000)}).read_bytes()
    for size in (0, 4, 100, len(whole) - 10):
        (tmp_path / "a.pt").write_bytes(whole[:size])
        with pytest.raises(detect.Unrecognised, match="no file of torch"):
            detect.contents(tmp_path / "a.pt")
