import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from hf_delta.cli import main
from hf_delta.errors import InputError
from hf_delta.evaluation.report import Problem, Report
from hf_delta.plot import plot_pictures, plot_run, plot_token_weights, run_figure
from hf_delta.plot.tokens import texts_of, token_figure
from hf_delta.preference.snapshots import Example, TokenSnapshots, read_snapshots


def grpo_log(steps):
    return [
        {
            "step": step,
            "reward": 0.3 + 0.01 * step,
            "reward_std": 0.2,
            "pass_rate/add10": 0.1,
            "pass_rate/add2": None if step % 2 else 0.9,
            "completions/mean_length": 10.0 + step,
            "completions/min_length": 3.0,
            "completions/max_length": 38.0,
            "completions/clipped_ratio": 0.25,
            "weights/mean": 1.0,
            "weights/std": 0.5,
            "weights/min": 0.2,
            "weights/max": 3.0,
            "loss": 1e-9,
            "entropy": float("nan"),
            "grad_norm": 0.1,
        }
        for step in range(1, steps + 1)
    ] + [{"step": steps, "train_runtime": 3.0, "train_loss": 0.0}]


def write_state(directory, log, global_step=None):
    directory.mkdir(parents=True, exist_ok=True)
    state = {"global_step": global_step or log[-1]["step"], "log_history": log}
    (directory / "trainer_state.json").write_text(json.dumps(state))


def write_report(run_dir, name, correct, **fields):
    settings = {"ks": [1, 8], "samples": 8, "temperature": 1.0, "max_new_tokens": 8, "reward": "r"}
    problems = [Problem(f"{level}/{c}", level, 8, c, 0, 5.0) for level, counts in correct.items() for c in counts]
    Report(**{"settings": settings, "fingerprint": "f", "problems": problems, **fields}).save(
        run_dir / f"eval_{name}.json"
    )


def panels(run_dir):
    return {axes.get_title(): axes for axes in run_figure(run_dir).axes if axes.get_title()}


def labels(axes):
    return [entry.get_text() for entry in axes.get_legend().get_texts()]


def test_a_grpo_run(tmp_path):
    write_state(tmp_path, grpo_log(40))
    write_report(tmp_path, "before", {"add2": [3, 4], "add10": [0, 0]})
    write_report(tmp_path, "after", {"add2": [8, 7], "add10": [0, 1]})
    shown = panels(tmp_path)
    # No loss beside a reward, and no entropy because it was never a number.
    assert list(shown) == [
        "Reward",
        "Pass rate of training rollouts",
        "Completion length",
        "Sequence weights",
        "Gradient norm",
        "Held-out pass@1, 95 % intervals",
        "Held-out pass@8, 95 % intervals",
    ]
    assert labels(shown["Pass rate of training rollouts"]) == ["add2", "add10"]
    assert labels(shown["Completion length"]) == ["mean", "min to max", "cut (right)"]
    assert labels(shown["Sequence weights"]) == ["min to max", "mean", "std"]
    bars = shown["Held-out pass@1, 95 % intervals"]
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["add2", "add10", "mean"]
    before, after = bars.containers[1], bars.containers[3]
    assert [bar.get_height() for bar in before] == pytest.approx([7 / 16, 0, 7 / 32])
    assert [bar.get_height() for bar in after] == pytest.approx([15 / 16, 1 / 16, 1 / 2])
    assert all(axes.get_ylabel() and axes.get_xlabel() for axes in shown.values())


def test_points_are_raw_and_lines_are_moving_averages(tmp_path):
    write_state(tmp_path, [{"step": s, "reward": float(s % 2), "reward_std": 0.0} for s in range(1, 61)])
    axes = panels(tmp_path)["Reward"]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == list(range(1, 61))
    assert all(0.4 < y < 0.6 for y in line.get_ydata()[6:-6])
    points = [c for c in axes.collections if len(c.get_offsets()) == 60]
    assert set(points[0].get_offsets()[:, 1]) == {0.0, 1.0}
    # A mean of a constant is that constant, at the ends too.
    write_state(tmp_path, [{"step": s, "grad_norm": 2.0} for s in range(1, 61)])
    assert list(panels(tmp_path)["Gradient norm"].get_lines()[0].get_ydata()) == pytest.approx([2.0] * 60)


