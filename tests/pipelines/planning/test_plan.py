"""Whole plans: what they say, what they refuse, and that the setting they name helps."""

import json
from pathlib import Path

import pytest

from dice_core.settings.base import ConfigError
from pipelines.cli import main
from pipelines.kfp.submit import require_fit
from pipelines.overrides import apply_overrides
from pipelines.planning import speeds
from pipelines.planning.command import as_run_here
from pipelines.planning.find_model import find_model
from pipelines.planning.machine import MachineSpeed, measure_speed
from pipelines.planning.make import make_plan
from pipelines.planning.memory import GIB
from pipelines.planning.ranges import Range
from pipelines.planning.rates import CARDS
from pipelines.planning.run_plan import RunPlan, StagePlan
from pipelines.planning.text import plan_lines
from pipelines.preflight.findings import UncertainError
from pipelines.preflight.preflight import check_memory
from pipelines.presets import PRESETS, Preset, on_this_machine

QWEN_32B = ["policy_source=Qwen/Qwen2.5-32B-Instruct", "reference_source=Qwen/Qwen2.5-32B"]
MACHINE = MachineSpeed({"float32": 190e9, "bfloat16": 890e9}, import_seconds=5.2)


def changed(name: str, *assignments: str) -> Preset:
    return apply_overrides(PRESETS[name](), assignments)


def stage(plan: RunPlan, title: str) -> StagePlan:
    return next(stage for stage in plan.stages if stage.title == title)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_every_preset_of_a_cluster_fits_its_pool_and_has_a_time(name: str) -> None:
    plan = make_plan(PRESETS[name]())
    assert plan.refusals == [] and plan.changes == []
    assert plan.seconds is not None and plan.gpu_seconds is not None
    assert 0 < plan.seconds.low < plan.seconds.high


def test_stages_are_those_of_the_graph() -> None:
    titles = [stage.title for stage in make_plan(changed("zephyr", "iterations=1")).stages]
    assert titles == [
        "check settings",
        "import policy",
        "import reference",
        "import judge",
        "prepare data",
        "iteration 1: generate and score",
        "iteration 1: pair",
        "iteration 1: train",
        "iteration 1: evaluate",
        "report",
    ]
    offline = [stage.title for stage in make_plan(PRESETS["zephyr-offline"]()).stages]
    assert not [title for title in offline if "generate" in title]


def test_a_run_without_shards_beside_each_other_takes_as_many_gpu_hours_and_longer() -> None:
    eight, one = (make_plan(changed("zephyr", f"num_shards={number}")) for number in (8, 1))
    title = "iteration 1: generate and score"
    of_eight, of_one = stage(eight, title), stage(one, title)
    assert of_eight.seconds is not None and of_one.seconds is not None
    assert of_one.seconds.high > 4 * of_eight.seconds.high
    assert (of_eight.num_pods, of_one.num_pods) == (8, 1)
    assert of_eight.tokens == of_one.tokens


@pytest.mark.parametrize(
    ("assignments", "stage_name", "setting"),
    [
        (["training.deepspeed=none"], "iteration 1: train", "training.deepspeed=zero3"),
        (["launch.processes_per_node=1"], "iteration 1: train", "training.offload_optimizer=cpu"),
        (["training.gradient_checkpointing=false"], "iteration 1: train", "training.gradient_checkpointing=true"),
        (QWEN_32B, "iteration 1: generate and score", "generation.tensor_parallel_size=4"),
        (
            ["generation.gpu_memory_utilization=0.3"],
            "iteration 1: generate and score",
            "generation.gpu_memory_utilization=0.9",
        ),
        (["judging.gpu_memory_utilization=0.3"], "iteration 1: evaluate", "judging.gpu_memory_utilization=0.9"),
        (
            ["scoring.tokens_per_batch=1000000"],
            "iteration 1: generate and score: scoring",
            "scoring.tokens_per_batch=16384",
        ),
        # What the preset of 70 billion parameters has, of which no change alone is enough.
        (
            [
                "policy_source=meta-llama/Meta-Llama-3-70B-Instruct",
                "reference_source=meta-llama/Meta-Llama-3-70B-Instruct",
            ],
            "iteration 1: train: ZeRO-3",
            "training.offload_optimizer=cpu launch.num_nodes=2",
        ),
        (["cluster.trainer_memory=100Gi"], "iteration 1: train", "cluster.trainer_memory="),
        (["cluster.gpu_task_memory=20Gi"], "iteration 1: generate and score", "cluster.gpu_task_memory="),
    ],
)
def test_what_cannot_fit_is_one_line_with_a_setting_that_helps(
    assignments: list[str], stage_name: str, setting: str
) -> None:
    preset = changed("zephyr", *assignments)
    plan = make_plan(preset)
    found = next(line for line in plan.refusals if line.startswith(stage_name) and setting in line)
    assert "\n" not in found and " GiB of " in found
    assert plan.changes and make_plan(apply_overrides(preset, plan.changes)).refusals == []


