"""Webhooks: promised with the job, told once it has ended, signed, again until heard, whatever happens in between."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import plain
from fake_models import diffusers_folder
from receiving import Heard, Receiver, free_port, misbehaving, receiving, silence
from serving import PATIENCE, ROOT, eventually, run, serving

from diffusion_api import webhooks
from diffusion_api.errors import DiskFull, QueueUnusable, UrlRefused
from diffusion_api.fetch import Fetcher, origins
from diffusion_api.queues.base import Key
from diffusion_api.queues.memory import MemoryQueue
from diffusion_api.retention import Limits
from diffusion_api.schema.job import Job
from diffusion_api.webhooks import Delivery, Hook, Outbox, Webhooks

SECRET = "a secret of this test"
SOON = (0.05,) * 7


class Teller:
    """Webhooks with the queue whose jobs they tell of; a job is cancelled to end it."""

    def __init__(self, folder: Path, hosts: str, *, queue: MemoryQueue | None = None, **options: Any) -> None:
        self.queue = queue or MemoryQueue()
        self.folder = folder
        fetcher = Fetcher(origins(hosts), total=options.pop("total", PATIENCE))
        options = {"secret": SECRET, "waits": SOON, "describe": self.describe} | options
        self.webhooks = Webhooks(folder, self.queue, fetcher, **options)

    @staticmethod
    def describe(job: Job) -> dict[str, Any]:
        return {"job_id": job.id, "state": job.state.value, "prompt": job.request.prompt}

    def submit(self, url: str) -> Job:
        job = Job(request=plain(prompt="ein Leuchtturm, größer"), webhook=url)
        with self.webhooks.promised(job):
            self.queue.enqueue(job)
        return job

    def ended(self, url: str) -> Job:
        job = self.submit(url)
        self.queue.cancel(job.id)
        return job

    def deliveries(self, job: Job) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.webhooks.report(job)["deliveries"]
        return found

    def waiting(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def done(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "done").iterdir())


@contextlib.contextmanager
def telling(folder: Path, hosts: str, **options: Any) -> Iterator[Teller]:
    teller = Teller(folder, hosts, **options)
    teller.webhooks.start()
    try:
        yield teller
    finally:
        teller.webhooks.stop()


def verified(heard: Heard, secret: str = SECRET) -> bool:
    """What a receiver does, written anew: it shares no code with the sender."""
    found = re.fullmatch(r"t=(\d{10}),v1=([0-9a-f]{64})", heard.headers["x-diffusionapi-signature"])
    assert found
    assert abs(time.time() - int(found[1])) < 2 * PATIENCE
    expected = hmac.new(secret.encode("ascii"), b"%s.%s" % (found[1].encode(), heard.body), hashlib.sha256)
    return hmac.compare_digest(expected.hexdigest(), found[2])


def test_the_end_of_a_job_is_told_and_signed(tmp_path: Path) -> None:
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        job = teller.submit(f"{receiver.url}?a=1")
        assert teller.webhooks.report(job) == {"url": f"{receiver.url}?a=***", "deliveries": []}
        assert receiver.heard == []
        teller.queue.cancel(job.id)
        eventually(teller.done)
        (heard,) = receiver.heard
        (delivery,) = teller.deliveries(job)
    assert (heard.method, heard.path) == ("POST", "/hook?a=1")
    assert json.loads(heard.body) == {"job_id": job.id, "state": "cancelled", "prompt": "ein Leuchtturm, größer"}
    assert heard.headers["content-type"] == "application/json"
    assert heard.headers["x-diffusionapi-delivery"] == job.id
    assert verified(heard)
    assert not verified(heard, "another secret")
    assert not verified(Heard(heard.method, heard.path, heard.headers, heard.body + b" "))
    assert delivery["status"] == 204
    assert abs(delivery["at"] - time.time()) < PATIENCE
    assert 0 <= delivery["seconds"] < PATIENCE
    assert teller.waiting() == []


def test_a_job_that_has_not_ended_is_not_told(tmp_path: Path) -> None:
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        waits = teller.submit(receiver.url)
        teller.ended(receiver.url)
        eventually(teller.done)
        assert teller.waiting() == [waits.id]
    assert len(receiver.heard) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503, 301])
def test_every_answer_but_success_is_tried_again(tmp_path: Path, status: int) -> None:
    with receiving(status, status, 200) as receiver, telling(tmp_path, receiver.host) as teller:
        job = teller.ended(receiver.url)
        eventually(teller.done)
        assert [d["status"] for d in teller.deliveries(job)] == [status, status, 200]
    assert len({(h.body, h.headers["x-diffusionapi-delivery"]) for h in receiver.heard}) == 1
    assert all(map(verified, receiver.heard))
    assert len(receiver.heard) == 3


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with (
        receiving() as other,
        receiving(307, location=other.url) as receiver,
        telling(tmp_path, f"{receiver.host},{other.host}") as teller,
    ):
        job = teller.ended(receiver.url)
        eventually(teller.done)
        assert [d["status"] for d in teller.deliveries(job)] == [307, 204]
    assert other.heard == []


def test_a_receiver_that_is_down_is_told_once_it_is_up(tmp_path: Path) -> None:
    port = free_port()
    with telling(tmp_path, f"127.0.0.1:{port}", waits=(0.1,) * 1000) as teller:
        job = teller.ended(f"http://127.0.0.1:{port}/hook")
        eventually(lambda: len(teller.deliveries(job)) > 1)
        with receiving(port=port) as receiver:
            eventually(teller.done)
        *failed, last = teller.deliveries(job)
    assert {d["error"] for d in failed} == {"connection refused"}
    assert last["status"] == 204
    assert len(receiver.heard) == 1


def test_it_is_given_up_after_the_last_wait(tmp_path: Path) -> None:
    with receiving(*[500] * 20) as receiver, telling(tmp_path, receiver.host) as teller:
        job = teller.ended(receiver.url)
        eventually(teller.done)
        tries = len(teller.deliveries(job))
        teller.ended(receiver.url)
        eventually(lambda: len(teller.done()) == 2)
    assert tries == len(SOON) + 1 == len(webhooks.WAITS) + 1 == 8
    assert len(receiver.heard) == 2 * tries


def test_the_waits_grow_to_an_hour() -> None:
    assert webhooks.WAITS[0] == 1
    assert webhooks.WAITS[-1] == 3600
    assert all(later > 3 * earlier for earlier, later in itertools.pairwise(webhooks.WAITS))


def test_the_next_try_comes_after_its_wait(tmp_path: Path) -> None:
    with receiving(500) as receiver, telling(tmp_path, receiver.host, waits=(1.0,)) as teller:
        job = teller.ended(receiver.url)
        eventually(teller.done)
        first, second = teller.deliveries(job)
    assert second["at"] - first["at"] >= 1


def test_a_receiver_that_never_answers_runs_out_of_time(tmp_path: Path) -> None:
    with misbehaving(silence) as receiver, telling(tmp_path, receiver.host, total=0.2, waits=(0.1,)) as teller:
        job = teller.ended(receiver.url)
        eventually(teller.done)
        assert [d["error"] for d in teller.deliveries(job)] == ["no answer within 0.2 s"] * 2
        assert all(d["seconds"] >= 0.2 for d in teller.deliveries(job))


@pytest.mark.parametrize("swallowed", [1, 10])
def test_one_receiver_that_never_answers_holds_up_nobody_else(tmp_path: Path, swallowed: int) -> None:
    with (
        misbehaving(silence) as hole,
        receiving() as receiver,
        telling(tmp_path, f"{hole.host},{receiver.host}") as teller,
    ):
        lost = [teller.ended(hole.url) for _ in range(swallowed)]
        heard = [teller.ended(receiver.url) for _ in range(20 - swallowed)]
        eventually(lambda: len(teller.done()) == len(heard))
        assert {h.headers["x-diffusionapi-delivery"] for h in receiver.heard} == {job.id for job in heard}
        assert all(teller.deliveries(job) == [] for job in lost)
        assert teller.waiting() == sorted(job.id for job in lost)


def test_a_stop_breaks_off_what_is_under_way_and_the_next_start_begins_it_again(tmp_path: Path) -> None:
    queue = MemoryQueue()
    with misbehaving(silence) as hole:
        with telling(tmp_path, hole.host, queue=queue) as teller:
            job = teller.ended(hole.url)
            eventually(lambda: teller.webhooks._tasks)
            time.sleep(0.1)
            began = time.monotonic()
            teller.webhooks.stop()
            assert time.monotonic() - began < PATIENCE / 2  # it did not wait for the answer
            assert not teller.webhooks._thread.is_alive()
        assert teller.waiting() == [job.id]
        port = hole.port
    with receiving(port=port) as receiver, telling(tmp_path, receiver.host, queue=queue) as teller:
        eventually(teller.done)
        assert [d["status"] for d in teller.deliveries(job)] == [204]
    assert [h.headers["x-diffusionapi-delivery"] for h in receiver.heard] == [job.id]


def test_tries_are_counted_across_restarts(tmp_path: Path) -> None:
    queue = MemoryQueue()
    with receiving(*[500] * 20) as receiver:
        with telling(tmp_path, receiver.host, queue=queue, waits=(0.05, 0.05, 3600.0)) as teller:
            job = teller.ended(receiver.url)
            eventually(lambda: len(teller.deliveries(job)) == 3)
        with telling(tmp_path, receiver.host, queue=queue, waits=(0.05, 0.05, 0.05)) as teller:
            eventually(teller.done)
            assert len(teller.deliveries(job)) == 4
    assert len(receiver.heard) == 4
    assert len({h.body for h in receiver.heard}) == 1


def test_what_is_told_is_kept_when_the_job_is_not(tmp_path: Path) -> None:
    with receiving(500, 204) as receiver:
        with telling(tmp_path, receiver.host, waits=(3600.0,)) as teller:
            job = teller.ended(receiver.url)
            eventually(lambda: teller.deliveries(job))
        with telling(tmp_path, receiver.host, waits=(0.0,)):  # its queue knows no job
            eventually(lambda: len(receiver.heard) == 2)
    assert receiver.heard[0].body == receiver.heard[1].body


def test_only_one_of_two_processes_delivers_and_the_other_takes_over(tmp_path: Path) -> None:
    queue = MemoryQueue()
    with (
        receiving() as receiver,
        telling(tmp_path, receiver.host, queue=queue) as first,
        telling(tmp_path, receiver.host, queue=queue) as second,
    ):
        for _ in range(5):
            first.ended(receiver.url)
            second.ended(receiver.url)
        eventually(lambda: len(first.done()) == 10)
        assert len(receiver.heard) == 10
        first.webhooks.stop()
        second.ended(receiver.url)
        eventually(lambda: len(receiver.heard) == 11)


def test_a_promise_is_on_disk_before_the_job_is_stored(tmp_path: Path) -> None:
    teller = Teller(tmp_path, "127.0.0.1:9")
    job = Job(request=plain(), webhook="http://127.0.0.1:9/")
    with teller.webhooks.promised(job):
        assert teller.waiting() == [job.id]
    assert teller.waiting() == [job.id]


def test_a_job_that_could_not_be_stored_leaves_no_promise(tmp_path: Path) -> None:
    teller = Teller(tmp_path, "127.0.0.1:9")
    with pytest.raises(DiskFull), teller.webhooks.promised(Job(request=plain(), webhook="http://127.0.0.1:9/")):
        raise DiskFull
    assert teller.waiting() == []


def test_a_host_that_is_not_allowed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    teller = Teller(tmp_path, "127.0.0.1:9")
    with pytest.raises(UrlRefused, match=r"^webhook leads to http://127\.0\.0\.1:10; allowed: "):
        teller.submit("http://127.0.0.1:10/")
    assert teller.waiting() == []
    assert teller.queue.jobs() == []


def test_a_host_that_is_no_longer_allowed_is_not_called(tmp_path: Path) -> None:
    queue = MemoryQueue()
    with receiving() as receiver:
        job = Teller(tmp_path, receiver.host, queue=queue).ended(receiver.url)
        with telling(tmp_path, "127.0.0.1:9", queue=queue) as teller:
            eventually(teller.done)
            assert [d["error"] for d in teller.deliveries(job)] == ["its host is no longer allowed"]
    assert receiver.heard == []


def test_promises_of_jobs_that_are_gone_are_swept(tmp_path: Path) -> None:
    with receiving() as receiver:
        with telling(tmp_path, receiver.host) as teller:
            for _ in range(3):
                teller.ended(receiver.url)
            eventually(lambda: len(teller.done()) == 3)
        with telling(tmp_path, receiver.host) as teller:  # its queue knows no job
            eventually(lambda: not teller.done())
    assert len(receiver.heard) == 3


def test_promises_of_jobs_that_are_there_stay(tmp_path: Path) -> None:
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        kept = [teller.ended(receiver.url).id for _ in range(2)]
        eventually(lambda: len(teller.done()) == 2)
        stray = tmp_path / "done" / "stray.json"
        stray.write_bytes(Hook(url=receiver.url, done=True).model_dump_json().encode())
        eventually(lambda: not stray.exists())
        assert teller.done() == sorted(kept)


def test_a_promise_whose_job_comes_a_moment_later_is_kept(tmp_path: Path) -> None:
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        job = Job(request=plain(), webhook=receiver.url)
        with teller.webhooks.promised(job):
            eventually(lambda: job.id in teller.webhooks._unknown)
            teller.queue.enqueue(job)
            teller.queue.cancel(job.id)
        eventually(teller.done)
    assert len(receiver.heard) == 1


def test_a_job_sent_again_is_told_of_once(tmp_path: Path) -> None:
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        first, again = (Job(request=plain(), webhook=receiver.url) for _ in range(2))
        for job in (first, again):
            with teller.webhooks.promised(job):
                kept = teller.queue.enqueue(job, key=Key.of("k", {}))
        assert kept == first
        teller.webhooks.turn(again, kept)
        assert teller.waiting() == [first.id]
        teller.queue.cancel(first.id)
        eventually(lambda: teller.done() == [first.id])
        teller.webhooks.turn(again, kept)
    assert len(receiver.heard) == 1


def test_a_job_stored_only_when_it_was_sent_again_is_promised_then(tmp_path: Path) -> None:
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        job = Job(request=plain(), webhook=receiver.url)
        teller.queue.enqueue(job)  # its promise was dropped meanwhile, as there was no such job
        teller.webhooks.turn(Job(request=plain(), webhook=receiver.url), job)
        teller.queue.cancel(job.id)
        eventually(teller.done)
    assert len(receiver.heard) == 1


def test_what_was_settled_is_told_without_the_record(tmp_path: Path) -> None:
    with receiving() as receiver:
        teller = Teller(tmp_path, receiver.host)
        job = teller.ended(receiver.url)
        snapshot = teller.queue.get(job.id)
        assert snapshot
        teller.webhooks.settle(snapshot.job)
        teller.queue.forget(job.id)
        teller.webhooks.start()
        eventually(lambda: receiver.heard)
        teller.webhooks.stop()
    assert json.loads(receiver.heard[0].body)["state"] == "cancelled"


def test_what_is_settled_while_it_is_told_is_told_once(tmp_path: Path) -> None:
    def describe(job: Job) -> dict[str, Any]:
        if threading.current_thread() is threading.main_thread():
            teller.webhooks.start()
            eventually(lambda: receiver.heard)
            time.sleep(0.3)  # enough to write down what was tried, if nothing forbids it
        return {"job_id": job.id}

    with receiving() as receiver:
        teller = Teller(tmp_path, receiver.host, describe=describe)
        job = teller.ended(receiver.url)
        teller.webhooks.settle(job)
        eventually(lambda: teller.done() == [job.id])
        teller.webhooks.stop()
    assert teller.waiting() == []
    assert len(receiver.heard) == 1


def test_a_result_that_is_no_longer_kept_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "FORGOTTEN_AFTER", 0.1)
    with receiving() as receiver:
        teller = Teller(tmp_path, receiver.host)
        teller.ended(receiver.url)
        teller.queue.sweep(Limits(count=0), now=time.time())
        told = teller.ended(receiver.url)
        teller.webhooks.start()
        eventually(lambda: teller.done() == [told.id])
        teller.queue.sweep(Limits(count=0), now=time.time())
        eventually(lambda: teller.done() == teller.waiting() == [])
        teller.webhooks.stop()
    assert len(receiver.heard) == 1


def test_a_promise_whose_job_never_comes_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "FORGOTTEN_AFTER", 0.1)
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        with teller.webhooks.promised(Job(request=plain(), webhook=receiver.url)):
            pass  # the process died before the job was stored
        assert teller.waiting()
        eventually(lambda: not teller.waiting())
    assert receiver.heard == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b'{"version": 1}', b'{"version": 2, "url": "http://x/"}', b"\xff\xfe", b"[" * 100_000],
    ids=lambda content: str(content[:12]),
)
def test_what_cannot_be_read_is_set_aside_and_the_rest_is_told(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with receiving() as receiver:
        teller = Teller(tmp_path, receiver.host)
        broken, whole = teller.ended(receiver.url), teller.ended(receiver.url)
        (tmp_path / f"{broken.id}.json").write_bytes(content)
        teller.webhooks.start()
        eventually(teller.done)
        eventually(lambda: not teller.waiting())
        teller.webhooks.stop()
        assert teller.deliveries(broken) == []
    assert [h.headers["x-diffusionapi-delivery"] for h in receiver.heard] == [whole.id]
    assert (tmp_path / f"{broken.id}.unreadable").read_bytes() == content
    assert caplog.text.count("set aside") == 1


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_file_is_not_followed(tmp_path: Path, kind: str) -> None:
    with receiving() as receiver:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes(Hook(url=receiver.url, body="{}").model_dump_json().encode())
        teller = Teller(tmp_path / "hooks", receiver.host)
        entry = tmp_path / "hooks" / "entry.json"
        make = {"link": lambda: entry.symlink_to(elsewhere), "folder": entry.mkdir, "pipe": lambda: os.mkfifo(entry)}
        make[kind]()
        teller.webhooks.start()
        teller.ended(receiver.url)
        eventually(lambda: teller.done() and not teller.waiting())
        teller.webhooks.stop()
    assert len(receiver.heard) == 1


@pytest.mark.parametrize("at", [0.0, 4e9], ids=["long ago", "in the future"])
def test_a_clock_that_was_set_holds_no_try_back_and_hurries_none_for_ever(tmp_path: Path, at: float) -> None:
    queue = MemoryQueue()
    with receiving() as receiver:
        job = Teller(tmp_path, receiver.host, queue=queue).ended(receiver.url)
        tried = Hook(url=receiver.url, body="{}", deliveries=(Delivery(at=at, status=500, seconds=1),))
        Outbox(tmp_path).write(job.id, tried)
        with telling(tmp_path, receiver.host, queue=queue, waits=(0.2,)) as teller:
            eventually(teller.done)
    assert len(receiver.heard) == 1


def test_a_full_disk_refuses_the_promise(small_disk: Path) -> None:
    teller = Teller(small_disk, "127.0.0.1:9")
    (small_disk / "ballast").write_bytes(b"x" * _free(small_disk))
    with pytest.raises(DiskFull):
        teller.submit("http://127.0.0.1:9/")
    (small_disk / "ballast").unlink()
    assert teller.waiting() == []
    assert list((small_disk / "tmp").iterdir()) == []
    assert teller.queue.jobs() == []


def test_a_full_disk_does_not_make_it_tell_twice(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with receiving() as receiver:
        teller = Teller(small_disk, receiver.host)
        job = teller.ended(receiver.url)
        (small_disk / "ballast").write_bytes(b"x" * _free(small_disk))
        teller.webhooks.start()
        eventually(lambda: "cannot be written down yet" in caplog.text)
        (small_disk / "ballast").unlink()
        eventually(teller.done)
        teller.webhooks.stop()
        assert [d["status"] for d in teller.deliveries(job)] == [204]
    assert len(receiver.heard) == 1


def _free(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QueueUnusable, match="the folder of the webhooks cannot be used: Not a directory"):
        Teller(tmp_path / "file" / "hooks", "")


def test_a_bug_in_one_description_does_not_silence_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def describe(job: Job) -> dict[str, Any]:
        if job.id == broken:
            raise KeyError("seed")
        return {"job_id": job.id}

    broken = ""
    with receiving() as receiver, telling(tmp_path, receiver.host, describe=describe) as teller:
        first = teller.submit(receiver.url)
        broken = first.id
        teller.queue.cancel(first.id)
        eventually(lambda: "webhook broke" in caplog.text)
        teller.ended(receiver.url)
        eventually(teller.done)
    assert len(receiver.heard) == 1
    assert caplog.text.count("webhook broke") == 1


# the whole service


@pytest.fixture
def home(tmp_path: Path) -> Path:
    diffusers_folder(tmp_path / "home" / "stable_diffusion" / "models" / "small", sample_size=8)
    return tmp_path / "home"


def options(receiver: Receiver) -> dict[str, object]:
    return {"webhook_hosts": receiver.host, "webhook_secret": SECRET}


def told(server: Any, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.status(job_id)["webhook"]["deliveries"]
    return found


def test_the_service_tells_what_the_status_says_but_the_pictures(home: Path) -> None:
    with receiving() as receiver, serving(home, **options(receiver)) as server:
        job_id = server.submit(prompt="a lighthouse", n=2, seed=7, webhook=f"{receiver.url}?token=s3cret")
        eventually(lambda: told(server, job_id))
        status = server.status(job_id)
        log = server.log
    (heard,) = receiver.heard
    assert verified(heard)
    assert heard.path == "/hook?token=s3cret"
    webhook = status.pop("webhook")
    assert webhook["url"] == f"{receiver.url}?token=***"
    assert [d["status"] for d in webhook["deliveries"]] == [204]
    assert len(status.pop("images")) == 2
    assert status.pop("image")
    assert status.pop("image_url") == status.pop("image_urls")[0]
    assert json.loads(heard.body) == status
    assert status["payload"] == {"prompt": "a lighthouse", "n": 2, "seed": 7}
    assert "s3cret" not in log
    assert SECRET not in log


def test_a_failed_job_is_told_too(home: Path) -> None:
    with receiving() as receiver, serving(home, **options(receiver)) as server:
        job_id = server.submit(prompt="stub:fail", webhook=receiver.url)
        eventually(lambda: told(server, job_id))
    (heard,) = receiver.heard
    body = json.loads(heard.body)
    assert (body["job_id"], body["state"]) == (job_id, "error")
    assert body["error"]


def test_a_job_without_webhook_says_nothing_of_it(home: Path) -> None:
    with receiving() as receiver, serving(home, **options(receiver)) as server:
        assert "webhook" not in server.result(prompt="a lighthouse")
    assert receiver.heard == []


def test_a_host_that_is_not_allowed_is_a_400_with_the_choices(home: Path) -> None:
    with receiving() as receiver, serving(home, **options(receiver)) as server:
        answer = server.post(webhook="https://user.example/hook?token=s3cret")
        assert answer.status_code == 400
        assert answer.json()["error"] == (
            f"webhook leads to https://user.example:443; allowed: https://{receiver.host}, http://{receiver.host}"
        )
        assert server.get("/health").json()["queue"]["active_jobs"] == 0
        assert [*(home / "queue" / "hooks").glob("*.json")] == []


def test_webhooks_are_refused_where_the_operator_allows_no_hosts(home: Path) -> None:
    with serving(home) as server:
        answer = server.post(webhook="https://hooks.example.com/")
        assert answer.status_code == 400
        assert answer.json()["error"] == (
            "webhook is refused: the operator of this service allows no hosts (setting webhook_hosts)"
        )
        assert server.post(webhook=None).status_code == 200
    assert not (home / "queue" / "hooks").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"webhook_hosts": "hooks.example.com"}, "set DIFFUSION_API_WEBHOOK_SECRET to a long random text"),
        ({"webhook_hosts": "localhost:9000", "webhook_secret": SECRET}, "allowed host 'localhost:9000': "),
    ],
)
def test_wrong_settings_are_told_in_one_line(home: Path, settings: dict[str, object], message: str) -> None:
    ended = run("serve", "--port", 0, "--home", home, cwd=home, engine="stub", **settings)
    assert ended.returncode == 1
    assert message in ended.stderr.splitlines()[-1]
    assert SECRET not in ended.stderr


def test_the_secret_is_not_printed(home: Path) -> None:
    printed = run("config", cwd=home, webhook_secret=SECRET).stdout
    assert "webhook_secret" in printed
    assert SECRET not in printed


def test_a_kill_between_two_tries_loses_nothing(home: Path) -> None:
    with receiving(500) as receiver:
        with serving(home, **options(receiver)) as server:
            job_id = server.submit(prompt="a lighthouse", webhook=receiver.url)
            eventually(lambda: told(server, job_id))
            server.kill()
        assert len(receiver.heard) == 1
        with serving(home, **options(receiver)) as server:
            eventually(lambda: len(told(server, job_id)) == 2)
            assert [d["status"] for d in told(server, job_id)] == [500, 204]
    first, second = receiver.heard
    assert first.headers["x-diffusionapi-delivery"] == second.headers["x-diffusionapi-delivery"] == job_id
    assert first.body == second.body
    assert verified(second)


@pytest.mark.parametrize("isolated", [False, True], ids=["in one process", "isolated"])
def test_a_kill_while_the_job_runs_loses_nothing(home: Path, isolated: bool) -> None:
    with receiving() as receiver:
        with serving(home, isolated=isolated, **options(receiver)) as server:
            job_id = server.submit(prompt="stub:seconds=0.1", steps=20, webhook=receiver.url)
            server.wait(job_id, "processing")
            server.kill()
        assert receiver.heard == []
        with serving(home, isolated=isolated, **options(receiver)) as server:
            eventually(lambda: told(server, job_id))
    (heard,) = receiver.heard
    assert json.loads(heard.body)["state"] == "done"


def test_a_service_with_a_silent_receiver_stops_at_once_when_told(home: Path) -> None:
    with misbehaving(silence) as receiver, serving(home, **options(receiver)) as server:
        job_id = server.submit(prompt="a lighthouse", webhook=receiver.url)
        server.wait(job_id)
        server.signal(15)
        assert server.ended() == 0


# the manual


def test_the_manuals_receiver_takes_what_is_genuine_and_nothing_else(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "webhooks.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    genuine = names["genuine"]
    with receiving() as receiver, telling(tmp_path, receiver.host) as teller:
        teller.ended(receiver.url)
        eventually(teller.done)
    (heard,) = receiver.heard
    header = heard.headers["x-diffusionapi-signature"]
    assert genuine(SECRET, header, heard.body)
    assert not genuine("another secret", header, heard.body)
    assert not genuine(SECRET, header, heard.body + b" ")
    for wrong in ("", "t=1", "v1=ab", "t=x,v1=y", header.replace("t=", "t=1"), header.replace("v1=", "v0=")):
        assert not genuine(SECRET, wrong, heard.body)
    old = webhooks.signature(SECRET, int(time.time()) - 301, heard.body)
    assert not genuine(SECRET, old, heard.body)
