"""The files for Accelerate, the guard against its silent fallbacks, and `hf-plm launch`, with real launchers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_plm.cli import main
from hf_plm.config import UserError
from hf_plm.training import guard, launch
from hf_plm.training.guard import asked_by, check_before_start, num_gpus, num_started, read_config
from hf_plm.training.launch import Request, config_names, find_config, plan

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_configs"
BIN = Path(sys.executable).parent

# What each file asks for: distributed_type, machines, ZeRO stage, where the optimizer is.
FILES = {
    "cpu": ("NO", 1, None, None),
    "single_gpu": ("NO", 1, None, None),
    "ddp": ("MULTI_GPU", 1, None, None),
    "fsdp2": ("FSDP", 1, None, None),
    "zero1": ("DEEPSPEED", 1, 1, "none"),
    "zero2": ("DEEPSPEED", 1, 2, "none"),
    "zero3": ("DEEPSPEED", 1, 3, "none"),
    "zero2_offload": ("DEEPSPEED", 1, 2, "cpu"),
    "zero3_offload": ("DEEPSPEED", 1, 3, "cpu"),
    "multi_node_ddp": ("MULTI_GPU", 2, None, None),
    "multi_node_zero2": ("DEEPSPEED", 2, 2, "none"),
    "multi_node_fsdp2": ("FSDP", 2, None, None),
}
LAUNCHER_VARIABLES = ("ACCELERATE_", "FSDP_", "DS_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "PMI_", "OMPI_", "MV2_")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher that the tests themselves run under."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_VARIABLES):
            monkeypatch.delenv(name)


# --- the files ---------------------------------------------------------------------------------------------------


def test_the_files_are_those_listed() -> None:
    assert config_names() == sorted(FILES)
    listed = (CONFIGS / "README.md").read_text()
    assert all(f"`{name}`" in listed for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_each_file(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    kind, machines, stage, optimizer = FILES[name]
    ours, theirs = read_config(path), load_config_from_file(str(path))
    assert ours == theirs
    assert ours.distributed_type.value == kind
    assert ours.num_machines == machines
    assert ours.num_processes == (1 if kind == "NO" else 8 * machines)
    assert ours.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert ours.use_cpu == (name == "cpu")
    assert ours.deepspeed_config.get("zero_stage") == stage
    assert ours.deepspeed_config.get("offload_optimizer_device") == optimizer
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ("zero_stage: 2|zero_stge: 2", "zero2.yaml has a key deepspeed_config.zero_stge"),
        ("zero_stage: 2|zero_stge: 2", "did you mean zero_stage?"),
        ("num_machines: 1|num_machine: 1", "has a key num_machine, unknown to Accelerate"),
        ("num_machines: 1|colour_of_the_machine: red", "upgrade accelerate, or remove it."),
        ("DEEPSPEED|MEGATRON_LM", "distributed_type: MEGATRON_LM; hf_plm trains with NO, MULTI_GPU, FSDP, DEEPSPEED."),
        ("distributed_type: DEEPSPEED|distributed_type: NO", "write 'no' in quotes"),
        ("mixed_precision: bf16|mixed_precision: no", "says mixed_precision: no, which YAML reads as false"),
        ("distributed_type: DEEPSPEED|", "it has no distributed_type"),
        ("compute_environment|[", "cannot be read as a file for Accelerate"),
    ],
)
def test_a_wrong_file(tmp_path: Path, edit: str, sentence: str) -> None:
    old, new = edit.split("|")
    path = tmp_path / "zero2.yaml"
    path.write_text((CONFIGS / "zero2.yaml").read_text().replace(old, new))
    with pytest.raises(UserError) as told:
        read_config(path)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_accelerate_itself_drops_inner_keys(tmp_path: Path) -> None:
    """Why `read_config` looks there: without this, its refusal could go."""
    content = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    content["fsdp_config"]["fsdp_versoin"] = content["fsdp_config"].pop("fsdp_version")
    path = tmp_path / "fsdp2.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_config_from_file(str(path)).fsdp_config["fsdp_versoin"] == 2
    with pytest.raises(UserError, match=r"fsdp_config\.fsdp_versoin.* did you mean fsdp_version"):
        read_config(path)


def test_a_file_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("zero2") == CONFIGS / "zero2.yaml"
    assert find_config("accelerate_configs/zero2.yaml") == CONFIGS / "zero2.yaml"
    (tmp_path / "zero2.yaml").write_text("mine: true")
    assert find_config("zero2.yaml") == Path("zero2.yaml")  # the twin: one's own file comes first
    with pytest.raises(UserError, match=r"did you mean zero2_offload\?"):
        find_config("zero2_ofload")
    with pytest.raises(UserError, match="there are cpu, ddp, fsdp2"):
        find_config("everything")
    with pytest.raises(UserError, match="'mine' is a recipe, and the file for Accelerate comes first"):
        find_config("mine")


def test_a_wheel_carries_the_files(tmp_path: Path) -> None:
    """The package laid out as pyproject.toml lays out the wheel, imported from a folder that is no clone."""
    shutil.copytree(ROOT / "hf_plm", tmp_path / "hf_plm", ignore=shutil.ignore_patterns("__pycache__"))
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for source, target in tables["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / target)
    script = "from hf_plm.training.launch import find_config as f; print(f('ddp')); print(f('fsdp2'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    folder = tmp_path / "hf_plm" / "accelerate_configs"
    assert done.stdout.split() == [str(folder / "ddp.yaml"), str(folder / "fsdp2.yaml")]


# --- the guard, on command lines ---------------------------------------------------------------------------------

FALLBACKS = [
    ("--cpu --num_processes 2", 1, "was asked for 2 processes and started one"),
    ("--num_processes 4", 1, "was asked for 4 processes and started one"),
    ("--config_file cpu.yaml --num_processes 3", 1, "was asked for 3 processes and started one"),
    ("--config_file single_gpu.yaml --num_processes 8", 1, "accelerate_configs/ddp.yaml"),
    ("--cpu --config_file zero2.yaml --num_processes 2", 1, "zero2.yaml asks for DeepSpeed, and --cpu makes"),
    ("--cpu --config_file fsdp2.yaml --num_processes 2", 1, "fsdp2.yaml asks for FSDP2, and --cpu makes"),
    ("--cpu --config_file ddp.yaml --num_processes 1", 1, "ddp.yaml asks for DDP, and --cpu makes"),
    ("--config_file multi_node_ddp.yaml --num_machines 3 --num_processes 8", 6, "a multiple of 3"),
]


def accelerate_launch(words: str) -> list[str]:
    given = [str(CONFIGS / word) if word.endswith(".yaml") else word for word in words.split()]
    return [sys.executable, str(BIN / "accelerate"), "launch", *given, "pretrain.py", "demo", "--run.folder", "x"]


@pytest.mark.parametrize(("words", "started", "sentence"), FALLBACKS)
def test_what_accelerate_starts_instead_is_refused(words: str, started: int, sentence: str) -> None:
    asked = asked_by(accelerate_launch(words))
    assert asked is not None
    with pytest.raises(UserError) as told:
        guard._check_command(asked, started)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("words", "started"),
    [
        ("", 1),
        ("--quiet", 1),
        ("--cpu", 1),
        ("--config_file cpu.yaml", 1),
        ("--config_file single_gpu.yaml", 1),
        ("--multi_gpu --num-processes=2", 2),
        ("--config_file ddp.yaml", 8),
        ("--config_file zero3.yaml --num_processes 4", 4),
        ("--config_file multi_node_ddp.yaml --num_machines 4 --num_processes 32", 32),
    ],
)
def test_what_came_as_asked_is_let_through(words: str, started: int) -> None:
    asked = asked_by(accelerate_launch(words))
    assert asked is not None
    guard._check_command(asked, started)


def test_use_cpu_in_a_file_with_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((CONFIGS / "ddp.yaml").read_text().replace("use_cpu: false", "use_cpu: true"))
    asked = asked_by(["accelerate", "launch", "--config_file", str(path), "pretrain.py"])
    assert asked is not None
    with pytest.raises(UserError, match=r"mine\.yaml says use_cpu: true, which accelerate launch ignores"):
        guard._check_command(asked, 8)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    guard._check_command(asked, 8)


def test_the_spellings_of_the_launcher() -> None:
    for command in (
        ["/x/python", "/x/bin/accelerate", "launch"],
        ["/x/python", "/x/bin/accelerate-launch"],
        ["/x/python", "-m", "accelerate.commands.launch"],
        ["/x/python", "-m", "accelerate.commands.accelerate_cli", "launch"],
        ["accelerate.exe", "launch"],
    ):
        asked = asked_by([*command, "--num_processes", "3", "pretrain.py"])
        assert asked is not None
        assert asked.processes == 3
    for other in (["bash"], [], ["/x/bin/accelerate", "config"], ["/x/bin/torchrun", "--nproc_per_node", "3", "a.py"]):
        assert asked_by(other) is None


def test_the_saved_file_of_accelerate_config_counts(tmp_path: Path) -> None:
    """It is found under HF_HOME when accelerate is imported; it wants no GPU by itself, since it may be old."""
    folder = tmp_path / "accelerate"
    folder.mkdir()
    saved = yaml.safe_load((CONFIGS / "single_gpu.yaml").read_text()) | {"num_processes": 2}
    (folder / "default_config.yaml").write_text(yaml.safe_dump(saved))
    script = "from hf_plm.training.guard import asked_by; print(asked_by(['accelerate', 'launch', 'a.py']))"
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "source='default_config.yaml', kind='NO', processes=2" in done.stdout
    assert "wants_gpu=False" in done.stdout


# --- the guard, on variables and devices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "gpus", "sentence"),
    [
        ("ACCELERATE_USE_CPU=true ACCELERATE_USE_DEEPSPEED=true", 0, "unset it and set DS_ACCELERATOR=cpu"),
        ("ACCELERATE_USE_CPU=1 ACCELERATE_USE_FSDP=true", 8, "Accelerate shards on GPUs only"),
        ("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2", 0, "2 processes were started, and torch sees no GPU here"),
        ("OMPI_COMM_WORLD_SIZE=4", 0, "4 processes were started, and torch sees no GPU here"),
        ("ACCELERATE_USE_DEEPSPEED=true", 0, "for a trial on CPUs set DS_ACCELERATOR=cpu"),
        ("ACCELERATE_USE_FSDP=true WORLD_SIZE=2", 0, "FSDP cannot be tried on CPUs"),
        ("WORLD_SIZE=16 LOCAL_WORLD_SIZE=8", 4, "8 processes were started on a machine where torch sees 4 GPUs"),
        ("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2", 1, "1 GPU, and several would share one; start 1 (--num_processes 1)"),
        ("DS_ACCELERATOR=cpu ACCELERATE_USE_DEEPSPEED=true", 2, "set CUDA_VISIBLE_DEVICES="),
        ("", 0, ""),
        ("", 8, ""),
        ("WORLD_SIZE=16 LOCAL_WORLD_SIZE=8", 8, ""),
        ("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 ACCELERATE_USE_CPU=true", 0, ""),
        ("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 ACCELERATE_USE_CPU=True", 1, ""),
        ("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 DS_ACCELERATOR=cpu ACCELERATE_USE_DEEPSPEED=true", 0, ""),
        ("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 ACCELERATE_USE_FSDP=true", 2, ""),
    ],
)
def test_variables_and_devices(monkeypatch: pytest.MonkeyPatch, variables: str, gpus: int, sentence: str) -> None:
    """GPUs are counted by us, since tests run where there are none; the parent of a test is no launcher."""
    monkeypatch.setattr(guard, "num_gpus", lambda: gpus)
    for assignment in variables.split():
        monkeypatch.setenv(*assignment.split("="))
    if not sentence:
        check_before_start()
        return
    with pytest.raises(UserError) as told:
        check_before_start()
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("words", ["--config_file single_gpu.yaml", "--gpu_ids 0", "--config_file ddp.yaml"])
def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    asked = asked_by(accelerate_launch(words))
    monkeypatch.setattr(guard, "num_gpus", lambda: 0)
    with pytest.raises(UserError, match=r"asks for GPUs, and torch sees none here \(.+\); on a CPU take"):
        guard._check_devices(asked, False, False)
    guard._check_devices(asked_by(accelerate_launch("--config_file cpu.yaml")), False, False)
    guard._check_devices(asked_by(accelerate_launch("")), False, False)


def test_processes_are_counted_as_accelerate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_started() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert num_started() == 4


# --- the guard, in launched processes ----------------------------------------------------------------------------

PROBE = """
import json, os
from hf_plm.cli.process import leave
from hf_plm.config import UserError
from hf_plm.training.guard import check_before_start, check_launch

