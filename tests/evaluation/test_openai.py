"""A service answers a benchmark: what is sent, cached, retried, counted and refused, against a server on loopback."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.benchmarks import Squares
from tests.helpers.programs import evaluate, read
from vlm.evaluation import openai
from vlm.evaluation.openai import OpenAI, check_url
from vlm.evaluation.prompts import Prompts
from vlm.evaluation.respondent import Answer
from vlm.launch.command_line import translate
from vlm.schema import Sample

SQUARES = "benchmark.squares={_target_:tests.helpers.benchmarks.Squares}"
SECRET = "sk-never-written-0123456789"
Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, JSON or text, headers


def completion(text: str | None = "red", **message: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 2}}
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": "stop"}], "usage": usage}


class Service:
    """A server that replies as `reply` says, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, Any]], Reply] = lambda _: (200, completion())
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(body)
                service.headers.append({"path": self.path, **dict(self.headers.items())})
                status, content, *headers = service.reply(body)
                if not status:  # the connection is closed
                    return
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers[0] if headers else {})}.items():
                    self.send_header(name, value)
                with suppress(BrokenPipeError):  # after a timeout
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        # `shutdown` waits until the server looks again, which would be after half a second.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(openai, "FIRST_WAIT", 0.001)
    found = Service()
    yield found
    found.server.shutdown()
    found.server.server_close()


def rival(service: Service, folder: Path, **options: Any) -> OpenAI:
    cache = str(folder / "requests.jsonl")
    return OpenAI(**{"model_name": "gpt-4o", "base_url": service.url, "cache": cache, "num_retries": 2, **options})


def answers(asked: OpenAI, indices: range = range(4), benchmark: Squares | None = None) -> dict[int, Answer]:
    found: list[Answer] = []
    asked.respond(Prompts(benchmark=benchmark or Squares()), indices, (), found.append)
    assert len(found) == len({answer.index for answer in found}) == len(indices)
    return {answer.index: answer for answer in found}


def question(body: dict[str, Any]) -> str:
    """The text of the last message, and the color of its image."""
    image, text = body["messages"][-1]["content"]
    return f"{text['text'].strip()} {decoded(image).getpixel((0, 0))}"


def decoded(piece: dict[str, Any]) -> Image.Image:
    _, _, data = piece["image_url"]["url"].partition(";base64,")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_request_has_the_prompt_the_pixels_and_the_parameters(service: Service, tmp_path: Path) -> None:
    squares = Squares()
    asked = rival(service, tmp_path, system_prompt="Be short.", detail="low", extra_body={"seed": 1})
    found: list[Answer] = []
    prompts = Prompts(benchmark=squares, demonstrations=squares, shots=[[1], [], [], []])
    asked.respond(prompts, [0], (), found.append)
    (body,), (headers,) = service.requests, service.headers
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert {key: value for key, value in body.items() if key != "messages"} == {
        "model": "gpt-4o",
        "temperature": 0,
        "max_tokens": 16,
        "seed": 1,
    }
    system, shown, answer, question = body["messages"]
    assert system == {"role": "system", "content": "Be short."}
    assert answer == {"role": "assistant", "content": "green"}
    for message, color in ((shown, (0, 255, 0)), (question, (255, 0, 0))):
        image, text = message["content"]
        assert (message["role"], text) == ("user", {"type": "text", "text": "\nWhich color?"})
        assert image["type"] == "image_url"
        assert image["image_url"]["detail"] == "low"
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        assert list(decoded(image).convert("RGB").getdata()) == [color] * 32 * 32
    assert found[0].prediction == "red"
    usage = found[0].usage
    assert (usage["images"], usage["image_pixels"]) == (2, 2048)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["reasoning_tokens"]) == (100, 3, 2)


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (20, 10)])
def test_only_larger_images_are_sent_smaller(service: Service, tmp_path: Path, size: tuple[int, int]) -> None:
    message: Any = {"role": "user", "content": [{"type": "image"}]}
    sample = Sample(id="a", images=[Image.new("RGB", size, (9, 9, 200))], messages=[message])
    asked = rival(service, tmp_path, max_image_side=20, image_format="jpeg")
    body, usage = asked.request(sample, 5)
    (piece,) = body["messages"][0]["content"]
    image = decoded(piece)
    assert image.format == "JPEG"
    assert image.size == {(100, 50): (20, 10), (50, 100): (10, 20), (20, 10): (20, 10)}[size]
    assert usage["image_pixels"] == 200
    assert "detail" not in piece["image_url"]


