"""Which lines of a pod's log are the stage's own. KFP's launcher, KFP's executor and Argo's executor write there too.

Only lines that report no fault are left out: an upload that the launcher could not make is shown.
"""

import re
from collections.abc import Iterable, Iterator

# glog, as KFP's launcher uses it: I1128 15:21:22.502999      27 launcher_v2.go:181] publish success.
_LAUNCHER = re.compile(r"I\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w.-]+\.go:\d+\] ")
# logrus and slog: time="2025-11-28T15:21:23.490Z" level=info msg="sub-process exited" argo=true error="<nil>"
_ARGO = re.compile(r'time="?\d{4}-\d\d-\d\dT\S+ level="?(?:debug|info)"? msg=', re.IGNORECASE)
_EXECUTOR = re.compile(r"\[KFP Executor [^]]* (?:DEBUG|INFO)\]: ")
# Argo repeats the exit code; what went wrong stands above it.
_EXIT = re.compile(r"Error: exit status \d+")
_MACHINERY = (_LAUNCHER, _ARGO, _EXECUTOR)


def own_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines that the stage wrote, and the faults of whoever started it.

    Args:
        lines: of a whole log, from its beginning: the JSON of the inputs is left out from its first brace to its last.
    """
    is_json = follows_machinery = False
    for line in lines:
        if is_json:
            is_json = line != "}"
        elif follows_machinery and line == "{":
            is_json = True
        else:
            follows_machinery = _is_machinery(line)
            is_json = follows_machinery and line.endswith("{")
            if not follows_machinery:
                yield line


def _is_machinery(line: str) -> bool:
    return any(kind.match(line) for kind in _MACHINERY) or _EXIT.fullmatch(line) is not None
