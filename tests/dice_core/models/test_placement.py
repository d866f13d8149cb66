"""Where models go, by numbers worked by hand; and that a spread one computes what a whole one does."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dice_core.accelerator import free_bytes
from dice_core.logprobs import attention, packing
from dice_core.logprobs.forward import PromptGroup, group_logps
from dice_core.logprobs.output_head import target_logps
from dice_core.models.files import ModelError
from dice_core.models.loading import load_model, move
from dice_core.models.placement import bring, lay_out, lay_out_alone, let_inputs_follow, parts_of, working_bytes

GIB = 1 << 30
LLAMA = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    attn_implementation="eager",
)
PARTS = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "model.rotary_emb", "lm_head"]
GROUPS = [PromptGroup([5, 6, 7], [[8, 9, 10, 1], [11, 1]]), PromptGroup([12], [[13, 14, 1]])]


def llama(config: LlamaConfig = LLAMA) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def three(name: str, size: int) -> dict[str, int]:
    return {f"{name}.{i}": size for i in range(3)}


@pytest.mark.parametrize(
    ("models", "free", "expected"),
    [
        # Both on one card, as long as they fit there; else each on a card of its own.
        ([three("a", 10), three("b", 10)], [60, 60], ["0", "0"]),
        ([three("a", 10), three("b", 10)], [59, 60], ["0", "1"]),
        # None has room for 30: a part that does not fit begins the next card, and what is left is the second model's.
        ([three("a", 10)], [25, 25], ["0 0 1"]),
        ([three("a", 10), three("b", 5)], [25, 15, 9], ["0 0 1", "0 1 2"]),
        ([three("a", 10), three("b", 5)], [25, 15, 4], None),
        ([three("a", 10)], [19, 19], None),
        ([three("a", 10)], [29], None),
        # A card that something else has filled.
        ([three("a", 10)], [-5, 20, 10], ["1 1 2"]),
    ],
)
def test_models_lie_whole_where_there_is_room_and_are_spread_where_there_is_none(
    models: list[dict[str, int]], free: list[int], expected: list[str] | None
) -> None:
    layouts = lay_out(models, {str(i): size for i, size in enumerate(free)})
    assert (layouts and [" ".join(layout.values()) for layout in layouts]) == expected


@given(st.lists(st.lists(st.integers(1, 50), min_size=1), max_size=3), st.lists(st.integers(-10, 90), min_size=1))
def test_no_device_gets_more_than_it_has_room_for_and_parts_stay_in_order(
    sizes: list[list[int]], free: list[int]
) -> None:
    models = [{f"{i}.{k}": size for k, size in enumerate(parts)} for i, parts in enumerate(sizes)]
    layouts = lay_out(models, {str(i): size for i, size in enumerate(free)})
    if layouts is None:
        # On every card less was left than a part takes.
        num_bytes, largest = sum(map(sum, sizes)), max(map(max, sizes))
        assert sum(max(0, room) for room in free) < num_bytes + largest * len(free)
        return
    filled = dict.fromkeys(map(str, range(len(free))), 0)
    for parts, layout in zip(models, layouts, strict=True):
        if "" in layout:
            filled[layout[""]] += sum(parts.values())
            continue
        assert list(layout) == list(parts)
        assert all(int(before) <= int(after) for before, after in pairwise(layout.values()))
        for name, device in layout.items():
            filled[device] += parts[name]
    assert all(size <= max(0, room) for size, room in zip(filled.values(), free, strict=True))


def test_parts_are_layers_embeddings_norm_and_head_and_every_byte_counts_once() -> None:
    parts = parts_of(llama())
    assert list(parts) == PARTS
    # Query and output 32 x 32, key and value 16 x 32, three matrices 48 x 32, two norms.
    assert parts["model.layers.2"] == 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)
    assert parts["model.embed_tokens"] == parts["lm_head"] == 4 * 97 * 32
    tied = parts_of(llama(LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})))
    assert (tied["model.embed_tokens"], tied["lm_head"]) == (0, 4 * 97 * 32), "moved with the last part that has it"


def test_a_model_that_names_nothing_that_must_stay_whole_stays_whole() -> None:
    model = llama()
    model._no_split_modules = None
    assert list(parts_of(model)) == [""]
    assert lay_out([parts_of(model)], {"0": 1e4, "1": 1e9}) == [{"": "1"}]


def test_llama_3_70b_takes_two_cards_of_80_gib_and_both_its_models_take_four() -> None:
    """By hand: 141 GB each in bfloat16, and a batch of 16,384 tokens needs 10.8 GiB beside them."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    parts, working = parts_of(model), working_bytes(model, 16384)
    assert sum(parts.values()) == pytest.approx(2 * 70_553_706_496, rel=1e-6)
    assert working == 16384 * (16 * 8192 + 6 * 28672) * 2 + 1.5 * GIB
    cards = {f"cuda:{i}": 79.0 * GIB for i in range(4)}
    alone = lay_out([parts], cards, working)
    assert alone is not None and set(alone[0].values()) == {"cuda:0", "cuda:1"}
    both = lay_out([parts, parts], cards, working)
    assert both is not None and set(both[1].values()) == {"cuda:1", "cuda:2", "cuda:3"}
    assert lay_out([parts, parts], dict(list(cards.items())[:3]), working) is None, "they take turns"
    message = (
        "llama: its weights take 131.4 GiB and a batch 10.8 GiB on each GPU, of which this process has 1 with 79.0 GiB "
        "free: take more"
    )
    with pytest.raises(ModelError, match=re.escape(message)):
        lay_out_alone(model, {"cuda:0": 79 * GIB}, working, "take more")