@pytest.mark.parametrize(
    ("steps", "footer"),
    [(60, "points: logged values; lines: centred moving averages"), (5, "points: logged values"), (0, "")],
)
def test_the_footer_explains_what_is_drawn(tmp_path, steps, footer):
    write_report(tmp_path, "before", {"all": [3, 4]})
    if steps:
        write_state(tmp_path, [{"step": s, "grad_norm": 2.0} for s in range(1, steps + 1)])
    assert run_figure(tmp_path).get_supxlabel() == footer


def test_few_points_are_drawn_as_they_are(tmp_path):
    log = [{"step": s, "loss": 3.0 / s, "mean_token_accuracy": 0.5} for s in (1, 2)] + [{"step": 2, "eval_loss": 1.4}]
    write_state(tmp_path, log)
    shown = panels(tmp_path)
    assert list(shown) == ["Token accuracy", "Loss"]
    assert [list(line.get_ydata()) for line in shown["Loss"].get_lines()] == [[3.0, 1.5], [1.4]]
    assert labels(shown["Loss"]) == ["training", "evaluation"]


def test_a_dpo_run(tmp_path):
    keys = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "loss")
    write_state(tmp_path, [{"step": s, **dict.fromkeys(keys, 0.5)} for s in range(1, 30)])
    shown = panels(tmp_path)
    assert list(shown) == ["Preference accuracy", "Preference margin", "Loss"]
    assert labels(shown["Preference margin"]) == ["chosen", "rejected", "margin"]


@pytest.mark.parametrize(
    ("keys", "title", "lines"),
    [
        (("rewards/best", "rewards/worst", "rewards/margins"), "Preference margin", ["best", "worst", "margin"]),
        (("weights/reward_mean", "weights/kl_mean"), "Token weights", ["reward", "KL"]),
        (("kl/chosen", "kl/rejected"), "Divergence of completions", ["chosen", "rejected"]),
        (("feasible/loss_mean", "feasible/loss_max"), "Loss of samples", ["largest", "mean"]),
        (("feasible/satisfied", "eval_feasible/satisfied"), "Samples that keep the bound", ["training", "evaluation"]),
    ],
)
def test_what_preference_losses_of_ours_log(tmp_path, keys, title, lines):
    write_state(tmp_path, [{"step": s, **dict.fromkeys(keys, 0.5)} for s in range(1, 30)])
    shown = panels(tmp_path)
    assert list(shown) == [title]
    assert labels(shown[title]) == lines


def test_the_newest_readable_state_is_drawn(tmp_path, caplog):
    write_state(tmp_path, grpo_log(3))
    write_state(tmp_path / "checkpoint-9", grpo_log(9))
    write_state(tmp_path / "checkpoint-10", grpo_log(10))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_step": 11, "log_hi')
    assert len(panels(tmp_path)["Reward"].get_lines()[0].get_xdata()) == 10
    assert "checkpoint-11" in caplog.text


def test_an_evaluation_alone(tmp_path):
    write_report(tmp_path, "before", {"all": [3, 4]})
    shown = panels(tmp_path)
    assert list(shown) == ["Held-out pass@1, 95 % intervals", "Held-out pass@8, 95 % intervals"]
    bars = shown["Held-out pass@1, 95 % intervals"]
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["all"]
    assert labels(bars) == ["before"]


def heat(run_dir, title):
    axes = panels(run_dir)[title]
    (image,) = axes.get_images()
    return axes, image, image.get_array()


