"""A prompt becomes token ids, once, and a response becomes the ids that the model would have generated.

A chat format is a frame: the text before the person's prompt, the text after it, and the token that ends a response.
The frame of `zephyr` and `llama3` is written here; that of `model` is read from the tokenizer's own template.
The framed text is tokenised with `add_special_tokens=False`: a BOS is there because the frame has it, never twice.

Words of a person or of a model are data: a `</s>` inside a prompt is tokenised as those four characters, not as the
token that ends a turn. (A SentencePiece tokenizer then reads a space beside it: pieces are tokenised apart there.)

Loads no torch. What else ends a response, `generation/responses.py` decides (`stop_token_ids`).
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from dice_core.data.records import prompt_id
from dice_core.data.settings import ChatConfig
from dice_core.settings.base import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "qX7z"
"""Stands for a text in a template: no template has it, and it survives trimming."""


_KNOWN_CONTROL_TOKENS = frozenset(
    (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<</SYS>>",
    )
)
"""Of the templates in use: text that has one was most often made for a model, whichever that was."""


class PromptTooLongError(ValueError):
    """A prompt has more tokens than chat.max_prompt_tokens. The message is one line."""


@dataclass(frozen=True)
class _Frame:
    """The text around a prompt, and what ends a response."""

    before: str
    after: str
    end_of_turn: str
    """The text of the token that ends a response."""
    other_stops: tuple[str, ...] = ()
    """Tokens that end one too, though the format's own answers end otherwise."""
    trims: bool = False
    """Whether the template strips the prompt."""
    lead: str = ""
    """White space that the template has between `after` and a response."""
    tells_date: bool = False
    """Whether the template tells the model the date."""


_ZEPHYR = _Frame("<|system|>\n </s>\n<|user|>\n", "</s>\n<|assistant|>\n", "</s>")
"""From the `zephyr-custom` template of https://github.com/sail-sg/dice: the system prompt is one space, and no BOS."""

_LLAMA3 = _Frame(
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
    # As upstream's stop ids 128009 and 128001.
    other_stops=("<|end_of_text|>",),
)

_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")


