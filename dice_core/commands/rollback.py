"""Command rollback: the pointer says again what it said before."""

from dice_core.commands.person import person
from dice_core.commands.table import Answer
from dice_core.release.mlflow_registry import register_or_tell
from dice_core.storage.promotion import roll_back


def rollback(pointer_uri: str, *, to: int = 0, reason: str = "") -> Answer:
    """Let a pointer say again, byte for byte, what it said before; the history keeps that too.

    Args:
        pointer_uri: the pointer to move, ROOT/promoted/NAME.json.
        to: number of the entry to go back to, as `dice history` shows it; 0: what was there before the current policy
            was promoted.
        reason: why, for the history.
    """
    target = roll_back(pointer_uri, to or None, by=person(), reason=reason)
    text = f"{pointer_uri} names {target.policy_uri} again, as after entry {target.sequence}"
    values = {"pointer": pointer_uri, "policy_uri": target.policy_uri, "entry": target.sequence}
    return Answer(text, values | {"registry": register_or_tell(pointer_uri)})
