"""The judge against a server of its own, which fails in the ways that servers do."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import httpx2
import numpy as np
import pytest
from judge_server import Reply, Server
from PIL import Image as PILImage

from vlmenv.cli import main
from vlmenv.core.answers import Answer, Caption
from vlmenv.core.errors import ConfigError, RewardError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.rewards.judge import KEY, Judge, _Case, parse_verdict, truth_as_text
from vlmenv.options.scorers import ScorerConfig

TAGS = AnswerFormat.TAGS
CAT = Answer("a cat", "exact")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        yield one
        one.shutdown()


def judge(server: Server, **more: Any) -> Judge:
    return Judge(server.url, "tester", **({"wait": 0.01} | more))


def verdicts(term: Judge, *answers: str, target: Any = CAT) -> list[float]:
    texts = [TAGS.write(answer, "SECRET") for answer in answers]
    return term.batch(texts, [target] * len(texts), [()] * len(texts), TAGS, ["What is it?"] * len(texts))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("yes", 1), ("No", 0), (" Yes.\n", 1), ("0", 0), ("1", 1), ("1.0", 1), ("0.25", 0.25), (".5", 0.5),
        ("1.5", None), ("2", None), ("-1", None), ("yes, it is", None), ("yes no", None), ("", None), ("0.5/1", None),
        ("nan", None), ("inf", None), ("1e-1", None), ("**yes**", None), ("½", None), ("٠", None), ("true", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_strictly(reply: str, verdict: float | None) -> None:
    assert parse_verdict(reply) == verdict


def test_the_judge_sees_question_truth_and_answer_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sesame")
    server.reply = lambda turn, request: "0.75"
    assert verdicts(judge(server), "one {truth} of cats") == [0.75]
    (prompt,) = server.prompts()
    assert "What is it?" in prompt
    assert "a cat" in prompt
    assert "one {truth} of cats" in prompt
    assert "SECRET" not in prompt
    assert server.keys == ["Bearer sesame"]
    assert (server.requests[0]["model"], server.requests[0]["temperature"]) == ("tester", 0)


def test_each_answer_gets_its_own_verdict_and_equal_ones_are_judged_once(server: Server) -> None:
    server.reply = lambda turn, request: "yes" if "tabby" in request["messages"][0]["content"] else "no"
    assert verdicts(judge(server), *["a tabby", "a dog"] * 8) == [1, 0] * 8
    assert len(server.requests) == 2


def test_no_answer_is_not_judged(server: Server) -> None:
    term = judge(server)
    long = TAGS.write("x" * 20_000)
    assert term.batch(["no idea", TAGS.write(" "), long], [CAT] * 3, [()] * 3, TAGS) == [0, 0, 0]
    assert server.requests == []


def test_what_passes_is_asked_again(server: Server) -> None:
    replies: list[Reply] = [(500, b"oh"), (429, b"busy"), (200, b"not JSON"), "perhaps", "yes"]
    server.reply = lambda turn, request: replies[turn]
    assert verdicts(judge(server, retries=4), "a tabby") == [1]
    assert [request["temperature"] for request in server.requests] == [0, 0.7, 0.7, 0.7, 0.7]


@pytest.mark.parametrize(
    ("reply", "message", "asked"),
    [
        ((500, b"out of memory"), "status 500: 'out of memory'", 3),
        ((404, b"no such model"), "status 404: 'no such model'", 1),
        ((200, b"<html>hello"), "no chat completion: '<html>hello'", 3),
        ((200, b'{"choices": []}'), "no chat completion", 3),
        ("I think that yes", "the reply is no verdict: 'I think that yes'", 3),
    ],
)
def test_what_lasts_is_an_error_with_the_server_and_what_came_back(
    reply: Reply, message: str, asked: int, server: Server
) -> None:
    server.reply = lambda turn, request: reply
    with pytest.raises(RewardError, match=f"the judge tester at {server.url} failed, asked {asked} times: ") as caught:
        verdicts(judge(server, retries=2), "a tabby")
    assert message in str(caught.value)
    assert len(server.requests) == asked


@pytest.mark.slow
def test_a_server_that_hangs_and_one_that_trickles_are_out_of_time(server: Server) -> None:
    gone = threading.Event()
    server.reply = lambda turn, request: str(gone.wait(5))
    with pytest.raises(RewardError, match=r"no reply within 0\.2 seconds"):
        verdicts(judge(server, time_limit=0.2, retries=1), "a tabby")
    gone.set()
    server.reply, server.trickles = lambda turn, request: "yes", True
    with pytest.raises(RewardError, match=r"no whole reply within 0\.2 seconds"):
        verdicts(judge(server, time_limit=0.2, retries=0), "a tabby")


class Waits(threading.Event):
    """Waits no time, and remembers for how long it should have."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        return False