@pytest.fixture(params=["llama", "gpt2", "gemma2, tied", "one row each"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": llama,
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4)
        ),
        "gemma2, tied": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**sizes, num_key_value_heads=2, intermediate_size=48, sliding_window=4)
        ),
        "one row each": lambda: llama(LlamaConfig(**{**LLAMA.to_dict(), "rope_parameters": rope})),
    }
    makers[request.param]().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*each response runs in a row of its own")
def test_a_spread_model_gives_the_same_log_probs_to_the_bit_also_after_it_was_away(folder: Path) -> None:
    whole, model = load_model(folder, "float32"), load_model(folder, "float32")
    layout = dict.fromkeys(parts_of(model), "cpu")
    assert len(layout) > 4
    let_inputs_follow(model, layout)
    bring(model, layout)
    expected = group_logps(whole, GROUPS, tokens_per_batch=64)
    assert group_logps(model, GROUPS, tokens_per_batch=64) == expected
    move(model, "cpu")
    bring(model, layout)
    assert group_logps(model, GROUPS, tokens_per_batch=64) == expected


def test_what_parts_are_given_is_on_their_device_whichever_that_is() -> None:
    """On cards that are not there: torch checks the devices of tensors without values, and refuses to mix them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _on_two_cards()
        row = packing.pack_row(GROUPS)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            _hidden(model, row)
        let_inputs_follow(model, dict.fromkeys(PARTS, ""))
        hidden = _hidden(model, row)
        assert hidden.device == torch.device("cuda:1")
        chosen = hidden[torch.as_tensor(row.predictors, device=hidden.device)]
        # The targets are wherever the row was made.
        logps = target_logps(model, chosen, torch.as_tensor(row.targets, device="cuda:0"))
        assert logps.device == torch.device("cuda:1") and logps.shape == row.targets.shape


def _on_two_cards() -> PreTrainedModel:
    with torch.device("cuda:0"):
        model = LlamaForCausalLM(LLAMA).eval()
    for part in PARTS[3:]:
        for module in model.get_submodule(part).modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(weight, device="cuda:1")))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty_like(buffer, device="cuda:1"))
    return model


def _hidden(model: PreTrainedModel, row: packing.Row) -> torch.Tensor:
    ids, positions, *ranges = (
        torch.as_tensor(values, device="cuda:0")[None]
        for values in (row.input_ids, row.positions, row.own_starts, row.prompt_starts, row.prompt_ends)
    )
    visible = attention.dense_mask(*ranges)  # (1, 1, tokens, tokens)
    mask = torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, -1e9)
    decoder = model.get_decoder()
    hidden: torch.Tensor = decoder(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)[0][0]
    return hidden


def test_the_mask_of_flex_attention_takes_its_ranges_along_and_is_made_once_for_a_device() -> None:
    row = packing.padded(packing.pack_row(GROUPS), attention.BLOCK)
    ranges = [torch.from_numpy(part)[None] for part in (row.own_starts, row.prompt_starts, row.prompt_ends)]
    mask = attention.block_mask(*ranges)
    assert mask.to("cpu") is mask
    there = mask.to("meta")
    zero = torch.zeros(1, dtype=torch.long, device="meta")
    # With a range left behind it would mix devices, which torch refuses.
    assert there.mask_mod(zero, zero, zero, zero).device.type == there.kv_indices.device.type == "meta"
    assert mask.to(torch.device("meta")) is there


@pytest.mark.gpu
@pytest.mark.slow
def test_layers_on_two_gpus_give_the_log_probs_of_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is shown here: where there are two, set CUDA_VISIBLE_DEVICES=0,1")
    llama(LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 128})).save_pretrained(tmp_path)
    one, two = load_model(tmp_path, "bfloat16", device="cuda:0"), load_model(tmp_path, "bfloat16")
    parts = parts_of(two)
    (layout,) = lay_out([parts], dict.fromkeys(free_bytes(), 0.6 * sum(parts.values()))) or [{}]
    assert set(layout.values()) == {"cuda:0", "cuda:1"}
    let_inputs_follow(two, layout)
    bring(two, layout)
    expected = [pytest.approx(sums, abs=1e-3) for sums in group_logps(one, GROUPS, tokens_per_batch=512)]
    assert group_logps(two, GROUPS, tokens_per_batch=512) == expected
