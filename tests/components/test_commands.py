"""How KFP starts a component: the programs that an image must have."""

import importlib
from pathlib import Path

import pytest

from components import images

NAMES = sorted(
    path.stem for path in Path(images.__file__).parent.glob("*.py") if path.stem not in ("__init__", "images")
)
SCRIPT = [
    "program_path=$(mktemp -d)",
    'printf "%s" "$0" > "$program_path/ephemeral_component.py"',
    "_KFP_RUNTIME=true python3 -m kfp.dsl.executor_main --component_module_path "
    '"$program_path/ephemeral_component.py" "$@"',
]


@pytest.mark.parametrize("name", NAMES)
def test_a_component_needs_sh_mktemp_printf_and_python_with_kfp(name: str) -> None:
    component = getattr(importlib.import_module(f"components.{name}"), name)
    shell, option, script, _source = component.component_spec.implementation.container.command
    assert (shell, option) == ("sh", "-ec")
    assert [" ".join(line.split()) for line in script.splitlines() if line] == SCRIPT
