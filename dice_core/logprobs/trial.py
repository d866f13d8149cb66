"""Tries a model on a few tokens before its log-probs are trusted: is it causal, is its head known, does it heed masks.

What counts is what a model does and not its name: models that transformers gets later, and code inside a model, are
judged too. Weights that ZeRO-3 shards are not tried: more forwards would upset the order in which it collects them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dice_core.logprobs.attention import SEGMENTS, attention_masks
from dice_core.logprobs.output_head import logit_scale
from dice_core.logprobs.packing import PromptGroup, pack_row
from dice_core.models.files import ModelError

_KNOWN = "known to work are Llama, Mistral, Qwen, Gemma, Phi, Granite, Cohere, OLMo, GPT-2 and their like"
_NUM_TOKENS = 8
# Differences that rounding makes: of logits, as a share of the largest, and of hidden states, of their length.
_LOGITS_ROUNDED = {torch.float32: 1e-4}
_STATES_ROUNDED = {torch.float32: 0.01}
_LOGITS_ROUNDED_16, _STATES_ROUNDED_16 = 0.02, 0.1

_checked: "WeakSet[nn.Module]" = WeakSet()
_mask_faults: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()


def check_structure(model: PreTrainedModel) -> None:
    """Check that transformers tells a model's decoder from its head; a model on the meta device will do.

    Raises:
        ModelError: hidden states cannot be had without logits, or a head is not linear.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if not isinstance(head, nn.Linear):
        raise _refusal(model, f"has no linear output head but {type(head).__name__}")
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        raise _refusal(model, "transformers does not tell its decoder from its head")


def check_model(model: PreTrainedModel) -> None:
    """Check once that a model is causal, and that its logits are its head's output under a scale that is known.

    Raises:
        ModelError: it is not, or does not run at all; log-probs of it would be wrong.
    """
    if model in _checked or _is_sharded(model):
        return
    check_structure(model)
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    ids = torch.arange(_NUM_TOKENS, device=model.device)[None] % head.out_features  # (1, tokens)
    try:
        with _without_dropout(model):
            expected = model(input_ids=ids, use_cache=False).logits.float()  # (1, tokens, vocabulary)
            begun = model(input_ids=ids[:, : _NUM_TOKENS // 2], use_cache=False).logits.float()
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # (1, tokens, hidden size)
            found = logit_scale(model).apply(head(hidden).float().clone())  # (1, tokens, vocabulary)
    except ModelError as error:
        raise _refusal(model, str(error)) from None
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Whatever the code of a model raises.
    except Exception as error:
        raise _refusal(model, f"does not run on a few tokens: {_first_line(error)}") from None
    limit = _LOGITS_ROUNDED.get(_precision(model), _LOGITS_ROUNDED_16)
    if _differs(found, expected, limit):
        raise _refusal(
            model,
            "its logits are not its head's output under a scale that is known here (such as logit_scale or "
            "final_logit_softcapping), so log-probs of it would be wrong",
        )
    if _differs(begun, expected[:, : _NUM_TOKENS // 2], limit):
        raise _refusal(model, "its tokens see those that come after them, so it is no causal language model")
    _checked.add(model)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Run a model, which may be in training, without gradient and so that the same tokens give the same numbers."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _differs(found: Tensor, expected: Tensor, limit: float) -> bool:
    # Broken weights give no numbers to compare; their log-probs are seen not to be finite later.
    difference, size = (values.nan_to_num(0, 0, 0).abs().max() for values in (found - expected, expected))
    return bool(difference > limit * size)


def mask_fault(model: PreTrainedModel) -> str:
    """Return what goes wrong when a model runs a prompt with two responses in one row; empty: nothing does.

    Args:
        model: for which `ways.unmaskable` has no reason. It is tried once, with the attention that it has.
    """
    if _is_sharded(model) or model.config._attn_implementation not in (SEGMENTS, "eager"):
        return ""
    if model not in _mask_faults:
        _mask_faults[model] = _try_masks(model)
    return _mask_faults[model]


def _try_masks(model: PreTrainedModel) -> str:
    num_ids = model.get_output_embeddings().out_features
    prompt, *responses = ([i % num_ids for i in ids] for ids in ([0, 1, 2], [3, 4, 5], [6, 7, 8, 9]))
    row = pack_row([PromptGroup(prompt, responses)])
    with _without_dropout(model):
        expected = torch.cat([_states(model, [*prompt, *response])[len(prompt) - 1 : -1] for response in responses])
        try:
            masks = attention_masks(model, row, model.dtype)
            found = _states(model, row.input_ids, row.positions, masks)[torch.from_numpy(row.predictors)]
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            return f"its attention fails under a mask of ours ({_first_line(error)})"
    # Both (response tokens, hidden size).
    share = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    limit = _STATES_ROUNDED.get(_precision(model), _STATES_ROUNDED_16)
    return "its attention does not heed a mask of ours" if bool((share > limit).any()) else ""


def _states(model: PreTrainedModel, ids: object, positions: object = None, masks: object = None) -> Tensor:
    """Return hidden states of a row, (tokens, hidden size), float32."""
    given = {} if positions is None else {"position_ids": torch.as_tensor(positions, device=model.device)[None]}
    input_ids = torch.as_tensor(ids, device=model.device)[None]
    states: Tensor = model.get_decoder()(input_ids=input_ids, attention_mask=masks, use_cache=False, **given)[0][0]
    return states.float()


def _precision(model: PreTrainedModel) -> torch.dtype:
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def _is_sharded(model: PreTrainedModel) -> bool:
    return hasattr(next(model.parameters()), "ds_id")


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(f"{model.config.model_type}: {reason}; {_KNOWN}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
