"""The stages of a preset's run and what each takes: counts and lengths, memory and speeds put together. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from dice_core.stages.table import EVALUATE, GENERATE_AND_SCORE
from dice_core.training.disk import checkpoint_bytes, node_bytes
from dice_core.training.host_memory import pod_bytes
from dice_core.training.settings import TrainingConfig
from pipelines.planning import memory, rates
from pipelines.planning.memory import BYTES, Memory
from pipelines.planning.ranges import Range, exactly
from pipelines.planning.run_plan import StagePlan, Use
from pipelines.planning.shapes import ModelShape
from pipelines.planning.speeds import Speeds
from pipelines.planning.workload import Tokens, Workload
from pipelines.presets import Preset

_UPDATED_BYTES = 34
"""Of a parameter, of the node's memory in an offloaded update: the float32 weight, gradient and two moments read (16),
three of them written (12), the gradient brought there (4), the weight taken away (2)."""
_IMPORTS_OF_A_TOKENIZER = 0.2
"""Of the time that torch and transformers take: a stage that only tokenises loads no torch (measured, 1.0 of 5.2 s)."""
_RESPONSE_BYTES_PER_TOKEN = 6
"""Text and ids of a token in a compressed table. Assumed; the demo's tables took 6.0."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """What a run's stages follow from."""

    preset: Preset
    policy: ModelShape
    judge: ModelShape | None
    """Of the model that judges answers; None: there is none, or it is not known."""
    workload: Workload | None
    """None: nothing tells how many prompts there are. Times and tokens are then not known."""
    speeds: Speeds
    decoding: Range
    """Tokens a second of an engine with the policy."""
    device: str
    """`gpu` or `cpu`."""
    device_bytes: float
    model_bytes: float
    """Of the policy as it is stored."""

    def stages(self) -> Iterator[StagePlan]:
        """Yield the stages in their order."""
        yield StagePlan(title="check settings", seconds=self._text_seconds(0.0))
        yield from self._imports()
        yield StagePlan(title="prepare data", seconds=self._text_seconds(_IMPORTS_OF_A_TOKENIZER))
        if self.preset.has_warm_start and self.preset.warm_start_training:
            yield self._pair("warm start")
            yield self._train("warm start", self.preset.warm_start_training, is_warm_start=True)
        for iteration in range(1, self.preset.iterations + 1):
            where = f"iteration {iteration}"
            if not self.preset.is_offline:
                yield self._generate_and_score(where)
            yield self._pair(where)
            yield self._train(where, self.preset.training, is_warm_start=False)
            yield self._evaluate(where, is_first=iteration == 1)
        yield StagePlan(title="report", seconds=self._text_seconds(0.0))

    def _text_seconds(self, times_imports: float = 1.0) -> Range:
        return self.speeds.start + self.speeds.imports * times_imports

    def _imports(self) -> Iterator[StagePlan]:
        roles = ["policy", *([] if self.preset.has_warm_start else ["reference"])]
        sizes = {role: self.model_bytes for role in roles}
        if self.judge:
            sizes["judge"] = 2 * self.judge.num_parameters
        for number, (role, size) in enumerate(sizes.items()):
            # A tensor at a time is checked, the embedding being the largest; a converted model is held whole, twice.
            largest = 2 * BYTES["float32"] * self.policy.num_embedding
            held = memory.CPU_LIBRARIES + (2 * size if self.device == "cpu" else largest)
            yield StagePlan(
                title=f"import {role}",
                uses=[Use("the files", Memory(working=held))] if self.device == "cpu" else (),
                host_bytes=held,
                disk_bytes=size,
                written_bytes=exactly(size),
                seconds=self._text_seconds() + Range(size, size) / self.speeds.importing,
                is_beside=number > 0 and self.device == "gpu",
            )

    def _pair(self, where: str) -> StagePlan:
        return StagePlan(title=f"{where}: pair", seconds=self._text_seconds(_IMPORTS_OF_A_TOKENIZER))

    def _transfer(self, num_bytes: float | Range) -> Range:
        return (num_bytes if isinstance(num_bytes, Range) else exactly(num_bytes)) / self.speeds.storage

    def _operations(self, tokens: Tokens) -> Range:
        parts = [(tokens.all.low, tokens.of_responses.low), (tokens.all.high, tokens.of_responses.high)]
        low, high = (self.policy.forward_operations(*bound) for bound in parts)
        return Range(min(low, high), max(low, high))

    def _gpus(self, number: int) -> int:
        return number if self.device == "gpu" else 0

    def _generate_and_score(self, where: str) -> StagePlan:
        preset, shards = self.preset, self.preset.num_shards
        config, num_gpus = preset.generation, preset.generation.tensor_parallel_size
        longest = preset.chat.max_prompt_tokens + config.max_new_tokens
        engine = memory.engine_memory(self.policy, config, longest, self.device, device_bytes=self.device_bytes)
        scoring = memory.scoring_memory(
            self.policy,
            preset.scoring.dtype,
            self._tokens_per_batch(preset.scoring.tokens_per_batch),
            self.device,
            num_gpus=num_gpus,
            device_bytes=self.device_bytes,
        )
        tokens = seconds = None
        written = exactly(0)
        if self.workload:
            generated, scored = self.workload.generated(), self.workload.scored()
            tokens = generated.all + scored.all * 2
            written = generated.of_responses * _RESPONSE_BYTES_PER_TOKEN
            prompts = self._operations(Tokens(generated.all, generated.of_responses)) / self.speeds.forward
            sampling = generated.of_responses / self.decoding
            # Prompts are read while responses are sampled; on a CPU decoding's share counts both.
            sampling = sampling + prompts * 0.1 if self.device == "gpu" else sampling
            scoring_seconds = self._operations(scored) * 2 / self.speeds.forward
            seconds = (
                self._text_seconds(2 if self.device == "cpu" else 1)
                + self.speeds.engine_start
                + self.speeds.model_start * 2
                + (sampling + scoring_seconds) / shards
                + self._transfer(2 * self.model_bytes)
            )
        return StagePlan(
            title=f"{where}: generate and score",
            num_pods=shards,
            gpus_per_pod=self._gpus(preset.gpus_of(GENERATE_AND_SCORE)),
            uses=[Use("vLLM", engine), Use("scoring", scoring)],
            host_bytes=memory.scoring_host_bytes(self.policy, preset.scoring.dtype) if self.device == "gpu" else 0.0,
            disk_bytes=0.0 if self._has_cache else 2 * self.model_bytes,
            read_bytes=self._models_read(2, shards),
            written_bytes=written,
            tokens=tokens,
            seconds=seconds,
        )

    def _tokens_per_batch(self, setting: int) -> int:
        # Shorter rows are taken on a CPU (logprobs/forward.py).
        return min(setting, 2048) if self.device == "cpu" else setting

    @property
    def _has_cache(self) -> bool:
        return bool(self.preset.cluster and self.preset.cluster.model_cache_claim)

    def _models_read(self, num_models: int, num_pods: int) -> Range:
        """Return the bytes of models that pods read: each its own, or once where a claim keeps them for all."""
        most = float(num_models * num_pods * self.model_bytes)
        return Range(num_models * self.model_bytes if self._has_cache else most, most)

    def _train(self, where: str, config: TrainingConfig, *, is_warm_start: bool) -> StagePlan:
        launch, count = self.preset.launch, self.policy.num_parameters
        ranks = launch.num_nodes * launch.processes_per_node
        row = 2.0 * config.max_length
        if self.workload:
            row = self.workload.largest_row(config, is_warm_start=is_warm_start)
        tokens, steps = self._steps(config, ranks, is_warm_start=is_warm_start)
        saved = float(BYTES[config.saved_dtype] * count)
        written, seconds = exactly(saved), None
        if steps:
            starts = self._text_seconds() + self.speeds.training_start + self.speeds.model_start
            seconds = starts + steps + self._transfer(self.model_bytes + saved)
            one = checkpoint_bytes(count, config, launch.num_nodes) * launch.num_nodes
            numbers = [int(bound // (60 * config.save_minutes)) for bound in (steps.low, steps.high)]
            written = written + Range(numbers[0] * one, numbers[1] * one)
        uses = [Use(f"{_split(config)}, rows of {row:,.0f} tokens", self._training_memory(config, ranks, row))]
        if config.reference == "base":
            uses.append(Use("the reference", memory.reference_memory(self.policy, config, row, self.device)))
        disk = node_bytes(
            count,
            config,
            launch.num_nodes,
            has_scratch_volume=bool(self.preset.cluster and self.preset.cluster.trainer_scratch_volume),
            has_cache_volume=self._has_cache,
        )
        return StagePlan(
            title=f"{where}: train",
            num_pods=launch.num_nodes,
            gpus_per_pod=self._gpus(launch.processes_per_node),
            uses=uses,
            host_bytes=self._training_host_bytes(config) if self.device == "gpu" else 0.0,
            disk_bytes=disk,
            read_bytes=self._models_read(1, launch.num_nodes),
            written_bytes=written,
            tokens=tokens,
            seconds=seconds,
        )

    def _steps(self, config: TrainingConfig, ranks: int, *, is_warm_start: bool) -> tuple[Range | None, Range | None]:
        """Return the tokens of a training and the seconds of its passes; None: no data are known."""
        if not self.workload:
            return None, None
        trained = self.workload.trained(config, is_warm_start=is_warm_start)
        measured = self.workload.measured(config, is_warm_start=is_warm_start)
        # Forward, and backward to the inputs and to the weights: to those that are trained.
        passes = 2 + memory.num_trained(self.policy, config) / self.policy.num_parameters
        steps = self._operations(trained) * passes / self.speeds.training / ranks
        if config.offload_optimizer == "cpu":
            updated = memory.num_trained(self.policy, config) / self.preset.launch.num_nodes * _UPDATED_BYTES
            steps = steps + exactly(config.max_steps * updated) / rates.UPDATE_IN_MEMORY.value
        return trained.all + measured.all, steps + self._operations(measured) / self.speeds.forward / ranks

    def _training_memory(self, config: TrainingConfig, ranks: int, row: float) -> Memory:
        taken = memory.training_memory(self.policy, config, ranks, row, self.device)
        if self.device == "gpu":
            return taken
        # The finished weights and those that training began with, to compare: the same process, the same memory.
        return memory.joined(taken, Memory(working=8 * self.policy.num_parameters))

    def _training_host_bytes(self, config: TrainingConfig) -> float:
        launch = self.preset.launch
        held = pod_bytes(self.policy.num_parameters, config, launch.num_nodes, launch.processes_per_node)
        return max(held, memory.loading_host_bytes(self.policy, config, launch.num_nodes, launch.processes_per_node))

    def _evaluate(self, where: str, *, is_first: bool) -> StagePlan:
        preset = self.preset
        num_gpus = preset.generation.tensor_parallel_size
        config = preset.generation
        limit = preset.evaluation.max_new_tokens or config.max_new_tokens
        engine = memory.engine_memory(
            self.policy, config, preset.chat.max_prompt_tokens + limit, self.device, device_bytes=self.device_bytes
        )
        scoring = memory.logprobs_memory(
            self.policy,
            preset.evaluation.dtype,
            self._tokens_per_batch(preset.evaluation.tokens_per_batch),
            self.device,
            num_gpus=num_gpus,
        )
        if self.device == "gpu":
            uses = [Use("vLLM", engine), Use("log-probs", scoring)]
            if self.judge:
                longest = preset.judging.max_length
                judge = memory.engine_memory(self.judge, preset.judging, longest, device_bytes=self.device_bytes)
                uses.append(Use("the judge", judge))
        else:
            # One process does both, and what vLLM took it does not give back to the system.
            scoring = Memory(weights=scoring.weights, activations=scoring.activations)
            uses = [Use("vLLM, then log-probs", memory.joined(engine, scoring))]
        # Answers and log-probs of models that an evaluation before has met are taken from it.
        num_engines, num_models = (2, 3) if is_first else (1, 2)
        read = (5 if is_first else 3) * self.model_bytes
        tokens, seconds = self._evaluation_work(num_engines, num_models, read)
        return StagePlan(
            title=f"{where}: evaluate",
            gpus_per_pod=self._gpus(preset.gpus_of(EVALUATE)),
            uses=uses,
            host_bytes=memory.scoring_host_bytes(self.policy, preset.evaluation.dtype) / 2
            if self.device == "gpu"
            else 0.0,
            disk_bytes=0.0 if self._has_cache else float(read),
            read_bytes=Range(float(self.model_bytes), float(read)),
            tokens=tokens,
            seconds=seconds,
        )

    def _evaluation_work(self, num_engines: int, num_models: int, read: float) -> tuple[Range | None, Range | None]:
        if not self.workload:
            return None, None
        answers, held_out = self.workload.answers(), self.workload.held_out()
        # Two models score the answers of both policies; the new policy and those not met before the held-out pairs.
        scored = Tokens(answers.all * 2, answers.of_responses * 2).times(2) + held_out.times(num_models - 1)
        tokens = answers.all * num_engines + scored.all
        seconds = (
            self._text_seconds()
            + (self.speeds.engine_start + answers.of_responses / self.decoding) * num_engines
            + self.speeds.model_start * num_models
            + self._operations(scored) / self.speeds.forward
            + self._transfer(read)
        )
        if self.judge:
            bound = answers.all.high * 2
            judged = 2 * self.judge.num_parameters * bound
            seconds = seconds + self.speeds.engine_start + Range(0.5 * judged, judged) / self.speeds.forward
            tokens = tokens + answers.all * 2
        return tokens, seconds


def _split(config: TrainingConfig) -> str:
    names = {"none": "whole states", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
    adapters = f", LoRA of rank {config.lora_rank}" if config.lora_rank else ""
    return names[config.deepspeed] + adapters + (", optimizer offloaded" if config.offload_optimizer == "cpu" else "")
