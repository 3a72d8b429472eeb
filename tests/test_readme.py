"""README keeps its word: its numbers are the results', its links lead somewhere, its example runs."""

import json
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tables(notebook) -> list[str]:
    """The markdown that the notebook's cells have displayed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return ["".join(output["data"]["text/markdown"]) for output in outputs if "data" in output]


def test_tables_are_what_the_results_give_now(tmp_path, monkeypatch):
    """Numbers, times and the list of notebooks; after new results: make record."""
    kept = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    run = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    with tempfile.TemporaryDirectory(prefix="clmae-") as place:  # short, for a socket's name
        own = {"transport": "ipc", "connection_file": f"{place}/kernel.json"}
        where = {"metadata": {"path": str(ROOT / "nbs")}}
        NotebookClient(run, config=Config({"KernelManager": own}), resources=where).execute()
    assert len(tables(kept)) == 7
    assert tables(run) == tables(kept), "run make record"


def numbers(cell: str) -> list[float]:
    """Mean, low and high of `51.2 (49.0–53.3)` or of `51.2 ± 0.4 (49.0–53.3)`; nothing of a dash."""
    found = [float(number) for number in re.findall(r"\d+\.\d", cell)]
    return found[:1] + found[-2:]


def test_numbers_are_those_of_metrics():
    from clmae.figures import NAMES, title

    metrics = json.loads((ROOT / "results/metrics.json").read_text())
    wanted = {NAMES[name]: summary for name, summary in metrics["baselines"].items()}
    wanted |= {f"**{title(run)}**": summary for run, summary in metrics["runs"].items()}
    section = README.split("\n## Results\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert {row[0] for row in rows} == set(wanted) and len(rows) == len(wanted)
    for label, *cells in rows:
        for cell, probe in zip(cells[:2], ("knn", "linear"), strict=True):
            summary = wanted[label].get(probe)
            expected = [100 * summary[key] for key in ("mean", "low", "high")] if summary else []
            assert numbers(cell) == pytest.approx(expected, abs=0.0501), (label, probe)


def test_both_methods_beat_what_needs_no_training():
    """Outside the 95 % intervals over test images; MAE by ten points over an encoder that learned nothing."""
    metrics = json.loads((ROOT / "results/metrics.json").read_text())
    for probe in ("knn", "linear"):
        for run in ("mae", "cl_mae"):
            for baseline in metrics["baselines"].values():
                assert metrics["runs"][run][probe]["low"] > baseline[probe]["high"]
        assert metrics["runs"]["mae"][probe]["mean"] > 0.1 + metrics["baselines"]["random"][probe]["mean"]
    whole = json.loads((ROOT / "results/difficulty.json").read_text())["pixels_64"]["test"]  # by kNN alone
    assert all(metrics["runs"][run]["knn"]["low"] > whole["high"] for run in ("mae", "cl_mae"))


def test_the_curriculum_turns_and_the_masker_lives():
    health = json.loads((ROOT / "results/metrics.json").read_text())["runs"]["cl_mae"]["health"]
    assert health["gap"]["first_quarter"] <= 0.95 and health["gap"]["last_quarter"] >= 1.05
    assert health["verdict"] == "alive" and health["alive"] == 1


def test_typed_numbers_are_those_of_the_bake_off():
    from clmae.bakeoff import arms
    from clmae.config import read_params

    section = README.split("\n## Does it pay?\n")[1].split("\n## ")[0]
    assert f"{len(arms)} arms" in section
    assert f"{read_params(ROOT / 'params.yaml').train.epochs} epochs of MAE" in section
    baselines = ROOT / "results/recorded/bakeoff/cifar10/baselines.json"
    found = json.loads(baselines.read_text())["metrics"]["pixels"]
    tested, trained = (f"{found[f'{split}_images']:,}" for split in ("test", "train"))
    assert f"The same on {trained} photographs of CIFAR-10, with {tested} of its test images" in section


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert len(local) > 10
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_every_notebook_is_on_the_map():
    for path in [*(ROOT / "nbs").glob("[0-9]*.ipynb"), *(ROOT / "nbs/stages").glob("[0-9]*.ipynb")]:
        assert f"({path.relative_to(ROOT)})" in README


def test_the_example_is_ten_lines_and_runs(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from clmae.mae import build_mae, save

    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    encoder = build_mae([64, 64], [8, 8]).encoder
    save(encoder, tmp_path / "build/runs/cl_mae-0")
    (tmp_path / "photos").mkdir()
    for i, (mode, size) in enumerate([("RGB", (80, 60)), ("L", (64, 64)), ("RGB", (31, 200))]):
        Image.new(mode, size, 40 * i).save(tmp_path / f"photos/{i}.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert f"torch.Size([3, {encoder.width}])" in capsys.readouterr().out
