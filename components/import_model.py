"""Component of the import-model stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def import_model(root: str, run: str, source: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Bring a model into storage, once for all runs.

    Args:
        root: Where all runs keep their data: s3://bucket/prefix or a folder.
        run: Name of the run that needs it.
        source: A Hub id (org/name), a folder, an s3:// address or a GGUF file.

    Returns:
        metrics: What was imported.
        Output: Address of the imported model.
    """
    from dice_core.stages.import_model import import_model
    from dice_core.storage import layout

    report = import_model(source, layout.imported_model(root, source), run_uri=layout.run(root, run))
    metrics.metadata.update(report.metrics, status=report.status, uri=report.uri)
    return report.uri
