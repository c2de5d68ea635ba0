"""What becomes of a job whose device, memory or numbers fail, and of the jobs after it; with the shipped model."""

from __future__ import annotations

import gc
import math
import pickle
import shutil
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from asking import Draw, events, finished, request
from ldm_layout import write_checkpoint
from safetensors.torch import load_file, save_file

from diffusion_api.catalog.library import Library
from diffusion_api.engine import job, pixels
from diffusion_api.engine.base import Event, Finished, Stop
from diffusion_api.engine.devices import Device
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.families import base
from diffusion_api.engine.families.base import read_tokenizer
from diffusion_api.engine.families.sd1 import SD1
from diffusion_api.errors import DeviceLost, DiffusionApiError, Interrupted, ModelUnreadable, NotFinite, OutOfMemory
from diffusion_api.settings import DATA

SHAPES = DATA / "models" / "shapes"
QUICK: dict[str, object] = dict(steps=4, width=64, height=64)

CUDA_IS_FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB"
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously …"


@contextmanager
def faulty(
    method: str, fault: Callable[[Any], Any], *, at: int = 1, times: float = 1, of: object = SD1
) -> Iterator[None]:
    """Within, so many calls of a function of the engine, from the ``at``-th on, give what ``fault`` makes of their value,
    or raise it.
    """
    whole = getattr(of, method)
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        value = whole(*arguments, **options)
        return fault(value) if at <= calls < at + times else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, method, call)
        yield
    assert calls >= at, f"{method} was called {calls} times"


def raises(error: Exception) -> Callable[[Any], Any]:
    def fault(value: Any) -> Any:
        raise error

    return fault


@pytest.fixture(autouse=True)
def listed_again(executor: Executor) -> Iterator[None]:
    """After each test the library looks at its folders again."""
    yield
    executor._library._scanned = float("-inf")


@pytest.fixture
def copies(models_dir: Path, executor: Executor) -> Iterator[Callable[[str], Path]]:
    """``copies(name)`` → the folder of another model like the shipped one, listed, and gone after the test."""
    made: list[Path] = []

    def copy(name: str) -> Path:
        shutil.copytree(SHAPES, models_dir / name)
        made.append(models_dir / name)
        listed(executor, name)
        return made[-1]

    yield copy
    for folder in made:
        shutil.rmtree(folder)


def listed(executor: Executor, name: str) -> str:
    """The name, once the library has looked at its folder again; it does so no more until it is told."""
    executor._library._scanned = float("-inf")
    assert executor._library.find(name)
    executor._library._scanned = float("inf")
    return name


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_IS_FULL),
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.04 GB, other allocations: 5.27 MB)"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_a_job_that_runs_out_of_memory_is_told_what_to_do_and_the_next_one_works(
    executor: Executor, draw: Draw, error: Exception
) -> None:
    before = draw(**QUICK)
    with faulty("predict", raises(error), at=3, times=math.inf), pytest.raises(OutOfMemory) as caught:
        events(executor, request(**QUICK, count=3))
    assert str(caught.value) == (
        "out of memory: 64x64 pixels, n 3, model 'shapes'; ask for a smaller picture or for a smaller model (tried "
        "evaluate: caches freed, evaluate: attention slicing, evaluate: one conditioning at a time)"
    )
    assert np.array_equal(before, draw(**QUICK))


def test_memory_that_really_runs_out_is_noticed(executor: Executor, draw: Draw) -> None:
    before = draw(**QUICK)
    with pytest.raises(OutOfMemory, match="33554432x33554432 pixels"):
        events(executor, request(width=2**25, height=2**25))
    assert np.array_equal(before, draw(**QUICK))


