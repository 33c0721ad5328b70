import dataclasses
import json
import math
import re
import shlex

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.program import ROOT, assert_one_line_error, assert_refuses, run
from train import plan
from train.planning import footprint, plan_report, targets
from train.planning.collectives import Traffic, step_traffic
from train.step import optimizers
from train.step.mesh import make_mesh
from train.step.setup import llama_setup

SMALL = [
    *["--hidden-size", "32", "--mlp-size", "64", "--num-layers", "2"],
    *["--num-heads", "2", "--vocabulary-size", "320", "--rank", "8"],
    *["--sequence-length-tokens", "16"],
]
MESH = "fsdp=4,tensor=2"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The program's table and numbers for two optimizers."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    done = run(
        *[*SMALL, "--target", "cpu:8", "--mesh", MESH, "--compare", "adamw, subtrack"],
        *["--device-memory-gib", "0.0001", "--json", path],
        program="train.plan",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def pieces_bytes(tree, shardings):
    """Expected bytes: each leaf's size over the product of the axes that split it."""
    total = 0
    for leaf, sharding in zip(
        jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
    ):
        names = [
            name
            for axes in sharding.spec
            for name in ((axes,) if isinstance(axes, str) else axes or ())
        ]
        pieces = math.prod(sharding.mesh.shape[name] for name in names)
        total += leaf.size * leaf.dtype.itemsize // pieces
    return total


@pytest.mark.parametrize("column", range(2))
def test_each_device_holds_the_bytes_of_its_shards(planned, column):
    found = planned[1]["optimizers"][column]
    config = plan.read([*SMALL, "--mesh", MESH, "--optimizer", found["optimizer"]])
    mesh = make_mesh(MESH)
    schedule = optimizers.learning_rate_schedule(config.optimizer, 10)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, 0)
    setup = llama_setup(config.model, optimizer, schedule, mesh=mesh)
    state, where = setup.abstract_state, setup.state_shardings
    assert found["parameters"] == pieces_bytes(state.params, where.params)
    assert found["optimizer_state"] == pieces_bytes(state.opt_state, where.opt_state)
    assert found["gradients"] == found["parameters"]
    parts = ("parameters", "optimizer_state", "gradients", "temporaries")
    assert found["total"] == sum(found[part] for part in parts)
    assert found["temporaries"] > 0


