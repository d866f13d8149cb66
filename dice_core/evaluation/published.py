"""What the paper reports, to set beside one's own numbers: AlpacaEval 2 against gpt-4-turbo, in percent."""

from typing import NamedTuple


class AlpacaEvalResult(NamedTuple):
    """A model's result on AlpacaEval 2, percent."""

    length_controlled_win_rate: float
    win_rate: float


PAPER = "arXiv 2406.09760"
PUBLISHED: dict[str, tuple[AlpacaEvalResult, ...]] = {
    "zephyr": (
        AlpacaEvalResult(12.69, 10.71),
        AlpacaEvalResult(19.03, 17.67),
        AlpacaEvalResult(20.71, 20.16),
    ),
    "llama3": (
        AlpacaEvalResult(18.20, 15.50),
        AlpacaEvalResult(25.08, 25.77),
        AlpacaEvalResult(27.55, 30.99),
    ),
}
"""By preset: the policy it starts from, then the policy of each iteration."""