def test_what_a_failed_job_held_is_free_again(executor: Executor) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail_with_hands_full(value: torch.Tensor) -> torch.Tensor:
        large = torch.empty(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError(CUDA_IS_FULL)

    errors: list[DiffusionApiError] = []
    with faulty("predict", fail_with_hands_full, at=2, times=math.inf):
        try:
            events(executor, request(**QUICK))
        except OutOfMemory as error:
            errors.append(error)
    gc.collect()
    assert errors
    assert [tensor() for tensor in held] == [None] * 4


@pytest.mark.parametrize("reader", ["read_text", "read_network"])
def test_a_model_that_does_not_fit_leaves_the_one_before_usable_and_nothing_of_itself(
    executor: Executor, draw: Draw, copies: Callable[[str], Path], reader: str
) -> None:
    name = f"large-{reader}"
    copies(name)
    before = draw(**QUICK)
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def fail(value: torch.nn.Module) -> torch.nn.Module:
        loaded.append(weakref.ref(value))
        raise torch.OutOfMemoryError(CUDA_IS_FULL)

    with faulty(reader, fail, times=math.inf, of=base), pytest.raises(OutOfMemory) as caught:
        events(executor, request(**QUICK, model=name))
    assert str(caught.value) == (
        f"out of memory while model {name!r} was loaded; ask for a smaller one (tried load: caches freed)"
    )
    gc.collect()
    assert [network() for network in loaded] == [None] * 2
    assert np.array_equal(before, draw(**QUICK))
    assert np.array_equal(before, draw(**QUICK, model=name))


def test_a_tokenizer_that_is_loaded_again_and_again_takes_no_more_memory() -> None:
    """One of SD 1.5's vocabulary takes 6.5 MB, and transformers' own is never freed."""
    for _ in range(3):
        read_tokenizer(DATA / "clip")
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(10):
        read_tokenizer(DATA / "clip")
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 30 * 2**20


# The device


@pytest.fixture
def another_executor(models_dir: Path, executor: Executor) -> Iterator[Executor]:
    """An engine that a test may break."""
    engine = Executor(executor._library, device="cpu", tokenizer=DATA / "clip")
    engine.start()
    engine.wait()
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ILLEGAL_ACCESS),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("HIP error: an illegal memory access was encountered"),
    ],
    ids=lambda error: str(error)[:30],
)
@pytest.mark.parametrize("where", ["predict", "decode", "from_folder"])
def test_a_device_that_fails_for_good_is_lost_to_this_job_and_all_later_ones(
    another_executor: Executor, error: Exception, where: str
) -> None:
    with faulty(where, raises(error)), pytest.raises(DeviceLost, match="until the service starts again"):
        events(another_executor, request(**QUICK))
    with pytest.raises(DeviceLost):
        next(another_executor.run(request(**QUICK), stop=lambda: None))


def test_a_device_that_answers_no_more_is_lost_whatever_the_error_said(another_executor: Executor) -> None:
    error = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
    events(another_executor, request(**QUICK))  # what is loaded once may ask for ones too
    with (
        faulty("predict", raises(error)),
        faulty("ones", raises(torch.AcceleratorError("CUDA error: invalid argument")), of=torch),
        pytest.raises(DeviceLost),
    ):
        events(another_executor, request(**QUICK))


def test_any_other_error_of_the_device_is_this_jobs_alone(executor: Executor, draw: Draw) -> None:
    with (
        faulty("predict", raises(torch.AcceleratorError("CUDA error: invalid configuration argument"))),
        pytest.raises(torch.AcceleratorError),
    ):
        events(executor, request(**QUICK))
    assert draw(**QUICK).shape == (64, 64, 3)


def test_an_engine_that_cannot_start_says_so_and_leaves_nobody_waiting(models_dir: Path) -> None:
    engine = Executor(Library(models_dir.parent, models_dir), device="cpu", tokenizer=DATA / "clip")
    with faulty("Weights", raises(ImportError("libfoo.so.3: cannot open")), of=_weights()):
        engine.start()
        with pytest.raises(DiffusionApiError, match="the engine cannot start: ImportError; the log has the details"):
            engine.wait()


def _weights() -> object:
    from diffusion_api.engine import weights

    return weights


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_numbers_that_overflow_are_an_error_and_no_black_picture(
    executor: Executor, draw: Draw, sampler: str, value: float
) -> None:
    def overflow(predicted: torch.Tensor) -> torch.Tensor:
        predicted[0, 0, 0, 0] = value
        return predicted

    with faulty("predict", overflow, at=2), pytest.raises(NotFinite, match=r"try another sampler.*its file is damaged"):
        events(executor, request(**QUICK, sampler=sampler))
    assert draw(**QUICK, sampler=sampler).any()


def test_latents_that_overflowed_are_noticed_even_if_the_decoder_hides_it(executor: Executor) -> None:
    with (
        faulty("predict", lambda predicted: predicted * float("inf"), at=2),
        faulty("developed", lambda made: made, of=job),
        pytest.raises(NotFinite),
    ):
        events(executor, request(**QUICK))


def test_a_picture_that_overflows_in_the_decoder_is_decoded_again_and_says_so(executor: Executor, draw: Draw) -> None:
    before = draw(**QUICK)
    with faulty("decode", lambda values: values * float("nan")):
        made = finished(executor, request(**QUICK))
    assert made.warnings == (pixels.DECODED_AGAIN,)
    assert np.array_equal(made.images[0], before)
    assert finished(executor, request(**QUICK)).warnings == ()


