"""Component that checks a run's settings before anything expensive starts."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def check_settings(
    root: str,
    run: str,
    num_iterations: int,
    num_shards: int,
    seed: int,
    promote_as: str,
    policy_source: str,
    reference_source: str,
    preferences_source: str,
    prompts_source: str,
    exclude_source: str,
    chat: dict,
    data: dict,
    generation: dict,
    scoring: dict,
    pairing: dict,
    training: dict,
    warm_start_training: dict,
    evaluation: dict,
    launch: dict,
    pods: dict,
    service_account: str,
) -> None:
    """Check all settings, each and together, and compare them with what the run holds already.

    What was mistyped in the UI, or differs from what the run was begun with, fails here and not hours later.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run.
        num_iterations: Number of iterations of the run.
        num_shards: Number of shards of an iteration.
        seed: Seed of the run.
        promote_as: Name of the promoted pointer. Empty: none is moved.
        policy_source: The policy to start from.
        reference_source: Its reference. Empty: a warm start makes the first policy.
        preferences_source: Offline preference pairs.
        prompts_source: Prompts to generate on; those of the preference pairs when empty.
        exclude_source: Prompts of benchmarks, left out of the run; may be empty.
        chat: How a prompt becomes token ids (ChatConfig).
        data: Preparing data (DataConfig).
        generation: Sampling (GenerationConfig).
        scoring: Valid responses and their log-probs (ScoringConfig).
        pairing: Length penalty, selection, replay (PairingConfig).
        training: DPO (TrainingConfig).
        warm_start_training: DPO of the first policy on offline pairs (TrainingConfig); empty where there is none.
        evaluation: What is measured of a new policy, and when it is accepted (EvaluationConfig).
        launch: Which processes train (LaunchConfig).
        pods: What their pods look like (PodConfig); empty where the task of the stage trains itself.
        service_account: That the tasks of the run should have. Empty: any.
    """
    from dice_core.stages.check_settings import check_run

    names = ("chat", "data", "generation", "scoring", "pairing", "training", "evaluation", "launch", "pods")
    values = (chat, data, generation, scoring, pairing, training, evaluation, launch, pods)
    first = {"warm_start_training": warm_start_training} if warm_start_training else {}
    check_run(
        root,
        run,
        dict(zip(names, values, strict=True)) | first,
        service_account=service_account,
        num_iterations=num_iterations,
        num_shards=num_shards,
        seed=seed,
        promote_as=promote_as,
        policy_source=policy_source,
        reference_source=reference_source,
        preferences_source=preferences_source,
        prompts_source=prompts_source,
        exclude_source=exclude_source,
    )
