"""Complete settings for a model and a data set, one function a preset. A variant is a preset and `--set`.

Sources of the numbers: "upstream" is sail-sg/dice (scripts/run_dice/pipeline.sh unless another file is named), "paper"
is arXiv 2406.09760. What is not written here is the default of the settings class, with its own source there.
"""

import dataclasses
import re
from collections.abc import Callable

from dice_core.data.settings import ChatConfig, DataConfig
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import EngineConfig, GenerationConfig
from dice_core.judges.settings import GradingConfig, JudgingConfig
from dice_core.launch.settings import LaunchConfig
from dice_core.preferences.settings import PairingConfig, ScoringConfig
from dice_core.settings.base import Settings
from dice_core.stages.table import GENERATE_AND_SCORE, STAGES, Stage
from dice_core.storage import layout
from dice_core.training.settings import TrainingConfig
from pipelines.cluster.config import ClusterConfig
from pipelines.cluster.pools import POOLS

NO_POINTER = "none"
"""Value of `promote_as` of a run whose policies are promoted nowhere, and which starts from no promoted one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A run's settings: `iterations` and `num_shards` shape the compiled graph, the rest are parameters' defaults."""

    name: str
    policy_source: str
    """The DPO-tuned policy, or the SFT model where there is a warm start."""
    reference_source: str
    """What the policy's DPO started from; empty: a warm start makes the first policy from offline pairs."""
    preferences_source: str
    judge_source: str = ""
    """The model of judging.judge; empty: the graph has no task that imports one."""
    reward_source: str = ""
    """The model of scoring.reward, which may not be the judge; empty: the graph has no task that imports one."""
    prompts_source: str = ""
    """Empty: the prompts of the preference pairs."""
    exclude_source: str = ""
    """Prompts of benchmarks; what matches them is left out. Empty: nothing is."""
    promote_as: str = ""
    """The promoted pointer that an accepted, better policy moves. Empty: of the preset's name; NO_POINTER: none."""
    iterations: int = 2
    num_shards: int = 1
    """Tasks that generate and score, in parallel: a GPU each."""
    num_retries: int = 2
    seed: int = 42
    chat: ChatConfig
    data: DataConfig
    generation: GenerationConfig
    scoring: ScoringConfig
    grading: GradingConfig
    pairing: PairingConfig
    training: TrainingConfig
    warm_start_training: TrainingConfig | None = None
    evaluation: EvaluationConfig
    judging: JudgingConfig
    launch: LaunchConfig
    pool: str
    """The kind of nodes (cluster.pools), which decides section `cluster`. Empty in a run on this machine."""
    cluster: ClusterConfig | None = None
    """None in a run on this machine, see on_this_machine."""

    def __post_init__(self) -> None:
        """Train the first policy like the others, and run on the pool's nodes, where nothing else is said."""
        if self.has_warm_start and self.warm_start_training is None:
            object.__setattr__(self, "warm_start_training", self.training)
        if self.pool and self.cluster is None:
            object.__setattr__(self, "cluster", POOLS[self.pool]())

    @property
    def description(self) -> str:
        """What the run is, in a line: the policy and the data, iterations, shards, and the most GPUs at a time."""
        subject = f"{_title(self.policy_source)} on {_title(self.preferences_source)}"
        return ", ".join([subject, counted(self.iterations, "iteration"), self.sampling, self._where])

    @property
    def sampling(self) -> str:
        """How many tasks sample, in words."""
        return "offline pairs alone" if self.is_offline else counted(self.num_shards, "shard")

    @property
    def _where(self) -> str:
        if self.cluster is None:
            return "on this machine"
        if not self.cluster.gpu_resource:
            return "on CPUs"
        num_trainers = self.launch.num_nodes * self.launch.processes_per_node
        num_tasks = 1 if self.is_offline else self.num_shards
        return counted(max(num_tasks * self.gpus_of(GENERATE_AND_SCORE), num_trainers), "GPU")

    def gpus_of(self, stage: Stage) -> int:
        """Return how many GPUs a task of a stage needs: as many as vLLM spreads a model over in one of its parts."""
        sections = {name for part in stage.parts or (stage.name,) for name in STAGES[part].sections}
        engines = (self.sections().get(name) for name in sections)
        return max((engine.tensor_parallel_size for engine in engines if isinstance(engine, EngineConfig)), default=1)

    @property
    def has_warm_start(self) -> bool:
        """Return whether the first policy is made by this run."""
        return not self.reference_source

    @property
    def is_offline(self) -> bool:
        """Return whether only offline pairs are trained on: no response is sampled that nobody would use."""
        return self.pairing.replay_ratio == 1

    @property
    def pointer(self) -> str:
        """Return the name of the promoted pointer, a parameter of the pipeline; empty: there is none.

        Raises:
            ValueError: not a name.
        """
        return "" if self.promote_as == NO_POINTER else layout.check_name(self.promote_as or self.name, "promote_as")

    def own_fields(self) -> list[str]:
        """Return the names of the settings that belong to no section, such as `iterations`."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return [name for name, value in values if isinstance(value, str | int) and name != "name"]

    def sections(self) -> dict[str, Settings]:
        """Return the settings by name: those of the stages in their order, and where they run on a cluster."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if isinstance(value, Settings)}


