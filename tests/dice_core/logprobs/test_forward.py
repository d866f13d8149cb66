"""Log-probs of prompt groups against a plain forward of one row at a time, for every family and way, with gradients."""

import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dice_core.logprobs import attention, packing, ways
from dice_core.logprobs.forward import PromptGroup, group_logps, packed_token_logps
from dice_core.logprobs.output_head import target_logps
from dice_core.models.files import ModelError
from dice_core.models.loading import load_model
from dice_core.models.rotary import reset_positions

pytestmark = pytest.mark.slow

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FALCON = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 14}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# Products far beyond the cap, so that it shows.
CAPPED: dict[str, Any] = {"head_dim": 16, "attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 1}

PACKED = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "phi, a head with bias": transformers.PhiConfig(**SHAPE),
    "mistral, window shorter than the prompt": transformers.MistralConfig(**SHAPE, sliding_window=5),
    "qwen2, window in one layer": transformers.Qwen2Config(**SHAPE, use_sliding_window=True, **TWO_KINDS),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "gemma2, soft cap": transformers.Gemma2Config(**SHAPE, **CAPPED, sliding_window=6, final_logit_softcapping=3.0),
    "gemma3, windows": transformers.Gemma3TextConfig(**SHAPE, head_dim=16, **TWO_KINDS),
    "granite, divided logits": transformers.GraniteConfig(**SHAPE, logits_scaling=4.0),
    "cohere, multiplied logits": transformers.CohereConfig(**SHAPE, logit_scale=0.3),
    "gpt2, learned positions": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4),
}
SEPARATE = {
    "llama, positions stretched by what came before": transformers.LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 14},
        rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0},
    ),
    "falcon, ALiBi": transformers.FalconConfig(**FALCON, alibi=True),
    "lfm2, convolutions": transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    # Stretched from 15 positions on: some of the rows are longer, and some are not.
    "phi3, positions stretched by the longest row": transformers.Phi3Config(
        **SHAPE,
        original_max_position_embeddings=14,
        rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, **ROPE},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep tiny matrices on one core: with more, threads mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_model(config: PretrainedConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """Return a model with random weights large enough that attention to a wrong token shows."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return model


def make_groups(shapes: Sequence[tuple[int, Sequence[int]]], vocabulary: int = VOCABULARY) -> list[PromptGroup]:
    """Return groups of random tokens: the length of a prompt and of its responses."""
    draw = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    return [PromptGroup(tokens(prompt), [tokens(length) for length in lengths]) for prompt, lengths in shapes]


GROUPS = make_groups([(7, [9, 1, 4]), (1, [3, 12]), (20, [2])])


def plain_logps(model: PreTrainedModel, groups: Sequence[PromptGroup]) -> list[list[Tensor]]:
    """One row at a time, all logits, no masks, the model's own formula of attention, nothing kept: the definition."""

    def logps(prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        reset_positions(model)
        ids = torch.tensor([[*prompt, *response]], device=model.device)
        found = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        return found[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]

    attention = model.config._attn_implementation
    if model._supports_attention_backend:
        model.set_attn_implementation("eager")
    found = [[logps(group.prompt_token_ids, response) for response in group.responses] for group in groups]
    if model._supports_attention_backend:
        model.set_attn_implementation(attention)
    return found


def flat(groups: list[list[Any]]) -> list[Any]:
    return [part for group in groups for part in group]


def largest_difference(found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    assert [[len(part) for part in group] for group in found] == [[len(part) for part in group] for group in expected]
    with torch.no_grad():
        pairs = zip(flat(found), flat(expected), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs if len(a))


def gradients(model: PreTrainedModel, logps: list[list[Tensor]]) -> list[Tensor]:
    """Return the gradients of something that treats every token differently."""
    loss = sum(((index + 1) * part.sin().sum() for index, part in enumerate(flat(logps))), torch.zeros(()))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [grad for grad in torch.autograd.grad(loss, weights, allow_unused=True) if grad is not None]


def check_against_plain(model: PreTrainedModel) -> None:
    expected = plain_logps(model, GROUPS)
    found = packed_token_logps(model, GROUPS, chunk_size=5)
    assert largest_difference(found, expected) < 1e-4
    for grad, plain in zip(gradients(model, found), gradients(model, expected), strict=True):
        assert float((grad - plain).norm()) <= 1e-3 * float(plain.norm()) + 1e-6
    for sums, logps in zip(group_logps(model, GROUPS, tokens_per_batch=64), expected, strict=True):
        assert sums == pytest.approx([float(part.detach().sum()) for part in logps], abs=1e-3)


@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED.keys())
def test_packed_log_probs_and_gradients_are_those_of_single_rows(config: PretrainedConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_against_plain(make_model(config))


GEMMA2 = transformers.Gemma2Config(**SHAPE, **CAPPED, sliding_window=6)


@pytest.mark.parametrize("attention_mask", [None, [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9]], ids=["alone", "padded left"])
def test_a_plain_forward_does_not_drop_the_soft_cap_of_attention_either(attention_mask: list[list[int]] | None) -> None:
    """As answers are sampled. transformers' SDPA drops it without a word."""
    model = make_model(GEMMA2, "eager")
    ids = torch.arange(18).reshape(2, 9) + 3
    given = {"input_ids": ids, "attention_mask": None if attention_mask is None else torch.tensor(attention_mask)}
    with torch.no_grad():
        expected = model(**given).logits
        model.set_attn_implementation("sdpa")
        assert float((model(**given).logits - expected)[:, 3:].abs().max()) > 0.01
        attention.use_checked_attention(model)
        assert float((model(**given).logits - expected)[:, 3:].abs().max()) < 1e-4
        step = model.generate(**given, max_new_tokens=4, do_sample=False)
        model.set_attn_implementation("eager")
        assert torch.equal(step, model.generate(**given, max_new_tokens=4, do_sample=False))


def test_what_an_attention_has_that_is_not_known_is_refused_and_not_dropped() -> None:
    query, module = torch.randn(1, 4, 3, 8), nn.Identity()
    known = {
        "dropout": 0.0,
        "sliding_window": 5,
        "position_ids": torch.arange(3),
        "output_attentions": False,
        "s_aux": None,
    }
    attention.segment_attention(module, query, query, query, None, **known)
    for name in ("s_aux", "position_bias", "indices", "something_new"):
        with pytest.raises(ModelError, match=f"Identity: its attention has {name}, which is not known here"):
            attention.segment_attention(module, query, query, query, None, **known | {name: torch.ones(4)})


def test_sinks_run_by_the_model_s_own_formula() -> None:
    """SDPA has none: transformers runs gpt-oss with eager attention, and a mask of all tokens by all tokens."""
    config = transformers.GptOssConfig(**SHAPE, head_dim=16, num_local_experts=4, sliding_window=4)
    check_against_plain(make_model(config))


class _OwnMasks(transformers.LlamaModel):
    """Asks for its masks in another way than by transformers' functions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_that_makes_its_masks_in_a_way_of_its_own_runs_in_separate_rows() -> None:
    model = make_model(PACKED["llama"])
    model.model.__class__ = _OwnMasks
    with pytest.warns(UserWarning, match="it makes its masks in a way of its own, so each response runs in a row"):
        check_against_plain(model)


def test_a_model_without_a_decoder_that_is_known_is_refused() -> None:
    """Llama 4, with attention in chunks: transformers takes the whole model for its decoder."""
    config = transformers.Llama4TextConfig(
        **SHAPE, head_dim=16, attention_chunk_size=5, num_local_experts=2, intermediate_size_mlp=48
    )
    with pytest.raises(ModelError, match="llama4_text: transformers does not tell its decoder from its head"):
        group_logps(make_model(config), GROUPS, tokens_per_batch=64)


@pytest.mark.filterwarnings("ignore:llama. its positions")
def test_stretched_positions_do_not_depend_on_the_order_of_texts() -> None:
    model = make_model(SEPARATE["llama, positions stretched by what came before"])
    forwards = group_logps(model, GROUPS, tokens_per_batch=64)
    assert group_logps(model, GROUPS[::-1], tokens_per_batch=64)[::-1] == forwards
    assert group_logps(model, GROUPS[1:2], tokens_per_batch=64) == forwards[1:2]


# The smallest heads that FlexAttention has kernels for.
HEADS_OF_16 = {**SHAPE, "hidden_size": 64}


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**HEADS_OF_16),
        transformers.MistralConfig(**HEADS_OF_16, sliding_window=5),
        transformers.Gemma3TextConfig(**HEADS_OF_16, head_dim=16, **TWO_KINDS),
    ],
    ids=["llama", "mistral, window shorter than the prompt", "gemma3, windows"],
)
def test_the_attention_of_each_device_gives_log_probs_and_gradients_of_single_rows(
    config: PretrainedConfig, device: str
) -> None:
    """SDPA by segments on a CPU, compiled FlexAttention on a GPU."""
    model = make_model(config).to(device)
    check_against_plain(model)
    assert model.config._attn_implementation == {"cpu": "dice_segments", "cuda": "flex_attention"}[device]


def test_eager_attention_takes_the_mask_too() -> None:
    check_against_plain(make_model(PACKED["mistral, window shorter than the prompt"], "eager"))


def test_a_row_is_cut_into_prompts_and_responses_that_know_their_prompt() -> None:
    row = packing.pack_row(make_groups([(3, [4, 1, 2]), (2, [3])]))
    # 3 tokens of prompt; the last token of a response is no input, so responses of 4, 1 and 2 take 3, 0 and 1.
    expected = [[0, 3, 0, 0, 9], [3, 6, 0, 3, 9], [6, 7, 0, 3, 9], [7, 9, 7, 7, 9], [9, 11, 7, 9, 9]]
    assert attention.segment_table(row, 9)[0, 0].tolist() == expected


def test_a_model_set_to_segments_still_does_an_ordinary_padded_batch() -> None:
    model = make_model(PACKED["mistral, window shorter than the prompt"])
    ids = torch.arange(20).reshape(2, 10)
    is_input = torch.ones_like(ids)
    is_input[1, :4] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=is_input).logits[:, 4:]
        packed_token_logps(model, GROUPS)
        assert model.config._attn_implementation == "dice_segments"
        found = model(input_ids=ids, attention_mask=is_input).logits[:, 4:]
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("config", SEPARATE.values(), ids=SEPARATE.keys())
def test_a_model_that_cannot_be_masked_runs_in_separate_rows_and_says_so(config: PretrainedConfig) -> None:
    with pytest.warns(UserWarning, match="in a row of its own"):
        check_against_plain(make_model(config))


@pytest.mark.parametrize(
    ("differs", "is_taken"),
    [
        ({}, True),
        ({"generation": 9, "dtype": torch.float16}, True),
        ({"generation": None}, False),
        ({"generation": 7}, False),
        ({"generation": 10}, False),
        ({"dtype": torch.float32}, False),
        ({"head_size": 512}, False),
        ({"head_size": None}, False),
        ({"is_installed": False}, False),
        ({"is_supported": False}, False),
        ({"attention": "eager"}, False),
    ],
)
def test_separate_rows_take_flash_attention_where_there_is_a_kernel(differs: dict[str, Any], is_taken: bool) -> None:
    on_a100 = {"attention": "sdpa", "is_supported": True, "is_installed": True, "generation": 8, "head_size": 128}
    assert ways.takes_flash_attention(**{**on_a100, "dtype": torch.bfloat16, **differs}) is is_taken


@pytest.mark.parametrize("name", SEPARATE)
def test_why_a_model_runs_in_separate_rows_stays_the_same_with_flash_attention(name: str) -> None:
    model = make_model(SEPARATE[name])
    reason = ways.unmaskable(model)
    model.config._attn_implementation = "flash_attention_2"
    assert ways.unmaskable(model) == reason


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama", "mistral, window shorter than the prompt", "gemma3, windows"])
def test_flex_attention_sees_what_the_dense_mask_shows(name: str) -> None:
    # Uncompiled, by other code than on a GPU: the blocks are tested below. A compiler would take longer than
    # all the other tests, and CPUs have no backward of FlexAttention.
    model = make_model(PACKED[name], "flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = packed_token_logps(model, GROUPS)
        sums = group_logps(model, GROUPS, tokens_per_batch=24)
        model.set_attn_implementation("sdpa")
        expected = plain_logps(model, GROUPS)
    assert largest_difference(found, expected) < 1e-4
    assert flat(sums) == pytest.approx([float(part.sum()) for part in flat(expected)], abs=1e-3)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(0, 300), max_size=4)), min_size=1, max_size=4),
    st.sampled_from([None, 1, 50, 129, 300]),
)
@settings(max_examples=30, deadline=None)
def test_blocks_called_full_are_full_and_blocks_left_out_are_empty(
    shapes: list[tuple[int, list[int]]], window: int | None
) -> None:
    row = packing.pack_row(make_groups(shapes))
    row = ways.filled(row if window is None else packing.windowed(row, window), "flex")
    ranges = [torch.from_numpy(part)[None] for part in (row.own_starts, row.prompt_starts, row.prompt_ends)]
    mask, blocks = attention.dense_mask(*ranges)[0, 0], attention.block_mask(*ranges)
    num_seen = mask.unfold(0, 128, 128).unfold(1, 128, 128).sum((-2, -1))
    kinds = torch.zeros_like(num_seen)
    for query in range(len(kinds)):
        kinds[query, blocks.kv_indices[0, 0, query, : blocks.kv_num_blocks[0, 0, query]]] = 1
        kinds[query, blocks.full_kv_indices[0, 0, query, : blocks.full_kv_num_blocks[0, 0, query]]] = 2
    assert torch.equal(kinds == 2, num_seen == 128 * 128)
    assert torch.equal(kinds == 0, num_seen == 0)
    places = torch.arange(mask.shape[0])
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(blocks.mask_mod(zero, zero, places[:, None], places), mask)


LLAMA = make_model(PACKED["llama"])


@given(
    st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(0, 9), max_size=5)), max_size=4),
    st.integers(1, 80),
    st.integers(1, 30),
)
@settings(max_examples=25, deadline=None)
def test_neither_neighbours_nor_batches_nor_chunks_change_a_log_prob(
    shapes: list[tuple[int, list[int]]], tokens_per_batch: int, chunk_size: int
) -> None:
    groups = make_groups(shapes)
    with torch.no_grad():
        expected = [[float(part.double().sum()) for part in group] for group in plain_logps(LLAMA, groups)]
        packed = packed_token_logps(LLAMA, groups, chunk_size=chunk_size)
    batched = group_logps(LLAMA, groups, tokens_per_batch=tokens_per_batch)
    for i, logps in enumerate(expected):
        assert [float(part.double().sum()) for part in packed[i]] == pytest.approx(logps, abs=1e-3)
        assert batched[i] == pytest.approx(logps, abs=1e-3)


def test_progress_counts_responses_up_to_all_of_them() -> None:
    seen: list[tuple[int, int]] = []
    group_logps(LLAMA, GROUPS, tokens_per_batch=16, on_progress=lambda done, num_all: seen.append((done, num_all)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {num_all for _, num_all in seen} == {6}
    assert seen[-1] == (6, 6)


def test_under_bfloat16_autocast_the_result_is_float32_and_near() -> None:
    expected = plain_logps(LLAMA, GROUPS)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_token_logps(LLAMA, GROUPS)
    assert all(part.dtype == torch.float32 for part in flat(found))
    assert largest_difference(found, expected) < 0.5
    wanted = torch.cat([grad.flatten() for grad in gradients(LLAMA, expected)])
    grads = torch.cat([grad.flatten() for grad in gradients(LLAMA, found)])
    assert float(nn.functional.cosine_similarity(grads, wanted, dim=0)) > 0.99


def test_checkpointed_layers_give_the_same_gradients() -> None:
    model = make_model(PACKED["qwen2, window in one layer"])
    expected = gradients(model, packed_token_logps(model, GROUPS))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for grad, plain in zip(gradients(model, packed_token_logps(model, GROUPS)), expected, strict=True):
        assert torch.allclose(grad, plain, rtol=1e-4, atol=1e-6)


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements any new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor):
                self.num_elements = max(self.num_elements, part.numel())
        return result


def test_no_tensor_is_as_large_as_the_logits_of_all_tokens() -> None:
    vocabulary, num_tokens, chunk_size = 5000, 300, 50
    model = make_model(transformers.LlamaConfig(**{**SHAPE, "vocab_size": vocabulary}))
    groups = make_groups([(20, [100, 100]), (30, [100])], vocabulary)
    packed_token_logps(model, groups)  # the model's logits are compared once with 8 tokens
    with _LargestTensor() as largest:
        gradients(model, packed_token_logps(model, groups, chunk_size=chunk_size))
    # A chunk's logits, and the weights of embedding and head, are the largest things there are.
    assert largest.num_elements == max(chunk_size, SHAPE["hidden_size"]) * vocabulary
    assert largest.num_elements < num_tokens * vocabulary


def test_the_head_runs_once_whatever_the_number_of_chunks() -> None:
    # ZeRO-3 collects the head's weights in hooks: processes with more tokens must not call it more often.
    calls: list[nn.Module] = []
    with LLAMA.lm_head.register_forward_pre_hook(lambda head, _: calls.append(head)):
        packed_token_logps(LLAMA, GROUPS, chunk_size=3)
    assert calls == [LLAMA.lm_head]
    assert "forward" not in vars(LLAMA.lm_head)


def test_logits_made_in_an_unknown_way_are_refused() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    with pytest.raises(ModelError, match="llama: its logits are not its head's output"):
        group_logps(Doubled(PACKED["llama"]).eval(), GROUPS, tokens_per_batch=64)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do() -> None:
    model = make_model(PACKED["llama"])
    model.lm_head.weight.requires_grad_(False)
    hidden = torch.randn(4, 32, requires_grad=True)
    target_logps(model, hidden, torch.tensor([5, 6, 7, 8]), chunk_size=3).sum().backward()
    assert hidden.grad is not None and model.lm_head.weight.grad is None


def test_on_smollm_responses_of_a_chat_score_as_in_single_rows(smollm: Path) -> None:
    model = load_model(smollm, "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    answers = ["Paris.", "The capital of France is Paris, a city on the Seine.", "I do not know"]
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    group = PromptGroup(tokenizer.encode(prompt), [tokenizer.encode(f"{answer}<|im_end|>") for answer in answers])
    with torch.no_grad():
        expected = plain_logps(model, [group])
        assert largest_difference(packed_token_logps(model, [group]), expected) < 1e-4
    sums = [float(part.sum()) for part in expected[0]]
    assert group_logps(model, [group], tokens_per_batch=2048)[0] == pytest.approx(sums, abs=1e-3)
    assert sums[0] > sums[2]
