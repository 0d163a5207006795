"""The benchmark for a GPU, on a CPU: rows, ratios, budgets and reports."""

import json
from contextlib import contextmanager
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from tests.gpu_benchmark import Clock, comparison, loaded


@pytest.fixture
def bench(monkeypatch):
    with loaded(monkeypatch) as modules:
        yield modules


# -- rows and budgets ----------------------------------------------------------------------------------------------------
def test_ratios_follow_from_raw_figures(bench):
    row = lambda case, **figures: bench.gpu_rows.Row("rollout", "what", case, "a", tokens=8, **figures)  # noqa: E731
    a, b, c = bench.gpu_rows.with_ratios(
        [
            row("a", seconds=[1.0, 2.0, 4.0], peak_bytes=100),
            row("b", seconds=[3.0, 4.0, 4.0], peak_bytes=50),
            row("c", status="failed", reason="why"),
        ]
    )
    assert a["time_ratio"] == {"median": 1.0, "q25": 1.0, "q75": 1.0} and a["peak_ratio"] == 1.0
    # Round by round: 3, 2 and 1; not the ratio of medians, which is 2 as well, nor that of sums.
    assert b["time_ratio"] == {"median": 2.0, "q25": 1.5, "q75": 2.5}
    assert (b["peak_ratio"], b["ms"], b["tokens_per_second"]) == (0.5, 4000.0, 2.0)
    assert c["time_ratio"] is c["peak_ratio"] is c["ms"] is c["tokens_per_second"] is None


def test_rows_that_fail_say_so_and_the_others_go_on(bench):
    entered, runs = [], {"late": 0}
    Case, inside = bench.timing.Case, bench.timing.inside

    @contextmanager
    def context():
        entered.append(1)
        yield
        entered.pop()

    def missing():
        raise ImportError("No module named 'vllm'")

    def not_here():
        raise bench.gpu_rows.Skipped("not on this machine")

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")

    def late():
        runs["late"] += 1
        # Two runs for the peak, two in the first round.
        if runs["late"] > 4:
            raise ValueError("diverged")

    cases = {
        "peer": lambda: Case(lambda: torch.ones(1000)),
        "missing": missing,
        "not here": not_here,
        "too large": lambda: inside(Case(too_large), context),
        "late": lambda: inside(Case(late), context),
        "fine": lambda: Case(lambda: torch.ones(3000)),
    }
    rows = bench.gpu_rows.measure(comparison(bench, cases), "cpu", 3, bench.gpu_rows.Budget(1e9))
    found = {row.case: (row.status, row.reason, len(row.seconds)) for row in rows}
    assert found == {
        "peer": ("measured", "", 3),
        "missing": ("failed", "ImportError: No module named 'vllm'", 0),
        "not here": ("skipped", "not on this machine", 0),
        "too large": ("failed", "OutOfMemoryError: CUDA out of memory.", 0),
        "late": ("failed", "ValueError: diverged", 0),
        "fine": ("measured", "", 3),
    }
    assert not entered, "a context of a row that failed was not left"
    peer, *_, fine = bench.gpu_rows.with_ratios(rows)
    assert (peer["peak_bytes"], fine["peak_ratio"]) == (4000, 3.0)


def test_a_section_that_cannot_be_built_is_a_row(bench, monkeypatch):
    def broken(setup):
        raise RuntimeError("no such model")

    Case = bench.timing.Case
    monkeypatch.setitem(bench.gpu.SECTIONS, "adapters", (broken, 1.0))
    cases = {"x": lambda: Case(lambda: torch.ones(10)), "y": lambda: Case(lambda: torch.ones(10))}
    monkeypatch.setitem(bench.gpu.SECTIONS, "token_kl", (lambda setup: [comparison(bench, cases)], 1.0))
    rows = bench.gpu.run(SimpleNamespace(device="cpu"), ["token_kl", "adapters"], 2, bench.gpu_rows.Budget(60))
    assert [(row.case, row.status, len(row.seconds)) for row in rows] == [
        ("all", "failed", 0),
        ("x", "measured", 2),
        ("y", "measured", 2),
    ]


