# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""The scripts that measure speed run, from start to table."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from .processes import script as run_script
from .training.runs import pil_dataset

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(benchmark, monkeypatch, capsys):
    """`script(name)`: a script's module, and `module.main` called with arguments, for what it prints."""

    def load(name: str):
        module = benchmark(name)

        def call(*argv: object) -> str:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
            capsys.readouterr()
            module.main()
            return capsys.readouterr().out

        return module, call

    return load


@pytest.mark.slow
def test_step_benchmark(tmp_path, script):
    _, call = script("step")
    printed = call("--preset", "smoke", "--only", "tiny", "--output", tmp_path, "--rounds", 1)
    text = (tmp_path / "step-smoke-tiny.md").read_text()
    assert printed.endswith(text + "\n")
    assert text.startswith("`python benchmarks/step.py --preset smoke --only tiny")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0][:3] == ["| case", "batch", "images/s"]
    assert [row[1] for row in rows[2:]] == ["4", "4", "4", "4", "4", "4", "8"]
    assert rows[2][0] == "| vit_mae, sdpa, fp32"
    assert rows[2][5] == "1.00"
    assert all(float(row[2]) > 0 for row in rows[2:])


def test_step_benchmark_compares_what_is_of_one_shape(script):
    step, _ = script("step")
    rows = step.pd.DataFrame(
        [
            {**step.asdict(step.Case(family, shape, 2, attention="sdpa")), "flops": 6.0, "seconds": seconds}
            for shape, times in (("tiny", (4.0, 2.0)), ("192x6-64px", (80.0, 100.0)))
            for family, seconds in zip((step.VIT_MAE, "mae"), times, strict=True)
        ]
    )
    part = {**rows.iloc[1], "prediction_ratio": 0.5, "seconds": 1.0}  # faster than MAE, and not what others are beside
    assert list(
        step.compare_rows(step.pd.DataFrame([*rows.to_dict("records"), part]).assign(options=""), {"fp32": 3.0})[
            "over_mae"
        ]
    ) == [2, 1, 0.8, 1, 0.5]
    rows["options"] = rows["family"]
    rows = step.compare_rows(rows, {"fp32": 3.0})
    assert list(rows["times_defaults"]) == [1, 2, 1, 0.8]
    assert list(rows["over_mae"]) == [2, 1, 0.8, 1]
    assert list(rows["peak_share"]) == pytest.approx([0.5, 1, 0.025, 0.02])
    assert list(rows["images_per_second"]) == [0.5, 1, 0.025, 0.02]
    kernels = step.largest_kernels(lambda: step.torch.ones(9, 9) @ step.torch.ones(9, 9), step.torch.device("cpu"))
    assert "aten::mm" in set(kernels["kernel"])
    assert len(kernels) <= 5
    rows = rows.assign(peak_bytes=5e6, synchronisations=0, error=[None, None, None, "out of memory"])
    text = step.group_to_markdown("g", rows.assign(kernels=[kernels, None, kernels, None]))
    assert text.count("The largest kernels of a step, vit_mae:\n\n| kernel | launches | ms | share |") == 1
    assert "| tiny, mae | 2 | 1.0 | 2000.0 | 100% | 2.00 | 2.00 | 1.00 | 5 | 0 |" in text
    assert "| 192x6-64px, mae | 2 | out of memory |" in text


def test_step_benchmark_fits_exponents(script):
    step, _ = script("step")
    for names, axis, values, exponent in (
        (["tiny"] * 3, "batch", [2, 4, 8], 1.5),
        ([f"192x6-{side}px" for side in (32, 64, 96, 128)], "patches", [16, 64, 144, 256], 1.0),
        ([f"{width}x6-64px" for width in (192, 384, 768)], "width", [192, 384, 768], 2.0),
    ):
        batches = values if axis == "batch" else 32
        times = [3 * value**exponent for value in values]
        rows = step.pd.DataFrame({"shape": names, "batch": batches, "options": "mae", "seconds": times})
        (fit,) = step.exponents(rows).to_dict("records")
        assert (fit["x"], fit["b"]) == (f"{axis} {', '.join(map(str, values))}", f"{exponent:.3f}")
        assert step.exponents(rows[:2]).empty


@pytest.mark.slow
def test_the_page_on_speed_has_the_computed_tables(script):
    _, call = script("step")
    page = (ROOT / "docs" / "speed.md").read_text()
    for table in call("--cost").strip().split("\n\n"):
        assert table in page


def test_step_benchmark_wrong_use(tmp_path, script, capsys):
    _, call = script("step")
    with pytest.raises(SystemExit, match="`--only` 'huge' is in no group's name"):
        call("--preset", "smoke", "--only", "huge", "--output", tmp_path)


@pytest.mark.slow
def test_memory_is_counted(script):
    step, _ = script("step")
    case = step.Case("cl_mae", "tiny", 8, precision="bf16", masker="soft")
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
    _, without = step.counted_bytes(replace(case, masker="error"))
    _, again = step.counted_bytes(replace(case, checkpointing=True))
    assert state < again < peak < twice
    assert without < peak


def test_presets_hold_what_can_be_built(script):
    step, _ = script("step")
    for preset in step.PRESETS.values():
        for cases in map(step.read_cases, preset["groups"].values()):
            assert len(set(cases)) == len(cases) > 0
            assert all(step.step_flops(case.config, case.batch, case.interval) > 0 for case in cases)


@pytest.mark.slow
def test_input_pipeline_benchmark(tmp_path, script):
    for i, image in enumerate(pil_dataset(6, size=80)["image"]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        image.save(tmp_path / "photos" / f"{i}.jpg")
    _, call = script("input_pipeline")
    options = ("--sizes", 56, 32, "--rounds", 1, "--count", 4)
    printed = call("--images", tmp_path / "photos", *options, "--output", tmp_path)
    assert printed.startswith((tmp_path / "input_pipeline.md").read_text())
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["56", "32"]
    for row in rows:
        assert float(row[3]) == pytest.approx(float(row[1]) / float(row[2]), abs=0.02)
        # Of another crop the difference would be tens.
        assert 0 < float(row[4]) < 1


@pytest.mark.slow
def test_scaling_benchmark(tmp_path, script, processes, monkeypatch):
    module, call = script("scaling")

    def torchrun(command, **options):  # in processes that need not import everything
        count, program, *arguments = command[command.index("--nproc_per_node") + 1 :]
        processes.launch(int(count), run_script, Path(program), *arguments)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", torchrun)
    count = min(2, module.usable_cores())
    options = f"--processes {count} --families mae --shape tiny --batch 2 --steps 2 --rounds 1 --output"
    call(*options.split(), tmp_path)
    text = (tmp_path / "scaling.md").read_text()
    row = text.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "mae"
    alone, apart, together = (float(cell) for cell in row[1:4])
    assert 0 < alone < 60_000
    assert float(row[4]) == pytest.approx(alone / together, rel=0.1)
    assert float(row[5]) == pytest.approx(apart / together, rel=0.1)