def test_waits_double(server: Server) -> None:
    server.reply = lambda turn, request: (503, b"")
    waits = Waits()
    with httpx2.Client() as client, pytest.raises(RewardError, match="asked 4 times: status 503"):
        judge(server, retries=3, wait=2.0)._verdict(client, _Case("?", ()), waits)
    assert waits.seconds == [2, 4, 8]


def test_as_many_are_under_way_as_may_be(server: Server) -> None:
    together, inside, most = threading.Barrier(4, timeout=5), [0], [0]

    def reply(turn: int, request: dict[str, Any]) -> str:
        with server.lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        together.wait()  # of fewer than four at a time, none would get on
        time.sleep(0.05)  # of more than four, others come in the meantime
        with server.lock:
            inside[0] -= 1
        return "yes"

    server.reply = reply
    assert verdicts(judge(server, concurrency=4), *map(str, range(12))) == [1] * 12
    assert most[0] == 4


def test_after_a_failure_no_more_is_asked(server: Server) -> None:
    server.reply = lambda turn, request: (400, b"bad")
    with pytest.raises(RewardError):
        verdicts(judge(server, concurrency=2), *map(str, range(50)))
    time.sleep(0.1)
    assert len(server.requests) < 25


def test_images_are_shown_where_that_is_asked_for(server: Server) -> None:
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    text = TAGS.write("a tabby")
    judge(server, images=True).batch([text], [CAT], [(image,)], TAGS, ["What is it?"])
    picture, written = server.requests[0]["messages"][0]["content"]
    stored = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(PILImage.open(io.BytesIO(stored))), image)
    assert "What is it?" in written["text"]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (CAT, "a cat"),
        (Answer("B", "choice", choices=("a dog", "a cat")), "B: a cat"),
        (Answer("B", "choice"), "B"),
        (Caption(("red", "star"), Answer("3", "numeric")), "3; mentions red, star"),
        ("None", "None"),
    ],
)
def test_truths_as_the_judge_reads_them(target: Any, text: str) -> None:
    assert truth_as_text(target) == text