def test_the_budget_leaves_rows_out_and_cuts_rounds(bench):
    """Every case takes a second a run, two in its first runs and two in a round; what a row takes counts for the next."""
    clock = Clock()
    Case, Budget = bench.timing.Case, bench.gpu_rows.Budget
    cases = {name: lambda: Case(clock.takes(1.0)) for name in "abcd"}
    measured = lambda seconds: bench.gpu_rows.measure(comparison(bench, cases), "cpu", 9, Budget(seconds, clock))  # noqa: E731
    assert [len(row.seconds) for row in measured(1000.0)] == [9] * 4
    # 8 seconds of first runs, then 3 rounds of 8 in 27.
    start = clock()
    rows = measured(35.0)
    assert [len(row.seconds) for row in rows] == [3] * 4 and clock() - start == 32.0
    # With four comparisons to follow, a fifth is for this one, but all of its rows and one round are made.
    start = clock()
    rows = bench.gpu_rows.measure(comparison(bench, cases), "cpu", 9, Budget(35.0, clock), following=4)
    assert [len(row.seconds) for row in rows] == [1] * 4 and clock() - start == 16.0
    start = clock()
    rows = measured(7.0)
    assert [row.status for row in rows] == ["measured"] * 2 + ["left out"] * 2 and clock() - start == 8.0
    assert rows[2].reason == "no time was left for this row"
    start = clock()
    assert {row.status for row in measured(0.0)} == {"left out"} and clock() == start
    # The first row takes longer than anybody could know.
    cases = {"a": lambda: Case(clock.takes(50.0)), "b": lambda: Case(clock.takes(1.0))}
    a, b = measured(20.0)
    assert (a.status, a.reason) == ("left out", "no time was left for a round") and b.status == "left out"
    assert a.peak_bytes is not None


def test_sections_share_what_is_left(bench):
    clock = Clock()
    budget = bench.gpu_rows.Budget(100.0, clock)
    first = budget.share(1.0, following=3.0)
    assert first.left() == 25.0
    clock.now = 20.0
    # Five seconds were left over, which the next two share.
    second = budget.share(1.0, following=1.0)
    assert (first.left(), second.left(), second.spent()) == (5.0, 40.0, 0.0)
    clock.now = 130.0
    assert budget.share(1.0).left() == 0.0


# -- the report --------------------------------------------------------------------------------------------------------
def some_report(bench, device):
    row = lambda case, **options: bench.gpu_rows.Row("adapters", "a step", case, "LoRA", **options)  # noqa: E731
    rows = [row("LoRA", seconds=[1.0], peak_bytes=2**20), row("Bone", seconds=[2.0], peak_bytes=2**19, note="a note")]
    rows += [row("PMSS", status="left out", reason="no time | left")]
    settings = {"dtype": "float32", "rounds": 1, "quick": False}
    return bench.gpu.machine(device) | {
        "settings": settings,
        "seconds": 1.0,
        "rows": bench.gpu_rows.with_ratios(rows),
    }


def test_a_run_on_a_cpu_never_looks_like_one_on_a_gpu(bench, monkeypatch, tmp_path):
    card = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    bench.gpu.write(some_report(bench, "cuda"), tmp_path)
    on_gpu = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(on_gpu) == {"gpu.json", "gpu.md", "gpu.png"}
    table = on_gpu["gpu.md"].decode()
    assert table.startswith("# GPU benchmark: Some GPU\n") and "80 GiB, compute capability 9.0" in table
    assert "CPU" not in table
    assert "| Bone | 0.50 | 0.500 | 2000.00 | 2.000 [2.000, 2.000] |  | a note |" in table
    assert "| PMSS |  |  |  |  |  | **left out**: no time \\| left |" in table
    report = json.loads(on_gpu["gpu.json"])
    assert (report["gpu"]["name"], report["warning"]) == ("Some GPU", None)

    bench.gpu.write(some_report(bench, "cpu"), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in on_gpu} == on_gpu
    text = (tmp_path / "cpu_run_of_gpu_benchmark.md").read_text()
    assert text.startswith("# CPU RUN WITH SMALL SIZES: no figure here says anything about a GPU\n")
    assert text.count("CPU RUN") == 1 + text.count("the peer is")
    report = json.loads((tmp_path / "cpu_run_of_gpu_benchmark.json").read_text())
    assert report["gpu"] is None and report["warning"].startswith("CPU RUN")