@pytest.mark.parametrize(
    ("assignments", "advice"),
    [
        (["training.max_length=131072"], "take a smaller model, a lower training.max_length, or adapters"),
        (["training.reference=base"], "take a smaller model, or training.reference=start"),
        (["generation.max_concurrent_sequences=100000"], "or lower generation.max_new_tokens and max_concurrent_seq"),
    ],
)
def test_where_nothing_leaves_results_as_they_are_what_helps_is_named(assignments: list[str], advice: str) -> None:
    lines = make_plan(changed("llama3-70b", *assignments)).refusals
    assert any(advice in line for line in lines), lines


def test_an_engine_of_the_judge_has_a_share_of_the_card_of_its_own() -> None:
    plan = make_plan(changed("zephyr", "generation.tensor_parallel_size=8", "generation.gpu_memory_utilization=0.3"))
    assert plan.refusals == []


def test_gpus_that_cannot_share_the_heads_of_attention_are_refused(tmp_path: Path) -> None:
    """vLLM would refuse to start, in a pod that has its GPUs. Qwen2.5-7B has 28 heads."""
    config = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plans = {
        number: make_plan(changed("zephyr", f"generation.tensor_parallel_size={number}"), model_config=str(tmp_path))
        for number in (4, 8)
    }
    assert plans[4].refusals == []
    assert plans[8].refusals == [
        "generation.tensor_parallel_size: 8 GPUs cannot share the model's 28 heads of attention: "
        'SET="generation.tensor_parallel_size=4"'
    ]