@dataclass(frozen=True)
class ChatFormat:
    """How one model is spoken to. Made by `chat_format`."""

    tokenizer: "PreTrainedTokenizerBase"
    end_of_turn_id: int
    stop_token_ids: tuple[int, ...]
    """The end-of-turn id, then others of the format and the tokenizer's EOS."""
    max_prompt_tokens: int
    _frame: _Frame
    _control_tokens: dict[str, int]

    @property
    def tells_date(self) -> bool:
        """Whether prompts tell the model chat.date."""
        return self._frame.tells_date

    @property
    def control_tokens(self) -> frozenset[str]:
        """What shows that a text is templated already: control tokens of this format, and those of any other model.

        Of the tokenizer's special tokens only those that end a turn, stand in the frame or can be nothing else: people
        write <filename>, and it is a special token of SmolLM2's.
        """
        ends = {str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.stop_token_ids}
        frame = self._frame.before + self._frame.after
        own = {token for token in self._control_tokens if token in frame or "|" in token}
        return frozenset(own | ends | _KNOWN_CONTROL_TOKENS)

    def is_control_token(self, token_id: int) -> bool:
        """Return whether an id is a special token of the tokenizer, whichever, or ends a response."""
        return token_id in self._control_tokens.values() or self.is_end(token_id)

    def is_end(self, token_id: int) -> bool:
        """Return whether an id ends a response."""
        return token_id in self.stop_token_ids

    def prompt_token_ids(self, prompt: str) -> list[int]:
        """Return the ids of the framed prompt, up to the place where the response starts.

        Raises:
            PromptTooLongError: more than max_prompt_tokens of them.
        """
        ids = self._encode(self._frame.before, self._content(prompt), self._frame.after)
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"prompt {prompt_id(prompt)} has {len(ids)} tokens with its chat format, chat.max_prompt_tokens allows "
                f"{self.max_prompt_tokens}: shorten or drop {prompt[:40]!r}..., or raise chat.max_prompt_tokens"
            )
        return ids

    def response_token_ids(self, response: str) -> list[int]:
        """Return the ids that follow the prompt's when the model answers with this text, end-of-turn last.

        The text is stripped, as `decode_response` strips: white space that ends a written answer would set it apart
        from a sampled one. It is tokenised behind the frame that it follows: alone, a SentencePiece tokenizer would
        put a space in front of it. Where the frame's last characters would merge with the response's first, it is
        tokenised alone after all, for the ids of the prompt are given.
        """
        anchor = self._frame.after or self._frame.before
        text = response.strip()
        anchor_ids = self._encode(anchor, "", "")
        ids = self._encode(anchor + self._frame.lead, text, "") if text else anchor_ids
        if ids[: len(anchor_ids)] == anchor_ids:
            return [*ids[len(anchor_ids) :], self.end_of_turn_id]
        return [*self._encode("", text, ""), self.end_of_turn_id]

    def decode_response(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response: special tokens removed, stripped."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _content(self, prompt: str) -> str:
        return prompt.strip() if self._frame.trims else prompt

    def _encode(self, before: str, text: str, after: str) -> list[int]:
        return _encode(self.tokenizer, self._control_tokens, (before, text, after))


@dataclass(frozen=True)
class ExchangeFormat:
    """How a reward model reads a prompt and its answer, as its own template has them. Made by `exchange_format`.

    As the authors of such models tokenise: the template, with one BOS where the tokenizer begins every text with one.
    """

    tokenizer: "PreTrainedTokenizerBase"
    _template: tuple[str, str, str]
    """The text before the prompt, between prompt and answer, and after the answer."""
    _trims: tuple[bool, bool]
    """Whether the template strips the prompt, and the answer."""
    _control_tokens: dict[str, int]

    def token_ids(self, prompt: str, response: str) -> list[int]:
        """Return the ids of the whole exchange."""
        words = [text.strip() if trims else text for text, trims in zip((prompt, response), self._trims, strict=True)]
        before, between, after = self._template
        ids = _encode(self.tokenizer, self._control_tokens, (before, words[0], between, words[1], after))
        own = list(self.tokenizer("")["input_ids"])
        begins = own[:1] if own[:1] == [self.tokenizer.bos_token_id] else []
        return [*(begins if ids[:1] != begins else []), *ids, *own[len(begins) :]]


def exchange_format(tokenizer: "PreTrainedTokenizerBase") -> ExchangeFormat:
    """Return how a reward model's tokenizer puts a prompt and an answer, without a system prompt.

    Raises:
        ConfigError: it has no chat template, or one that cannot be used.
    """
    config, other = ChatConfig(), "Zx7q"
    rendered = _render(tokenizer, config, [("user", _PROBE), ("assistant", other)])
    before, found, rest = rendered.partition(_PROBE)
    between, found_too, after = rest.partition(other)
    padded = _render(tokenizer, config, [("user", f" {_PROBE}\n"), ("assistant", f" {other}\n")])
    for trims in ((False, False), (True, False), (False, True), (True, True)):
        words = [text if strips else f" {text}\n" for text, strips in zip((_PROBE, other), trims, strict=True)]
        if found and found_too and padded == f"{before}{words[0]}{between}{words[1]}{after}":
            return ExchangeFormat(tokenizer, (before, between, after), trims, _special_tokens(tokenizer))
    raise ConfigError(
        f"the chat template of {_name(tokenizer)} rewrites a prompt or its answer instead of framing them"
    )


def _encode(tokenizer: "PreTrainedTokenizerBase", control_tokens: dict[str, int], pieces: Sequence[str]) -> list[int]:
    """Tokenise pieces as one text: by turns of a template, where control tokens are read, and of others, where not."""
    whole = "".join(pieces)
    if not any(token in text for token in control_tokens for text in pieces[1::2]):
        return list(tokenizer.encode(whole, add_special_tokens=False))
    ends = list(accumulate(len(piece) for piece in pieces))
    words = list(zip(ends[0::2], ends[1::2], strict=False))
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    control_ids = set(control_tokens.values())
    ids: list[int] = []
    for token_id, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if token_id in control_ids and any(first <= start and end <= last for first, last in words):
            ids += tokenizer.encode(whole[start:end], add_special_tokens=False, split_special_tokens=True)
        else:
            ids.append(token_id)
    return ids


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def chat_format(tokenizer: "PreTrainedTokenizerBase", config: ChatConfig) -> ChatFormat:
    """Return the chat format of a model's tokenizer.

    Args:
        tokenizer: a fast one (`tokenizers`), as `models.load_tokenizer` returns.
        config: which format, and the longest prompt.

    Raises:
        ConfigError: the tokenizer lacks a token of the format, or has no usable chat template.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"{_name(tokenizer)}: a tokenizer.json is needed, this tokenizer has none")
    frames = {"zephyr": _ZEPHYR, "llama3": _LLAMA3}
    frame = frames.get(config.prompt_format) or _template_frame(tokenizer, config)
    control_tokens = _special_tokens(tokenizer)
    stops = [frame.end_of_turn, *frame.other_stops]
    for token in stops if config.prompt_format != "llama3" else [*_LLAMA3_TOKENS, *stops]:
        if token not in control_tokens:
            raise ConfigError(
                f"chat.prompt_format: {config.prompt_format!r} needs the special token {token!r}, which "
                f"{_name(tokenizer)} does not have: take the format the model was trained with, or 'model'"
            )
    stop_ids = [control_tokens[token] for token in stops]
    if tokenizer.eos_token_id is not None:
        stop_ids.append(tokenizer.eos_token_id)
    return ChatFormat(
        tokenizer, stop_ids[0], tuple(dict.fromkeys(stop_ids)), config.max_prompt_tokens, frame, control_tokens
    )


def any_format(tokenizer: "PreTrainedTokenizerBase") -> ChatFormat:
    """Return the model's own chat format, or none at all where it has no usable template: for responses alone.

    Raises:
        ConfigError: without a template, the tokenizer has no EOS token either.
    """
    try:
        return chat_format(tokenizer, ChatConfig())
    except ConfigError:
        if tokenizer.eos_token_id is None:
            raise
    end, frame = int(tokenizer.eos_token_id), _Frame("", "", str(tokenizer.eos_token))
    return ChatFormat(tokenizer, end, (end,), ChatConfig().max_prompt_tokens, frame, _special_tokens(tokenizer))


def _template_frame(tokenizer: "PreTrainedTokenizerBase", config: ChatConfig) -> _Frame:
    """Read the frame from the tokenizer's chat template, whatever it adds of its own (a system prompt, chat.date)."""
    rendered = _render(tokenizer, config, [("user", _PROBE)])
    before, found, after = rendered.rpartition(_PROBE)
    padded = _render(tokenizer, config, [("user", f" {_PROBE}\n")])
    trims = padded == rendered
    if not found or not (trims or padded == f"{before} {_PROBE}\n{after}"):
        raise ConfigError(
            f"chat.prompt_format: the chat template of {_name(tokenizer)} rewrites the prompt instead of framing it: "
            f"use 'zephyr' or 'llama3', or another template"
        )
    after, lead, tail = _around_answer(tokenizer, config, rendered, after)
    another_day = config.model_copy(update={"date": "1999-12-31" if config.date != "1999-12-31" else "2000-01-01"})
    tells_date = _render(tokenizer, another_day, [("user", _PROBE)]) != rendered
    return _Frame(before, after, _end_of_turn(tokenizer, tail), trims=trims, lead=lead, tells_date=tells_date)


def _around_answer(
    tokenizer: "PreTrainedTokenizerBase", config: ChatConfig, rendered: str, after: str
) -> tuple[str, str, str]:
    """Read what stands between a prompt and its answer, and behind the answer.

    A template without a generation prompt has the header of an answer with the answer alone: without it a model would
    go on with the person's turn.

    Returns:
        The text after the prompt, the white space before a response, and the text after it.
    """
    answered = _render(tokenizer, config, [("user", _PROBE), ("assistant", _PROBE)])
    upto, _, tail = answered.rpartition(_PROBE)
    continues = upto.startswith(rendered)
    header = upto.removeprefix(rendered) if continues else ""
    has_generation_prompt = _render(tokenizer, config, [("user", _PROBE)], generation_prompt=False) != rendered
    if not has_generation_prompt and _PROBE in upto and not continues:
        raise ConfigError(
            f"chat.prompt_format: the chat template of {_name(tokenizer)} has no generation prompt, and ends a "
            "question otherwise when an answer follows: take a template that knows add_generation_prompt"
        )
    if header.strip() and not has_generation_prompt:
        # Of "ASSISTANT: " the space is the answer's: most tokenizers make one token of it and the first word.
        start = header.rstrip(" ")
        return after + start, header.removeprefix(start), tail
    # Other words before the answer (an empty thought, say) are the model's to write: only white space is the frame's.
    return after, header if header.isspace() else "", tail


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    config: ChatConfig,
    turns: list[tuple[str, str]],
    *,
    generation_prompt: bool = True,
) -> str:
    """Render a conversation; after a question with the generation prompt, unless that is not wanted."""
    system = [("system", config.system_prompt)] if config.system_prompt else []
    messages = [{"role": role, "content": content} for role, content in [*system, *turns]]
    today = datetime.date.fromisoformat(config.date)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation_prompt and turns[-1][0] == "user",
            enable_thinking=config.enable_thinking,
            # Both ways in which templates ask for the date. transformers' own function looks at the clock.
            strftime_now=today.strftime,
            date_string=today.strftime("%d %b %Y"),
        )
    except Exception as error:
        # Jinja's own errors and whatever a template raises: it is the template's word on these settings.
        raise ConfigError(
            f"chat.prompt_format: 'model' cannot use the chat template of {_name(tokenizer)}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return str(text)


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", tail: str) -> str:
    """Return the special token that a template puts right after an answer, or else the EOS token."""
    ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False)
    added = tokenizer.added_tokens_decoder
    if ids and ids[0] in added and added[ids[0]].special:
        return str(added[ids[0]])
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"chat.prompt_format: neither the chat template of {_name(tokenizer)} nor its EOS token ends an answer"
        )
    return str(tokenizer.eos_token)


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return tokenizer.name_or_path or "the tokenizer"
