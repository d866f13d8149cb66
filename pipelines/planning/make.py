"""Makes a run's plan: finds the models and counts, plans the stages on the pool's devices, and looks what fits."""

from collections.abc import Iterator
from dataclasses import replace

from dice_core.settings.base import ConfigError, DType
from pipelines.cluster.pools import NODE_KINDS, POOLS
from pipelines.planning import rates
from pipelines.planning.data_counts import DataCounts, counts_of
from pipelines.planning.find_model import FoundModel, find_model
from pipelines.planning.fit import all_changes, late, refusals, warnings
from pipelines.planning.machine import MachineSpeed
from pipelines.planning.memory import BYTES, GIB
from pipelines.planning.ranges import Range
from pipelines.planning.run_plan import RunPlan
from pipelines.planning.shapes import ModelShape
from pipelines.planning.speeds import Speeds, cpu_decoding, cpu_speeds, gpu_decoding, gpu_speeds
from pipelines.planning.stage_plans import Planner
from pipelines.planning.workload import Workload
from pipelines.presets import Preset


def make_plan(
    preset: Preset,
    machine: MachineSpeed | None = None,
    *,
    model_config: str = "",
    run_uri: str = "",
    response_tokens: Range | None = None,
    asks_hub: bool = True,
) -> RunPlan:
    """Return the plan of a preset, with what cannot fit and the settings to change.

    Args:
        preset: with its changes.
        machine: its speed, where the run computes on this machine's CPUs; None: on the pool's GPUs.
        model_config: config.json of the policy, where its shape is not known.
        run_uri: of a run whose counts of data are taken.
        response_tokens: mean length of a response without a limit, where it was measured.
        asks_hub: whether to look for a model there that is not in the table.

    Raises:
        ConfigError: the shape of the policy is not known, or the run has no data.
    """
    policy, judge = find_model(preset.policy_source, model_config, asks_hub=asks_hub), _find_judge(preset, asks_hub)
    data = counts_of(preset, run_uri)
    if response_tokens:
        policy = policy._replace(response_tokens=response_tokens, response_source="given")

    unshared = _unshared_heads(preset, policy.shape, judge[0])

    def planned(changed: Preset) -> RunPlan:
        if len(lines := _unshared_heads(changed, policy.shape, judge[0])) > len(unshared):
            raise ConfigError(lines[0])
        workload = Workload(changed, data, policy.response_tokens) if data else None
        return _planned(changed, policy.shape, judge[0], workload, machine)

    found = planned(preset)
    return replace(
        found,
        notes=[note for note in _notes(preset, policy, judge[1], data, is_on_gpus=machine is None) if note],
        refusals=[*unshared, *refusals(found, preset, planned)],
        changes=[] if unshared else all_changes(found, preset, planned),
        warnings=warnings(found, preset),
        late=late(found, preset),
    )


def has_pools_nodes(preset: Preset) -> bool:
    """Return whether the run goes to nodes of its pool: of others chosen by their labels nothing tells the GPUs."""
    return preset.cluster is not None and preset.cluster.gpu_node_selector == POOLS[preset.pool]().gpu_node_selector


def _notes(
    preset: Preset, policy: FoundModel, judge: str, data: DataCounts | None, *, is_on_gpus: bool
) -> Iterator[str]:
    """Yield where shapes and counts are from, and what is not known or not counted."""
    lengths = policy.response_tokens
    yield f"policy: {policy.shape.num_parameters / 1e9:.3f} billion parameters ({policy.source})"
    yield judge
    yield _data_note(preset, data)
    yield f"responses: {lengths.low:,.0f} - {lengths.high:,.0f} tokens without a limit ({policy.response_source})"
    if is_on_gpus:
        yield "GPUs: no run of this suite on a GPU has been measured yet"
        if not has_pools_nodes(preset):
            yield f"nodes: cluster.gpu_node_selector is not that of pool {preset.pool}, whose GPUs are planned with"
    if preset.scoring.reward != "implicit":
        yield f"scoring.reward is {preset.scoring.reward}: its memory and time are not counted"


def _data_note(preset: Preset, data: DataCounts | None) -> str:
    if data is None:
        return f"data: ? ({preset.preferences_source} is in no table and no file here: give RUN= that has prepared it)"
    counts = f"{data.num_prompts:,} prompts, {data.num_preferences:,} pairs, {data.num_held_out:,} held out"
    return f"data: {counts} ({data.source})"


def _find_judge(preset: Preset, asks_hub: bool) -> tuple[ModelShape | None, str]:
    """Return the shape of the model that judges, and what to say of it."""
    if not preset.judging.model_kind or not preset.judge_source:
        return None, ""
    try:
        found = find_model(preset.judge_source, asks_hub=asks_hub)
    except ConfigError as error:
        return None, f"judge: ? ({error}; its memory and time are not counted)"
    return found.shape, f"judge: {found.shape.num_parameters / 1e9:.3f} billion parameters ({found.source})"


def _planned(
    preset: Preset,
    policy: ModelShape,
    judge: ModelShape | None,
    workload: Workload | None,
    machine: MachineSpeed | None,
) -> RunPlan:
    device, device_bytes, speeds, decoding = _device(preset, policy, workload, machine)
    planner = Planner(
        preset=preset,
        policy=policy,
        judge=judge,
        workload=workload,
        speeds=speeds,
        decoding=decoding,
        device="cpu" if machine else "gpu",
        device_bytes=device_bytes,
        model_bytes=BYTES[preset.training.saved_dtype] * policy.num_parameters,
    )
    return RunPlan(preset.name, device, device_bytes, list(planner.stages()), speeds.rates, notes=())


def _unshared_heads(preset: Preset, policy: ModelShape, judge: ModelShape | None) -> list[str]:
    """Return a line for each engine whose GPUs cannot share the heads of attention: vLLM would refuse to start."""
    lines = []
    for section, engine, shape in (("generation", preset.generation, policy), ("judging", preset.judging, judge)):
        number, heads = engine.tensor_parallel_size, shape.num_heads if shape else 0
        if heads % number:
            fit = max(size for size in (1, 2, 4) if heads % size == 0)
            lines.append(
                f"{section}.tensor_parallel_size: {number} GPUs cannot share the model's {heads} heads of attention: "
                f'SET="{section}.tensor_parallel_size={fit}"'
            )
    return lines


def _device(
    preset: Preset, policy: ModelShape, workload: Workload | None, machine: MachineSpeed | None
) -> tuple[str, float, Speeds, Range]:
    """Return what stages compute on: its name, its bytes, its speeds, and those of sampling."""
    if machine:
        import psutil

        training_dtype: DType = "bfloat16" if preset.training.precision == "bf16" else "float32"
        speeds = cpu_speeds(machine, preset.scoring.dtype, training_dtype)
        decoding = cpu_decoding(policy, machine, preset.generation.dtype)
        return "this machine (CPUs)", float(psutil.virtual_memory().total), speeds, decoding
    node = NODE_KINDS[preset.pool]
    card, device_bytes = rates.CARDS[node.gpu, node.gpu_memory_gib], float(node.gpu_memory_gib * GIB)
    longest = preset.chat.max_prompt_tokens + preset.generation.max_new_tokens
    # A response is half as long, on the average, while it grows.
    mean = workload.data.lengths.prompt + workload.sampled_length * 0.5 if workload else Range(longest, longest)
    decoding = gpu_decoding(policy, preset.generation, card, device_bytes, mean, longest)
    return f"{node.gpu} {node.gpu_memory_gib} GiB", device_bytes, gpu_speeds(card), decoding