def test_a_server_that_is_not_there_shows_when_an_environment_is_made(server: Server) -> None:
    judge(server).load()
    with pytest.raises(ConfigError, match="has no model other, but tester"):
        Judge(server.url, "other").load()
    with pytest.raises(ConfigError, match=r"no judge at http://127\.0\.0\.1:1/v1: ConnectError"):
        gymnasium.make(
            "VLM-VQA-v0", rewards={"judge": 1.0}, extra_terms={"judge": Judge("http://127.0.0.1:1/v1", "tester")}
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"url": "localhost:8000"}, "give one as http://localhost:8000/v1"),
        ({"prompt": "Is {answer} right?"}, r"has no \{truth\}"),
        ({"time_limit": 0.0}, "must be above 0"),
        ({"retries": -1}, "must be above 0"),
    ],
)
def test_arguments_of_a_judge(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Judge(**({"url": "http://localhost:1/v1", "model": "m"} | more))


# In an environment and from the command line


def test_the_environment_tells_the_judge_the_question(server: Server) -> None:
    env = gymnasium.make("VLM-VQA-v0", rewards={"accuracy": 1.0, "judge": 0.5}, extra_terms={"judge": judge(server)})
    env.reset(seed=0)
    task: Any = env.unwrapped
    _, reward, _, _, info = env.step(TAGS.write("certainly nothing"))
    assert info["rewards"] == {"accuracy": 0, "judge": 1}
    assert reward == 0.5
    assert task._episode.sample.question in server.prompts()[0]


def test_a_term_that_nothing_uses_is_refused(server: Server) -> None:
    with pytest.raises(ConfigError, match="nothing uses the reward term judge: give it a weight in rewards"):
        gymnasium.make("VLM-VQA-v0", extra_terms={"judge": judge(server)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge_url": "http://a/v1"}, "judge_url needs judge_model"),
        ({"judge_model": "m"}, "judge_model goes with judge_url"),
        ({"judge_retries": 5}, "judge_retries goes with judge_url"),
        ({"clip_score": "sigmoid"}, "clip_score goes with clip_model"),
        ({"clip_remote_code": True}, "clip_remote_code goes with clip_model"),
    ],
)
def test_options_of_scorers_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScorerConfig(**options)


def args(server: Server, *more: str) -> list[str]:
    options = ["--judge-url", server.url, "--judge-model", "tester", "--judge-retries", "0", "--max-new-tokens", "24"]
    return [*more, "--env", "VLM-VQA-v0", "--device", "cpu", *options]


def test_eval_measures_with_a_judge(server: Server, tmp_path: Path) -> None:
    server.reply = lambda turn, request: "0.5"
    rewards = ("--rewards", "accuracy", "1", "judge", "1")
    main(args(server, "eval", "--eval-limit", "6", *rewards, "--output", str(tmp_path)))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    answered = [TAGS.extract(line["completion"]) is not None for line in lines]
    assert [line["rewards"]["judge"] for line in lines] == [0.5 * one for one in answered]
    assert any(answered)
    mean = json.loads((tmp_path / "metrics.json").read_text())["judge"]["value"]
    assert mean == pytest.approx(np.mean([line["rewards"]["judge"] for line in lines]))


def test_training_ends_where_the_judge_fails(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda turn, request: (500, b"out of memory")
    small = ["--steps", "1", "--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "2"]
    with pytest.raises(SystemExit):
        main([*args(server, "train", "--rewards", "judge", "1", "--output", str(tmp_path / "run")), *small])
    message = " ".join(capsys.readouterr().err.split())
    assert f"the judge tester at {server.url} failed, asked 1 times: status 500" in message


def test_a_judge_that_no_reward_names_is_an_error(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(args(server, "eval", "--eval-limit", "1"))
    assert "nothing uses the reward term judge" in " ".join(capsys.readouterr().err.split())


# Credentials in its URL.


def with_credentials(server: Server) -> tuple[str, str]:
    """A URL with credentials, and as it may be shown."""
    place = server.url.removeprefix("http://")
    return f"http://tester:sesame@{place}?key=open", f"http://***@{place}?key=***"


def test_credentials_in_the_url_go_to_the_judge_and_into_no_message(server: Server) -> None:
    url, shown = with_credentials(server)
    server.reply = lambda turn, request: (400, b"no")
    term = Judge(url, "tester", wait=0.01)
    term.load()
    with pytest.raises(RewardError) as told:
        verdicts(term, "a cat")
    assert shown in str(told.value)
    assert "sesame" not in str(told.value) + term.url
    assert server.keys == ["Basic dGVzdGVyOnNlc2FtZQ=="]
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match=r"no judge at http://\*\*\*@") as away:
        term.load()
    assert "sesame" not in str(away.value)
    with pytest.raises(ConfigError) as malformed:
        Judge("ftp://tester:sesame@host", "tester")
    assert "sesame" not in str(malformed.value)


def test_options_hold_none_and_a_resumed_run_reads_them_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, shown = with_credentials(server)
    options = ScorerConfig(judge_url=url, judge_model="tester")
    assert options.judge_url == shown
    assert "sesame" not in repr(options)
    assert verdicts(options.terms()["judge"], "a cat") == [1]  # type: ignore[arg-type]
    monkeypatch.setattr("vlmenv.core.urls._whole", {})  # as in another process
    resumed = ScorerConfig(judge_url=shown, judge_model="tester")
    with pytest.raises(ConfigError, match="set VLMENV_JUDGE_URL to the whole URL"):
        resumed.terms()
    monkeypatch.setenv("VLMENV_JUDGE_URL", url)
    assert verdicts(resumed.terms()["judge"], "a cat") == [1]  # type: ignore[arg-type]
    assert server.keys == ["Basic dGVzdGVyOnNlc2FtZQ=="] * 2
