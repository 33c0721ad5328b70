"""The README's Python runs and prints the output shown; its commands parse."""

import pathlib
import re
import shlex
import shutil

import jax

from subtrack_jax.optimizers import FAMILY
from train import compare, export, finetune, generate, predict, pretrain, results, sft
from train.cli import command_line

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_readmes_python_runs_and_prints_what_it_shows(capsys):
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```(?:\n```\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for code, shown in blocks:
        with jax.numpy_rank_promotion("allow"):  # the default for users
            exec(code, names)
        assert capsys.readouterr().out == shown


def test_the_table_of_methods_is_that_of_the_family():
    """Each method has a row, which says what it does with moments and residual."""
    rows = re.findall(r"^\| `stj\.(\w+)`.*\[.*\|$", README.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(FAMILY)
    moments = {True: "transported", False: "kept", "momentum": "first moment rotated"}
    outside = {"columns": "recovered", "none": "dropped", None: "gradient itself"}
    for line in README.read_text().splitlines():
        if line.startswith("| `stj.") and line.endswith(") |"):
            name, _, kept, lost, *_ = line.strip("| ").split(" | ")
            method = FAMILY[re.match(r"`stj\.(\w+)`", name)[1]]
            assert moments[method.transport] in kept, name
            if name != "`stj.ldadam`":  # which adds it to the next gradient
                assert outside[method.recovery] in lost, name


def _commands():
    text = README.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def test_the_newcomers_commands_are_one_line_that_makes_its_own_environment():
    commands = [line for line in _commands() if line.startswith("python3 -m venv")]
    assert [command.split()[-1] for command in commands] == ["train.pretrain", "slow'"]
    for command in commands:
        assert ".venv && .venv/bin/pip install -e" in command


def test_the_programs_take_the_flags_that_the_readme_gives_them(tmp_path, monkeypatch):
    # Files that the commands name must exist.
    weights = README.parent / "tests/data/hugging_face/tied"
    shutil.copytree(weights, tmp_path / "path/to/llama")
    monkeypatch.chdir(tmp_path)
    programs = {
        "train.pretrain": pretrain.read,
        "train.finetune": finetune.read,
        "train.sft": sft.read,
        "train.predict": predict.read,
        "train.results": results.read,
        "train.generate": lambda argv: command_line.read(
            generate.GenerateConfig, "", argv
        ),
        "train.export": lambda argv: command_line.read(export.ExportConfig, "", argv),
        "train.compare": compare.read,
    }
    seen = set()
    for command in _commands():
        words = shlex.split(command, comments=True)
        if words[:2] == ["python", "-m"]:
            programs[words[2]](words[3:])
            seen.add(words[2])
    assert seen == set(programs)
