"""So much a minute for each caller."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_models import diffusers_folder
from serving import serving

from diffusion_api.errors import RateLimited, TooLarge
from diffusion_api.quotas import Minutes


def test_each_caller_has_its_own_and_a_refusal_costs_nothing() -> None:
    minutes = Minutes(10, "pixels")
    minutes.take("ann", 9)
    for amount in (2, 10):
        with pytest.raises(RateLimited, match="too many pixels: 10 a minute are allowed; try again in") as refused:
            minutes.take("ann", amount)
        assert 1 <= refused.value.retry_after <= 60
    minutes.take("ann", 1)
    minutes.take("bob", 10)
    with pytest.raises(RateLimited):
        minutes.take("ann")
    with pytest.raises(TooLarge, match="11 pixels are asked for; at most 10 a minute are allowed"):
        minutes.take("carl", 11)


def test_no_limit_is_none() -> None:
    for _ in range(100):
        Minutes(0, "pixels").take("ann", 10**12)


def test_many_at_once_get_no_more_than_there_is() -> None:
    minutes = Minutes(50, "requests")

    def take(_: int) -> bool:
        try:
            minutes.take("ann")
        except RateLimited:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(take, range(200))) == 50


def test_a_caller_who_had_its_share_is_told_when_to_come_back_and_others_go_on(tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "stable_diffusion" / "models" / "small", sample_size=8)
    limits = {"requests_per_minute": 8, "pixels_per_minute": 3 * 64 * 64, "max_queue_per_caller": 1}
    with serving(tmp_path, api_key="ann,bob", **limits) as server:

        def post(key: str, **fields: object) -> tuple[int, str, str]:
            body = {"model": "small", "prompt": "stub:seconds=5", "steps": 20, **fields}
            answer = server.request("POST", "/txt2img", json=body, headers={"X-API-Key": key})
            return answer.status_code, answer.json().get("error", ""), answer.headers.get("Retry-After", "")

        assert post("ann", n=4)[:2] == (413, "16384 pixels are asked for; at most 12288 a minute are allowed")
        assert post("ann", n=2)[0] == 200
        status, error, retry = post("ann", n=2)
        assert (status, error[:51]) == (429, "too many pixels: 12288 a minute are allowed; try ag")
        assert 1 <= int(retry) <= 60
        answers = {post("bob") for _ in range(3)}  # of three at most one is in hand, and one waits
        assert (200, "", "") in answers
        assert (429, "1 jobs of this caller wait already; at most 1 may", "10") in answers
        statuses = [server.get("/models", headers={"X-API-Key": "ann"}).status_code for _ in range(8)]
        assert statuses == [200] * 5 + [429] * 3
        assert server.get("/models", headers={"X-API-Key": "bob"}).status_code == 200
        assert server.get("/hello", headers={"X-API-Key": "ann"}).status_code == 200
