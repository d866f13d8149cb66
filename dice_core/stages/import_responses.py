"""Stage import-responses: the user's own responses, as texts, become the tables that score and pair read.

No stage of a pipeline: it takes generate's place where somebody else has sampled the responses.
"""

from functools import partial

from dice_core.data import records
from dice_core.data.settings import ChatConfig, DataConfig
from dice_core.settings.base import ConfigError, Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.parts import part_name, read_input
from dice_core.stages.prepare_data import SOURCES, LocalSource, local_sources
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import IMPORT_RESPONSES
from dice_core.storage.manifest import Manifest


@leaves_reason(IMPORT_RESPONSES)
def import_responses(
    responses_source: str,
    policy_uri: str,
    output_uri: str,
    *,
    data_uri: str = "",
    data: Values = None,
    chat: Values = None,
    overwrite: bool = False,
) -> StageReport:
    """Make the tables that score and pair read from responses of your own, as texts.

    Args:
        responses_source: JSONL or Parquet (a file or a folder) or a Hub data set, with prompt and response, or a list
            of responses.
        policy_uri: the model that wrote them: its tokenizer makes the token ids.
        output_uri: where the responses go, as part-00000.parquet and so on.
        data_uri: prepare-data's output; responses to prompts that it does not have are dropped.
        data: settings, see DataConfig: what becomes of rows that hold more than a prompt and a response.
        chat: settings, see ChatConfig.
        overwrite: first delete what this stage left at its output.
    """
    if not responses_source:
        raise ConfigError("responses_source: is empty, name a file, a folder, an s3:// address or a Hub data set")
    data_config, chat_config = DataConfig.parse(data, "data"), ChatConfig.parse(chat, "chat")
    with local_sources({"responses": responses_source}) as sources:
        return run_stage(
            IMPORT_RESPONSES,
            output_uri,
            partial(_make_tables, source=sources["responses"], data=data_config, chat=chat_config),
            settings={"data": data_config, "chat": chat_config},
            arguments={name: source.digest for name, source in sources.items()},
            noted={SOURCES: {name: source.shown for name, source in sources.items()}},
            overwrite=overwrite,
            inputs={"policy": policy_uri} | ({"data": data_uri} if data_uri else {}),
        )


def _make_tables(context: StageContext, *, source: LocalSource, data: DataConfig, chat: ChatConfig) -> Manifest:
    """Read the texts, and write them as token ids."""
    from dice_core.data.chat import chat_format
    from dice_core.data.rows import control_token_pattern
    from dice_core.data.sources import read_responses
    from dice_core.models.loading import load_tokenizer
    from dice_core.preferences.own_responses import ResponseTables, require_some

    template = chat_format(load_tokenizer(context.fetch_tokenizer("policy")), chat)
    rows = read_responses(source.path, data, name=source.shown)
    known = context.inputs.get("data")
    prompt_ids = set(read_input(context, known, records.PROMPTS, "prompts")["prompt_id"].to_pylist()) if known else None
    made = ResponseTables(rows.table, template, prompt_ids, control_token_pattern(template.control_tokens, data))
    files = {
        part_name(index): context.write_table(table, records.RESPONSES, part_name(index))
        for index, table in enumerate(made.tables())
    }
    counts = made.counts.copy()
    for what, reasons in (("dropped_rows", rows.num_dropped), ("cleaned", rows.num_cleaned)):
        counts.update({f"num_{what}_{reason}": count for reason, count in reasons.items()})
    require_some(counts, source.shown)
    return context.publish(files, {**{name: n for name, n in counts.items() if n}, "seconds": context.seconds()})