def test_the_numbers_say_what_was_planned(planned):
    values = planned[1]
    names = [each["optimizer"] for each in values["optimizers"]]
    assert names == ["subtrack", "adamw"]
    assert values["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert values["device_memory_bytes"] == int(0.0001 * 2**30)
    assert values["run"]["model"]["hidden_size"] == 32
    # The preset's eight sequences are split into four parts.
    assert values["run"]["data"]["batch_size_sequences"] == 8
    subtrack, adamw = values["optimizers"]
    assert not subtrack["fits"]
    assert subtrack["optimizer_state"] < adamw["optimizer_state"]
    assert set(adamw["traffic"]) == {"steady"}
    assert set(subtrack["traffic"]) == {"steady", "refresh", "start"}
    sent = {
        phase: sum(each["sent_bytes"] for each in kinds.values())
        for phase, kinds in subtrack["traffic"].items()
    }
    assert 0 < sent["steady"] < sent["refresh"] < sent["start"]


def test_the_table_puts_optimizers_side_by_side(planned):
    table, values = planned
    lines = table.splitlines()
    assert lines[0] == "tiny on cpu:8: 8 devices, data=1, fsdp=4, tensor=2"
    head = next(k for k, line in enumerate(lines) if line.startswith("memory per"))
    assert lines[head].split()[-2:] == ["subtrack", "adamw"]
    total = next(line for line in lines if line.startswith("  total"))
    shown = [
        float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
        for number, unit in re.findall(r"([\d.]+) (\wiB)", total)
    ]
    exact = [each["total"] for each in values["optimizers"]]
    assert shown == pytest.approx(exact, rel=0.01)
    verdicts = next(line for line in lines if line.startswith("  of 104.86 KiB"))
    assert verdicts.count("does not fit") == 2
    assert len(set(map(len, lines[head : head + 6]))) == 1
    assert re.search(r"^compile time( +\d+ s){2}$", table, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "tpu-v9:4x4"], "unknown --target 'tpu-v9:4x4': give a chip"),
        (["--target", "cpu:0"], "unknown --target 'cpu:0'"),
        (["--target", "tpu-v5e:4by4"], "unknown --target 'tpu-v5e:4by4'"),
        (["--target", "cpu:8", "--mesh", "fsdp=3"], "does not fit 8 devices"),
        (["--target", "cpu:8", "--mesh", "rows=8"], "'rows' is not one of"),
        (
            ["--compare", "adam"],
            "unknown 'adam' (did you mean adamw?): choose from adamw",
        ),
        (["--batch-size-sequences", "12"], "12 must be a multiple of 8"),
        (
            [*["--batch-size-sequences", "8", "--gradient-accumulation-steps", "2"]],
            "must be a multiple of 16",
        ),
        (["--batch-size-sequences", "0"], "--batch-size-sequences must be at least 1"),
        (["--target", "cpu:8", "--rank", "10000"], "--rank 10000 leaves no matrix to"),
        (["--device-memory-gib", "-1"], "--device-memory-gib must be positive"),
        (["--preset", "llama-8b"], "llama-8b"),
        (["--update-in-backward"], "it needs --remat full, got none"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_planned_is_one_line(capsys, flags, message):
    assert_refuses(plan.main, capsys, flags, message)


def test_a_tpu_without_its_compiler_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    flags = ["--target", "tpu-v5e:4x4"]
    assert_refuses(plan.main, capsys, flags, "pip install -e '.[tpu-plan]'")


def test_help_names_the_targets():
    done = run("--help", program="train.plan")
    assert done.returncode == 0
    for words in ("--target", "tpu-v5p:4x4x4", "--compare", "--json", "--rank"):
        assert words in done.stdout


def test_a_file_that_cannot_be_written_is_one_line(capsys, monkeypatch, tmp_path):
    measured = footprint.Footprint("subtrack", 1, 1, 1, 1, 4, True, {}, 0.0, 0.0)
    monkeypatch.setattr(plan_report, "measure", lambda run, mesh: measured)
    with pytest.raises(SystemExit) as stop:
        plan.main(["--target", "cpu:8", "--json", str(tmp_path / "none" / "x.json")])
    assert stop.value.code == 2
    assert "No such file" in capsys.readouterr().err


def test_updates_in_the_backward_pass_are_further_columns(
    capsys, monkeypatch, tmp_path
):
    def measure(run, mesh):
        in_backward = run.update_in_backward
        return footprint.Footprint(
            run.optimizer.name, 1, 1, 1, 1, 4, True, {}, 0.0, 0.0, in_backward
        )

    monkeypatch.setattr(plan_report, "measure", measure)
    path = tmp_path / "plan.json"
    flags = ["--update-in-backward", "--remat", "full", "--compare", "adamw"]
    plan.main([*flags, "--target", "cpu:8", "--json", str(path)])
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("memory per device"))
    titles = re.split(r"  +", head)[1:]
    assert titles == ["subtrack", "subtrack in backward", "adamw", "adamw in backward"]
    found = json.loads(path.read_text())["optimizers"]
    assert [each["update_in_backward"] for each in found] == [False, True] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_updates_in_the_backward_pass_hold_one_layers_gradient():
    flags = [*SMALL, "--num-layers", "16", "--remat", "full", "--optimizer", "adamw"]
    config = plan.read([*flags, "--mesh", MESH])
    mesh = make_mesh(MESH)
    ordinary = plan_report.make_run(config, mesh)
    layered = dataclasses.replace(ordinary, update_in_backward=True)
    before, after = (footprint.measure(run, mesh) for run in (ordinary, layered))
    assert before.parameters == after.parameters
    assert before.optimizer_state == after.optimizer_state
    assert after.gradients < 0.6 * before.gradients
    assert after.total < before.total


@pytest.mark.parametrize(
    ("parts", "sequences"), [(1, 16), (3, 24)], ids=["one part", "three parts"]
)
def test_a_batch_that_is_not_given_is_made_to_fit(parts, sequences):
    flags = ["--preset", "llama-7b", "--gradient-accumulation-steps", str(parts)]
    mesh = make_mesh("data=2,fsdp=4")
    assert (
        plan_report.make_run(plan.read(flags), mesh).data.batch_size_sequences
        == sequences
    )


def test_sums_of_parts_are_wide():
    mesh = make_mesh("fsdp=8")
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = {"a": jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=split)}
    assert footprint.shard_bytes(tree) == 2 * 3 * 2
    assert footprint.shard_bytes(tree, least_itemsize=4) == 2 * 3 * 4


def test_too_little_memory_for_the_compiler_is_a_number():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of "
                "memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded hbm"
            )

    compiled, needed = footprint.compile_step(Lowered())
    assert compiled is None
    assert needed == 24.5 * 2**30
    values = dataclasses.asdict(
        footprint.Footprint("adamw", 0, 0, 0, needed, needed, False, {}, 0.0, 0.0)
    )
    table = plan_report.table([footprint.Footprint(**values)], 25 * 2**30)
    assert "does not fit" in table


