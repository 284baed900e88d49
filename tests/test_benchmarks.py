# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The study scripts run, from start to report."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from .training.runs import pil_dataset

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch, tmp_path, capsys):
    """`study("run", …)`: what the script prints, in a folder of its own."""
    path = ROOT / "benchmarks" / "study.py"
    spec = importlib.util.spec_from_file_location("study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> str:
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, argv)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


def test_curriculum_study(tmp_path, study):
    images = pil_dataset(48, size=40).add_column("label", [i % 2 for i in range(48)])
    images.to_parquet(tmp_path / "data" / "train.parquet")
    for steps in (1, 2):
        for setting in ("authors", "default"):
            options = ("--setting", setting, "--dataset", "data", "--max_steps", steps, "--results", "results")
            study("run", "curriculum", *options)
    for setting in ("authors", "default"):
        (result,) = (tmp_path / "results").glob(f"cpu-{setting}-*-2.json")
        rows = json.loads(result.read_text())["rows"]
        assert [row["step"] for row in rows] == [0, 2]
        assert rows[0].keys() >= {"difficulty", "keep_spread", "alignment_tokens", "alignment_attention"}
    printed = study("report", "curriculum", "--results", "results")
    assert printed.splitlines()[2].startswith("| default | normalised | 2 | 0 | ")
    assert (tmp_path / "results" / "table.md").read_text() == printed.removesuffix("\n")
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {"cpu-difficulty.png", "cpu-causes.png"}


def test_cmae_study(tmp_path, study):
    images = pil_dataset(48, size=40).add_column("label", [i % 2 for i in range(48)])
    images.to_parquet(tmp_path / "data" / "train.parquet")
    for setting in ("mae", "learned"):
        study("run", "cmae", "--setting", setting, "--dataset", "data", "--max_steps", 1, "--results", "results")
    printed = study("report", "cmae", "--results", "results")
    assert "| random-mask loss | position accuracy |" in printed.splitlines()[0]
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:4]] == ["| MAE", "| all, learned masks"]


