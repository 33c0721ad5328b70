"""Compilation cache: directory, precedence of settings, damaged files."""

import importlib
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tests.train.program import limited_file_size
from train.config.run_config import CompilationConfig
from train.system import compilation_cache, files

SETTINGS = ["compilation_cache_dir", "persistent_cache_min_compile_time_secs"]
SETTINGS += ["enable_compilation_cache"]  # disabled by plan and benchmark


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Resets JAX to a process that has not compiled; restores it afterwards."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in SETTINGS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def use(directory):
    compilation_cache.use(CompilationConfig(str(directory)))


def compile_something():
    """A new function with equal code: JAX looks up its program on disk."""
    return jax.jit(lambda x: jnp.sum(x @ x.T) * 3)(jnp.ones((3, 4)))


def programs(directory):
    return sorted(directory.rglob("jit__lambda-*"))


def test_compiled_programs_are_kept_and_used(tmp_path, capsys):
    use(tmp_path / "a" / "b")
    compile_something()
    (kept,) = programs(tmp_path)
    assert kept.parent.parent == tmp_path / "a" / "b"
    hits = []
    listener = lambda name, **_: hits.append(name.endswith("cache_hits"))
    jax.monitoring.register_event_listener(listener)
    try:
        compile_something()
    finally:
        jax.monitoring.unregister_event_listener(listener)
    assert any(hits)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("directory", ["auto", "given"])
def test_a_cache_that_is_off_stays_off(tmp_path, monkeypatch, capsys, directory):
    jax.config.update("jax_enable_compilation_cache", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use(directory)
    assert not jax.config.jax_enable_compilation_cache
    told = capsys.readouterr().err
    assert told.startswith("warning: --compilation-cache-dir given is not used") == (
        directory == "given"
    )


@pytest.mark.parametrize("content", [b"", b"half", bytes(700)])
def test_a_damaged_file_is_one_line_and_made_anew(tmp_path, capsys, content):
    use(tmp_path)
    compile_something()
    (kept,) = programs(tmp_path)
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert compile_something() == 108
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"warning: reading the compilation cache, {kept.parent},")
    assert kept.read_bytes()[:2] == whole[:2] != content[:2]  # magic bytes
    assert compile_something() == 108
    assert capsys.readouterr().err == ""


def test_a_file_cut_short_is_one_line_and_removed(tmp_path, capsys):
    use(tmp_path)
    with limited_file_size(100):
        assert compile_something() == 108
        assert jax.jit(lambda x: x - 1)(jnp.ones(5))[0] == 0
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("warning: writing the compilation cache,")
    assert "File too large" in err
    assert programs(tmp_path) == []


@pytest.mark.parametrize("environment", [None, "elsewhere"])
def test_none_turns_it_off(tmp_path, monkeypatch, capsys, environment):
    monkeypatch.chdir(tmp_path)
    if environment:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment)
    jax.config.update("jax_compilation_cache_dir", environment)
    use("none")
    compile_something()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_the_default_is_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use("auto")
    compile_something()
    (kept,) = programs(tmp_path)
    assert kept.parent.parent == tmp_path / "subtrack_jax" / "compilation"


def test_the_environment_goes_before_and_a_flag_beside_it_is_told(
    tmp_path, monkeypatch, capsys
):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    compilation_cache.use(CompilationConfig())
    assert capsys.readouterr().err == ""
    use(tmp_path / "here")
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "/elsewhere" in err and "/here is not used" in err
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "here").exists()


def test_the_environments_other_setting_counts_too(tmp_path, monkeypatch):
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.setenv(name, "7")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    use(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
    monkeypatch.delenv(name)
    use(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", None)
    use(tmp_path / "file" / "below")
    _, err = capsys.readouterr()
    assert err.startswith("warning: --compilation-cache-dir ")
    assert err.count("\n") == 1
    assert "file/below cannot be used" in err
    assert jax.config.jax_compilation_cache_dir is None


def test_a_home_and_a_relative_path_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    use("~/kept")
    assert (tmp_path / "home" / "kept").is_dir()
    use("here")
    assert (
        pathlib.Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "here"
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/h"}, "/h/.cache/subtrack_jax/x"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/c/subtrack_jax/x"),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, "/h/.cache/subtrack_jax/x"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "c"}, "/h/.cache/subtrack_jax/x"),
    ],
)
def test_the_default_is_in_the_users_cache(monkeypatch, environment, expected):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert files.user_cache("x") == pathlib.Path(expected)


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for name, age in {"old": 1, "used": 3, "new": 2}.items():
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (age, 0))
    compilation_cache.limit_size(tmp_path, 30)
    assert len(list(tmp_path.iterdir())) == 3
    compilation_cache.limit_size(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]


@pytest.mark.parametrize(
    ("program", "argv"),
    [
        ("pretrain", ["--steps", "1", "--data-glob", "none"]),
        ("compare", []),
        ("generate", ["--checkpoint", "none"]),
        ("export", ["--checkpoint", "none"]),
    ],
)
def test_programs_that_compile_use_it_before_all_else(
    monkeypatch, tmp_path, program, argv
):
    class UsedError(Exception):
        pass

    def use(config):
        raise UsedError(config.compilation_cache_dir)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compilation_cache, "use", use)
    main = importlib.import_module(f"train.{program}").main
    with pytest.raises(UsedError, match=r"^here$"):
        main([*argv, "--compilation-cache-dir", "here"])
    assert list(tmp_path.iterdir()) == []