told = []
try:
    check_before_start()
except UserError as error:
    told.append(str(error))
from accelerate import Accelerator, InitProcessGroupKwargs
group = InitProcessGroupKwargs(backend="gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else None)
accelerator = Accelerator(kwargs_handlers=[group])
try:
    check_launch(accelerator)
except UserError as error:
    told.append(str(error))
facts = [told, accelerator.distributed_type.value, accelerator.num_processes]
with open(f"{os.environ['OUT']}/{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(facts, file)
accelerator.end_training()
leave(0)
"""


def probe(tmp_path: Path, command: str, **variables: str) -> tuple[list[str], str, int]:
    """What both checks said in the first process, and what Accelerate made of it; the same in all."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    words = [str(CONFIGS / word) if word.endswith(".yaml") else word for word in command.split()]
    environment = {**os.environ, **variables, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    launcher = [str(BIN / words[0]), *words[1:], str(script)]
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert all(fact == facts[0] for fact in facts)
    return tuple(facts[0])


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed, which is for Linux")
needs_no_gpu = pytest.mark.skipif(num_gpus() > 0, reason="about a machine without GPUs")


def test_cpu_flag_with_processes_for_real(tmp_path: Path) -> None:
    told, kind, processes = probe(tmp_path, "accelerate launch --cpu --num_processes 2")
    assert (kind, processes) == ("NO", 1)  # what it silently is
    assert len(told) == 1
    assert "was asked for 2 processes and started one" in told[0]


@needs_no_gpu
def test_two_runs_apart_for_real(tmp_path: Path) -> None:
    told, kind, processes = probe(tmp_path, "torchrun --standalone --nproc_per_node 2")
    assert (kind, processes) == ("NO", 1)
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert "2 processes were started, and torch sees no GPU here" in told[0]
    assert "each would train alone (WORLD_SIZE=2, and Accelerate counts 1)" in told[1]


def test_two_processes_together_for_real(tmp_path: Path) -> None:
    """The twin of the two above: what is as asked is let through."""
    found = probe(tmp_path, "torchrun --standalone --nproc_per_node 2", ACCELERATE_USE_CPU="true")
    assert found == ([], "MULTI_CPU", 2)


@needs_deepspeed
def test_deepspeed_dropped_for_real(tmp_path: Path) -> None:
    command = "accelerate launch --config_file zero2.yaml --num_processes 2 --mixed_precision no --main_process_port 0"
    told, kind, processes = probe(tmp_path, command, ACCELERATE_USE_CPU="true")
    assert (kind, processes) == ("MULTI_CPU", 2)
    assert "unset it and set DS_ACCELERATOR=cpu" in told[0]
    assert "DeepSpeed was asked for (ACCELERATE_USE_DEEPSPEED=true), and Accelerate chose MULTI_CPU" in told[1]


@needs_no_gpu
@pytest.mark.slow
def test_deepspeed_on_a_cpu_for_real(tmp_path: Path) -> None:
    command = "accelerate launch --config_file zero2.yaml --num_processes 1 --mixed_precision no --main_process_port 0"
    assert probe(tmp_path, command, DS_ACCELERATOR="cpu") == ([], "DEEPSPEED", 1)


@pytest.mark.gpu
def test_a_gpu_for_real(tmp_path: Path) -> None:
    assert probe(tmp_path, "accelerate launch --config_file single_gpu.yaml") == ([], "NO", 1)


# --- the front ---------------------------------------------------------------------------------------------------


def complaint(request: Request) -> str:
    with pytest.raises(UserError) as told:
        plan(request, ["demo"])
    assert "\n" not in str(told.value)
    return str(told.value)


@needs_deepspeed
def test_the_line_for_cpus() -> None:
    ddp = plan(Request("ddp", processes=2, on_cpu=True), ["demo", "--run.folder", "my runs/x"])
    assert ddp.variables["ACCELERATE_USE_CPU"] == "true"
    assert "DS_ACCELERATOR" not in ddp.variables
    assert ddp.line().endswith("--module hf_plm.cli pretrain demo --run.folder 'my runs/x'")
    asked = asked_by(["accelerate", "launch", *ddp.words])
    assert asked is not None
    assert (asked.kind, asked.processes) == ("MULTI_GPU", 2)
    zero = plan(Request("zero3", processes=2, on_cpu=True), ["demo"])
    assert zero.variables["DS_ACCELERATOR"] == "cpu"
    assert "ACCELERATE_USE_CPU" not in zero.variables
    assert "--cpu" not in [*zero.words, *ddp.words]
    assert "--cpu" in plan(Request("single_gpu", on_cpu=True), ["demo"]).words


@needs_deepspeed
def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "_num_cores", lambda: 12)
    monkeypatch.setattr(launch, "num_gpus", lambda: 4)
    assert plan(Request("ddp", processes=4, on_cpu=True), []).variables["OMP_NUM_THREADS"] == "3"
    assert plan(Request("zero2_offload"), []).variables["OMP_NUM_THREADS"] == "3"  # AdamW runs on the CPU
    assert "OMP_NUM_THREADS" not in plan(Request("zero2"), []).variables
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in plan(Request("ddp", processes=4, on_cpu=True), []).variables


@needs_deepspeed
def test_one_process_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "num_gpus", lambda: 4)
    words = plan(Request("fsdp2"), []).words
    assert words[words.index("--num_processes") + 1] == "4"
    several = Request("multi_node_zero2", machines=3, machine_rank=1, main_ip="10.0.0.1")
    words = plan(several, []).words
    assert words[words.index("--num_processes") + 1] == "12"
    assert words[words.index("--main_process_ip") + 1] == "10.0.0.1"
    assert words[words.index("--deepspeed_multinode_launcher") + 1] == "standard"


def test_mistakes_are_told_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "num_gpus", lambda: 4)
    assert "need as many GPUs, and torch sees 4; give --processes 4" in complaint(Request("ddp", processes=8))
    assert "cannot be tried on CPUs" in complaint(Request("fsdp2", on_cpu=True))
    assert "is for one process; for several take ddp" in complaint(Request("cpu", processes=2))
    assert "say on each which it is" in complaint(Request("multi_node_ddp"))
    where = {"main_ip": "10.0.0.1", "machine_rank": 2}
    assert "counts from 0 to 1 on 2 machines" in complaint(Request("multi_node_ddp", **where))
    assert "cannot be spread over 2" in complaint(Request("multi_node_ddp", processes=7))
    monkeypatch.setattr(launch, "num_gpus", lambda: 0)
    assert "ddp.yaml asks for GPUs, and torch sees none here" in complaint(Request("ddp"))
    assert "single_gpu.yaml asks for a GPU, and torch sees none here" in complaint(Request("single_gpu"))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "needs DeepSpeed, which is not installed; pip install deepspeed" in complaint(Request("zero2", on_cpu=True))


