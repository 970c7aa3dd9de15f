"""The wheel holds all that the program needs: it installs and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("llm", "configs", "ds_configs", "launch", "tools", "setup.py", "pyproject.toml", "README.md")


def run(*words, cwd: Path, **environment) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the installed wheel, built from a copy, for building writes into its source."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", root, source, cwd=root)
    (wheel,) = root.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", root / "installed", wheel, cwd=root)
    return root / "installed"


IMPORT = """
import llm, sys
from llm.config import EngineConfig, find_preset, load_config, shipped
from llm.engine.ds_config import ds_config_path
assert llm.__file__.startswith(sys.argv[1]), llm.__file__
for path in shipped("configs").glob("*.yaml"):
    assert str(find_preset(path.stem)).startswith(sys.argv[1])
    print(load_config(preset=path.stem).model.model_name)
for stage in (1, 2, 3):
    assert ds_config_path(EngineConfig(zero_stage=stage)).is_file()
"""


def test_presets_and_deepspeed_settings_load_from_the_wheel_alone(installed, tmp_path):
    found = run("-c", IMPORT, installed, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert sorted(found) == sorted(load.stem if load.stem != "sft-toy" else "toy" for load in ROOT.glob("configs/*.yaml"))


def test_scripts_run_as_modules_and_what_is_no_python_came_along(installed, tmp_path):
    assert "--steps-today" in run("-m", "llm.launch.train", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "pystdlib" in run("-m", "llm.tools.download", "--list", cwd=tmp_path, PYTHONPATH=str(installed))
    kept = {path.relative_to(ROOT) for path in ROOT.glob("llm/**/*") if path.is_file() and "__pycache__" not in path.parts}
    assert kept and not [path for path in kept if not (installed / path).is_file()]