@pytest.mark.parametrize(
    ("name", "options", "reasons"),
    [
        ("o3-mini", {}, True),
        ("openai/gpt-5-mini", {}, True),
        ("gpt-4o1", {}, False),
        ("qwen3-vl", {"reasoning": True}, True),
        ("o1", {"reasoning": False}, False),
    ],
)
def test_a_reasoning_model_gets_tokens_for_it_and_no_temperature(
    service: Service, tmp_path: Path, name: str, options: dict[str, Any], reasons: bool
) -> None:
    asked = rival(service, tmp_path, model_name=name, max_reasoning_tokens=100, **options)
    answers(asked, range(1))
    del service.requests[0]["messages"]
    with_reasoning = {"model": name, "max_completion_tokens": 116}
    assert service.requests == [with_reasoning if reasons else {"model": name, "temperature": 0, "max_tokens": 16}]


def test_a_second_run_sends_nothing(service: Service, tmp_path: Path) -> None:
    first = answers(rival(service, tmp_path))
    assert len(service.requests) == 4
    file = tmp_path / "requests.jsonl"
    cut = file.read_text()[:-9]  # by a kill
    file.write_text(cut)
    again = answers(rival(service, tmp_path))
    assert len(service.requests) == 5, "only the request of the cut line"
    assert {index: answer.prediction for index, answer in again.items()} == {index: "red" for index in first}
    third = answers(rival(service, tmp_path))
    assert len(service.requests) == 5
    assert [answer.usage["from_cache"] for answer in third.values()] == [1] * 4
    assert {answer.usage["prompt_tokens"] for answer in third.values()} == {100}
    answers(rival(service, tmp_path, temperature=1))
    assert len(service.requests) == 9, "another request"


def test_cost_is_of_the_tokens_also_of_those_in_the_cache(service: Service, tmp_path: Path) -> None:
    assert "cost" not in answers(rival(service, tmp_path), range(1))[0].usage
    usage = answers(rival(service, tmp_path, input_price=2.5, output_price=10), range(1))[0].usage
    assert usage["cost"] == pytest.approx((100 * 2.5 + 3 * 10) / 1e6)
    assert usage["from_cache"] == 1
    service.reply = lambda _: (200, {"choices": [{"message": {"content": "red"}}]})
    usage = answers(rival(service, tmp_path, input_price=2.5, output_price=10), range(1, 2))[1].usage
    assert usage["replies_without_tokens"] == 1
    assert "cost" not in usage
    with pytest.raises(ValueError, match=r"input_price=1 and output_price=None: give both"):
        rival(service, tmp_path, input_price=1)


@pytest.mark.parametrize(
    "reply",
    [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        (503, "busy"),
        (200, "{not json"),
        (200, {"choices": []}),
        (200, {"error": {"message": "upstream"}}),
    ],
)
def test_what_may_be_answered_later_is_asked_again(service: Service, tmp_path: Path, reply: Reply) -> None:
    rest = iter([reply, reply])
    service.reply = lambda _: next(rest, (200, completion()))
    (answer,) = answers(rival(service, tmp_path), range(1)).values()
    assert (answer.prediction, answer.error) == ("red", "")
    assert len(service.requests) == 3


def test_a_lost_connection_and_a_timeout_are_tried_again(service: Service, tmp_path: Path) -> None:
    def slow(_: Any) -> Reply:
        if len(service.requests) == 1:
            return 0, ""
        if len(service.requests) == 2:
            ended.wait(10)
        return 200, completion()

    ended, service.reply = threading.Event(), slow
    (answer,) = answers(rival(service, tmp_path, timeout=0.5), range(1)).values()
    ended.set()
    assert answer.prediction == "red"
    assert len(service.requests) == 3


