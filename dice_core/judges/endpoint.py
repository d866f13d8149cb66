"""A judge behind OpenAI's API: requests side by side, within what they may cost, and what is paid for is kept.

The openai package sends: it waits and tries again after 429, 5xx, timeouts and lost connections, for as long as the
server asks (Retry-After) or in growing pauses. What it cannot decide is here: an answer that cannot be read is missing,
a refused key ends the work at once, and so do many failures in a row. The key is in no message.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dice_core.judges.answer_cache import AnswerCache, Reply, digest
from dice_core.judges.endpoint_key import api_key
from dice_core.judges.reward_model import OnProgress
from dice_core.judges.settings import JudgeModelConfig
from dice_core.progress import log
from dice_core.settings.base import ConfigError

if TYPE_CHECKING:
    from openai import OpenAI

# A server that answers none of so many is not there; each was tried endpoint_retries times before.
_MOST_FAILURES_IN_A_ROW = 20
_NUM_TOKENS = 20
# What servers and models do not take, by a word of their refusal, and what is sent in place of it.
_WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "max_completion_tokens": {"max_tokens": "max_completion_tokens"},
    "logprobs": {"logprobs": None, "top_logprobs": None},
    "temperature": {"temperature": None},
    "seed": {"seed": None},
}


class EndpointError(RuntimeError):
    """An endpoint that cannot be used now. The message is one line."""


class CostLimitError(ValueError):
    """The next request would cost more than judging may. The message is one line."""


@dataclass(frozen=True)
class Request:
    """What a model is asked."""

    text: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    wants_first_tokens: bool = False

    @property
    def most_input_tokens(self) -> int:
        """More than it can have: no tokenizer makes more tokens than there are bytes, and the frame is small."""
        return len(self.text.encode()) + 100


@dataclass
class Endpoint:
    """An endpoint that can be asked. Made by open_endpoint."""

    config: JudgeModelConfig
    section: str
    answers: AnswerCache
    _client: "OpenAI"
    _key: str
    _left_out: frozenset[str] = frozenset()
    """Words of _WITHOUT: what this server has refused."""

    def ask(self, requests: Sequence[Request], on_progress: OnProgress = None) -> list[Reply | None]:
        """Return the replies to requests, in order; None: it failed, or could not be read.

        Raises:
            CostLimitError: the next request would cost more than endpoint_max_cost.
            ConfigError: the server refuses the key, or knows no such model or address.
            EndpointError: it does not answer at all.
        """
        keys = [digest({**self._identity(), **vars(request)}) for request in requests]
        waiting = {key: request for key, request in zip(keys, requests, strict=True) if self.answers.get(key) is None}
        if waiting:
            self._ask_all(waiting, on_progress)
        return [self.answers.get(key) for key in keys]

    def cost(self) -> float:
        """Return what all answers there are have cost, in the currency of the prices."""
        return self._price(*self.answers.num_tokens)

    def _identity(self) -> dict[str, str]:
        return {"url": self.config.endpoint_url.rstrip("/"), "model": self.config.endpoint_model}

    def _price(self, input_tokens: int, output_tokens: int) -> float:
        config = self.config
        return (input_tokens * config.endpoint_input_price + output_tokens * config.endpoint_output_price) / 1e6

    def _ask_all(self, waiting: dict[str, Request], on_progress: OnProgress) -> None:
        """Ask what is not known yet, some at a time. What has come back is kept, whatever ends the work."""
        left, num_asked, num_in_a_row = dict(waiting), len(waiting), 0
        running: dict[Future[Reply], str] = {}
        with _pool(self.config.endpoint_concurrency) as pool:
            try:
                while left or running:
                    while left and len(running) < self.config.endpoint_concurrency:
                        key = next(iter(left))
                        if not self._is_affordable([waiting[other] for other in running.values()], left[key]):
                            break
                        running[pool.submit(self._send, left.pop(key))] = key
                    if not running:
                        raise self._cost_limit(num_asked - len(left), num_asked)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        num_in_a_row = self._keep(running.pop(future), future, num_in_a_row)
                    if on_progress is not None:
                        on_progress(num_asked - len(left) - len(running), num_asked)
            finally:
                self._keep_the_rest(running)

    def _is_affordable(self, running: Sequence[Request], request: Request) -> bool:
        """Return whether a request keeps to the limit even if it and those under way are as dear as they can be."""
        if not self.config.endpoint_max_cost:
            return True
        most = sum(self._price(other.most_input_tokens, other.max_tokens) for other in (*running, request))
        return self.cost() + most <= self.config.endpoint_max_cost

    def _cost_limit(self, num_done: int, num_all: int) -> CostLimitError:
        return CostLimitError(
            f"{self.section}.endpoint_max_cost: {num_done} of {num_all} requests were made, all answers have cost "
            f"{self.cost():.4g}, and the next could pass the limit of {self.config.endpoint_max_cost:g}: raise it and "
            "start the run again (what is paid for is kept), or compare fewer prompts"
        )

    def _keep(self, key: str, future: "Future[Reply]", num_in_a_row: int) -> int:
        """Keep an answer, and return how many requests have failed since the last one."""
        try:
            self.answers.add(key, future.result())
        except _UnansweredError as error:
            if num_in_a_row + 1 >= _MOST_FAILURES_IN_A_ROW:
                raise EndpointError(
                    f"{self.config.endpoint_url}: {num_in_a_row + 1} requests in a row have failed, the last with: "
                    f"{error}: start the run again when it answers (what is paid for is kept)"
                ) from None
            log(f"{self.section}: a request has failed, its verdict is missing: {error}")
            return num_in_a_row + 1
        return 0

    def _keep_the_rest(self, running: "dict[Future[Reply], str]") -> None:
        """Keep what is under way and being paid for, where the work ends before its time."""
        for future, key in running.items():
            if not future.cancel() and not future.exception():
                self.answers.add(key, future.result())
        self.answers.flush()

    def _send(self, request: Request) -> Reply:
        """Return the reply to a request, which is sent again without what the server does not take."""
        import openai

        for _ in range(1 + len(_WITHOUT)):
            left_out = self._left_out
            try:
                arguments = _arguments(self.config, request, left_out)
                raw = self._client.chat.completions.with_raw_response.create(**arguments)
                return self._read(raw.http_response.text, request)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise self._refusal(error.status_code) from None
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                words = [word for word in _WITHOUT if word in str(error.message) and word not in left_out]
                if not words:
                    raise self._unanswered(f"HTTP {error.status_code}: {error.message}") from None
                self._left_out |= {words[0]}
            except openai.APIStatusError as error:
                raise self._unanswered(f"HTTP {error.status_code}: {error.message}") from None
            except openai.OpenAIError as error:
                cause = f" ({error.__cause__})" if error.__cause__ else ""
                raise self._unanswered(f"{str(error) or type(error).__name__}{cause}") from None
        raise self._unanswered("the server refuses whatever is sent")

    def _read(self, text: str, request: Request) -> Reply:
        """Read a reply. One that says nothing is an answer too, and paid for: only what is no reply is none."""
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            said, usage = choice["message"].get("content") or "", body.get("usage") or {}
            tokens = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
            first = {str(token["token"]): float(token["logprob"]) for token in tokens}
            counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
            if not isinstance(said, str) or any(math.isnan(value) for value in first.values()):
                raise ValueError("its content is of another form")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise self._unanswered(f"no reply of OpenAI's API, but {' '.join(text.split())[:80]!r}") from None
        # Where the server counts nothing, as much as it can have been.
        most = (request.most_input_tokens, request.max_tokens)
        used = [
            count if type(count) is int and count >= 0 else limit for count, limit in zip(counts, most, strict=True)
        ]
        return Reply(said, first, *used)

    def _refusal(self, status: int) -> ConfigError:
        """Return what is said of an error that every other request would meet. The server's words may hold the key."""
        url, config = self.config.endpoint_url, self.config
        if status == 404:
            return ConfigError(
                f"{self.section}.endpoint_model: {url} knows no model {config.endpoint_model!r}, or is no address of "
                "OpenAI's API (it mostly ends in /v1): correct it"
            )
        key = f"the key in {config.endpoint_key_variable}" if self._key else "a request without a key"
        return ConfigError(f"{self.section}.endpoint_url: {url} refuses {key} (HTTP {status}): put another one there")

    def _unanswered(self, reason: str) -> "_UnansweredError":
        line = " ".join(reason.split())[:300]
        return _UnansweredError(line.replace(self._key, "***") if self._key else line)


