"""A service with an OpenAI-compatible endpoint answers the questions of a benchmark.

Of the protocol, POST <base_url>/chat/completions is used: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from vlm import files
from vlm.evaluation.prompts import Prompts
from vlm.evaluation.respondent import Answer, Respondent, Write
from vlm.ranges import Name, Number, Range
from vlm.schema import BadSample, Sample, hashed

KEY = "OPENAI_API_KEY"
IDENTITY = (  # options that the results depend on
    *("model_name", "base_url", "system_prompt", "max_image_side", "image_format", "detail", "temperature"),
    *("reasoning", "max_reasoning_tokens", "reasoning_effort", "extra_body", "input_price", "output_price"),
)
REASONING = re.compile(r"(?<![a-z0-9])(o[134]|gpt-5)(?![a-z0-9])", re.IGNORECASE)
JPEG_QUALITY = 90
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the first retry, doubled for each further one
MAX_IN_A_ROW = 20  # questions that fail one after the other before no more are asked
MAX_REPLY = 2**24  # bytes
MAX_CACHE = 2**32
LONGEST_REASON = 300  # characters of a service's message

Price = Annotated[Number, Range(0, 10**6)]


class Failed(Exception):
    """A request has no answer; the others may have one."""


class Busy(Failed):
    """As `Failed`, but the same request may be answered later, after `wait` seconds if the service says when."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class OpenAI(Respondent):
    """Asks a service. Answers are cached by a hash of the request, so that none is paid for twice.

    A question that fails has an error in place of an answer. Raises ValueError where no question can be answered: for a
    wrong key, an address without such a service, or MAX_IN_A_ROW failures one after the other.
    """

    remembers = True

    def __init__(
        self,
        *,
        model_name: Name,
        cache: Name,
        base_url: str = "https://api.openai.com/v1",
        system_prompt: str | None = None,
        max_image_side: Annotated[int, Range(1, 65_536)] = 2048,
        image_format: Literal["png", "jpeg"] = "png",
        detail: Literal["low", "high", "auto"] | None = None,
        temperature: Annotated[Number, Range(0, 2)] | None = 0,
        reasoning: bool | None = None,
        max_reasoning_tokens: Annotated[int, Range(0, 10**6)] = 4096,
        reasoning_effort: Name | None = None,
        extra_body: dict[str, Any] | None = None,
        input_price: Price | None = None,
        output_price: Price | None = None,
        num_concurrent: Annotated[int, Range(1, 256)] = 8,
        num_retries: Annotated[int, Range(0, 100)] = 6,
        timeout: Annotated[Number, Range(above=0, most=86_400)] = 120,
    ) -> None:
        check_url(base_url)
        if (input_price is None) != (output_price is None):
            raise ValueError(f"input_price={input_price} and output_price={output_price}: give both prices, or none")
        self.model_name, self.base_url, self.system_prompt = model_name, base_url.rstrip("/"), system_prompt
        self.max_image_side, self.image_format, self.detail = max_image_side, image_format, detail
        self.reasoning = bool(REASONING.search(model_name)) if reasoning is None else reasoning
        self.temperature = None if self.reasoning else temperature
        self.max_reasoning_tokens = max_reasoning_tokens if self.reasoning else 0
        self.reasoning_effort, self.extra_body = reasoning_effort, extra_body or {}
        self.input_price, self.output_price = input_price, output_price
        self.num_concurrent, self.num_retries, self.timeout = num_concurrent, num_retries, timeout
        self._key = key_of_environment()
        self._url = f"{self.base_url}/chat/completions"
        self._opener = urllib.request.build_opener(NoRedirect)
        self._cache = Cache(Path(cache))
        self._reached = False  # whether the service has answered a request
        self._failed_in_a_row = 0

    @property
    def has_key(self) -> bool:
        """Whether requests have a key."""
        return bool(self._key)

    @property
    def identity(self) -> dict[str, Any]:
        """The options that the results depend on."""
        return {name: getattr(self, name) for name in IDENTITY}

    def respond(self, prompts: Prompts, indices: Sequence[int], answered: Container[int], write: Write) -> None:
        """Questions are prepared and answers written in this thread, because neither is safe in several."""
        with Threads(self.num_concurrent) as threads:
            for answer in threads.each(self._jobs(prompts, [index for index in indices if index not in answered])):
                write(answer)

    def _jobs(self, prompts: Prompts, indices: Sequence[int]) -> Iterator[Callable[[], Answer]]:
        for index in indices:
            (sample,) = prompts.samples([index])
            yield partial(self._answer, index, sample, prompts.benchmark.max_new_tokens)

    def _answer(self, index: int, sample: Sample | BadSample, max_new_tokens: int) -> Answer:
        if isinstance(sample, BadSample):
            return Answer(index, error=str(sample))
        body, usage = self.request(sample, max_new_tokens)
        name = hashed(self._url, json.dumps(body, sort_keys=True))
        if (reply := self._cache.get(name)) is not None:
            usage["from_cache"] = 1
        else:
            try:
                reply = self._ask(body)
            except Failed as error:
                self._count_failure(error)
                return Answer(index, error=str(error))
            self._reached, self._failed_in_a_row = True, 0
            self._cache.add(name, reply)
        choice = reply["choices"][0]
        text, usage = (choice["message"].get("content") or "").strip(), {**usage, **self._usage(reply)}
        return Answer(index, prediction=text, error="" if text else _no_answer(choice), usage=usage)

    def _count_failure(self, error: Failed) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= MAX_IN_A_ROW:
            raise ValueError(
                f"{self._failed_in_a_row} questions failed one after the other ({error}); what was answered is kept, "
                "so the same command continues"
            )

    def request(self, sample: Sample, max_new_tokens: int) -> tuple[dict[str, Any], dict[str, Number]]:
        """The body of a request, and the number, pixels and bytes of the images in it."""
        encoded = [self._encode(image) for image in sample.images]
        usage: dict[str, Number] = {
            "images": len(encoded),
            "image_pixels": sum(image.width * image.height for image in encoded),
            "image_bytes": sum(len(image.data) for image in encoded),
        }
        messages: list[dict[str, Any]] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": self.system_prompt})
        rest = iter(encoded)
        for message in sample.messages:
            pieces = [self._image(next(rest)) if piece["type"] == "image" else piece for piece in message["content"]]
            only_text = all(piece["type"] == "text" for piece in pieces)  # then every server takes a text
            content = "".join(piece["text"] for piece in pieces) if only_text else pieces
            messages.append({"role": message["role"], "content": content})
        body: dict[str, Any] = {"model": self.model_name, "messages": messages}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.reasoning:
            body["max_completion_tokens"] = max_new_tokens + self.max_reasoning_tokens
        else:
            body["max_tokens"] = max_new_tokens
        if self.reasoning_effort is not None:
            body["reasoning_effort"] = self.reasoning_effort
        return {**body, **self.extra_body}, usage

    def _encode(self, image: Image.Image) -> Encoded:
        longest = max(image.size)
        if longest > self.max_image_side:
            sides = [max(1, round(side * self.max_image_side / longest)) for side in image.size]
            image = image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format=self.image_format, quality=JPEG_QUALITY)  # PNG has none and ignores it
        return Encoded(buffer.getvalue(), image.width, image.height)

    def _image(self, image: Encoded) -> Any:
        url = {"url": f"data:image/{self.image_format};base64,{base64.b64encode(image.data).decode()}"}
        return {"type": "image_url", "image_url": {**url, "detail": self.detail} if self.detail else url}

    def _usage(self, reply: Mapping[str, Any]) -> dict[str, Number]:
        """Seconds, tokens and cost of a reply. Replies without a number of tokens have no cost, and are counted."""
        seconds, used = {"seconds": reply["seconds"]}, _mapping(reply.get("usage"))
        prompt, completion = used.get("prompt_tokens"), used.get("completion_tokens")
        if not isinstance(prompt, int) or not isinstance(completion, int):
            return {**seconds, "replies_without_tokens": 1}
        found = {**seconds, "prompt_tokens": prompt, "completion_tokens": completion}
        reasoning = _mapping(used.get("completion_tokens_details")).get("reasoning_tokens")
        if isinstance(reasoning, int):
            found["reasoning_tokens"] = reasoning
        if self.input_price is not None and self.output_price is not None:
            found["cost"] = (prompt * self.input_price + completion * self.output_price) / 10**6
        return found

    def _ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request, and how many seconds it took, after as many retries as needed.

        Raises Failed if there is none, and ValueError if there would be none to any other request.
        """
        data = json.dumps(body).encode()
        for attempt in range(self.num_retries + 1):
            try:
                start = time.monotonic()
                return {**self._send(data), "seconds": round(time.monotonic() - start, 3)}
            except Busy as error:
                if attempt == self.num_retries:
                    raise Failed(f"{error}, in each of {attempt + 1} attempts") from error
                wait = error.wait + FIRST_WAIT * 2**attempt * random.uniform(0.5, 1)
                time.sleep(min(LONGEST_WAIT, wait))
        raise AssertionError("the last attempt returns or raises")

    def _send(self, data: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data=data, headers=headers)
        try:
            try:
                response = self._opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                text = str(response.read(MAX_REPLY).decode(errors="replace"))
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            lasting = isinstance(why, ConnectionRefusedError | socket.gaierror | ssl.SSLError)
            if lasting and not self._reached:
                raise ValueError(f"base_url={self.base_url} cannot be reached ({why}); check the address") from None
            raise Busy(f"the service did not answer ({why or type(why).__name__})") from None
        if self._key:
            text = text.replace(self._key, f"<{KEY}>")  # which a service may repeat in an error
        if response.status >= 300:
            raise self._refusal(response.status, response.headers.get("Retry-After") or "", text)
        try:
            reply = json.loads(text)
            if isinstance(reply, dict) and reply.get("error"):
                raise Busy(f"the service reported an error: {_message(text)}")
            content = reply["choices"][0]["message"].get("content")
            if content is not None and not isinstance(content, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Busy(f"the reply is not a chat completion ({_message(text)})") from None
        return {key: reply[key] for key in ("choices", "usage", "model") if key in reply}

    def _refusal(self, status: int, retry_after: str, text: str) -> Exception:
        said = f"{status}: {_message(text)}"
        if status == 401:
            remedy = f"the key in {KEY} is not valid there" if self._key else f"set {KEY} in the environment"
            return ValueError(f"base_url={self.base_url} wants a valid key ({said}); {remedy}")
        if status == 402 or (status == 429 and "insufficient_quota" in text):
            return ValueError(f"the account has no credit left ({said}); what was answered is kept")
        if (status in (403, 404, 405) or 300 <= status < 400) and not self._reached:
            return ValueError(
                f"base_url={self.base_url} does not answer for model_name={self.model_name} ({said}); check both"
            )
        if status in (408, 409, 429) or status >= 500:
            wait = float(retry_after) if re.fullmatch(r"\d+(\.\d+)?", retry_after) else 0.0
            return Busy(f"the service answered {said}", wait)
        return Failed(f"the service answered {said}")


class Encoded(NamedTuple):
    """An image file."""

    data: bytes
    width: int
    height: int


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Sends the key to no other address than the user's."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


class Threads:
    """Runs jobs in threads that end with the process, so that Ctrl-C waits for no request."""

    def __init__(self, num: int) -> None:
        self._num, self._stopped = num, False
        self._jobs: SimpleQueue[Callable[[], Answer] | None] = SimpleQueue()
        self._results: SimpleQueue[Answer | Exception] = SimpleQueue()

    def __enter__(self) -> Threads:
        for _ in range(self._num):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stopped = True
        for _ in range(self._num):
            self._jobs.put(None)

    def each(self, jobs: Iterator[Callable[[], Answer]]) -> Iterator[Answer]:
        """The answers as they come, with twice as many jobs prepared as there are threads."""
        waiting = 0
        for job in jobs:
            self._jobs.put(job)
            waiting += 1
            if waiting == 2 * self._num:
                yield self._next()
                waiting -= 1
        for _ in range(waiting):
            yield self._next()

    def _next(self) -> Answer:
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stopped:
            try:
                self._results.put(job())
            except Exception as error:
                self._stopped = True
                self._results.put(error)


class Cache:
    """Replies by the hash of their requests, in a JSONL file."""

    def __init__(self, file: Path) -> None:
        """Raises ValueError if the file cannot be used."""
        self._file, self._lock = file, threading.Lock()
        self._found: dict[str, dict[str, Any]] = {}
        text = files.read(file, max_bytes=MAX_CACHE).decode(errors="replace") if file.exists() else ""
        self._cut = bool(text) and not text.endswith("\n")  # the last line, by a kill
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
                self._found[entry["request"]] = entry["reply"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, name: str) -> dict[str, Any] | None:
        return self._found.get(name)

    def add(self, name: str, reply: dict[str, Any]) -> None:
        line = json.dumps({"request": name, "reply": reply}, ensure_ascii=False)
        with self._lock:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with files.append(self._file) as opened:
                opened.write("\n" * self._cut + line + "\n")
            self._cut = False
            self._found[name] = reply


def check_url(base_url: str) -> None:
    """Raise ValueError for an address that holds a secret or is none; the message does not repeat it."""
    try:
        parts = urlsplit(base_url)
    except ValueError:
        parts = urlsplit("")
    if "@" in base_url or parts.query or parts.fragment:
        raise ValueError(
            f"base_url must have no user, password or query, because it is written to results.json; put the key into "
            f"the environment as {KEY}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url must be an address such as http://localhost:8000/v1")


def key_of_environment() -> str:
    """The key, empty if there is none. Raises ValueError for a key that no header can hold, without repeating it."""
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"{KEY} in the environment has spaces or other characters that no key has; set it again")
    return key


def _no_answer(choice: Mapping[str, Any]) -> str:
    """Why a reply without text is no answer; empty where the model chose to say nothing."""
    if refusal := choice["message"].get("refusal"):
        return f"the model refused: {_short(str(refusal))}"
    reason = choice.get("finish_reason")
    if reason == "length":
        return "all tokens were used before the answer; raise max_reasoning_tokens"
    silent = choice["message"].get("content") is not None and reason != "content_filter"
    return "" if silent else f"the reply has no text (finish_reason {reason})"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _message(text: str) -> str:
    """What a service says about an error, by the `message` in its JSON if there is one."""
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return _short(" ".join(text.split())) or "no message"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"
