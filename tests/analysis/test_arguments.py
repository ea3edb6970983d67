"""How the commands of ``analysis`` end."""

from __future__ import annotations

import pytest

from analysis import compare, export, publish, report
from analysis.arguments import end


@pytest.mark.parametrize("command", [compare, export, publish, report])
def test_unknown_arguments_are_one_line(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["a", "b", "--fast"])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "--fast" in said.err


@pytest.mark.parametrize("code", [0, 2])
def test_the_exit_code_is_the_commands(code):
    with pytest.raises(SystemExit) as stop:
        end(lambda: code)
    assert stop.value.code == code


def test_ctrl_c_is_a_word(capsys):
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        end(main)
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")
