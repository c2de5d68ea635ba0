"""``diffusion-api test-lora-compatibility``: which LoRAs fit which models, judged from their files or proven by pictures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_api.catalog import compatibility, detect, pickles
from diffusion_api.catalog.kinds import family_of
from diffusion_api.catalog.library import Library, Model
from diffusion_api.errors import Misconfigured, NotFound
from diffusion_api.schema.request import LoraUse, Output, Txt2Img
from diffusion_api.server import build_engine, build_library, build_queue
from diffusion_api.settings import Settings

if TYPE_CHECKING:
    from diffusion_api.engine.base import Engine, Finished

REPORT = Path("lora_compatibility_report.txt")
SUFFIXES = (".safetensors", *(suffix for suffix in pickles.SUFFIXES if suffix != ".ckpt"))
LONGEST_ERROR = 100

PROMPT = "a large red circle on a blue background"
STEPS = 8
LARGEST = 512
"""Pixels: the side of the pictures that prove, at most."""


@dataclass(frozen=True)
class Lora:
    """A file, and the name by which it is told."""

    name: str
    path: Path


@dataclass(frozen=True)
class Verdict:
    """Whether a LoRA fits a model. ``error`` is the fact, ``compatibility_info`` what to do about it; ``test_time`` is
    seconds; ``picture`` is where the proof is, ``difference`` how far it is from the picture without the LoRA, 0 to 1.
    """

    model_name: str
    model_label: str
    lora_name: str
    lora_path: str
    compatible: bool
    error: str = ""
    compatibility_info: str = ""
    test_time: float = 0.0
    picture: Path | None = None
    difference: float = 0.0


def run_test(
    settings: Settings, *, model: str | None, lora: str | None, folder: Path | None, output: Path | None, render: bool
) -> int:
    """Test the pairs that are meant, print the report and write it; the exit status. Raises UnknownModel, NotFound, and
    Misconfigured for a report that cannot be written.
    """
    library = build_library(settings)
    models, loras = chosen_models(library, model), chosen_loras(library, lora, folder)
    verdicts = list(judge(models, loras))
    seconds = sum(verdict.test_time for verdict in verdicts)
    if output is None and not (model or lora or folder):
        output = REPORT
    if render:
        roots = dict.fromkeys([*settings.models_from, *(one.path.resolve().parent for one in loras)])
        settings = settings.model_copy(update={"models_from": tuple(roots)})
        pictures = (output or REPORT).with_suffix("")
        verdicts = list(prove(verdicts, settings, pictures))
    text = report(verdicts, datetime.now())
    print(text)
    if output:
        _write(output, text)
        print(f"The report is in {output}.")
    print(f"{len(verdicts)} pairs were judged from their files in {1000 * seconds:.1f} ms.")
    return 0 if lora is None or any(verdict.compatible for verdict in verdicts) else 1


def chosen_models(library: Library, name: str | None) -> list[Model]:
    """The model of that name, or all. Raises UnknownModel, and NotFound when there is none."""
    models = [library.resolve(name)] if name else library.models()
    if not models:
        raise NotFound("no models found: put one into stable_diffusion/models")
    return models


def chosen_loras(library: Library, name: str | None, folder: Path | None) -> list[Lora]:
    """The LoRA of that name or path, those of a folder, or all that are installed. Raises NotFound when there is none."""
    if name is not None:
        installed = library.find_asset("lora", name)
        path = installed.path if installed else Path(name)
        if not path.is_file():
            raise NotFound(f"LoRA {name!r} is no file, and no LoRA of that name is installed")
        return [Lora(installed.name if installed else path.stem, path)]
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        loras = [Lora(path.stem, path) for path in files]
    else:
        loras = [Lora(row.name, row.path) for row in library.assets("lora")]
    if not loras:
        raise NotFound(f"no LoRAs found in {folder or 'stable_diffusion/loras'}: it takes {', '.join(SUFFIXES)}")
    return loras


def judge(models: Iterable[Model], loras: Sequence[Lora]) -> Iterator[Verdict]:
    """Each model with each LoRA, from the names and shapes of their tensors: milliseconds a pair."""
    for model in models:
        try:
            layers = compatibility.layers(compatibility.model_shapes(model.path, model.stamp))
        except detect.Unrecognised as error:
            yield from (_verdict(model, lora, f"model {error}", "Look at the model's files.") for lora in loras)
            continue
        for lora in loras:
            began = time.perf_counter()
            verdict = _judged(model, lora, layers)
            yield replace(verdict, test_time=time.perf_counter() - began)


def prove(verdicts: Iterable[Verdict], settings: Settings, folder: Path) -> Iterator[Verdict]:
    """The verdicts; for each LoRA that fits, a picture beside one without it lies in ``folder`` as its proof.

    Raises DeviceUnusable.
    """
    library = build_library(settings)
    engine = build_engine(settings, library, build_queue(settings))
    engine.start()
    engine.wait()
    plain: dict[str, Finished] = {}
    for verdict in verdicts:
        if not verdict.compatible:
            yield verdict
            continue
        began = time.perf_counter()
        model = library.resolve(verdict.model_name)
        row = next(row for row in library.assets("lora") if row.path.samefile(verdict.lora_path))
        if model.name not in plain:
            plain[model.name] = _drawn(engine, model, ())
        proven = _proven(verdict, plain[model.name], _drawn(engine, model, (LoraUse(name=row.name),)), folder)
        yield replace(proven, test_time=verdict.test_time + time.perf_counter() - began)
    engine.close()


def report(verdicts: Sequence[Verdict], at: datetime) -> str:
    """The report on all pairs, in the form of the original tool."""
    return "\n".join(_report(verdicts, at)) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise Misconfigured(f"the report cannot be written to {path}: {error.strerror}") from error


def _judged(model: Model, lora: Lora, layers: compatibility.Layers) -> Verdict:
    try:
        tensors = detect.contents(lora.path)
    except detect.Unrecognised as error:
        return _verdict(model, lora, str(error), f"LoRA '{lora.name}' cannot be read: take a .safetensors file.")
    found = compatibility.fit({name: tensor.shape for name, tensor in tensors.items()}, layers)
    if found.applies:
        return _verdict(model, lora)
    made_for = family_of("lora", tensors)
    advice = compatibility.advice(lora.name, model.label, made_for=made_for, family=model.family)
    return _verdict(model, lora, compatibility.reason(found), advice)


def _verdict(model: Model, lora: Lora, error: str = "", info: str = "") -> Verdict:
    return Verdict(
        model_name=model.name,
        model_label=model.label,
        lora_name=lora.name,
        lora_path=str(lora.path),
        compatible=not error,
        error=error,
        compatibility_info=info,
    )


def _drawn(engine: Engine, model: Model, loras: tuple[LoraUse, ...]) -> Finished:
    width, height = (min(side, LARGEST) for side in model.default_size)
    request = Txt2Img(
        model=model.name, prompt=PROMPT, negative_prompt="", steps=STEPS, guidance_scale=5, width=width, height=height,
        sampler="euler", schedule="default", seed=1, loras=loras, output=Output(format="png"),
    )  # fmt: skip
    *_, finished = engine.run(request, stop=lambda: None)
    return finished  # type: ignore[return-value]  # the last event is always the result


def _proven(verdict: Verdict, without: Finished, with_lora: Finished, folder: Path) -> Verdict:
    import numpy as np
    from PIL import Image

    if not with_lora.loras_applied:
        reason = with_lora.loras_skipped[0].reason
        return replace(verdict, compatible=False, error=reason, compatibility_info="; ".join(with_lora.warnings))
    pictures = np.hstack([without.images[0], with_lora.images[0]])
    before, after = (finished.images[0].astype(np.float32) for finished in (without, with_lora))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{verdict.model_name}--{verdict.lora_name}.png".replace("/", "_")
    Image.fromarray(pictures).save(path)
    return replace(verdict, picture=path, difference=float(np.abs(after - before).mean()) / 255)


def _report(verdicts: Sequence[Verdict], at: datetime) -> Iterator[str]:
    yield from ("=" * 80, "COMPREHENSIVE LoRA COMPATIBILITY REPORT", "=" * 80)
    fitting = sum(verdict.compatible for verdict in verdicts)
    yield f"Generated: {at:%Y-%m-%d %H:%M:%S}"
    yield f"Total Tests: {len(verdicts)}"
    yield f"Compatible: {fitting}"
    yield f"Incompatible: {len(verdicts) - fitting}"
    yield f"Success Rate: {_share(fitting, len(verdicts))}"
    in_order = sorted(verdicts, key=lambda verdict: (verdict.model_label, verdict.model_name, verdict.lora_name))
    by_model = [
        (label, list(rows)) for (label, _), rows in groupby(in_order, lambda row: (row.model_label, row.model_name))
    ]
    yield from ("", "SUMMARY BY MODEL:", "-" * 40)
    for label, rows in by_model:
        fitting = sum(row.compatible for row in rows)
        yield f"{label}: {fitting}/{len(rows)} ({_share(fitting, len(rows))})"
    for label, rows in by_model:
        yield from ("", f"MODEL: {label}", "=" * 60)
        yield from _compatible([row for row in rows if row.compatible])
        yield ""
        yield from _incompatible([row for row in rows if not row.compatible])


def _compatible(rows: Sequence[Verdict]) -> Iterator[str]:
    yield "✓ COMPATIBLE LoRAs:" if rows else "✓ No compatible LoRAs found"
    for row in rows:
        yield f"  • {row.lora_name}"
        if row.picture:
            yield f"    Picture: {row.picture} (differs by {row.difference:.1%} from the one without it)"


def _incompatible(rows: Sequence[Verdict]) -> Iterator[str]:
    yield "✗ INCOMPATIBLE LoRAs:" if rows else "✗ No incompatible LoRAs found"
    for row in rows:
        yield from (f"  • {row.lora_name}", f"    Reason: {row.compatibility_info}")
        shown = row.error if len(row.error) <= LONGEST_ERROR else f"{row.error[:LONGEST_ERROR]}..."
        yield f"    Error: {shown}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"
