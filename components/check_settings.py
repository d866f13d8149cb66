"""Component that checks a run's settings before anything expensive starts."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def check_settings(
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
) -> None:
    """Check all settings, each and together: what was mistyped in the UI fails here and not hours later.

    Args:
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
    """
    from dice_core.stages.check_settings import check_settings

    names = ("chat", "data", "generation", "scoring", "pairing", "training", "evaluation", "launch", "pods")
    values = (chat, data, generation, scoring, pairing, training, evaluation, launch, pods)
    sections = dict(zip(names, values, strict=True))
    check_settings(sections | ({"warm_start_training": warm_start_training} if warm_start_training else {}))
