"""A reward model in vLLM: a sequence classification model with one label, which gives an answer a number.

It reads an answer as its own chat template has it, without a system prompt (`data.chat.exchange_format`), and its raw
number counts: vLLM's pooling runner would put it through a sigmoid.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dice_core.data.chat import ExchangeFormat, exchange_format
from dice_core.generation.engine import answered, started_engine
from dice_core.judges.settings import JudgeModelConfig
from dice_core.models.files import ModelError
from dice_core.settings.base import ConfigError

OnProgress = Callable[[int, int], None] | None
Exchange = tuple[str, str]
"""A prompt and an answer to it."""
Rewards = Callable[[Sequence[Exchange], OnProgress], list[float | None]]
"""Returns the raw reward of each exchange, in order; None of one that is too long."""


@contextmanager
def started_reward_model(folder: Path, config: JudgeModelConfig, section: str) -> Iterator[Rewards]:
    """Start vLLM with a reward model, and yield a function that gives rewards.

    Args:
        folder: of fetch_model.
        config: precision and memory, and the longest exchange.
        section: of the settings, for messages.

    Raises:
        ModelError: the model gives no reward, or its chat template cannot be used.
        GenerationError: vLLM failed to start.
    """
    from dice_core.models.loading import context_length, load_config, load_tokenizer

    model_config = load_config(folder)
    names = model_config.architectures or [""]
    if not names[0].endswith("ForSequenceClassification") or model_config.num_labels != 1:
        raise ModelError(f"{folder}: {names[0]} with {model_config.num_labels} labels is no reward model")
    try:
        template = exchange_format(load_tokenizer(folder))
    except ConfigError as error:
        raise ModelError(f"{folder}: gives no rewards: {error}") from None
    max_length = min(config.max_length, context_length(model_config))
    pad_id = model_config.get_text_config().pad_token_id
    with started_engine(folder, config, max_length, section=section, pools=True) as engine:
        from vllm import PoolingParams

        params = PoolingParams(task="classify", use_activation=False)

        def rewards(exchanges: Sequence[Exchange], on_progress: OnProgress = None) -> list[float | None]:
            ids = {exchange: _token_ids(template, exchange, pad_id) for exchange in dict.fromkeys(exchanges)}
            asked = [exchange for exchange in ids if len(ids[exchange]) <= max_length]
            outputs = answered(engine, [(ids[exchange], params) for exchange in asked], on_progress)
            found = {exchange: float(output.outputs.data) for exchange, output in zip(asked, outputs, strict=True)}
            return [found.get(exchange) for exchange in exchanges]

        yield rewards


def _token_ids(template: ExchangeFormat, exchange: Exchange, pad_id: int | None) -> list[int]:
    """Return the ids up to the last that is not padding: there the model was trained to have its reward."""
    ids = template.token_ids(*exchange)
    while len(ids) > 1 and ids[-1] == pad_id:
        ids.pop()
    return ids
