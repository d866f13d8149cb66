"""A chat model in vLLM as a judge: the probabilities of its first token, or whole replies.

What it is asked and how that is read is wording.py's. Whatever stands in a prompt or an answer is text to it: a control
token of its chat template, written there, is tokenised as the characters that it has (`data.chat`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.data.chat import ChatFormat, PromptTooLongError, chat_format
from dice_core.data.settings import ChatConfig
from dice_core.generation.engine import answered, started_engine
from dice_core.judges.reward_model import OnProgress
from dice_core.judges.settings import GradingConfig, JudgeModelConfig
from dice_core.models.files import ModelError
from dice_core.settings.base import ConfigError
from dice_core.settings.seeds import derive_seed

if TYPE_CHECKING:
    from vllm import LLMEngine

# As many as vLLM gives without a setting of its own.
_NUM_TOKENS = 20


@dataclass(frozen=True)
class ChatModel:
    """A chat model that is loaded. Made by started_chat_model."""

    _engine: "LLMEngine"
    _template: ChatFormat
    _stop_ids: Sequence[int]

    def first_tokens(self, texts: Sequence[str], on_progress: OnProgress = None) -> list[Mapping[str, float] | None]:
        """Return the likeliest first tokens of the reply to each text, with their log-probs in nats.

        Returns:
            In order; None of a text that is too long.
        """
        from vllm import SamplingParams

        # The numbers are those of the model, before any temperature.
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=_NUM_TOKENS, ignore_eos=True, detokenize=False)
        asked, outputs = self._ask(texts, lambda _: params, on_progress)
        found: dict[str, dict[str, float]] = {}
        for text, output in zip(asked, outputs, strict=True):
            tokens = found.setdefault(text, {})
            for token_id, entry in output.outputs[0].logprobs[0].items():
                word = str(self._template.tokenizer.decode([token_id]))
                # Two tokens may have one text: the text is as likely as the likelier one at least.
                tokens[word] = max(entry.logprob, tokens.get(word, entry.logprob))
        return [found.get(text) for text in texts]

    def replies(
        self, texts: Sequence[str], config: GradingConfig, seed: int, on_progress: OnProgress = None
    ) -> list[list[str]]:
        """Return config.num_grades sampled replies to each text, in order; none to one that is too long."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def params(text: str) -> Any:
            return SamplingParams(
                n=config.num_grades,
                temperature=config.temperature,
                max_tokens=config.max_new_tokens,
                stop_token_ids=list(self._stop_ids),
                ignore_eos=True,
                # Of a text and no place in a list: whichever part of the work it is in, it draws the same.
                seed=derive_seed(seed, text) // config.num_grades * config.num_grades,
                detokenize=False,
                # Else the last of the samples to end would come alone.
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        asked, outputs = self._ask(texts, params, on_progress)
        decode = self._template.decode_response
        found = {
            text: [decode(sample.token_ids) for sample in output.outputs]
            for text, output in zip(asked, outputs, strict=True)
        }
        return [found.get(text, []) for text in texts]

    def _ask(self, texts: Sequence[str], params: Any, on_progress: OnProgress) -> tuple[list[str], list[Any]]:
        """Return the texts that are not too long, each once, and vLLM's answers to them."""
        ids = {text: found for text in dict.fromkeys(texts) if (found := self._token_ids(text))}
        return list(ids), answered(self._engine, [(ids[text], params(text)) for text in ids], on_progress)

    def _token_ids(self, text: str) -> list[int] | None:
        try:
            return self._template.prompt_token_ids(text)
        except PromptTooLongError:
            return None


@contextmanager
def started_chat_model(
    folder: Path, config: JudgeModelConfig, section: str, max_new_tokens: int = 1
) -> Iterator[ChatModel]:
    """Start vLLM with a chat model.

    Args:
        folder: of fetch_model.
        config: precision and memory, and the longest request.
        section: of the settings, for messages.
        max_new_tokens: of a reply.

    Raises:
        ModelError: it has no chat template that can be used.
        ConfigError: its context is too short for the replies.
        GenerationError: vLLM failed to start.
    """
    from dice_core.models.loading import context_length, eos_token_ids, load_config, load_tokenizer

    max_length = min(config.max_length, context_length(load_config(folder)))
    if max_length <= max_new_tokens:
        raise ConfigError(
            f"{section}.max_length: {max_length} tokens hold no request and a reply of {max_new_tokens}: raise it, or "
            "take a judge with a longer context"
        )
    tokenizer = load_tokenizer(folder)
    try:
        template = chat_format(tokenizer, ChatConfig(max_prompt_tokens=max_length - max_new_tokens))
    except ConfigError as error:
        reason = str(error).removeprefix("chat.prompt_format: ")
        raise ModelError(f"{folder}: is no judge that chats: {reason}") from None
    stop_ids = tuple(dict.fromkeys([*template.stop_token_ids, *eos_token_ids(folder)]))
    with started_engine(folder, config, max_length, section=section) as engine:
        yield ChatModel(engine, template, stop_ids)