def test_a_decoder_that_overflows_each_time_is_an_error(executor: Executor) -> None:
    with (
        faulty("decode", lambda values: values * float("inf")),
        faulty("decode", lambda values: values * float("inf"), at=2),
        pytest.raises(NotFinite),
    ):
        events(executor, request(**QUICK))


def test_half_precision_that_overflows_gets_float32_for_one_picture() -> None:
    lane = SD1.from_folder(SHAPES, Device(torch.device("cpu"), torch.float32))
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain, _ = pixels.developed(lane, latents)
        for weights in lane.vae.decoder.conv_in.parameters():
            weights.mul_(1e4)
        lane.vae.half()
        assert not torch.isfinite(lane.decode(latents)).all()
        picture, warnings = pixels.developed(lane, latents)
        assert lane.vae.dtype == torch.float16
        exact = lane.vae.float()
        again, nothing = pixels.developed(lane, latents)
    assert exact is lane.vae
    assert warnings == (pixels.DECODED_AGAIN,)
    assert nothing == ()
    assert np.array_equal(picture, again)
    assert picture.std() > 0
    assert picture.shape == plain.shape


def test_a_black_picture_may_be_meant(executor: Executor) -> None:
    with faulty("decode", lambda values: torch.full_like(values, -1)):
        made = finished(executor, request(**QUICK))
    assert not made.images[0].any()
    assert made.warnings == ()


# Stopping


def stopped_after(engine: Executor, step: int, how: Stop, **changes: object) -> list[Event]:
    """Events of a job that is told to stop once that many steps were reported, over all of its pictures."""
    seen: list[Event] = []
    told: list[Stop] = []
    for event in engine.run(request(**QUICK | changes), stop=lambda: told[0] if told else None):
        seen.append(event)
        if sum(bool(getattr(e, "step", 0)) for e in seen) == step and not told:
            told.append(how)
    return seen


def test_a_job_that_is_stopped_with_a_picture_shows_the_models_present_guess(executor: Executor, draw: Draw) -> None:
    calls = 0

    def look() -> Stop | None:
        nonlocal calls
        calls += 1
        return Stop.WITH_PICTURE if calls > 10 else None

    *_, last = executor.run(request(steps=40, sampler="euler"), stop=look)
    assert isinstance(last, Finished)
    assert last.partial is not None
    assert 0 < last.partial < 40
    whole = draw(steps=40, sampler="euler").astype(float)
    distance = np.abs(last.images[0] - whole).mean()
    other = np.abs(draw("a small green star on a white background", steps=40, sampler="euler") - whole).mean()
    assert 0 < distance < other


def test_pictures_that_were_done_stay_whole(executor: Executor, draw: Draw) -> None:
    last = stopped_after(executor, 6, Stop.WITH_PICTURE, count=3)[-1]
    assert isinstance(last, Finished)
    assert last.partial in (2, 3, 4)
    assert last.seeds == (1, 2)
    assert np.array_equal(last.images[0], draw(**QUICK, seed=1))


def test_a_job_that_is_stopped_before_its_first_step_has_no_picture(executor: Executor) -> None:
    with pytest.raises(Interrupted):
        list(executor.run(request(**QUICK), stop=lambda: Stop.WITH_PICTURE))


@pytest.mark.parametrize("where", ["from_folder", "encode", "decode"])
def test_a_job_can_be_stopped_while_it_loads_reads_or_decodes(
    executor: Executor, copies: Callable[[str], Path], draw: Draw, where: str
) -> None:
    copies("fresh")
    told: list[Stop] = []

    def tell(value: Any) -> Any:
        told.append(Stop.NOW)
        return value

    with faulty(where, tell), pytest.raises(Interrupted):
        list(executor.run(request(**QUICK, model="fresh", count=2), stop=lambda: told[0] if told else None))
    assert draw(**QUICK).any()


# Files


HEADER = struct.Struct("<Q")