HLO = """\
HloModule jit_train_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%layer (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(%piece), \
replica_groups=[2,4]<=[8], dimensions={0}
  %start = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%piece), \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
}

%turn (carry: (s32[], f32[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%counter, %bound), direction=LT
}

%layer.2 (carry: (s32[])) -> (s32[]) {
  %sent = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%piece), \
source_target_pairs={{0,1},{1,0}}
}

%due (carry: (pred[], f32[4])) -> pred[] {
  ROOT %now = pred[] get-tuple-element(%carry), index=0
}

%little (x: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

%much (x: f32[4]) -> f32[4] {
  ROOT %r = f32[40]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

%moves (x: f32[4]) -> f32[4] {
  ROOT %inner = f32[4] conditional(%index, %x, %x), branch_computations={%little, \
%much}
}

%starts (x: f32[4]) -> f32[4] {
  ROOT %called = f32[4] call(%x), to_apply=%little
}

%wrapped (x: f32[8]) -> f32[2] {
  ROOT %scattered = f32[2]{0} reduce-scatter(%x), \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[4]) -> (f32[4], /*index=1*/f32[8]) {
  %loop = (s32[], f32[8,4]) while(%tuple), condition=%turn, body=%layer
  %known = (s32[]) while(%tuple), condition=%turn, body=%layer.2, \
backend_config={"known_trip_count":{"n":"5"}}
  %started = (pred[], f32[4]) while(%tuple), condition=%due, body=%starts, \
metadata={op_name="jit(step)/start_subspaces/while"}
  %moved = (pred[], f32[4]) while(%tuple), condition=%due, body=%moves, \
metadata={op_name="jit(step)/move_subspaces/while"}
  %turned = (pred[], f32[4]) while(%tuple), condition=%due, body=%little, \
metadata={op_name="jit(step)/turn_moments/while"}
  %async = ((f32[8]), f32[2]) async-start(%y), calls=%wrapped
  %everyone = (f32[100]{0}, bf16[10]{0}) all-reduce(%p, %q), replica_groups={}, \
to_apply=%add, metadata={op_name="while(all-gather(x))"}
  %alone = f32[100]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
  ROOT %result = (f32[4], f32[8]) tuple(%started, %moved)
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    found = step_traffic(HLO, devices=8)
    steady = {
        # Three times: 16 x 4 and 8 x 4 of two bytes, three quarters from other devices.
        "all-gather": Traffic(6, 3 * (128 * 3 // 4 + 64 * 3 // 4)),
        # To all eight devices and back.
        "all-reduce": Traffic(1, 2 * 420 * 7 // 8),
        "reduce-scatter": Traffic(1, 8 * 3),
        "collective-permute": Traffic(5, 5 * 16),
    }
    assert found["steady"] == steady
    # The costlier branch, and the moments.
    more = {"all-reduce": Traffic(3, 2 * 420 * 7 // 8 + 160 + 16)}
    assert found["refresh"] == steady | more
    assert found["start"] == steady | {
        "all-reduce": Traffic(2, 2 * 420 * 7 // 8 + 16),
    }


def test_a_program_without_subspaces_has_one_phase():
    text = re.sub(r"(?m)^  %(started|moved|turned) .*\n", "", HLO)
    assert list(step_traffic(text, devices=8)) == ["steady"]


def test_a_tpu_that_is_not_there():
    pytest.importorskip("libtpu")
    flags = [*SMALL, "--target", "tpu-v5e:2x2", "--optimizer", "adamw"]
    done = run(*flags, program="train.plan")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tiny on tpu-v5e:2x2: 4 devices" in done.stdout
    assert re.search(r"of 16.00 GiB +fits", done.stdout)


def test_one_chip():
    pytest.importorskip("libtpu")
    flags = [*SMALL, "--target", "tpu-v6e:1", "--optimizer", "adamw"]
    done = run(*flags, program="train.plan")
    assert done.returncode == 0, done.stderr
    assert "tiny on tpu-v6e:1: one device" in done.stdout


def test_a_slice_that_does_not_exist():
    pytest.importorskip("libtpu")
    done = run("--target", "tpu-v5e:3x5", program="train.plan")
    assert_one_line_error(done, "--target tpu-v5e:3x5 is not a slice")


def test_the_readmes_command_is_one():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"\$ python -m train\.plan ((?:[^\\\n]|\\\n)*)", readme)
    assert commands
    for command in commands:
        config = plan.read(shlex.split(command.replace("\\\n", " ")))
        assert config.optimizer_names == ["subtrack", "adamw"]