class _UnansweredError(RuntimeError):
    """A request that was not answered. The message is one line, without the key."""


def _arguments(config: JudgeModelConfig, request: Request, left_out: frozenset[str]) -> dict[str, Any]:
    """Return what is sent, less what the server does not take."""
    arguments: dict[str, Any] = {
        "model": config.endpoint_model,
        "messages": [{"role": "user", "content": request.text}],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
    }
    if request.temperature:
        arguments["seed"] = request.seed
    if request.wants_first_tokens:
        arguments |= {"logprobs": True, "top_logprobs": _NUM_TOKENS}
    for word in left_out:
        for name, other in _WITHOUT[word].items():
            value = arguments.pop(name, None)
            if other and value is not None:
                arguments[other] = value
    return arguments


@contextmanager
def open_endpoint(config: JudgeModelConfig, section: str, answers: AnswerCache | None = None) -> Iterator[Endpoint]:
    """Yield an endpoint that can be asked.

    Args:
        config: where it is, its model, and what it may cost.
        section: of the settings, for messages.
        answers: those of earlier attempts, and where new ones go; nothing is kept by default.

    Raises:
        ConfigError: it has no address or no model, or its key is not there.
    """
    key = api_key(config, section)
    from openai import OpenAI

    client = OpenAI(
        base_url=config.endpoint_url,
        api_key=key or "none",
        timeout=config.endpoint_timeout,
        max_retries=config.endpoint_retries,
    )
    with client:
        endpoint = Endpoint(config, section, AnswerCache() if answers is None else answers, client, key)
        num_before = len(endpoint.answers)
        yield endpoint
        sent, came = endpoint.answers.num_tokens
        log(
            f"{section}: {config.endpoint_model}: {len(endpoint.answers)} answers ({num_before} of earlier attempts), "
            f"{sent:,} tokens sent and {came:,} back" + (f", cost {endpoint.cost():.4g}" if endpoint.cost() else "")
        )


@contextmanager
def _pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that does not begin what is still waiting when the work ends."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dice-judge")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