def test_heat_maps_of_a_curriculum(tmp_path):
    log = [
        {"step": 1, "reward": 0.5, "gdro/weight/add10": 0.5, "gdro/weight/add2": 4.0, "gdro/rollouts/add2": 8.0},
        {"step": 2, "reward": 0.5, "gdro/weight/add2": 0.0, "gdro/rollouts/add2": 2, "gdro/rollouts/add10": 14.0},
        {"step": 3, "reward": 0.5, "gdro/weight/add10": 2.0, "gdro/weight/add2": float("nan"), "gdro/q/add2": 7.0},
    ]
    write_state(tmp_path, log)
    axes, image, weights = heat(tmp_path, "Curriculum: weights")
    # The first group on top, as in the legends.
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["add2", "add10"]
    assert axes.yaxis_inverted() and list(axes.get_yticks()) == [0, 1]
    assert weights.filled(-1).tolist() == [[4.0, 0.0, -1], [0.5, -1, 2.0]]
    assert image.get_extent() == [0.5, 3.5, 1.5, -0.5]
    # As many times less as more than 1 is as far from white; a weight of 0 has the colour of the least one.
    assert image.norm([0.25, 0.5, 1.0, 2.0, 4.0]).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert float(image.norm(0.0)) == pytest.approx(0)
    assert image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.05)
    assert image.cmap(0.0)[2] > image.cmap(0.0)[0] and image.cmap(1.0)[0] > image.cmap(1.0)[2]

    axes, image, rollouts = heat(tmp_path, "Curriculum: rollouts")
    assert rollouts.filled(-1).tolist() == [[8.0, 2.0], [-1, 14.0]]
    assert float(image.norm(8.0)) == pytest.approx(0.5)
    assert float(image.norm(2.0)) == pytest.approx(0)
    assert not axes.get_xgridlines()[0].get_visible()
    assert run_figure(tmp_path).get_supxlabel().endswith("grey cells: no prompt of that group")


def test_blank_cells_show_the_ground(tmp_path):
    write_state(tmp_path, [{"step": s, f"gdro/weight/{'ab'[s % 2]}": 1.0} for s in range(1, 5)])
    figure = run_figure(tmp_path)
    (axes,) = (axes for axes in figure.axes if axes.get_title() == "Curriculum: weights")
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3].astype(int)
    ground = [round(255 * part) for part in to_rgb(axes.get_facecolor())]
    # Weights of 1 are all but white, and blanks must not be taken for them.
    assert max(ground) < 225
    shown = []
    for row in (0, 1):
        places = [axes.transData.transform((step, row)).astype(int) for step in range(1, 5)]
        shown.append([picture[y, x].tolist() == ground for x, y in places])
    # b at steps 1 and 3, a at steps 2 and 4.
    assert shown == [[True, False, True, False], [False, True, False, True]]


@pytest.mark.parametrize(
    ("steps", "every", "width"), [(60, 1, 1), (61, 1, 2), (150, 1, 3), (600, 10, 10), (1000, 10, 20)]
)
def test_heat_maps_of_long_runs_are_means_over_windows(tmp_path, steps, every, width):
    random = np.random.default_rng(0)
    at = np.arange(every, steps + 1, every)
    values = random.uniform(2, 20, len(at))
    values[random.random(len(at)) < 0.4] = np.nan
    rows = [{"step": int(s), "gdro/rollouts/all": 8.0, "gdro/rollouts/hard": float(v)} for s, v in zip(at, values)]
    write_state(tmp_path, rows)
    _, image, means = heat(tmp_path, "Curriculum: rollouts")
    windows = [values[(low < at) & (at <= low + width)] for low in range(0, steps, width)]
    expected = [np.mean(window[~np.isnan(window)]) if (~np.isnan(window)).any() else -1 for window in windows]
    assert means.shape == (2, len(windows)) and len(windows) <= 60
    assert means.filled(-1)[1] == pytest.approx(expected)
    assert image.get_extent()[:2] == [0.5, 0.5 + width * len(windows)]