def test_what_cannot_be_run_is_refused(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in ([], ["--minutes", "0", "--device", "cpu"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            bench.gpu.parse(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        bench.gpu.parse([])
    messages = capsys.readouterr().err
    assert "--device cpu shows that it runs" in messages and "CUDA_VISIBLE_DEVICES=0" in messages
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bench.gpu.parse([]).device == "cuda"


def test_the_model_for_a_gpu_has_six_hundred_million_parameters(bench):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**bench.gpu.ON_GPU.model))
    assert 0.59e9 < sum(p.numel() for p in model.parameters()) < 0.6e9
    completions, rows = bench.gpu.ON_GPU.grpo
    # Games compare prompts with one another.
    assert completions % rows == 0 and rows // bench.gpu_grpo.GENERATIONS >= 2


def test_prompts_are_different_and_as_long_as_they_should_be(bench):
    tokenizer = bench.gpu_grpo.word_tokenizer()
    rows = bench.gpu_grpo.prompts(16, 12)
    ids = tokenizer(list(rows["prompt"]))["input_ids"]
    assert {len(row) for row in ids} == {12} and len(set(map(tuple, ids))) == 16 and set(rows["level"]) == {"0", "1"}


@pytest.mark.slow
def test_every_row_of_all_sections_on_a_cpu(bench, tmp_path, capsys):
    """Sizes are tiny and times worth nothing, but all rows are there, and all follows from raw figures."""
    bench.gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "cpu_run_of_gpu_benchmark.json").read_text())
    assert set(report) == {"gpu", "warning", "python", "versions", "settings", "seconds", "rows"}
    assert {"torch", "cuda", "triton", "trl", "peft"} <= set(report["versions"])
    assert {"dtype", "rounds", "minutes", "quick", "model", "linear", "vocabularies"} <= set(report["settings"])
    rows = {(row["section"], row["what"], row["case"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    adapters, peers = bench.gpu_setup.ADAPTERS, bench.gpu_sections.PEERS
    assert {section: sum(s == section for s, *_ in rows) for section in bench.gpu.SECTIONS} == {
        "adapters": 2 * len(adapters),
        "token_kl": 6 * len(peers),
        "grpo": 6,
        "rollout": len(adapters) + 2 + 2 * len(adapters),
    }
    not_measured = {row["case"] for row in report["rows"] if row["status"] != "measured"}
    assert not_measured <= {"vLLM, merged model"}, report["rows"]
    for (section, what, _), row in rows.items():
        peer = rows[section, what, row["peer"]]
        if row["status"] == "measured":
            ratios = [ours / theirs for ours, theirs in zip(row["seconds"], peer["seconds"], strict=True)]
            assert row["time_ratio"]["median"] == pytest.approx(median(ratios)) and len(ratios) == 1
            assert row["peak_ratio"] == pytest.approx(row["peak_bytes"] / peer["peak_bytes"])
    # Bytes are what they are at any size: one whole weight at a time against none.
    blocks = {case: row for (_, what, case), row in rows.items() if what.startswith("train step of one linear")}
    assert blocks["DoRA of PEFT"]["peak_ratio"] > 2 > blocks["fast DoRA"]["peak_ratio"]
    notes = [row["note"] for row in report["rows"] if row["section"] == "token_kl" and row["case"] != row["peer"]]
    assert all(float(note.split()[1]) < 1e-5 for note in notes)
    assert (tmp_path / "cpu_run_of_gpu_benchmark.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("CPU RUN WITH SMALL SIZES") == 1 + 12
