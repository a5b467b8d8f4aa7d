"""Labels and verdicts from a model behind an OpenAI-compatible address (`/chat/completions`).

Two questions are asked, each in one request, at temperature 0:

- *label*: some of the making half's contexts with the firing tokens marked; a phrase is wanted;
- *score*: a label and numbered held-out contexts, active and silent ones mixed, nothing marked; the
  numbers of those the feature fires in are wanted (delphi's detection: Paulo et al. 2024,
  2410.13928). Once with the feature's own label, once with another feature's: the control.

Every answer is appended to `answers.jsonl` as it comes, so that a killed or refused run goes on
with what is missing and nothing is paid twice. The key is read from an environment variable and is
written nowhere. An answer that cannot be read leaves that feature without a label, or unscored.
"""

import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from probe.errors import Failure, UserError

logger = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"
TRIES = 4
"""Requests before a busy or silent endpoint counts as failed."""
PAUSE = 1.0
"""Seconds before the second try; doubled before each further one."""
BUSY = (408, 409, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""
LONGEST_LABEL = 200
"""Letters of a label that are kept."""

LABEL_PROMPT = """A feature of a language model fires on some tokens and is silent on all others. \
Below are passages in which it fires; the tokens that it fires on are marked <<like this>>, the \
passages with the strongest firings come first.

{examples}
{promoted}
What do the marked tokens have in common: which words, which kind of word, after or before what, \
in which kind of text? Answer with JSON only: {{"label": "a phrase of at most ten words"}}"""
SCORE_PROMPT = """A feature of a language model is said to fire on: {label}

In which of these numbered passages does it fire at least once?

{contexts}

Answer with JSON only: {{"active": [numbers of the passages]}}, an empty list for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to ask, and how."""

    url: str
    """Base address, such as https://api.example.com/v1: `/chat/completions` is added."""
    model: str
    """Name of the model there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; none is sent where it is not set."""
    parallel: int = 4
    """Requests under way at once."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""
    examples: int = 12
    """Passages shown to make a label."""
    contexts: int = 20
    """Passages shown to score one, half of them active."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise UserError(
                "an endpoint needs an address that begins with http:// or https:// and the name of "
                f"a model; got {self.url!r} and {self.model!r}."
            )
        if min(self.parallel, self.examples, self.contexts) < 1 or self.timeout <= 0:
            raise UserError(f"the numbers of an endpoint must be above zero; got {self}.")

    def run_config(self) -> dict[str, Any]:
        """What of it decides the answers."""
        names = ("url", "model", "examples", "contexts")
        return {name: getattr(self, name) for name in names}

    def ask(self, prompt: str) -> str:
        """The model's answer to a prompt.

        Raises `Failure` where the endpoint refuses, or does not answer in `TRIES` tries.
        """
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": prompt}],
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        return self._answer(request)

    def _answer(self, request: urllib.request.Request) -> str:
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _content(response.read(), self.url)
            except urllib.error.HTTPError as error:
                said = _said(error)
                if error.code not in BUSY or attempt == TRIES - 1:
                    raise Failure(
                        f"the endpoint {self.url} answered {error.code} ({said}); "
                        f"{self._advice(error.code)}."
                    ) from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == TRIES - 1:
                    raise Failure(
                        f"the endpoint {self.url} cannot be reached "
                        f"({getattr(error, 'reason', error)}); check the address and that it runs."
                    ) from error
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last try returns or raises")

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return f"check the key in the environment variable {self.key_variable}"
        if status == 404:
            return f"check the address and that it has a model {self.model!r}"
        return "wait, and run the same command again"


def _content(body: bytes, url: str) -> str:
    """The text of an answer. Raises `Failure` where it does not speak the protocol."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
        return content or ""
    except (ValueError, KeyError, IndexError, TypeError) as error:
        shown = body[:80].decode(errors="replace")
        raise Failure(
            f"the endpoint {url} does not answer as OpenAI's chat completions do (it said "
            f"{shown!r}); give the base address of one that does, often one that ends in /v1."
        ) from error


def _said(error: urllib.error.HTTPError) -> str:
    text = error.read()[:500].decode(errors="replace")
    try:
        found = json.loads(text)["error"]
        text = found["message"] if isinstance(found, dict) else str(found)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:200] or error.reason


def label_prompt(examples: Sequence[str], promoted: Sequence[str]) -> str:
    """The question for a label."""
    raised = f"\nIt raises the probability of: {', '.join(map(repr, promoted))}\n"
    return LABEL_PROMPT.format(
        examples="\n".join(f"{i}. {text}" for i, text in enumerate(examples, 1)),
        promoted=raised if promoted else "",
    )


def score_prompt(label: str, contexts: Sequence[str]) -> str:
    """The question in which contexts a labelled feature fires."""
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(contexts, 1))
    return SCORE_PROMPT.format(label=label, contexts=numbered)


def parse_label(answer: str) -> str | None:
    """The label in an answer: of its JSON, else its first line; None where there is none."""
    found = _object(answer)
    text = found.get("label") if found is not None else answer.strip().split("\n")[0]
    if not isinstance(text, str):
        return None
    text = re.sub(r"^(label|answer)\s*:\s*", "", text.strip(), flags=re.IGNORECASE).strip(" \"'*`")
    return " ".join(text.split())[:LONGEST_LABEL] or None


def parse_active(answer: str, n: int) -> list[bool] | None:
    """Which of `n` contexts an answer calls active; None where it does not say."""
    found = _object(answer)
    numbers = found.get("active") if found is not None else None
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        return None
    if any(not 1 <= number <= n for number in numbers):
        return None
    return [number in numbers for number in range(1, n + 1)]


def _object(answer: str) -> dict[str, Any] | None:
    """The first JSON object in an answer, whatever stands around it."""
    for start in (match.start() for match in re.finditer(r"\{", answer)):
        try:
            found, _ = json.JSONDecoder().raw_decode(answer[start:])
        except ValueError:
            continue
        return found if isinstance(found, dict) else None
    return None


# ------------------------------------------------------------------------------ the answers' file


class Answers:
    """What the endpoint has said so far, one JSON line an answer, on disk as soon as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, int], Any] = {}
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            path.write_bytes(whole)  # a line that was cut off is asked again
            for line in whole.splitlines():
                row = json.loads(line)
                self.found[row["step"], row["feature"]] = row["said"]

    def collect(
        self,
        step: str,
        features: Iterable[int],
        ask: Callable[[int], Any],
        *,
        parallel: int,
        progress: bool,
    ) -> dict[int, Any]:
        """What `ask` says of each feature, asked only where it is not known.

        Raises what `ask` raises, a `Failure` with a word on what is kept.
        """
        wanted = list(features)
        missing = [feature for feature in wanted if (step, feature) not in self.found]
        bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=step,
                   unit=" features", disable=not progress)  # fmt: skip
        with bar, self.path.open("a") as file, ThreadPoolExecutor(parallel) as pool:
            jobs = {pool.submit(ask, feature): feature for feature in missing}
            try:
                for job in as_completed(jobs):
                    said = job.result()
                    row = {"step": step, "feature": jobs[job], "said": said}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    self.found[step, jobs[job]] = said
                    bar.update()
            except Failure as error:
                raise Failure(
                    f"{str(error).rstrip('.')}; {len(self.found)} answers are kept, and the same "
                    "command goes on after them."
                ) from error
            finally:
                for job in jobs:
                    job.cancel()
        return {feature: self.found[step, feature] for feature in wanted}