def test_a_first_step_that_is_logged_too_shares_its_window(tmp_path):
    write_state(tmp_path, [{"step": s, "gdro/weight/all": float(s)} for s in (1, 10, 20, 30)])
    assert heat(tmp_path, "Curriculum: weights")[2].tolist() == [[5.5, 20.0, 30.0]]


@pytest.mark.parametrize(
    ("groups", "shown"),
    [
        (["0.5-1.0", "0.25-0.5", "0.0-0.25"], ["0.0-0.25", "0.25-0.5", "0.5-1.0"]),
        (["0.1-1.0", "1e-05-0.1", "0.0-1e-05"], ["0.0-1e-05", "1e-05-0.1", "0.1-1.0"]),
        (["level 10", "other", "level 9"], ["level 9", "level 10", "other"]),
        (["counting and probability 5"], ["counting…bility 5"]),
        ([f"g{i}" for i in range(40)], [f"g{i}" for i in range(0, 40, 3)]),
    ],
)
def test_names_of_groups(tmp_path, groups, shown):
    write_state(tmp_path, [{"step": 1, **{f"gdro/weight/{group}": 1.0 for group in groups}}])
    axes, image, weights = heat(tmp_path, "Curriculum: weights")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == shown
    # Weights of 1 alone are white, on a scale that is not empty.
    assert weights.shape == (len(groups), 1) and float(image.norm(1.0)) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_no_heat_map_of_nothing(tmp_path, value):
    write_state(tmp_path, [{"step": 1, "reward": 0.5, "gdro/weight/all": value, "gdro/q/all": 1.0, "gdro/price": 2.0}])
    assert list(panels(tmp_path)) == ["Reward"]
    assert "grey" not in run_figure(tmp_path).get_supxlabel()


def test_files(tmp_path):
    write_state(tmp_path / "run", grpo_log(5))
    assert plot_run(tmp_path / "run") == tmp_path / "run" / "curves.png"
    picture = imread(tmp_path / "run" / "curves.png")
    assert picture.shape[0] > 500 and picture.std() > 0.05
    plot_run(tmp_path / "run", tmp_path / "new" / "curves.svg")
    assert (tmp_path / "new" / "curves.svg").read_text().startswith("<?xml")
    with pytest.raises(InputError, match="must end in .png"):
        plot_run(tmp_path / "run", tmp_path / "curves.jpeg")


