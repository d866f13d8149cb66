"""An import tries its output before it looks for the model."""

import pytest

from dice_core.stages.import_model import import_model
from dice_core.storage.contract import NoAccessError
from pipelines.demo.object_store import ObjectStore
from tests.faulty_store import line_to


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    s3: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with line_to(object_store, monkeypatch) as line:
        line.denied = b"PUT "
        with pytest.raises(NoAccessError, match="denies PutObject"):
            import_model("/no/model/here", f"{s3}/models/refused")