def test_a_taken_port() -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        sentence = complaint(Request("ddp", processes=2, on_cpu=True, port=port))
        assert sentence == f"Port {port} of this machine is taken; give another with --port, such as --port {port + 1}."
    words = plan(Request("ddp", processes=2, on_cpu=True, port=port), []).words
    assert words[words.index("--main_process_port") + 1] == str(port)


def test_flags_of_the_front(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    main(["launch", "ddp", "demo", "--cpu", "--processes", "3", "--dry-run", "--run.folder", folder])
    line = capsys.readouterr().out
    assert "accelerate launch --config_file" in line
    assert "--num_processes 3" in line
    assert line.endswith(f"pretrain demo --run.folder {folder}\n")
    for words, sentence in (
        (["ddp", "demo", "--proceses", "2"], "Unknown flag --proceses; did you mean --processes?"),
        (["ddp", "demo", "--data.trian", "x"], "Unknown flag --data.trian; did you mean --data.train?"),
        (["ddp", "mine"], "The run has no folder"),
        (["ddp", "dmeo", "--run.folder", folder], "There is no recipe 'dmeo'"),
        (["dpd", "demo", "--run.folder", folder], "There is no file for Accelerate 'dpd'; did you mean ddp?"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["launch", *words])
        assert exit_.value.code == 1
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_processes_is_one_sentence(tmp_path: Path) -> None:
    """Not one from each process, and nothing of the launcher's after it."""
    words = ["ddp", "demo", "--cpu", "--data.train", "missing.fasta", "--run.folder", str(tmp_path / "run")]
    command = [sys.executable, "-m", "hf_plm.cli", "launch", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 ACCELERATE_USE_CPU=true")
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("hf-plm: ")]
    assert len(told) == 1
    assert "missing.fasta" in told[0]


ENDS = """
import os, signal, sys, time

if sys.argv[1] == "exit":
    sys.exit(7)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL) if os.environ["RANK"] == "1" else time.sleep(60)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(40))
print("ready", flush=True)
time.sleep(60)
"""
RUN = "import sys; from hf_plm.training.launch import Plan, run; sys.exit(run(Plan(sys.argv[1:], {})))"


def run_script(tmp_path: Path, config: str, *words: str) -> subprocess.Popen[str]:
    (tmp_path / "ends.py").write_text(ENDS)
    launcher = ["--config_file", str(CONFIGS / f"{config}.yaml"), *words[:-1], str(tmp_path / "ends.py"), words[-1]]
    command = [sys.executable, "-c", RUN, *launcher]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_exit_codes_and_signals_pass_through(tmp_path: Path) -> None:
    one = run_script(tmp_path, "cpu", "--quiet", "exit")
    assert one.wait(60) == 7
    stopped = run_script(tmp_path, "cpu", "stop")
    assert stopped.stdout is not None
    assert stopped.stdout.readline() == "ready\n"
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 40
    killed = run_script(tmp_path, "ddp", "--num_processes", "2", "--main_process_port", "0", "kill")
    _, error = killed.communicate(timeout=60)
    assert killed.returncode == 128 + signal.SIGKILL
    assert "hf-plm: Process 1 was ended by SIGKILL; the machine may be out of memory." in error
    assert "Traceback" not in error
