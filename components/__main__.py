"""Runs a component of this package in a pod: `python3 -m components EXECUTOR ... --function_to_execute NAME`.

The executor is KFP's, which reads the inputs, calls the function and writes down its outputs.
"""

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Tell KFP's executor where the function is: in the module of its name."""
    executor, *given = sys.argv[1:]
    module = Path(__file__).with_name(f"{given[-1]}.py")
    # Without it, kfp loads its compiler and its client too.
    os.environ["_KFP_RUNTIME"] = "true"
    from dice_core.stages.light_start import begin

    begin(module.stem.replace("_", "-"))
    sys.argv = [executor, "--component_module_path", str(module), *given]
    runpy.run_module(executor, run_name="__main__")


if __name__ == "__main__":
    main()