def zephyr() -> Preset:
    """Zephyr-7B-beta on UltraFeedback, as in the paper, on a node of 8 GPUs."""
    return Preset(
        name="zephyr",
        policy_source="HuggingFaceH4/zephyr-7b-beta",  # upstream
        reference_source="HuggingFaceH4/mistral-7b-sft-beta",  # upstream
        preferences_source="HuggingFaceH4/ultrafeedback_binarized",  # paper
        iterations=2,  # paper: rounds 1 and 2; no gain was seen beyond three
        num_shards=8,  # upstream: 8 processes, a GPU each
        chat=ChatConfig(prompt_format="zephyr"),  # upstream: zephyr-custom
        data=_ultrafeedback(),
        generation=_generation(temperature=0.7, top_p=0.9),  # upstream: self_alignment/configs/gen.py
        scoring=_scoring(),
        grading=GradingConfig(),  # read where scoring.reward is not implicit; upstream's judge: 7 grades, 3 at least
        # upstream's script ships gamma 0.5 for this model. It is the best of the paper's sweep too (Fig. 3: LC of
        # iteration 2 at 0, 0.25, 0.5, 0.75 and 1), where offline pairs alone collapse
        pairing=_pairing(replay_ratio=0.5),
        training=_training(),
        # 1,024 prompts show 3.7 points of win rate (ties 30 %); the paper's iterations gain 2 to 10.
        evaluation=EvaluationConfig(num_sample_prompts=1024),
        # On GPUs a number an answer is the judge to begin with: it has no order to prefer, and takes minutes.
        judging=JudgingConfig(judge="reward-model"),
        # The strongest of its series by its authors (arXiv 2507.01352), and of another family than Zephyr, a Mistral: a
        # judge favours its own.
        judge_source="Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        launch=LaunchConfig(backend="pytorchjob", num_nodes=1, processes_per_node=8),  # upstream: 8 x A100
        pool="p4d",  # upstream: A100; the smallest node with 8 of them
    )


def llama3() -> Preset:
    """Llama-3-8B after SFT and DPO on UltraFeedback, as in the paper, on a node of 8 GPUs."""
    return dataclasses.replace(
        zephyr(),
        name="llama3",
        # Of the same series as zephyr's judge. That one is a Llama, as this policy is.
        judge_source="Skywork/Skywork-Reward-V2-Qwen3-8B",
        policy_source="princeton-nlp/Llama-3-Base-8B-SFT-DPO",  # upstream
        reference_source="princeton-nlp/Llama-3-Base-8B-SFT",  # upstream
        chat=ChatConfig(prompt_format="llama3"),  # upstream: llama3-custom, no system prompt
        # upstream's script ships gamma 0.5 for this model too; the paper shows no sweep of it
        pairing=_pairing(replay_ratio=0.5),
        # upstream: self_alignment/configs/gen.py, whose stop ids 128001 and 128009 are those of the prompt format
        generation=_generation(temperature=0.9, top_p=1.0),
    )


