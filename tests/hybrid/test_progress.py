"""What a person sees of a run while it trains."""

from __future__ import annotations

import time

import pytest

from hybrid.progress import RunProgress, duration
from hybrid.schema import DisplayConfig


class Clock:
    """Both clocks of ``time``, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now + 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def progress(
    style: str = "plain", notes: list[str] | None = None, max_steps: int = 100, **display: float
) -> RunProgress:
    found = [] if notes is None else notes
    return RunProgress("gated seed 0", max_steps, DisplayConfig(progress=style, **display), found.append)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (75, "1:15"), (3599.6, "1:00:00"), (3675, "1:01:15"), (-3, "0:00"),
     (400_000, "111:06:40")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_is_a_line_per_evaluation_on_screen_and_in_the_log(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    notes: list[str] = []
    with progress("plain", notes) as shown:
        shown.evaluated(0, {"train_loss": None, "val_loss": 4.17439}, None, 0.0)
        shown.step(10, 3.0, 1500.0)
        clock.now += 90
        shown.step(20, 2.5, 1500.0)
        shown.evaluated(20, {"train_loss": 2.75, "val_loss": 2.80006}, 0.8149, 1500.0)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) == 2  # steps alone print nothing
    assert lines[0] == "gated seed 0: step   0/100  val 4.1744"
    assert lines[1].startswith("gated seed 0: step  20/100  train 2.7500  val 2.8001  RWKV/Mamba 0.81  1,500 tok/s  ")
    assert lines[1].endswith(" left")
    assert [f"gated seed 0: {note}" for note in notes] == lines


def test_off_prints_nothing_and_logs_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    with progress("off", notes) as shown:
        shown.step(1, 3.0, 10.0)
        shown.evaluated(1, {"train_loss": 3.0, "val_loss": 3.0}, None, 10.0)
        shown.message("diverged")
    assert tuple(capsys.readouterr()) == ("", "")
    assert len(notes) == 2 and notes[1] == "diverged"


def test_auto_is_plain_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress("auto").style == "plain"
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    assert progress("auto").style == "bar"


def test_bar_shows_run_step_loss_and_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    notes: list[str] = []
    with progress("bar", notes, run_index=2, run_total=14) as shown:
        shown.step(10, 3.14159, 1234.5)
        shown.step(20, 2.71828, 2345.6)
        shown.evaluated(20, {"train_loss": 2.7, "val_loss": 2.9}, 1.0, 2345.6)
        shown.message("a [word] in brackets [/and more]")
    out = capsys.readouterr().out
    assert "run 2/14 gated seed 0" in out and "20/100" in out and "loss 2.718" in out and "2,346 tok/s" in out
    assert "a [word] in brackets [/and more]" in out
    assert len(notes) == 2 and "val 2.9000" in notes[0]


def test_bar_is_taken_down_when_the_run_raises(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress("bar")
    with pytest.raises(KeyboardInterrupt), shown:
        raise KeyboardInterrupt
    assert shown.bar is not None and shown.bar.live.is_started is False


def test_a_step_without_a_loss() -> None:
    with progress("bar") as shown:
        shown.step(1, None, 0.0)
        assert "loss" not in shown.bar.tasks[0].fields["facts"]


def test_messages_name_the_run_and_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = "failed: " + "long " * 60
    with progress("plain", run_index=3, run_total=4) as shown:
        shown.message(text.strip())
    assert capsys.readouterr().out == f"run 3/4 gated seed 0: {text.strip()}\n"


def test_no_number_where_there_is_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("plain", run_index=1, run_total=1) as shown:
        shown.message("x")
    assert capsys.readouterr().out == "gated seed 0: x\n"


def test_nan_losses_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    nan = float("nan")
    with progress("plain") as shown:
        shown.evaluated(10, {"train_loss": nan, "val_loss": nan}, nan, 100.0)
    assert "train nan  val nan  RWKV/Mamba nan" in capsys.readouterr().out


def test_time_left_of_the_run(clock: Clock) -> None:
    shown = progress()
    assert shown.left(0) == ""  # nothing is known yet
    shown.step(1, None, 0.0)
    clock.now += 40
    shown.step(21, None, 0.0)
    # 2 s a step, 79 to go (within the one step that the first report stands for)
    minutes, seconds = shown.left(21).removesuffix(" left").split(":")
    assert 60 * int(minutes) + int(seconds) == pytest.approx(158, rel=0.06)
    clock.now += 158
    assert shown.left(100) == "0:00 left"


def test_time_left_of_a_resumed_run(clock: Clock) -> None:
    shown = progress()
    shown.step(51, None, 0.0)
    clock.now += 100
    shown.step(61, None, 0.0)
    minutes, seconds = shown.left(61).removesuffix(" left").split(":")
    assert 60 * int(minutes) + int(seconds) == pytest.approx(390, rel=0.1)  # 10 s a step, not 161 / 61


def test_no_time_left_is_claimed_before_it_is_known(clock: Clock) -> None:
    shown = progress(max_steps=5000)
    clock.now += 60  # 10 steps
    shown.step(10, 3.0, 100.0)
    assert shown.left(10) != "0:00 left"
    clock.now += 60
    shown.step(20, 3.0, 100.0)
    assert shown.left(20) == "8:18:00 left"


def test_time_left_of_the_sweep(clock: Clock) -> None:
    """Two runs of four are done after 600 s, the third is half done at 750: 300 s a run, 1.5 runs to go."""
    shown = progress(run_index=3, run_total=4, sweep_started=clock.now + 1e9)
    clock.now += 600
    shown.step(1, None, 0.0)
    clock.now += 150
    shown.step(50, None, 0.0)
    assert shown.left(50).endswith(" left, sweep 7:30")


def test_no_time_of_a_sweep_of_one(clock: Clock) -> None:
    shown = progress(run_index=1, run_total=1, sweep_started=clock.now)
    shown.step(1, None, 0.0)
    clock.now += 1
    assert "sweep" not in shown.left(50)