def test_a_model_beyond_every_pool_is_told_so(tmp_path: Path) -> None:
    huge = find_model("meta-llama/Meta-Llama-3-70B-Instruct")
    config = {
        "model_type": "llama",
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
        "num_hidden_layers": 1260,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = make_plan(changed("llama3"), model_config=str(tmp_path))
    assert plan.changes == [] and any("take a smaller model" in line for line in plan.refusals)
    assert huge.shape.num_parameters < 100e9


def test_what_is_close_is_told_and_not_refused() -> None:
    plan = make_plan(changed("llama3", "training.deepspeed=zero2"))
    assert plan.refusals == [] and [line for line in plan.warnings if line.startswith("iteration 1: train")]


def test_an_attempt_that_may_end_before_its_stage_is_told() -> None:
    """A shard of all prompts on one A100 may take longer than the 12 and 6 hours that generating and scoring have."""
    plan = make_plan(changed("llama3", "num_shards=1"))
    (line,) = plan.late
    assert line.startswith("iteration 1: generate and score: may take 21 h ")
    assert line.endswith("an attempt ends after 18 h 00 min (cluster.generate_timeout and cluster.score_timeout)")
    assert f"late: {line}" in plan_lines(plan)
    assert all(make_plan(PRESETS[name]()).late == [] for name in PRESETS if name != "demo")


def test_what_nothing_tells_is_a_question_mark() -> None:
    plan = make_plan(changed("zephyr", "preferences_source=s3://bucket/pairs"))
    assert plan.seconds is None and plan.refusals == []
    text = "\n".join(plan_lines(plan, price=2.5))
    assert "data: ? (s3://bucket/pairs" in text
    assert "time: ?" in text and "GPU hours: ?" in text and "cost at 2.5 a GPU hour: ?" in text


def test_a_price_makes_a_cost_of_gpu_hours() -> None:
    plan = make_plan(PRESETS["zephyr"]())
    assert plan.gpu_seconds is not None
    low, high = plan.gpu_seconds.low / 3600, plan.gpu_seconds.high / 3600
    (line,) = (line for line in plan_lines(plan, price=2) if line.startswith("cost"))
    assert line.startswith(f"cost at 2 a GPU hour: {2 * low:,.3g} - {2 * high:,.3g}")


def test_every_rate_names_its_kind_and_source() -> None:
    for plan in (make_plan(PRESETS["zephyr"]()), make_plan(on_this_machine(PRESETS["demo"]()), MACHINE)):
        assert plan.rates
        for rate in plan.rates:
            assert rate.source and rate.kind in ("cited", "measured", "assumed")
    assert any("no run of this suite on a GPU" in note for note in make_plan(PRESETS["zephyr"]()).notes)


# Output tokens a second of one engine on whole data sets, by the pages that the rate cites.
@pytest.mark.parametrize(
    ("model", "card", "gibibytes", "published"),
    [("HuggingFaceH4/zephyr-7b-beta", "A100", 80, 3363), ("meta-llama/Meta-Llama-3-8B", "H100", 80, 12_500)],
)
def test_the_speed_of_sampling_has_the_published_one_within_its_bounds(
    model: str, card: str, gibibytes: int, published: int
) -> None:
    preset = PRESETS["zephyr"]()
    shape = find_model(model).shape
    found = speeds.gpu_decoding(
        shape, preset.generation, CARDS[card, gibibytes], gibibytes * GIB, Range(300, 700), 4096
    )
    assert found.low <= published <= found.high


def test_the_speed_of_training_has_a_published_dpo_within_its_bounds() -> None:
    """alignment-handbook/zephyr-7b-dpo-full: 61,135 pairs in 5,328 s on 8 GPUs, with a reference model in every step.

    A pair there runs its prompt twice. Ours are policy passes of as many tokens; the reference's forward is a third.
    """
    shape, pair_tokens = find_model("HuggingFaceH4/zephyr-7b-beta").shape, 2 * (150 + 300)
    operations = 61_135 * (3 + 1) * shape.forward_operations(pair_tokens, 600)
    reached = operations / 5328 / 8
    assert CARDS["A100", 80].utilization.value.low < reached / 312e12 < CARDS["A100", 80].utilization.value.high


def test_the_demo_on_the_machine_of_its_listing_takes_what_the_readme_shows() -> None:
    """README.md's listing is of a machine with 2 cores that did nothing else, in bfloat16: 263 s in its stages."""
    preset = apply_overrides(
        on_this_machine(PRESETS["demo"]()),
        [
            *(f"{section}.dtype=bfloat16" for section in ("generation", "scoring", "evaluation")),
            *(f"{section}.precision=bf16" for section in ("training", "warm_start_training")),
        ],
    )
    plan = make_plan(preset, MACHINE)
    assert plan.seconds is not None
    assert (plan.seconds.low + plan.seconds.high) / 2 == pytest.approx(263, rel=0.25)
    peak = max(stage.largest.memory.total for stage in plan.stages if stage.largest)
    # VmHWM of the process that trained, in a run on that machine.
    assert peak == pytest.approx(5651 * 2**20, rel=0.25)


def test_states_in_the_nodes_memory_take_the_time_of_their_update() -> None:
    """7.24 billion parameters x 34 bytes x 300 steps, at 300 to 50 GB/s: 246 to 1,477 s."""
    title = "iteration 1: train"
    plain, offloaded = (
        stage(make_plan(changed("zephyr", f"training.offload_optimizer={where}")), title) for where in ("none", "cpu")
    )
    assert plain.seconds is not None and offloaded.seconds is not None
    assert offloaded.seconds.low - plain.seconds.low == pytest.approx(246, abs=1)
    assert offloaded.seconds.high - plain.seconds.high == pytest.approx(1477, abs=1)


def test_a_slower_machine_takes_longer() -> None:
    slower = MachineSpeed({name: speed / 2 for name, speed in MACHINE.operations.items()}, 2 * MACHINE.import_seconds)
    preset = on_this_machine(PRESETS["demo"]())
    fast, slow = make_plan(preset, MACHINE).seconds, make_plan(preset, slower).seconds
    assert fast is not None and slow is not None
    assert slow.low > 1.5 * fast.low


# ---- the commands


def test_the_command_prints_a_table_and_exits_by_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "zephyr", "--price", "2.5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan of zephyr, on A100 40 GiB\n")
    assert "iteration 2: train" in printed and "cost at 2.5 a GPU hour" in printed and "cannot fit" not in printed
    assert main(["plan", "--preset", "zephyr", "--set", "launch.processes_per_node=1"]) == 2
    assert "cannot fit: iteration 1: train" in capsys.readouterr().out


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "zephyr", "--json", "--response-tokens", "250-400"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["name"] == "zephyr" and values["seconds"]["low"] > 0
    assert "responses: 250 - 400 tokens without a limit (given)" in values["notes"]
    assert values["cost"] is None
    assert main(["plan", "--preset", "zephyr", "--json", "--price", "2"]) == 0
    priced = json.loads(capsys.readouterr().out)
    assert priced["cost"]["low"] == pytest.approx(2 * priced["gpu_seconds"]["low"] / 3600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "policy_source=s3://bucket/no"], "MODEL_CONFIG="),
        (["--price", "-1"], "price: must be 0 or more, got -1"),
        (["--price", "nan"], "price: must be 0 or more, got nan"),
        (["--price", "inf"], "price: must be 0 or more, got inf"),
        (["--response-tokens", "0"], "response-tokens: must be a number such as 340, or 250-400, 1 or more, got '0'"),
        (["--response-tokens", "400-250"], "response-tokens: must be a number such as 340"),
        (["--response-tokens", "inf"], "response-tokens: must be a number such as 340"),
        (["--response-tokens", "many"], "response-tokens: must be a number such as 340"),
        (["--run", "r", "--root", "s3://bucket/dice"], "s3://bucket/dice/runs/r/data/manifest.json: "),
        (["--model-config", "/nowhere/config.json"], "/nowhere/config.json: no config.json can be read"),
    ],
)
def test_what_a_plan_lacks_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if "policy_source" in arguments[-1]:
        arguments = ["--set", "policy_source=owner/unknown"]
        monkeypatch.setattr("pipelines.planning.find_model.is_hub_out_of_reach", lambda: True)
    assert main(["plan", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def test_submit_refuses_what_cannot_fit_and_lets_through_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"cannot fit: iteration 1: train: .*make plan PRESET=zephyr shows all"):
        require_fit(changed("zephyr", "launch.processes_per_node=1"))
    require_fit(changed("zephyr"))
    require_fit(changed("zephyr", "policy_source=owner/unknown"))
    require_fit(changed("demo"))


def test_a_schedule_of_what_cannot_fit_is_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["schedule", "--preset", "zephyr", "--every", "7d", "--dry-run", "--root", "s3://bucket/dice"]
    assert main([*command, "--set", "launch.processes_per_node=1"]) == 1
    assert "error: cannot fit: iteration 1: train" in capsys.readouterr().err


def test_of_nodes_that_are_not_the_pools_nothing_is_refused() -> None:
    own = changed("zephyr", "launch.processes_per_node=1", 'cluster.gpu_node_selector={"gpu":"h200"}')
    require_fit(own)
    with pytest.raises(UncertainError, match="the nodes are not those of pool p4d"):
        check_memory(own)
    assert any("cluster.gpu_node_selector is not that of pool p4d" in note for note in make_plan(own).notes)


def test_the_demo_is_planned_as_it_runs_here() -> None:
    """In the number format that this machine is faster in, and with the changes asked for on top."""
    here = as_run_here(PRESETS["demo"](), ["training.max_steps=3", "scoring.dtype=float32"], MACHINE)
    assert here.cluster is None and here.launch.backend == "torchrun"
    assert (here.training.precision, here.training.max_steps) == ("bf16", 3)
    assert (here.generation.dtype, here.scoring.dtype) == ("bfloat16", "float32")
    slow = MachineSpeed({"float32": 190e9, "bfloat16": 2e9}, import_seconds=5)
    assert as_run_here(PRESETS["demo"](), [], slow).training.precision == "float32"


def test_the_command_plans_the_demo_with_this_machines_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.planning.command.measure_speed", lambda: MACHINE)
    assert main(["plan", "--preset", "demo"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan of demo, on this machine (CPUs)\n")
    assert "warm start: train" in printed and "GPU hours" not in printed


@pytest.mark.slow
def test_this_machine_has_a_speed() -> None:
    found = measure_speed()
    assert found.operations["float32"] > 1e9 and found.operations["bfloat16"] > 0
    assert 0.5 < found.import_seconds < 120


def test_preflight_has_a_line_of_memory() -> None:
    assert check_memory(changed("zephyr")).startswith("the most is 36 GiB of A100 40 GiB")
    with pytest.raises(ConfigError, match=r"SET=\"training.offload_optimizer=cpu\""):
        check_memory(changed("zephyr", "launch.processes_per_node=1"))
    with pytest.raises(UncertainError, match="close, it may not fit"):
        check_memory(changed("llama3", "training.deepspeed=zero2"))
    with pytest.raises(UncertainError, match="owner/unknown: its shape is not in the plan's table"):
        check_memory(changed("zephyr", "policy_source=owner/unknown"))
