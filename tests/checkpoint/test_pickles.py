"""Case 50: whoever can write into a checkpoint can spoil it, but cannot make the program run what lies there."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
from little_run import make_run, sit
from ranks import run_ranks
from resealing import forge

from llm.checkpoint import folder
from llm.config import load_config
from llm.log import UserError


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def four_steps(world, config: str) -> None:
    sit(world, config, steps_today=4)


def go_on(world, configs: list[str]) -> list[str]:
    told = []
    for config in configs:
        try:
            sit(world, config)
            told.append("went on")
        except UserError as error:
            told.append(str(error))
    return told


@pytest.mark.timeout(120)
def test_a_pickle_in_the_place_of_any_file_is_refused_and_nothing_of_it_runs(tmp_path):
    config, canary = make_run(tmp_path / "whole"), tmp_path / "canary"
    run_ranks(four_steps, 1, tmp_path, str(config))
    payload = pickle.dumps(Bomb(canary))
    files = sorted(p.relative_to(tmp_path / "whole") for p in folder.entries(load_config(config).run_folder)[-1].path.rglob("*") if p.is_file())
    configs = []
    for n, file in enumerate(files):
        copy = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"copy-{n}"))
        text = (copy / "little.json").read_text().replace(str(tmp_path / "whole"), str(copy))
        (copy / "little.json").write_text(text)
        (copy / file).write_bytes(payload)
        checkpoint = copy / Path(*file.parts[:3])
        if file.name != "MANIFEST.json":
            name = (copy / file).relative_to(checkpoint).as_posix()
            forge(checkpoint, lambda fields, name=name: _recompute(fields, name, payload))
        configs.append(str(copy / "little.json"))
    told = run_ranks(go_on, 1, tmp_path, configs)[0]
    assert len(files) == 4 and not canary.exists()
    for file, what in zip(files, told, strict=True):
        assert file.name == "tokenizer.json" or file.name in what or "no sound checkpoint" in what, (file, what)  # training has its own tokenizer


def _recompute(fields: dict, name: str, payload: bytes) -> None:
    for record in fields["files"]:
        if record["path"] == name:
            record |= {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
