"""Settings of vLLM: its precision and memory, and how responses are sampled."""

from pydantic import Field, field_validator

from dice_core.settings.base import OPERATIONAL, DType, Int, Ints, Settings


class EngineConfig(Settings):
    """vLLM's precision and memory, whatever it is started for."""

    dtype: DType = "bfloat16"
    """Precision of the weights."""
    tensor_parallel_size: Int = Field(default=1, ge=1, le=8, json_schema_extra=OPERATIONAL)
    """GPUs that share the model's weights: 1, 2, 4 or 8. Tasks that start vLLM ask for as many."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1, json_schema_extra=OPERATIONAL)
    """Share of the GPU's memory that vLLM takes."""
    max_concurrent_sequences: Int = Field(default=0, ge=0, json_schema_extra=OPERATIONAL)
    """0 leaves it to vLLM, which knows the device."""
    cpu_kv_cache_gib: Int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)
    """Memory for vLLM's key-value cache on a CPU, in GiB."""

    @field_validator("tensor_parallel_size")
    @classmethod
    def _divides_heads(cls, value: int) -> int:
        if value not in (1, 2, 4, 8):
            raise ValueError("must be 1, 2, 4 or 8, which divide the heads of attention")
        return value


class GenerationConfig(EngineConfig):
    """vLLM sampling. K responses a prompt with the policy."""

    num_responses: Int = Field(default=16, ge=2)
    """K. Two at least: a pair needs a best and a worst."""
    temperature: float = Field(default=0.7, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability; 1 is all tokens."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens that the prompt or the response already holds become less likely."""
    max_new_tokens: Int = Field(default=2048, ge=1)
    """Longest response, in tokens. A response that reaches it is cut, and not scored."""
    stop_token_ids: Ints = ()
    """Ids that end a response beside the chat format's end of turn and the model's own EOS."""
    prompts_per_part: Int = Field(default=256, ge=1)
    """A killed shard resumes at the first part that is not stored."""