def test_the_service_says_how_long_to_wait(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(openai.time, "sleep", waited.append)
    rest = iter([(429, "", {"Retry-After": "7"}), (500, "")])
    service.reply = lambda _: next(rest, (200, completion()))
    answers(rival(service, tmp_path), range(1))
    assert [round(seconds, 2) for seconds in waited] == [7.0, 0.0]
    rest = iter([(429, "", {"Retry-After": "9999"})])
    answers(rival(service, tmp_path), range(1, 2))
    assert waited[2] == openai.LONGEST_WAIT


@pytest.mark.parametrize(
    ("reply", "error", "requests"),
    [
        ((500, "broken"), "the service answered 500: broken, in each of 3 attempts", 3),
        ((200, "x"), "the reply is not a chat completion (x), in each of 3 attempts", 3),
        ((400, {"error": {"message": "bad image"}}), "the service answered 400: bad image", 1),
        ((200, completion(None, refusal="I may not")), "the model refused: I may not", 1),
        ((200, completion(None)), "the reply has no text (finish_reason stop)", 1),
        (
            (200, {"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}),
            "all tokens were used before the answer; raise max_reasoning_tokens",
            1,
        ),
        (
            (200, {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}),
            "the reply has no text (finish_reason content_filter)",
            1,
        ),
    ],
)
def test_a_failure_is_no_answer_and_the_others_are_asked(
    service: Service, tmp_path: Path, reply: Reply, error: str, requests: int
) -> None:
    service.reply = lambda body: reply if question(body) == "Is it red? (255, 0, 0)" else (200, completion())
    found = answers(rival(service, tmp_path))
    assert {index: (answer.prediction, answer.error) for index, answer in found.items()} == {
        **{index: ("red", "") for index in range(3)},
        3: ("", error),
    }
    assert len(service.requests) == 3 + requests


def test_an_empty_answer_is_one(service: Service, tmp_path: Path) -> None:
    service.reply = lambda _: (200, completion(""))
    (answer,) = answers(rival(service, tmp_path), range(1)).values()
    assert (answer.prediction, answer.error) == ("", "")


def test_a_missing_image_is_named_and_nothing_is_sent_for_it(service: Service, tmp_path: Path) -> None:
    found = answers(rival(service, tmp_path), benchmark=Squares(missing=True))
    assert found[1].error == "image 'b.png' is missing; restore it"
    assert len(service.requests) == 3


def test_after_many_failures_no_more_is_asked(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai, "MAX_IN_A_ROW", 3)
    service.reply = lambda _: (400, "no")
    with pytest.raises(ValueError, match=r"3 questions failed one after the other \(the service answered 400: no\)"):
        answers(rival(service, tmp_path, num_concurrent=1))
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("reply", "key", "said"),
    [
        ((401, {"error": {"message": "no key"}}), "", r"wants a valid key \(401: no key\); set OPENAI_API_KEY"),
        (
            (401, f"wrong: {SECRET}"),
            SECRET,
            r"\(401: wrong: <OPENAI_API_KEY>\); the key in OPENAI_API_KEY is not valid",
        ),
        ((404, {"error": "no such model"}), SECRET, r"for model_name=gpt-4o \(404: no such model\); check both"),
        ((302, "", {"Location": "http://elsewhere.invalid"}), SECRET, r"\(302: no message\); check both"),
        ((402, "pay"), SECRET, r"no credit left \(402: pay\)"),
        ((429, {"error": {"code": "insufficient_quota", "message": "pay"}}), SECRET, r"no credit left \(429: pay\)"),
    ],
)
def test_what_no_retry_helps_against(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, key: str, said: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    service.reply = lambda _: reply
    with pytest.raises(ValueError, match=said):
        answers(rival(service, tmp_path, num_concurrent=1))
    assert len(service.requests) == 1
    assert "Authorization" not in service.headers[0] or key


def test_a_key_that_no_header_can_hold_is_not_repeated(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
    answers(rival(service, tmp_path), range(1))
    assert service.headers[0]["Authorization"] == f"Bearer {SECRET}"
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX: y")
    with pytest.raises(ValueError, match="OPENAI_API_KEY in the environment has spaces") as error:
        rival(service, tmp_path)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["http://me:pass@host/v1", "me:pass@host/v1", "https://host/v1?key=pass", "https://host/#pass", "pass", "ftp://x"],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^base_url must") as error:
        check_url(url)
    assert "pass" not in str(error.value).replace("password", "")


@pytest.fixture
def command(service: Service, tmp_path: Path) -> list[str]:
    words = ["model=openai", f"base_url={service.url}", "model_name=org/gpt-4o", f"out={tmp_path / 'out'}"]
    return [*words, "num_retries=1", "num_concurrent=2", SQUARES]


def test_eval_writes_figures_without_the_key_and_a_rerun_is_free(
    service: Service, command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One question fails: it is counted, takes no part in the figures, and is asked again by the same command."""
    failing: list[Any] = []

    def reply(body: dict[str, Any]) -> Reply:
        failing[:] = failing or [body]
        return (500, f"wrong {SECRET}") if body == failing[0] else (200, completion())

    service.reply = reply
    command += ["input_price=1", "output_price=2"]
    assert evaluate(*command) == 0
    folder = tmp_path / "out" / "squares"
    results = json.loads((folder / "results.json").read_text())
    assert (results["n"], results["num_failed"], results["metrics"]["exact_match"]["n"]) == (3, 1, 3)
    assert results["rival"]["model_name"] == "org/gpt-4o"
    assert results["rival"]["max_image_side"] == 2048
    usage = results["usage"]
    assert (usage["images"], usage["image_pixels"], usage["prompt_tokens"]) == (3, 3 * 32 * 32, 300)
    assert usage["cost"] == pytest.approx(3 * (100 + 2 * 3) / 1e6)
    failed = [record for record in read(folder / "samples.jsonl") if "error" in record]
    assert [record["error"] for record in failed] == [
        "the service answered 500: wrong <OPENAI_API_KEY>, in each of 2 attempts"
    ]
    assert "score" not in failed[0]

    service.reply = lambda _: (200, completion())
    num = len(service.requests)
    assert evaluate(*command) == 0
    assert len(service.requests) == num + 1
    assert json.loads((folder / "results.json").read_text())["num_failed"] == 0
    assert evaluate(*command, f"against={tmp_path / 'out'}") == 0
    assert len(service.requests) == num + 1

    printed = "".join(capfd.readouterr())
    assert "Used: 3 images" in printed
    assert "1 question without an answer" in printed
    assert SECRET not in printed
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} == {"results.json", "samples.jsonl", "requests.jsonl"}
    assert [path for path in written if SECRET in path.read_text()] == []


def test_eval_where_no_question_is_answered(
    service: Service, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    service.reply = lambda _: (500, "broken")
    assert evaluate(*command) == 2
    assert (
        "none of the 4 questions of squares has an answer: the service answered 500: broken" in capsys.readouterr().err
    )


def test_results_have_a_folder_of_the_models_name(
    service: Service, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(*(word for word in command if not word.startswith("out="))) == 0
    assert (tmp_path / "runs" / "eval" / "org-gpt-4o" / "squares" / "results.json").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["ckpt=x"], "ckpt=x is for a run of train.py, and model=openai is none; leave it out"),
        (["benchmark=none"], "a service answers benchmarks, and none is chosen; add benchmark=<name>"),
        (["base_url=http://127.0.0.1:9/v1"], "base_url=http://127.0.0.1:9/v1 cannot be reached ("),
        (["detail=full"], "rival.detail='full' must be one of low, high, auto"),
        (["api_key=pass"], "there is no option api_key; choose one of "),
        (["cache=nowhere/a.jsonl"], "cache=nowhere/a.jsonl cannot be written: there is no folder nowhere"),
        ([SQUARES[:-1] + ",method:rank}"], "asks by the method rank, and model_name=org/gpt-4o only by generate"),
    ],
)
def test_a_slip_is_refused_before_the_first_request(
    service: Service, command: list[str], capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    keys = {re.split(r"[.=]", word)[0] for word in given}
    kept = [word for word in command if re.split(r"[.=]", word)[0] not in keys]
    assert evaluate(*kept, *given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "pass" not in error
    assert service.requests == []


def test_options_of_a_service_need_no_prefix_and_an_address_with_a_secret_reaches_no_file() -> None:
    words = ["model=openai", "base_url=http://h/v1", "model_name=a,b", "cache=~/d.jsonl", "num_samples=8", "timeout=9"]
    found = translate([*words, "-m"], config_name="eval")
    assert found[-6:] == [
        "rival=openai",
        "++rival.base_url=http://h/v1",
        "++rival.model_name=a,b",
        f"++rival.cache={Path.home() / 'd.jsonl'}",
        "num_samples=8",
        "++rival.timeout=9",
    ]
    for word in ("base_url=http://me:pass@h/v1", "rival.base_url='http://me:pass@h/v1'"):
        with pytest.raises(ValueError, match=r"^base_url must have no user"):
            translate(["model=openai", word], config_name="eval")


@pytest.mark.parametrize("word", ["model=openai", "rival=openai", "+rival.timeout=9", "benchmark=shapes"])
def test_training_takes_no_option_of_an_evaluation(word: str) -> None:
    with pytest.raises(ValueError, match=r"is an option of eval.py alone; leave it out") as error:
        translate([word], config_name="train")
    assert str(error.value).startswith(word)
