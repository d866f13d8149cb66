"""How much the sections do: on a GPU the shapes of 7 and 8 billion weights, on a CPU the same code with tiny ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tests.benchmarks.gpu import SHAPES, SMALL_SHAPE, Amounts


@dataclass(frozen=True)
class Scale:
    """Sizes of models and of their work.

    Attributes:
        device: where it runs.
        shape: of the model that scores, is trained and answers, by the names of transformers' LlamaConfig.
        shape_name: of `shape`, for people.
        num_trained_layers: of the model that is trained with its optimizer, otherwise of the same shape.
        trained_vocabulary: of that model.
        speed: how much is scored and trained on to know how fast it goes.
        generation: prompts, responses to each, and the tokens of one of these.
        pair_tokens: of each prompt and each response of the pairs that are trained on.
    """

    device: Literal["cuda", "cpu"]
    shape: Mapping[str, int]
    shape_name: str
    num_trained_layers: int
    trained_vocabulary: int
    speed: Amounts
    generation: tuple[int, int, int]
    pair_tokens: int

    @property
    def trained_shape(self) -> dict[str, int]:
        """Return the shape of the model that is trained with its optimizer."""
        return {**self.shape, "num_hidden_layers": self.num_trained_layers, "vocab_size": self.trained_vocabulary}


SCALES = {
    # 8 billion weights with AdamW under ZeRO-3 take 16 bytes a weight on one GPU, 128 GB, and a checkpoint 96 GB of the
    # machine's memory, of its disk, and of what stores it. Four layers of the same width with 32,000 words, 1.1 billion
    # weights, take 18 and 14 GB, and run the same matrix products.
    "full": Scale(
        device="cuda",
        shape=SHAPES["Llama 3 8B"],
        shape_name="Llama 3 8B",
        num_trained_layers=4,
        trained_vocabulary=32_000,
        speed=Amounts(),
        generation=(64, 16, 256),
        pair_tokens=512,
    ),
    "small": Scale(
        device="cpu",
        shape=SMALL_SHAPE,
        shape_name="a tiny Llama",
        num_trained_layers=2,
        trained_vocabulary=512,
        speed=Amounts(20, (10, 30), num_prompts=2, num_responses=2, num_pairs=2, num_peer_prompts=1, repeats=1),
        generation=(2, 2, 4),
        pair_tokens=20,
    ),
}