class Canary:
    """What a hostile pickle holds: loading it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, path)


def claims(length: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(HEADER.pack(length) + path.read_bytes()[8:])

    return damage


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (cut, r"has \d+ bytes and should have \d+ \(an unfinished download\?\)"),
    (claims(2**63), "the length of its header is wrong"),
    (claims(100 * 10**9), "the length of its header is wrong"),
    (lambda path: path.write_text("<!DOCTYPE html><title>Sign in</title>" * 100), "is no safetensors file"),
    (lambda path: path.write_bytes(b""), "is no safetensors file"),
    (without_a_tensor, "lack|Missing key"),
    (Path.unlink, "No such file or directory|holds no safetensors weights"),
]
NAMES = ["cut", "2^63", "100 GB", "HTML", "empty", "a tensor is missing", "deleted"]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=NAMES)
def test_a_file_that_is_damaged_after_it_was_listed_fails_its_job_with_the_reason(
    executor: Executor, models_dir: Path, draw: Draw, damage: Callable[[Path], object], reason: str
) -> None:
    before = draw(**QUICK)
    path = models_dir / "single.safetensors"
    write_checkpoint(SHAPES, DATA / "clip" / "vocab.json", path)
    asked = request(**QUICK, model=listed(executor, "single"))
    damage(path)
    fails_with(executor, asked, rf"model 'single' cannot be read: .*({reason})", models_dir)
    path.unlink(missing_ok=True)
    assert np.array_equal(before, draw(**QUICK))


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=NAMES)
def test_so_does_a_folder_any_part_of_which_is_damaged(
    executor: Executor, copies: Callable[[str], Path], damage: Callable[[Path], object], reason: str, part: str
) -> None:
    folder = copies("folder")
    (path,) = (folder / part).glob("*.safetensors")
    damage(path)
    named = "" if damage in (without_a_tensor, Path.unlink) else f"{part}/{path.name}"
    fails_with(
        executor, request(**QUICK, model="folder"), f"model 'folder' cannot be read: {named}.*({reason})", folder
    )


@pytest.mark.parametrize(
    "part",
    [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ],
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")], ids=["deleted", "cut"])
def test_so_does_a_folder_with_a_damaged_description(
    executor: Executor, copies: Callable[[str], Path], damage: Callable[[Path], object], part: str
) -> None:
    folder = copies("folder")
    damage(folder / part)
    fails_with(executor, request(**QUICK, model="folder"), "model 'folder' cannot be read: .{10,}", folder)


def fails_with(engine: Executor, asked: Any, reason: str, folder: Path) -> None:
    with pytest.raises(ModelUnreadable, match=reason) as caught:
        events(engine, asked)
    assert str(folder.parent) not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("dress", ["safetensors", "bin"])
@pytest.mark.parametrize("write", [lambda canary, path: path.write_bytes(pickle.dumps(canary)), torch.save],
                         ids=["pickle", "torch"])  # fmt: skip
def test_a_pickle_runs_no_code_whatever_it_is_called(
    executor: Executor,
    copies: Callable[[str], Path],
    tmp_path: Path,
    part: str,
    dress: str,
    write: Callable[[Canary, Path], object],
) -> None:
    folder = copies("hostile")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    stem = "pytorch_model" if (part, dress) == ("text_encoder", "bin") else weights.stem
    write(Canary(tmp_path / "canary"), folder / part / f"{stem}.{dress}")
    fails_with(executor, request(**QUICK, model="hostile"), "model 'hostile' cannot be read", folder)
    assert not (tmp_path / "canary").exists()


def test_a_pickle_in_a_single_file_runs_no_code_either(executor: Executor, models_dir: Path, tmp_path: Path) -> None:
    path = models_dir / "single.safetensors"
    write_checkpoint(SHAPES, DATA / "clip" / "vocab.json", path)
    asked = request(**QUICK, model=listed(executor, "single"))
    for write in (lambda canary, path: path.write_bytes(pickle.dumps(canary)), torch.save):
        write(Canary(tmp_path / "canary"), path)
        fails_with(
            executor,
            asked,
            "model 'single' cannot be read: models/single.safetensors is no safetensors file",
            models_dir,
        )
    path.unlink()
    assert not (tmp_path / "canary").exists()


def test_the_pickles_above_would_run_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_a_single_file_without_an_autoencoder_is_told_so(executor: Executor, models_dir: Path) -> None:
    path = models_dir / "single.safetensors"
    write_checkpoint(SHAPES, DATA / "clip" / "vocab.json", path)
    asked = request(**QUICK, model=listed(executor, "single"))
    tensors = {key: value for key, value in load_file(path).items() if not key.startswith("first_stage_model.")}
    save_file(tensors, path)
    fails_with(executor, asked, r"it holds no autoencoder \(first_stage_model\.\*\)", models_dir)
    path.unlink()


def test_weights_that_were_replaced_are_read_again(
    executor: Executor, copies: Callable[[str], Path], draw: Draw
) -> None:
    folder = copies("changing")
    before = draw(**QUICK, model="changing")
    (path,) = (folder / "unet").glob("*.safetensors")
    tensors = {name: tensor * 0.9 for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    after = draw(**QUICK, model=listed(executor, "changing"))
    assert not np.array_equal(before, after)
