"""One function per stage: URIs and settings in, a small report out. What pipelines and the command line call.

Each checks its settings before anything expensive starts; stage_runner.py then decides whether there is anything to do,
and stage_work.py does it. Loads no torch.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dice_core.data.settings import ChatConfig, DataConfig
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.launch.settings import LaunchConfig
from dice_core.preferences.settings import GenerationConfig, PairingConfig, ScoringConfig
from dice_core.settings.base import ConfigError
from dice_core.settings.seeds import derive_seed
from dice_core.stages import prepare_data_work as stage_data
from dice_core.stages import work as stage_work
from dice_core.stages.runner import StageReport, run_stage
from dice_core.storage import layout
from dice_core.storage.manifest import clear_stage, read_manifest
from dice_core.training.settings import TrainingConfig

Values = Mapping[str, Any] | None


def import_model(
    source: str, output_uri: str, *, revision: str = "", trust_remote_code: bool = False, overwrite: bool = False
) -> StageReport:
    """Bring a model into storage once: a Hub id, a folder, an s3:// address or a GGUF file.

    Args:
        source: where it is.
        output_uri: gets the model's files; layout.model names the usual place.
        revision: of a Hub model: a branch, a tag or a commit.
        trust_remote_code: whether code inside the model may run; no by default.
        overwrite: delete the model that is there before.

    Raises:
        ModelError: it cannot be read, is cut, or is not safetensors.
    """
    from dice_core.models import importing as models

    if overwrite:
        clear_stage(output_uri, "import-model")
    was_complete = read_manifest(output_uri) is not None
    manifest = models.import_model(source, output_uri, revision=revision, trust_remote_code=trust_remote_code)
    return StageReport(output_uri, "already complete" if was_complete else "completed", manifest.metrics)


def prepare_data(
    preferences_source: str,
    output_uri: str,
    *,
    policy_uri: str,
    prompts_source: str = "",
    exclude_source: str = "",
    data: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Check, clean and split the user's preference pairs and prompts.

    Args:
        preferences_source: JSONL or Parquet (a file or a folder) or a Hub data set, with prompt, chosen, rejected.
        output_uri: gets prompts.parquet, preferences.parquet (for replay) and held_out.parquet (for evaluation).
        policy_uri: whose tokenizer measures prompts.
        prompts_source: prompts to generate on; those of the preference pairs when empty.
        exclude_source: prompts of benchmarks; what matches them is left out.
        data: DataConfig.
        chat: ChatConfig.
        seed: of the run.
        overwrite: delete what this stage left at its output before.
    """
    if not preferences_source:
        raise ConfigError("preferences_source: is empty, name a file, a folder, an s3:// address or a Hub data set")
    configs = {"data": DataConfig.parse(data, "data"), "chat": ChatConfig.parse(chat, "chat")}
    with stage_data.local_sources(
        {"preferences": preferences_source, "prompts": prompts_source, "exclude": exclude_source}
    ) as sources:
        work = partial(stage_data.prepare_data, sources=sources, seed=derive_seed(seed, "prepare-data"), **configs)
        return run_stage(
            "prepare-data",
            output_uri,
            work,
            format_version=1,
            settings=configs,
            arguments={"seed": seed, **{name: source.digest for name, source in sources.items()}},
            overwrite=overwrite,
            inputs={"policy": policy_uri},
        )


