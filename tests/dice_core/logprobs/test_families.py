"""Families of models as transformers has them, tiny and random: each gives the log-probs of single rows, or is refused.

`test_forward.py` looks at a few of them closely. Here it is breadth that counts: no family may be wrong without a word,
and what a new version of transformers does to one shows.
"""

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from dice_core.logprobs import attention, trial, ways
from dice_core.logprobs.forward import packed_token_logps
from dice_core.models.files import ModelError
from tests.dice_core.logprobs.test_forward import (
    GROUPS,
    PACKED,
    VOCABULARY,
    largest_difference,
    make_model,
    plain_logps,
)

pytestmark = pytest.mark.slow

# Sizes under the names that families have for them.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "state_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "time_step_rank"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **{"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2},
    **{"sliding_window": 6, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "rotary_dim": 4},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
}
# Attention over a low rank has a key for every head, and heads of another size.
LOW_RANK = {"num_key_value_heads": 4, "head_dim": None}
FULL = {"layer_types": ["full_attention", "full_attention"]}

IN_ONE_ROW: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": FULL,
    "qwen2_moe": FULL,
    "qwen3": FULL,
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "granite": {},
    "cohere": {},
    "cohere2": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "starcoder2": {},
    "smollm3": {},
    "deepseek_v3": LOW_RANK,
    "minicpm3": LOW_RANK,
    # Its config has a window, which it does not heed.
    "moshi": {},
    # It makes a view of what attention returns.
    "jetmoe": {},
}
IN_SEPARATE_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "takes no positions"),
    "mpt": ({}, "takes no positions"),
    "falcon": ({}, "its attention takes no mask of ours"),
    "stablelm": ({}, "its attention takes no mask of ours"),
    "gptj": ({}, "its attention takes no mask of ours"),
    "mamba": ({}, "linear_attention"),
    "rwkv": ({}, "stateful"),
    "recurrent_gemma": ({}, "stateful"),
    "doge": ({}, "DogeAttention"),
    "minimax_m3_vl_text": ({}, "MiniMaxM3VLAttention"),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "xlm": ({}, "its tokens see those that come after them"),
    "bert": ({"is_decoder": True}, "its logits are not its head's output"),
    "rembert": ({"is_decoder": True}, "does not run on a few tokens"),
    "deepseek_v32": (LOW_RANK, "its attention has indices, which is not known here"),
    "llama4_text": ({}, "transformers does not tell its decoder from its head"),
}


def config_of(family: str, changes: dict[str, Any]) -> PretrainedConfig:
    known = vars(AutoConfig.for_model(family)).keys() | type(AutoConfig.for_model(family)).attribute_map.keys()
    values = {name: size for name, size in SIZES.items() if name in known} | changes
    return AutoConfig.for_model(family, **{name: value for name, value in values.items() if value is not None})


@pytest.mark.parametrize("family", IN_ONE_ROW)
def test_prompts_with_their_responses_in_one_row_have_the_log_probs_of_single_rows(family: str) -> None:
    model = make_model(config_of(family, IN_ONE_ROW[family]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = packed_token_logps(model, GROUPS)
    assert largest_difference(found, plain_logps(model, GROUPS)) < 1e-3


@pytest.mark.parametrize("family", IN_SEPARATE_ROWS)
def test_what_no_mask_can_drive_runs_in_rows_of_its_own_and_says_why(family: str) -> None:
    changes, reason = IN_SEPARATE_ROWS[family]
    model = make_model(config_of(family, changes))
    with torch.no_grad(), pytest.warns(UserWarning, match=f"{family}: .*{reason}.*, so each response runs in a row"):
        found = packed_token_logps(model, GROUPS)
    assert largest_difference(found, plain_logps(model, GROUPS)) < 1e-3


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line_that_names_what_works(family: str) -> None:
    changes, reason = REFUSED[family]
    with pytest.raises(ModelError) as caught:
        packed_token_logps(make_model(config_of(family, changes)), GROUPS)
    message = str(caught.value)
    assert message.startswith(f"{family}: ") and reason in message and "known to work are Llama" in message
    assert "\n" not in message


class _Deaf(type(make_model(PACKED["llama"]).model.layers[0].self_attn)):  # type: ignore[misc]
    """Attention that forgets the table of segments, as code inside a model might."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs["attention_mask"]
        is_table = given is not None and given.dtype == torch.int64
        return super().forward(*args, **{**kwargs, "attention_mask": None if is_table else given})


class _Choosy(_Deaf):
    """Attention that takes masks of one shape only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs["attention_mask"]
        assert given is None or given.shape[-1] == given.shape[-2], "a square, please"
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"), [(_Deaf, "does not heed a mask of ours"), (_Choosy, r"fails under a mask of ours \(a square")]
)
def test_an_attention_that_fails_the_trial_runs_in_separate_rows(kind: type, reason: str) -> None:
    model = make_model(PACKED["llama"])
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    assert ways.unmaskable(model) == ""
    with torch.no_grad(), pytest.warns(UserWarning, match=reason):
        found = packed_token_logps(model, GROUPS)
    assert largest_difference(found, plain_logps(model, GROUPS)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype: torch.dtype) -> None:
    model = make_model(PACKED["llama"]).to(dtype)
    attention.use_checked_attention(model)
    trial.check_model(model)
    assert trial.mask_fault(model) == ""
