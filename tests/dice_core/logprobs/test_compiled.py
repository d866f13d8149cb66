"""FlexAttention is compiled for few kinds of rows and passes, and never runs uncompiled without a word."""

import copy
import functools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from dice_core.logprobs.compiled import COMPILE_LIMIT, use_flex_attention
from dice_core.logprobs.forward import PromptGroup, group_logps, packed_token_logps
from dice_core.logprobs.trial import check_model
from dice_core.models.files import ModelError

pytestmark = pytest.mark.slow

# Heads of 16 are the smallest that FlexAttention has kernels for.
SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "head_dim": 16}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "gemma3, windows": transformers.Gemma3TextConfig(**SHAPE, **TWO_KINDS),
}
# As batches come: one block of 128 tokens and several, a prompt with one response and with many, two prompts in a row.
LENGTHS: list[list[tuple[int, list[int]]]] = [
    [(7, [9, 1, 4])],
    [(100, [200, 100])],
    [(300, [200, 100, 100]), (20, [30])],
    [(20, [900, 100])],
    [(20, [100])],
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def _traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch trace and guard as ever, and run what it traced as it is: a CPU has no kernel for backward."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def make_model(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Return a model as a GPU would have it: tried first, then switched to FlexAttention."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    check_model(model)
    use_flex_attention(model)
    return model


def make_groups(shapes: Sequence[tuple[int, list[int]]]) -> list[PromptGroup]:
    """Return groups of random tokens: the length of a prompt and of its responses."""
    draw = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 97) for _ in range(count)]

    return [PromptGroup(tokens(prompt), [tokens(length) for length in lengths]) for prompt, lengths in shapes]


def num_compiled() -> int:
    """Return how often torch has compiled something; FlexAttention is all that is compiled here."""
    return counters["frames"]["ok"]


def score(*models: transformers.PreTrainedModel) -> None:
    for shapes in LENGTHS:
        for model in models:
            group_logps(model, make_groups(shapes), tokens_per_batch=4096)


def train(model: transformers.PreTrainedModel) -> None:
    """Make a pass without gradient and one with it for every batch, as training does; layers are done anew."""
    for shapes in LENGTHS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                packed_token_logps(model.eval(), make_groups(shapes))
            found = packed_token_logps(model.train(), make_groups(shapes))
        torch.stack([logps.sum() for group in found for logps in group]).sum().backward()


@pytest.mark.usefixtures("_traced_alone")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_scoring_compiles_attention_twice_and_training_at_most_eight_times(
    config: transformers.PretrainedConfig,
) -> None:
    policy, reference = make_model(config), make_model(config)
    score(policy, reference)
    assert num_compiled() == 2
    # Training may begin with a reference of its own, as scoring does.
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train(policy)
    assert 4 <= (before := num_compiled()) <= 8 < COMPILE_LIMIT
    train(policy)
    assert num_compiled() == before


def test_one_kind_too_many_is_an_error_of_one_line_and_not_a_slow_kernel() -> None:
    """Compiled in earnest, as CPUs have the forward of FlexAttention."""
    model = make_model(CONFIGS["llama"])
    torch._dynamo.config.recompile_limit = 1
    group_logps(model, make_groups(LENGTHS[0]), tokens_per_batch=4096)
    with pytest.raises(ModelError, match="LlamaAttention: FlexAttention has been compiled 1 times") as caught:
        group_logps(model, make_groups(LENGTHS[1]), tokens_per_batch=4096)
    assert "recompile_limit" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert num_compiled() == 1