def test_nothing_to_plot(tmp_path):
    message = "Nothing to plot in .*looked for logged values in trainer_state.json .*eval_before.json"
    with pytest.raises(InputError, match=message):
        plot_run(tmp_path)
    with pytest.raises(InputError, match="Nothing to plot in .*none: it is no directory"):
        plot_run(tmp_path / "none")
    write_state(tmp_path, [{"step": 1, "train_runtime": 3.0}])
    with pytest.raises(InputError, match=message):
        plot_run(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_reports_that_do_not_belong_together(tmp_path):
    write_report(tmp_path, "before", {"all": [3, 4]})
    write_report(tmp_path, "after", {"all": [3, 4]}, fingerprint="g")
    with pytest.raises(InputError, match="of different problems"):
        plot_run(tmp_path)


def example(side, tokens, reward, kl=None, pair=0, prompt="2+2="):
    return Example(prompt, side, pair, tokens, reward, kl)


def write_weights(run_dir, *snapshots, rule="sparse_po"):
    run_dir.mkdir(parents=True, exist_ok=True)
    writer = TokenSnapshots(run_dir / "token_weights.json", rule)
    for step, examples in snapshots:
        writer.add(step, examples)
    return run_dir


def drawn(run_dir):
    """The texts that are drawn in the axes of tokens, and the boxes with a colour, from the top."""
    texts = texts_of(read_snapshots(run_dir / "token_weights.json")[1])
    axes = token_figure(texts, "title").axes[0]
    boxes = [(patch.get_xy(), patch.get_width(), patch.get_facecolor()[:3]) for patch in axes.patches]
    return [text.get_text() for text in axes.texts], boxes


def blue(share):
    return pytest.approx(colormaps["Blues"](float(share))[:3], abs=0.03)


def test_token_weights_of_the_first_and_the_last_snapshot(tmp_path):
    old, new = ["4", "<eos>"], [" 5", "\n", "x"]
    write_weights(
        tmp_path,
        (1, [example("chosen", old, [1.0, 1.0], [1.0, 1.0]), example("rejected", new, [0.5] * 3, [0.5] * 3)]),
        (5, [example("chosen", old, [9.0, 9.0], [9.0, 9.0])]),
        (9, [example("chosen", old, [0.0, 2.0], [0.5, 0.5]), example("rejected", new, [0.0] * 3, [0.0] * 3)]),
    )
    texts, boxes = drawn(tmp_path)
    assert texts == [
        *("pair 1, chosen", "2+2=", "both, step 1", "4", "<eos>", "reward, step 9", "4", "<eos>", "KL, step 9", "4", "<eos>"),
        *("pair 1, rejected", "2+2=", "both, step 1", "·5", "↵", "x", "both, step 9", "·5", "↵", "x"),
    ]  # fmt: skip
    # One scale for all, from 0 to the largest that is drawn.
    shares = [0.5, 0.5, 0, 1, 0.25, 0.25, 0.25, 0.25, 0.25, 0, 0, 0]
    assert [colour for *_, colour in boxes] == [blue(share) for share in shares]
    # A box stands beside the one before it, below what was drawn, and in a new line after a line break.
    (four, end), (five, line_break, x) = boxes[:2], boxes[6:9]
    assert (four[0][0], end[0][0], four[1], end[1]) == (0, 1, 1, 5) and four[0][1] == end[0][1]
    assert (line_break[0], x[0]) == ((2, five[0][1]), (0, five[0][1] + 1))
    assert sorted(place[1] for place, *_ in boxes) == [place[1] for place, *_ in boxes]


def test_completions_of_one_snapshot_only_come_with_it(tmp_path):
    write_weights(
        tmp_path,
        (1, [example("chosen", ["a"], [1.0]), example("rejected", ["b"], [1.0])]),
        (2, [example("chosen", ["c"], [0.5]), example("rejected", ["b"], [0.5])]),
    )
    texts, _ = drawn(tmp_path)
    assert [text for text in texts if text not in ("2+2=",)] == [
        *("pair 1, chosen", "step 2", "c", "pair 1, rejected", "step 1", "b", "step 2", "b"),
        *("pair 1, chosen", "step 1", "a"),
    ]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.0, 0.0], [0, 0]),
        ([1.0, 1.0], [1, 1]),
        ([3.0, 1.5], [1, 0.5]),
        # Close together: the scale begins at the least.
        ([0.7, 1.0, 1.3], [0, 0.5, 1]),
        # Equal but for rounding.
        ([1.0, 0.9999], [1, 0.9999]),
        # One that is far above all others.
        ([1e6, *np.linspace(0, 1, 201).tolist()], [1, *np.linspace(0, 1, 201)]),
    ],
)
def test_the_scale_of_token_weights(tmp_path, weights, shares):
    write_weights(tmp_path, (1, [example("chosen", ["x"] * len(weights), list(weights))]))
    _, boxes = drawn(tmp_path)
    assert [colour for *_, colour in boxes] == [blue(share) for share in shares]


def test_weights_that_are_no_numbers_are_grey(tmp_path):
    write_weights(tmp_path, (1, [example("chosen", ["x", "y"], [None, 1.0])]))
    _, boxes = drawn(tmp_path)
    assert [colour for *_, colour in boxes] == [pytest.approx(to_rgb("#CCCCCC")), blue(1.0)]
    write_weights(tmp_path / "all", (1, [example("chosen", ["x"], [None])]))
    assert plot_token_weights(tmp_path / "all").is_file()


