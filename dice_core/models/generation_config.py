"""A generation config that transformers writes: it reads many that it refuses to save.

Sampling here takes its own settings: of a model's file, only the ids that end a text are read (`loading.py`).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_length", "max_new_tokens")


def savable(settings: "GenerationConfig") -> "GenerationConfig":
    """Return the settings, or as much of them as transformers writes.

    Some published models have sampling settings and no do_sample, or settings of a beam search without beams: do_sample
    is set, or else only the special ids and the settings of sampling are kept, or else only the ids.
    """
    if _is_savable(settings):
        return settings
    kept = settings.to_diff_dict()
    for fields in (kept.keys(), (*_IDS, *_SAMPLING), _IDS):
        values = {name: kept[name] for name in fields if name in kept}
        candidate = type(settings).from_dict(values if fields == _IDS else {**values, "do_sample": True})
        if _is_savable(candidate):
            return candidate
    return type(settings)()


def _is_savable(settings: "GenerationConfig") -> bool:
    try:
        settings.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True