def llama3_70b() -> Preset:
    """Tulu 3 70B, a Llama 3.1 after SFT and DPO, on two nodes of 8 H100. Not yet run on a GPU.

    Its policy of DPO and the SFT model that this began with are both published, under the Llama 3.1 Community License.
    A parameter of ZeRO-3 takes 16 bytes, 1.13 TB for 70.6 billion: 71 GB of each of 16 GPUs, and rows, gathered layers
    and their gradients take 27 GB more of the 86. With optimizer states in the nodes' memory it is 9 and 27.
    """
    preset = llama3()
    training = {
        "offload_optimizer": "cpu",
        "per_device_batch_size": 2,  # 16 GPUs x 2 are the global batch: weights are gathered as rarely as can be
    }
    cluster = {
        "gpu_task_cpu": "88",  # half of a node, with 4 of its 8 GPUs
        # Policy and reference in bfloat16, 141 GB each, which take turns on the GPUs, and what torch takes
        "gpu_task_memory": "400Gi",
        # training/host_memory.py: 25 bytes a parameter on the first of two nodes, 1675 GiB with 8 processes
        "trainer_memory": "1800Gi",
        # A shard's 17 million tokens through two models, the layers' GPUs one after another: 4 hours by arithmetic
        "score_timeout": "12h",
        "evaluate_timeout": "8h",  # five models of 141 GB are loaded, two of them sampled from
    }
    return dataclasses.replace(
        preset,
        name="llama3-70b",
        policy_source="allenai/Llama-3.1-Tulu-3-70B-DPO",  # its model card, arXiv 2411.15124
        reference_source="allenai/Llama-3.1-Tulu-3-70B-SFT",  # likewise: what its DPO started from
        num_shards=4,  # 4 GPUs each: both nodes
        chat=ChatConfig(prompt_format="model"),  # its own template, without a system prompt, as it was trained
        # Weights of 35 GB a GPU leave 36 GB of 80 for keys and values
        generation=preset.generation.model_copy(update={"tensor_parallel_size": 4}),
        training=preset.training.model_copy(update=training),
        launch=LaunchConfig(backend="pytorchjob", num_nodes=2, processes_per_node=8),
        pool="p5",  # of the nodes with 8 x 80 GB the one with enough memory
        cluster=POOLS["p5"]().model_copy(update=cluster),
    )


def zephyr_offline() -> Preset:
    """The paper's baseline "offline DPO": zephyr trained further on the offline pairs, against its first reference.

    No response is sampled. The paper saw it fall from 13.40 to 4.96 (AlpacaEval 2, LC) in the second iteration.
    """
    preset = zephyr()
    return dataclasses.replace(
        preset,
        name="zephyr-offline",
        pairing=preset.pairing.model_copy(update={"replay_ratio": 1.0}),  # paper: offline pairs alone
        training=preset.training.model_copy(update={"reference": "base"}),  # paper: the reference stays the SFT model
    )


def zephyr_offline_new_reference() -> Preset:
    """The paper's baseline "offline DPO with a new reference": as zephyr_offline, against the policy as it starts."""
    preset = zephyr_offline()
    return dataclasses.replace(
        preset,
        name="zephyr-offline-new-reference",
        training=preset.training.model_copy(update={"reference": "start"}),  # paper: the reference of DICE
    )


def demo() -> Preset:
    """SmolLM2-135M-Instruct on 2 CPU cores in minutes; its first policy is made from offline pairs.

    In float32, which every processor is good at; demo/precision.py says where bfloat16 is faster.
    """
    training = TrainingConfig(
        beta=0.1,
        # Six steps must show an effect: 40 times the published rate, on weights kept in float32.
        learning_rate=2e-5,
        max_steps=6,
        global_batch_size=4,
        per_device_batch_size=4,
        max_length=512,
        precision="float32",
        saved_dtype="float32",  # bfloat16 would round most of so small a change away
        gradient_checkpointing=False,  # the model is small; recomputing costs a third more time
        eval_steps=3,
        reference_logps="reuse",  # exact in float32
    )
    return Preset(
        name="demo",
        policy_source="HuggingFaceTB/SmolLM2-135M-Instruct",
        reference_source="",
        preferences_source="pipelines/data/demo_preferences.jsonl",
        prompts_source="",
        iterations=2,
        num_shards=1,
        num_retries=0,  # a failure on one's own machine is told at once
        chat=ChatConfig(prompt_format="model", max_prompt_tokens=256),
        data=DataConfig(num_held_out=16, max_prompts=22, max_preferences=36),
        generation=GenerationConfig(
            num_responses=4,
            temperature=0.9,
            top_p=1.0,  # less halves the speed of sampling on a CPU
            max_new_tokens=96,  # an answer that does not end is dropped
            prompts_per_part=11,
            max_concurrent_sequences=64,
            dtype="float32",
        ),
        scoring=ScoringConfig(min_valid_responses=2, tokens_per_batch=2048, dtype="float32"),
        grading=GradingConfig(dtype="float32"),
        pairing=PairingConfig(
            # 22 prompts make at most 22 pairs, whose effect the demo shows in six steps of 4: a quarter is 7 offline
            # pairs beside them.
            replay_ratio=0.25,
            num_eval_pairs=4,
        ),
        training=training,
        warm_start_training=training.model_copy(update={"max_steps": 8}),
        # Six answers decide little: the demo shows the gate, with bounds that fit so few.
        evaluation=EvaluationConfig(
            num_sample_prompts=6,
            num_shown_samples=4,
            max_new_tokens=64,
            max_length_growth=1.0,
            max_accuracy_drop=0.3,
            tokens_per_batch=2048,
            dtype="float32",
        ),
        judging=JudgingConfig(judge="none"),  # a judge that is worth asking does not run on two cores
        launch=LaunchConfig(backend="pytorchjob", num_nodes=1, processes_per_node=1),
        pool="kind",
    )