def test_long_completions_end_with_an_ellipsis(tmp_path):
    tokens = ["word "] * 300
    write_weights(tmp_path, (1, [example("chosen", tokens, [1.0] * 300, prompt="p" * 500 + "end")]))
    texts, boxes = drawn(tmp_path)
    # 22 words of 5 cells in each of 6 lines of 110.
    assert len(boxes) == 132 and texts[-1] == "… and 168 more tokens"
    assert len(texts[1]) == 110 and texts[1].startswith("…p") and texts[1].endswith("end")
    assert len({place[1] for place, *_ in boxes}) == 6 and max(place[0] + width for place, width, _ in boxes) == 110


def test_any_token_can_be_drawn(tmp_path, recwarn):
    odd = [
        "日本",
        "e\u0301",
        "\u0301",
        "\ud800",
        "\x00",
        "🙂",
        "مرحبا",
        "\n\n",
        "\t",
        "",
        "$",
        r"$\frac{",
        "^_{}",
        "x" * 300,
    ]
    write_weights(tmp_path, (1, [example("chosen", odd, [0.5] * len(odd), prompt=r"$\bad{ 日本")]))
    texts, boxes = drawn(tmp_path)
    shown = [
        "日本",
        "é",
        "◌\u0301",
        "\ufffd",
        "\ufffd",
        "🙂",
        "مرحبا",
        "↵↵",
        "⇥",
        "∅",
        "$",
        r"$\frac{",
        "^_{}",
        "x" * 109 + "…",
    ]
    assert texts == ["pair 1, chosen", r"$\bad{·日本", "step 1", *shown]
    assert [width for _, width, _ in boxes] == [4, 1, 1, 1, 1, 2, 5, 2, 1, 1, 1, 7, 4, 110]
    for name in ("a.png", "a.svg", "a.pdf"):
        assert plot_token_weights(tmp_path, tmp_path / name).stat().st_size > 1000
    assert not [warning for warning in recwarn if "lyph" in str(warning.message)]


def test_plot_draws_the_token_weights_of_a_run(tmp_path, capsys):
    run = write_weights(tmp_path / "run", (1, [example("chosen", ["a", "b"], [0.0, 1.0])]))
    # Before the first checkpoint nothing else is there.
    assert main(["plot", str(run)]) in (None, 0)
    assert capsys.readouterr().out.splitlines() == [f"Token weights in {run / 'token_weights.png'}"]
    assert imread(run / "token_weights.png").std() > 0.05
    write_state(run, grpo_log(3))
    assert plot_pictures(run) == {"Curves": run / "curves.png", "Token weights": run / "token_weights.png"}
    beside = plot_pictures(run, tmp_path / "mine.svg")
    assert beside == {"Curves": tmp_path / "mine.svg", "Token weights": tmp_path / "mine_token_weights.svg"}
    assert all(path.is_file() for path in beside.values())
    write_state(tmp_path / "plain", grpo_log(3))
    assert list(plot_pictures(tmp_path / "plain")) == ["Curves"]
    with pytest.raises(InputError, match="Nothing to plot"):
        plot_pictures(tmp_path / "none")


def test_token_weights_that_cannot_be_drawn(tmp_path):
    write_state(tmp_path, grpo_log(3))
    (tmp_path / "token_weights.json").write_text("{}")
    with pytest.raises(InputError, match="holds no token weights of hf_delta. Move it out of the directory"):
        plot_pictures(tmp_path)
    run = write_weights(tmp_path / "empty", (1, [example("chosen", [], [])]))
    with pytest.raises(InputError, match="holds no tokens yet"):
        plot_token_weights(run)
    with pytest.raises(InputError, match="must end in .png"):
        plot_token_weights(run, tmp_path / "tokens.jpeg")


def test_plotting_imports_no_framework():
    code = "import sys, hf_delta.plot; print([m for m in ('torch', 'trl', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
