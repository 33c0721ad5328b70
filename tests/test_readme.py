"""The README's Python runs and prints what the README says."""

import pathlib
import re

import jax

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_readmes_python_runs_and_prints_what_it_shows(capsys):
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```(?:\n```\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for code, shown in blocks:
        with jax.numpy_rank_promotion("allow"):  # readers have the default
            exec(code, names)
        assert capsys.readouterr().out == shown


def test_each_readme_command_is_one_line_that_makes_its_own_environment():
    commands = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    assert [command.split()[-1] for command in commands] == ["train.pretrain", "slow'"]
    for command in commands:
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e")
        assert command.count("\n") == 1