def counted(number: int, noun: str) -> str:
    """Return a number of things in words, such as `1 shard` or `8 shards`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def on_this_machine(preset: Preset) -> Preset:
    """Return the preset for a run on this machine: no cluster, and the task of training trains itself."""
    launch = preset.launch.model_copy(update={"backend": "torchrun", "num_nodes": 1})
    return dataclasses.replace(preset, pool="", cluster=None, launch=launch)


PRESETS: dict[str, Callable[[], Preset]] = {
    "zephyr": zephyr,
    "llama3": llama3,
    "llama3-70b": llama3_70b,
    "zephyr-offline": zephyr_offline,
    "zephyr-offline-new-reference": zephyr_offline_new_reference,
    "demo": demo,
}


def _title(source: str) -> str:
    """Return what a model or a data set is called, without its owner, folder, revision and suffix."""
    # Behind the name on the Hub a revision and a split may stand.
    address = source if "://" in source else re.split("[@:]", source)[0]
    return address.rstrip("/").rpartition("/")[2].removesuffix(".gguf").removesuffix(".jsonl")


def _ultrafeedback() -> DataConfig:
    # paper: around 10k random preference pairs of UltraFeedback; prompts of the same rows. Held out beside them: pairs
    # with the 1,024 prompts that evaluation answers, and some more, since a prompt may have several pairs.
    return DataConfig(max_preferences=10_000, num_held_out=1_100)


def _generation(*, temperature: float, top_p: float) -> GenerationConfig:
    return GenerationConfig(
        num_responses=16,  # upstream and paper: K
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=1.0,  # upstream: the default of LLaMA-Factory's generating_args.py
        max_new_tokens=2048,  # upstream: generate_responses.py
        dtype="bfloat16",
    )


def _scoring() -> ScoringConfig:
    return ScoringConfig(
        min_characters=4,  # upstream: generate_dpo_scores.py keeps 3 < characters < 6700
        max_characters=6699,
        min_valid_responses=8,  # upstream: n_least_score
        dtype="bfloat16",
        reward="implicit",  # upstream and paper
    )


def _pairing(*, replay_ratio: float) -> PairingConfig:
    return PairingConfig(
        selection="best-worst",  # upstream and paper: one pair a prompt
        length_penalty="exact",  # upstream's grid, without its rounding to 0.001
        length_unit="characters",  # upstream
        replay_ratio=replay_ratio,  # gamma
        num_eval_pairs=576,  # upstream: val_size
    )


def _training() -> TrainingConfig:
    return TrainingConfig(
        loss="sigmoid",  # upstream
        beta=0.1,  # upstream
        learning_rate=5e-7,  # upstream
        # upstream also passes warmup 50, which Hugging Face ignores with `constant`; `constant_with_warmup` heeds it
        lr_scheduler="constant",
        warmup_steps=0,
        max_steps=300,  # upstream
        global_batch_size=32,  # upstream: 8 GPUs x 1 x accumulation 4
        # upstream: 1. ZeRO-3 collects the weights twice a step in place of four times, and the largest row is mostly
        # the longest pair's in either case. More would not fit two nodes.
        per_device_batch_size=2,
        max_length=4096,  # upstream: cutoff_len
        precision="bf16",  # upstream
        saved_dtype="bfloat16",  # upstream
        deepspeed="zero3",  # upstream
        eval_steps=50,  # upstream: 20, which runs nearly as many pairs as are trained on
    )
