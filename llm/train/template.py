"""The one template that a run's conversations are written with."""

from llm.checkpoint.resume import Checkpoint
from llm.checkpoint.slices import CheckpointError
from llm.checkpoint.template import read_template, template_file
from llm.config import ConfigError
from llm.data.manifest import same_form
from llm.data.shards import Shard

ACCEPT = "template"  # what --accept-change calls another one


def run_template(
    datasets: dict[str, list[Shard]], checkpoint: Checkpoint | None, source: Checkpoint | None, accepted: tuple[str, ...]
) -> dict | None:
    """That of the data, else that of the checkpoint to go on from, or of the one whose weights a new run starts with. Raises UserError."""
    found = _of_data(datasets)
    before = checkpoint or source
    kept = read_template(before.folder) if before else None
    if checkpoint and kept and found and not same_form(kept, found) and ACCEPT not in accepted:
        raise CheckpointError(
            f"data.data_path: its conversations were written with the template {found['name']}, those that this run knows with {kept['name']}, and "
            f"a model would meet two forms of one thing. Tokenize them again with --template {template_file(checkpoint.folder)}, or go on with "
            f"--accept-change {ACCEPT}: from then on the new one is the run's."
        )
    return found or kept


def _of_data(datasets: dict[str, list[Shard]]) -> dict | None:
    found = [(name, template) for name, shards in datasets.items() for s in shards if (template := s.meta.writer.get("template"))]
    for name, template in found:
        if not same_form(template, found[0][1]):
            raise ConfigError(
                f"data.data_path: the conversations of {found[0][0]} were written with the template {found[0][1]['name']}, those of {name} with "
                f"{template['name']}, and a model would meet two forms of one thing. Tokenize one of them again with the --template of the other."
            )
    return found[0][1] if found else None
