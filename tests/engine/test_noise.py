"""Where noise comes from: against numbers that others printed, and by what it may not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from asking import Draw, finished, request
from torch import Tensor

from diffusion_api.engine import noise
from diffusion_api.engine.executor import Executor
from diffusion_api.engine.noise import Cpu, Nvidia
from diffusion_api.engine.plan import plan


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: str
) -> None:
    drawn = noise.philox(*(np.uint64(word) for word in counter + key))
    assert " ".join(f"{int(word):08x}" for word in drawn) == words


@pytest.mark.parametrize(
    ("seed", "calls"),
    [
        (0, ["-0.9246624 -0.42534396 -2.6438458 0.14518388"]),
        (42, ["0.1940 2.1614 -0.1721 0.8491", "0.1391 -0.1082 -0.7174 0.7566", "-0.5187 1.2268 0.6255 -0.9117"]),
        (42, ["0.1940 2.1614 -0.1721 0.8491 -1.9244 0.6530 -0.6494 -0.8175 0.5280 -1.2753 -1.6621 -0.3033 -0.0926"]),
    ],
)
def test_nv_is_what_torch_prints_on_an_nvidia_gpu(seed: int, calls: list[str]) -> None:
    stream = Nvidia(seed)
    for call in calls:
        printed = torch.tensor([float(number) for number in call.split()])
        assert torch.allclose(stream((len(printed),)), printed, rtol=0, atol=6e-5)


def slowly(seed: int, call: int, place: int) -> float:
    """A number of ``nv``, with nothing but Python's integers and floats."""
    mask = 0xFFFFFFFF
    one, two, three, four = call, 0, place, 0
    first, second = seed & mask, seed >> 32 & mask
    for _ in range(10):
        left, right = one * 0xD2511F53, three * 0xCD9E8D57
        one, two, three, four = right >> 32 ^ two ^ first, right & mask, left >> 32 ^ four ^ second, left & mask
        first, second = first + 0x9E3779B9 & mask, second + 0xBB67AE85 & mask
    turn = 2**-32 * float(np.float32(2 * math.pi))
    return math.sqrt(-2 * math.log(one * 2**-32 + 2**-33)) * math.sin(two * turn + turn / 2)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40 + 7, -5])
def test_not_a_bit_of_nv_depends_on_how_it_is_computed(seed: int) -> None:
    """A picture is made again years later, so nothing that makes noise cheaper may round it in another way."""
    places = [*range(0, 3 * 2**15, 997), 2**15 - 1, 2**15, 3 * 2**15 - 1]
    stream = Nvidia(seed)
    for call in range(2):
        made = stream((3 * 2**15,))[places].tolist()
        assert made == [float(np.float32(slowly(seed, call, place))) for place in places]


@pytest.mark.parametrize("shape", [(3,), (1, 4, 24, 16), (1, 4, 96, 104)])
@pytest.mark.parametrize("source", [Nvidia, Cpu])
def test_streams_begin_together_as_each_does_alone(source: type[Nvidia | Cpu], shape: tuple[int, ...]) -> None:
    seeds = range(100, 130)
    together = source.firsts(seeds, shape)
    assert together.shape == (30, *shape)
    assert all(torch.equal(one, source(seed)(shape)) for one, seed in zip(together, seeds, strict=True))


def test_a_place_has_its_number_whatever_the_shape() -> None:
    assert torch.equal(Nvidia(7)((1, 4, 8, 8)).flatten()[:10], Nvidia(7)((10,)))


def test_the_whole_seed_counts() -> None:
    first = [Nvidia(seed)((1,)).item() for seed in (5, 5 + 2**32, -5)]
    assert len(set(first)) == 3


def test_cpu_is_torchs_own_generator() -> None:
    stream, generator = Cpu(3), torch.Generator().manual_seed(3)
    for _ in range(2):
        assert torch.equal(stream((1, 4, 8, 8)), torch.randn(1, 4, 8, 8, generator=generator))


@pytest.mark.parametrize("source", [Nvidia, Cpu])
def test_numbers_are_normal(source: type[Nvidia | Cpu]) -> None:
    drawn = source(1)((1, 4, 128, 128)).double()
    assert abs(drawn.mean().item()) < 0.02
    assert abs(drawn.std().item() - 1) < 0.01
    assert abs((drawn**4).mean().item() - 3) < 0.2
    assert abs((drawn[..., 1:] * drawn[..., :-1]).mean().item()) < 0.02