def generate(
    policy_uri: str,
    data_uri: str,
    output_uri: str,
    *,
    iteration: int = 1,
    shard: int = 0,
    num_shards: int = 1,
    gate_uri: str = "",
    generation: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Sample K responses to each prompt of a shard with the policy.

    Args:
        policy_uri: a model with a manifest.
        data_uri: prepare-data's output, or a Parquet file with prompt_id and prompt.
        output_uri: gets part-00000.parquet and so on (records.RESPONSES).
        iteration: from 1; decides the random numbers together with the seed.
        shard: this one, from 0.
        num_shards: of all.
        gate_uri: evaluate of the iteration before; after a refused policy this stage, and all that read it, skip.
        generation: GenerationConfig.
        chat: ChatConfig.
        seed: of the run.
        overwrite: delete what this stage left at its output before.
    """
    layout.check_count(iteration, "iteration")
    layout.check_shard(shard, num_shards)
    configs = {"generation": GenerationConfig.parse(generation, "generation"), "chat": ChatConfig.parse(chat, "chat")}
    inputs = {"policy": policy_uri, "data": data_uri} | ({"gate": gate_uri} if gate_uri else {})
    return run_stage(
        "generate",
        output_uri,
        partial(
            stage_work.generate,
            shard=shard,
            num_shards=num_shards,
            seed=derive_seed(seed, "generate", iteration),
            **configs,
        ),
        format_version=1,
        settings=configs,
        arguments={"seed": seed, "iteration": iteration, "shard": shard, "num_shards": num_shards},
        overwrite=overwrite,
        inputs=inputs,
    )


def score(
    policy_uri: str,
    reference_uri: str,
    responses_uri: str,
    output_uri: str,
    *,
    scoring: Values = None,
    overwrite: bool = False,
) -> StageReport:
    """Compute the log-probs of valid responses under policy and reference: their difference is the implicit reward.

    Args:
        policy_uri: pi_{t-1}, which made the responses.
        reference_uri: pi_{t-2}.
        responses_uri: a shard of generate, or a Parquet file (records.RESPONSES).
        output_uri: gets part-00000.parquet and so on (records.SCORES).
        scoring: ScoringConfig.
        overwrite: delete what this stage left at its output before.
    """
    config = ScoringConfig.parse(scoring, "scoring")
    return run_stage(
        "score",
        output_uri,
        partial(stage_work.score, config=config),
        format_version=1,
        settings={"scoring": config},
        arguments={},
        overwrite=overwrite,
        inputs={"policy": policy_uri, "reference": reference_uri, "responses": responses_uri},
    )


def pair(
    data_uri: str,
    policy_uri: str,
    output_uri: str,
    *,
    scores_uris: Sequence[str] = (),
    responses_uris: Sequence[str] = (),
    iteration: int = 1,
    pairing: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Choose the length penalty, select the best and the worst response of each prompt, mix in offline pairs.

    Args:
        data_uri: prepare-data's output, or a Parquet file of preference pairs.
        policy_uri: whose tokenizer turns offline pairs into token ids; its weights are not read.
        output_uri: gets pairs.parquet (records.PAIRS) and length_penalty.json.
        scores_uris: shards of score, or Parquet files (records.SCORES); none makes a set of offline pairs alone.
        responses_uris: the responses of these shards, in the same order.
        iteration: from 1; 0 is the warm start.
        pairing: PairingConfig.
        chat: ChatConfig.
        seed: of the run.
        overwrite: delete what this stage left at its output before.
    """
    layout.check_count(iteration, "iteration", 0)
    if len(scores_uris) != len(responses_uris):
        raise ConfigError(f"{len(responses_uris)} responses for {len(scores_uris)} scores: give one for each, in order")
    configs = {"pairing": PairingConfig.parse(pairing, "pairing"), "chat": ChatConfig.parse(chat, "chat")}
    shards = {f"scores/{i}": uri for i, uri in enumerate(scores_uris)}
    shards |= {f"responses/{i}": uri for i, uri in enumerate(responses_uris)}
    return run_stage(
        "pair",
        output_uri,
        partial(stage_work.pair, seed=derive_seed(seed, "pair", iteration), **configs),
        format_version=1,
        settings=configs,
        arguments={"seed": seed, "iteration": iteration},
        overwrite=overwrite,
        inputs={"data": data_uri, "policy": policy_uri, **shards},
    )


def train(
    policy_uri: str,
    pairs_uri: str,
    output_uri: str,
    *,
    iteration: int = 1,
    training: Values = None,
    launch: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Train the policy on pairs by DPO, with itself as it starts for the reference.

    Args:
        policy_uri: pi_{t-1}.
        pairs_uri: pair's output, or a Parquet file (records.PAIRS).
        output_uri: gets the model pi_t and metrics.jsonl.
        iteration: from 1; 0 is the warm start.
        training: TrainingConfig.
        launch: LaunchConfig: where the processes run.
        seed: of the run.
        overwrite: delete what this stage left at its output before.

    Raises:
        LaunchError: a process failed; its last lines are in the message.
    """
    from dice_core.training.job import delete_leftovers

    layout.check_count(iteration, "iteration", 0)
    config, launch_config = TrainingConfig.parse(training, "training"), LaunchConfig.parse(launch, "launch")
    config.accumulation_steps(launch_config.num_nodes * launch_config.processes_per_node)
    report = run_stage(
        "train",
        output_uri,
        partial(stage_work.train, training=config, launch=launch_config, seed=derive_seed(seed, "train", iteration)),
        format_version=2,
        settings={"training": config},
        arguments={"seed": seed, "iteration": iteration},
        overwrite=overwrite,
        inputs={"policy": policy_uri, "pairs": pairs_uri},
    )
    if report.status == "already complete":
        # An attempt that was killed after it published: checkpoints are many times the model's size.
        delete_leftovers(output_uri)
    return report


def evaluate(
    policy_uri: str,
    previous_uri: str,
    base_reference_uri: str,
    data_uri: str,
    output_uri: str,
    *,
    iteration: int = 1,
    promoted_uri: str = "",
    evaluation: Values = None,
    generation: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Measure the new policy against the one before it; move the promoted pointer only if it is accepted and better.

    Args:
        policy_uri: pi_t.
        previous_uri: pi_{t-1}.
        base_reference_uri: the first reference of the run; both policies' held-out rewards are taken against it.
        data_uri: prepare-data's output (held_out.parquet).
        output_uri: gets evaluation.json.
        iteration: from 1.
        promoted_uri: a JSON pointer to change when the policy is accepted and better; none by default.
        evaluation: EvaluationConfig.
        generation: GenerationConfig: answers are sampled as in generate.
        chat: ChatConfig.
        seed: of the run.
        overwrite: delete what this stage left at its output before.
    """
    layout.check_count(iteration, "iteration")
    configs = {
        "evaluation": EvaluationConfig.parse(evaluation, "evaluation"),
        "generation": GenerationConfig.parse(generation, "generation"),
        "chat": ChatConfig.parse(chat, "chat"),
    }
    work = partial(
        stage_work.evaluate,
        seed=derive_seed(seed, "evaluate", iteration),
        iteration=iteration,
        promoted_uri=promoted_uri,
        **configs,
    )
    return run_stage(
        "evaluate",
        output_uri,
        work,
        format_version=2,
        settings=configs,
        arguments={"seed": seed, "iteration": iteration, "promoted_uri": promoted_uri},
        overwrite=overwrite,
        inputs={
            "policy": policy_uri,
            "previous": previous_uri,
            "base_reference": base_reference_uri,
            "data": data_uri,
        },
    )


def report(run_uri: str, output_uri: str, *, num_iterations: int, allow_empty: bool = False) -> StageReport:
    """Write one page on a run: what was made, dropped, trained and measured, and why.

    Always written anew: it shows the state of the run, finished or not.

    Args:
        run_uri: the run's own place (layout.run).
        output_uri: gets report.html and summary.json.
        num_iterations: of the run, from 1.
        allow_empty: write the page also of a run that has made nothing; an error by default.

    Raises:
        StorageError: the run has made nothing, or the place holds another stage's result.
    """
    layout.check_count(num_iterations, "num_iterations")
    return stage_work.report(run_uri, output_uri, num_iterations=num_iterations, allow_empty=allow_empty)
