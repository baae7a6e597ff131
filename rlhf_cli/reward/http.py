"""Rewards from a scoring server: POST {"prompts", "responses", "columns"} as JSON, answer {"rewards": [...]}."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.errors import ConfigError, Problem, RunFailed
from rlhf_cli.reward.source import Progress, ScoredText, checked_rewards, columns_of
from rlhf_cli.schema import RewardSourceConfig

FIRST_WAIT_SECONDS = 1.0
TOO_MANY_REQUESTS = 429  # RFC 6585
SHOWN = 200  # characters of an answer in a message

log = logging.getLogger(__name__)


class Retry(Exception):
    """A failure that may pass: nobody answers, or the server says that it has trouble of its own."""


@dataclass
class HttpSource:
    """A server that scores batches. sleep: waits so many seconds between two tries."""

    name: str
    weight: float
    url: str
    timeout: float
    retries: int
    batch_size: int
    sleep: Callable[[float], None] = time.sleep

    @property
    def about(self) -> str:
        """Where it is asked."""
        return self.url

    def score(self, texts: Sequence[ScoredText], progress: Progress) -> list[float]:
        """Raises RunFailed with the url and what came back when there is no usable answer."""
        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            rewards += self._ask(batch, progress)
            progress(len(batch))
        return rewards

    def _ask(self, batch: Sequence[ScoredText], progress: Progress) -> list[float]:
        question = {
            "prompts": [text.asked for text in batch],
            "responses": [text.response for text in batch],
            "columns": columns_of(batch),
        }
        body = json.dumps(question, default=str).encode()
        wait = FIRST_WAIT_SECONDS
        for attempt in range(self.retries + 1):
            try:
                return self._read(self._post(body), batch)
            except Retry as failure:
                if attempt == self.retries:
                    raise RunFailed(
                        f"{self._who()} gave no answer in {attempt + 1} tries: {failure}; look after the server, or"
                        " raise the source's timeout or retries"
                    ) from failure
                log.warning("%s: %s; next try in %g s", self._who(), failure, wait)
                progress(0)
                self.sleep(wait)
                wait *= 2
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        """The body of the answer. Raises Retry, or RunFailed when trying again is of no use."""
        request = urllib.request.Request(
            self.url, data=body, headers={"Content-Type": "application/json", "Accept": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} {error.reason}: {_body(error)}"
            if error.code == TOO_MANY_REQUESTS or error.code >= 500:
                raise Retry(said) from error
            raise RunFailed(f"{self._who()} refused the request: {said}") from error
        except TimeoutError as error:
            raise Retry(f"no answer within {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise Retry(f"no connection within {self.timeout:g} s") from error
            raise Retry(str(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise Retry(f"{type(error).__name__}: {error}") from error

    def _read(self, content: bytes, batch: Sequence[ScoredText]) -> list[float]:
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise RunFailed(f"{self._who()} answered no JSON: {_start(content)}") from error
        rewards: Any = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise RunFailed(f'{self._who()} must answer {{"rewards": [...]}}, got {_start(content)}')
        try:
            return checked_rewards(rewards, batch, self._who())
        except RunFailed as error:
            raise RunFailed(f"{error}. The answer: {_start(content)}") from error

    def _who(self) -> str:
        return f"reward source {self.name!r} ({self.url})"


def open_http(config: RewardSourceConfig, name: str, key: str, batch_size: int) -> HttpSource:
    """Nothing is sent before the first texts come. key: the source's place in the config."""
    assert config.url is not None, "checked by the schema"
    if not config.url.startswith(("http://", "https://")):  # urllib would also read file://
        raise ConfigError([Problem(f"{key}.url", f"got {config.url!r}; allowed: http://... or https://...")])
    return HttpSource(name, config.weight, config.url, config.timeout, config.retries, batch_size)


def _body(error: urllib.error.HTTPError) -> str:
    """How the body of a refusal starts; what matters is its code, so a body that breaks off is no failure."""
    try:
        with error:
            return _start(error.read(4 * SHOWN))
    except (OSError, http.client.HTTPException) as failure:
        return f"(its body could not be read: {type(failure).__name__})"


def _start(content: bytes) -> str:
    return repr(content[: 4 * SHOWN].decode("utf-8", "replace")[:SHOWN])