def drawn(width: int = 64, height: int = 64, **changes: object) -> tuple[Tensor, Tensor, Tensor]:
    """The first noise of a picture of that size, and two later ones."""
    stage = plan(request(width=width, height=height, **changes))[0]
    first, later = noise.streams(stage, lambda width, height: (1, 4, height // 8, width // 8))
    return first, later(), later()


def test_later_noise_goes_on_where_the_first_ended() -> None:
    stream = Nvidia(1)
    for tensor in drawn(seed=1):
        assert torch.equal(tensor, stream((1, 4, 8, 8)))


def test_ensd_changes_the_seed_of_later_noise_alone() -> None:
    first, *later = drawn(seed=1, ensd=31337)
    assert torch.equal(first, drawn(seed=1)[0])
    stream = Nvidia(31338)
    assert all(torch.equal(tensor, stream((1, 4, 8, 8))) for tensor in later)


def varied(strength: float, **changes: object) -> Tensor:
    return drawn(**{"seed": 1, "variation_seed": 2, "variation_strength": strength} | changes)[0]


def test_a_variation_goes_from_one_noise_to_the_other() -> None:
    one, other = drawn(seed=1)[0], drawn(seed=2)[0]
    assert torch.allclose(varied(1), other, atol=1e-6)
    assert torch.allclose(varied(1e-6), one, atol=1e-5)
    far = [(varied(strength) - one).norm().item() for strength in (0.1, 0.3, 0.5, 0.9)]
    assert far == sorted(far)


def test_a_variation_stays_on_the_arc() -> None:
    """Halfway between two columns of unit length at an angle is the unit vector of their sum."""
    one, other = (torch.tensor(column).reshape(1, 1, 3, 1) for column in ([1.0, 0, 0], [0, 0.6, 0.8]))
    assert torch.allclose(noise.slerp(one, other, 0.5), (one + other) / 2**0.5)
    assert torch.allclose(noise.slerp(one, other, 1 / 3), torch.tensor(3**0.5 / 2) * one + 0.5 * other)


@pytest.mark.parametrize("other", [[1.0, 2.0], [-1.0, -2.0], [2.0, 4.0]])
def test_a_variation_towards_the_same_or_the_opposite_noise_is_a_number(other: list[float]) -> None:
    one, end = (torch.tensor(column).reshape(1, 1, 2, 1) for column in ([1.0, 2.0], other))
    assert torch.allclose(noise.slerp(one, end, 0.25), 0.75 * one + 0.25 * end, atol=1e-3)


def test_a_variation_by_its_own_seed_is_the_picture() -> None:
    assert torch.allclose(varied(0.5, variation_seed=1), drawn(seed=1)[0], atol=1e-5)


def test_a_variation_changes_no_later_noise() -> None:
    for plain, other in zip(
        drawn(seed=1)[1:], drawn(seed=1, variation_seed=2, variation_strength=0.5)[1:], strict=True
    ):
        assert torch.equal(plain, other)


def test_variations_of_one_job_share_their_seed() -> None:
    asked = request(seed=5, count=3, variation_seed=8, variation_strength=0.2)
    assert [(stage.seed, stage.variation_seed) for stage in plan(asked)] == [(5, 8), (5, 9), (5, 10)]


def test_the_noise_of_a_smaller_size_lies_in_the_middle() -> None:
    first = drawn(96, 64, seed=1, seed_resize_width=64, seed_resize_height=64)[0]
    small, ground = drawn(64, 64, seed=1)[0], drawn(96, 64, seed=1)[0]
    assert torch.equal(first[..., 2:-2], small)
    assert torch.equal(first[..., :2], ground[..., :2])
    assert torch.equal(first[..., -2:], ground[..., -2:])


def test_of_the_noise_of_a_larger_size_the_middle_is_taken() -> None:
    first = drawn(64, 96, seed=1, seed_resize_width=96, seed_resize_height=64)[0]
    large, ground = drawn(96, 64, seed=1)[0], drawn(64, 96, seed=1)[0]
    assert torch.equal(first[:, :, 2:-2], large[..., 2:-2])
    assert torch.equal(first[:, :, :2], ground[:, :, :2])


def test_of_an_odd_excess_one_row_more_stays_as_it_was() -> None:
    """(room - length) // 2 of A1111 rounds down: of 9 columns in 8, the middle 7 go to the left."""
    first = drawn(64, 64, seed=1, seed_resize_width=72, seed_resize_height=64)[0]
    large, ground = drawn(72, 64, seed=1)[0], drawn(64, 64, seed=1)[0]
    assert torch.equal(first[..., :7], large[..., 1:8])
    assert torch.equal(first[..., 7], ground[..., 7])


def test_the_size_itself_is_no_other_size() -> None:
    for plain, other in zip(drawn(seed=1), drawn(seed=1, seed_resize_width=64, seed_resize_height=64), strict=True):
        assert torch.equal(plain, other)


def test_a_variation_is_mixed_before_its_size_changes() -> None:
    first = varied(0.3, width=96, seed_resize_width=64, seed_resize_height=64)
    assert torch.equal(first[..., 2:-2], varied(0.3))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rng": "cpu"},
        {"variation_seed": 9, "variation_strength": 0.4},
        {"sampler": "euler_a", "ensd": 5},
        {"sampler": "dpmpp_sde"},
    ],
)
def test_each_picture_of_a_job_is_as_if_it_were_alone(executor: Executor, changes: dict[str, object]) -> None:
    changes = {"steps": 2, "width": 64, "height": 64, "seed": 3} | changes
    asked = request(**changes, count=3)
    together = finished(executor, asked).images
    for image, seed, variation_seed in zip(together, asked.seeds, asked.variation_seeds, strict=True):
        (alone,) = finished(executor, request(**changes | {"seed": seed, "variation_seed": variation_seed})).images
        assert (image == alone).all()


def test_a_whole_variation_draws_the_picture_of_its_seed(draw: Draw) -> None:
    small = {"steps": 3, "width": 64, "height": 64}
    varied, other = (
        draw(**small | seeds).astype(int)
        for seeds in ({"seed": 1, "variation_seed": 2, "variation_strength": 1}, {"seed": 2})
    )
    assert abs(varied - other).max() <= 1


@pytest.mark.parametrize(("sampler", "changes"), [("euler_a", True), ("dpmpp_2s_a", True), ("euler", False)])
def test_ensd_changes_pictures_that_draw_noise_on_their_way(draw: Draw, sampler: str, changes: bool) -> None:
    small = {"steps": 3, "width": 64, "height": 64, "sampler": sampler}
    assert (draw(**small) != draw(**small, ensd=31337)).any() == changes


def test_the_two_sources_draw_other_pictures(draw: Draw) -> None:
    small = {"steps": 2, "width": 64, "height": 64}
    assert (draw(rng="nv", **small) != draw(rng="cpu", **small)).any()