def test_report_without_runs(study):
    with pytest.raises(SystemExit, match="`--results` nothing holds no runs"):
        study("report", "curriculum", "--results", "nothing")


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(name)`: a script's module, and `module.main` called with arguments, for what it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str):
        module = importlib.import_module(name)

        def call(*argv: object) -> str:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
            capsys.readouterr()
            module.main()
            return capsys.readouterr().out

        return module, call

    yield load
    for name in ("step", "input_pipeline", "scaling"):
        sys.modules.pop(name, None)


def test_step_benchmark(tmp_path, script):
    _, call = script("step")
    printed = call("--preset", "smoke", "--output", tmp_path, "--rounds", 1)
    results = json.loads((tmp_path / "step-smoke.json").read_text())
    assert results.keys() >= {"command", "date", "device", "cpu", "versions", "peaks"}
    assert printed.endswith((tmp_path / "step-smoke.md").read_text() + "\n")
    rows = {(row["options"], row["batch"]): row for row in results["groups"]["tiny"]}
    defaults, mae, learned = (
        rows[name, 4] for name in ("vit_mae, sdpa, fp32", "mae, eager, fp32", "cl_mae, eager, fp32")
    )
    assert defaults["times_vit_mae_defaults"] == 1
    assert mae["times_vit_mae_defaults"] == pytest.approx(defaults["median_seconds"] / mae["median_seconds"])
    assert learned["over_own_mae"] == pytest.approx(learned["median_seconds"] / mae["median_seconds"])
    assert mae["peak_share"] == pytest.approx(mae["flops"] / mae["median_seconds"] / results["peaks"]["fp32"])
    assert defaults["flops"] == mae["flops"] < learned["flops"]
    assert all(len(row["seconds"]) == 1 for row in rows.values())


def test_step_benchmark_reports(script):
    step, _ = script("step")
    case = step.Case("mae", "tiny", 2)
    timed = [
        {"shape": "tiny", "options": case.options, "batch": batch, "median_seconds": 3 * batch**1.5}
        for batch in (2, 4, 8)
    ]
    (fit,) = step.exponents([*timed, {"shape": "tiny", "options": "other", "batch": 2, "error": "out of memory"}])
    assert fit["exponent"] == pytest.approx(1.5)
    assert (fit["axis"], fit["values"]) == ("batch", [2, 4, 8])
    kernel = {"name": "gemm", "ms": 1.5, "share": 0.25}
    gpu = {
        "shape": "tiny",
        "options": case.options,
        "batch": 2,
        "images_per_second": 3.0,
        "peak_bytes": 5e6,
        "synchronisations": 0,
    }
    results = {
        **step.describe(step.torch.device("cpu")),
        **dict(rounds=5, peaks={"fp32": 2e11}, exponents=[fit]),
        "groups": {
            "g": [{**gpu, "kernels": [kernel]}, {"shape": "tiny", "options": "o", "batch": 4, "error": "out of memory"}]
        },
    }
    text = step.to_markdown(results)
    assert "| mae, eager, fp32 | 2 | 3.0 | 5 | 0 |" in text
    assert "| o | 4 | out of memory |  |  |" in text
    assert "`gemm` 1.50 ms (25%)" in text
    assert "| tiny, mae, eager, fp32 | batch 2, 4, 8 | 1.500 |" in text


def test_step_benchmark_compares_what_is_of_one_shape(script):
    step, _ = script("step")
    rows = [
        {**step.asdict(case), "options": case.options, "flops": 6.0, "median_seconds": seconds}
        for shape, times in (("tiny", (4.0, 2.0)), ("192x6-64px", (80.0, 100.0)))
        for case, seconds in zip(step._cases((step.VIT_MAE, "mae"), shape, 2, attention="sdpa"), times, strict=True)
    ]
    step.compare_rows(rows, {"fp32": 3.0})
    assert [row["times_vit_mae_defaults"] for row in rows] == [1, 2, 1, 0.8]
    assert [row["over_own_mae"] for row in rows] == [2, 1, 0.8, 1]
    text = step.to_markdown(
        {**step.describe(step.torch.device("cpu")), "rounds": 1, "peaks": {}, "exponents": [], "groups": {"g": rows}}
    )
    assert "| tiny, mae, sdpa, fp32 | 2 |" in text


def test_step_benchmark_fits_patches_and_widths(script):
    step, _ = script("step")
    shapes = {side: f"192x6-{side}px" for side in (32, 64, 96, 128)}
    rows = [{"shape": shapes[side], "batch": 32, "median_seconds": 2.0 * side**2, "options": "a"} for side in shapes]
    # Another depth is another case.
    rows.append({"shape": "ViT-S/8-64px", "batch": 32, "median_seconds": 1.0, "options": "a"})
    (patches,) = step.exponents(rows)
    assert (patches["case"], patches["axis"], patches["values"]) == ("batch 32, a", "patches", [16, 64, 144, 256])
    assert patches["exponent"] == pytest.approx(1)
    rows = [
        {"shape": f"{width}x6-64px", "batch": 32, "median_seconds": width**2.0, "options": "a"}
        for width in (192, 384, 768)
    ]
    (widths,) = step.exponents(rows)
    assert (widths["axis"], widths["values"], round(widths["exponent"], 6)) == ("width", [192, 384, 768], 2)


def test_the_page_on_speed_has_the_computed_tables(script):
    _, call = script("step")
    page = (ROOT / "docs" / "speed.md").read_text()
    for table in call("--cost").strip().split("\n\n"):
        assert table in page


def test_step_benchmark_wrong_use(tmp_path, script, capsys):
    _, call = script("step")
    with pytest.raises(SystemExit, match="`--only` 'huge' is in no group's name"):
        call("--preset", "smoke", "--only", "huge", "--output", tmp_path)


def test_memory_is_counted(script):
    step, _ = script("step")
    case = step.Case("cl_mae", "tiny", 8, precision="bf16")
    state, peak = step.counted_bytes(case)
    model = step.build_model(case)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Weights and AdamW's two moments, at least; little else: buffers and images.
    assert 12 * weights < state < 1.3 * 12 * weights
    with step.AliveBytes() as bytes_:
        kept = [step.torch.zeros(1000), step.torch.zeros(1000)]
        view = kept[0].view(10, 100)
        kept.pop()
        del kept
    assert (bytes_.peak, bytes_.alive) == (8000, 4000)
    assert view.numel() == 1000
    _, twice = step.counted_bytes(replace(case, batch=16))
    _, without = step.counted_bytes(case, with_pass_b=False)
    _, again = step.counted_bytes(replace(case, checkpointing=True))
    assert state < again < peak < twice
    assert without < peak


def test_presets_hold_what_can_be_built(script):
    step, _ = script("step")
    for preset in step.PRESETS.values():
        for cases in preset.groups.values():
            assert len(set(cases)) == len(cases)
            assert all(step.step_flops(case.config, case.batch, case.interval) > 0 for case in cases)


def test_input_pipeline_benchmark(tmp_path, script):
    for i, image in enumerate(pil_dataset(6, size=80)["image"]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{i}.jpg")
    _, call = script("input_pipeline")
    options = ("--sizes", 56, 32, "--rounds", 1, "--count", 4)
    printed = call("--images", tmp_path / "photos", *options, "--output", tmp_path)
    results = json.loads((tmp_path / "input_pipeline.json").read_text())
    assert [row["image_size"] for row in results["rows"]] == [56, 32]
    for row in results["rows"]:
        assert row["ratio"] == pytest.approx(row["medians"]["clmae"] / row["medians"]["mae_recipe"])
        # Of another crop the difference would be tens.
        assert 0 < row["difference"] < 1
    assert printed.startswith((tmp_path / "input_pipeline.md").read_text())


def test_scaling_benchmark(tmp_path, script):
    processes = min(2, script("scaling")[0].usable_cores())
    options = f"--processes {processes} --families mae --shape tiny --batch 2 --steps 2 --rounds 1 --output".split()
    subprocess.run([sys.executable, ROOT / "benchmarks" / "scaling.py", *options, tmp_path], check=True)
    results = json.loads((tmp_path / "scaling.json").read_text())
    (row,) = results["rows"]
    assert {way: len(seconds) for way, seconds in row["seconds"].items()} == {"alone": 2, "apart": 2, "together": 2}
    assert all(0 < seconds < 60 for way in row["seconds"].values() for seconds in way)
    alone, together = row["medians"]["alone"], row["medians"]["together"]
    assert f"| {alone / together:.2f} |" in (tmp_path / "scaling.md").read_text()
