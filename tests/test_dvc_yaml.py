"""dvc.yaml against the code: DVC does not see Python's imports, so a test does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from src.common.paths import ROOT
from src.compose import compose_experiment
from src.configuration.composing import compose

# The experiments that DVC runs by default, and those that a reader adds by removing a "#".
PARAMS = yaml.safe_load(re.sub(r"(?m)^#(  \w+: \{)", r"\1", (ROOT / "params.yaml").read_text()))
DEFAULT = ["cifar10_resnet", "imdb_lstm", "facades_pix2pix"]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imports(module: str, seen: set[Path] | None = None) -> set[Path]:
    """All files of src/ that a module imports, at whatever depth and wherever in its code, for type checking too."""
    seen = set() if seen is None else seen
    path = file_of(module)
    if path is None or path in seen:
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src"):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                imports(str(name), seen)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("src"):
                    imports(alias.name, seen)
    return seen


def targets(section: object) -> set[str]:
    if not isinstance(section, dict):
        return set()
    own = {section["_target_"]} if "_target_" in section else set()
    return own.union(*(targets(value) for value in section.values()))


def covered(path: Path, deps: list[str]) -> bool:
    relative = path.relative_to(ROOT).as_posix()
    return path.name == "__init__.py" or any(relative == dep or relative.startswith(f"{dep}/") for dep in deps)


@pytest.mark.parametrize("stage", ["download", "preprocess", "train", "evaluate", "export"])
@pytest.mark.parametrize("experiment", list(PARAMS["experiments"]))
def test_a_stage_s_deps_cover_every_module_that_it_imports(stage: str, experiment: str) -> None:
    item = PARAMS["experiments"][experiment]
    deps = [str(dep).replace("${item.model}", item["model"]) for dep in STAGES[stage]["do"]["deps"]]
    needed = imports(f"src.{stage}")
    config = compose([f"experiment={experiment}", "output=."]).plain()
    section = config["data"] if stage in ("download", "preprocess") else config["model"]
    for target in targets(section):
        needed |= imports(target.rpartition(".")[0])
    assert sorted(str(path) for path in needed if not covered(path, deps)) == []


def test_compose_depends_on_all_that_it_reads() -> None:
    deps = STAGES["compose"]["do"]["deps"]
    assert STAGES["compose_data"]["do"]["deps"] == deps
    assert {"conf", "src/data", "src/models"} <= set(deps)  # signatures are read from there
    assert [path for path in imports("src.compose") if not covered(path, deps)] == []


def test_rooms_never_use_stages_and_data_and_models_know_nothing_of_each_other() -> None:
    stage_files = set(ROOT.glob("src/*.py")) - {
        ROOT / "src" / name
        for name in ("__init__.py", "config.py", "dvc_stage.py", "errors.py", "files.py", "hardware.py", "identity.py")
    }
    for room in ("data", "models", "training", "reporting", "sweeping"):
        for path in (ROOT / "src" / room).glob("*.py"):
            used = imports(f"src.{room}.{path.stem}") - {path}
            assert not used & stage_files, path
            text = path.read_text()
            if room in ("data", "models"):
                assert "mlflow" not in text.lower(), path
                assert "import dvc" not in text, path
                assert not {p for p in used if p.parent.name in ("training", "reporting")}, path
    for path in (ROOT / "src" / "models").glob("*.py"):
        assert not {p for p in imports(f"src.models.{path.stem}") if p.parent.name == "data"}, path


def test_the_classic_networks_are_offered_but_not_run_by_default() -> None:
    default = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert list(default["experiments"]) == DEFAULT
    files = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert set(PARAMS["experiments"]) == files - {"facades_pix2pix_128"}


@pytest.mark.parametrize("name", list(PARAMS["experiments"]))
def test_compose_accepts_every_experiment_that_params_offers(name: str) -> None:
    assert compose_experiment(PARAMS, name).name == name


def test_every_experiment_of_params_has_a_file_and_a_data_set_that_is_listed() -> None:
    for name, item in PARAMS["experiments"].items():
        assert (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file()
        assert item["data"] in PARAMS["data"]
        assert compose([f"experiment={name}", "output=."]).data.name == item["data"]
