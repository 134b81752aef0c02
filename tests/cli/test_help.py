"""Help is instant, complete, and gives an example; option names do not change unnoticed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

OPTIONS = {
    "inspect": "--model-config --model --json --quiet",
    "convert": "--towers --out --partition --affinity --size-ratio --load-ratio --tower-module --c "
    "--p --dim --compression --precision --prefer "
    "--together --apart --group --calibration --replicate --batch "
    "--distill-steps --hosts "
    "--ranks-per-host --hbm-gib "
    "--dtype --optimizer-state --outliers --model-config --model --seed --dry-run --force "
    "--frontier --plot --max-auc-loss --min-r2 "
    "--json --quiet",
    "partition": "--towers --partition --compression --affinity --size-ratio --load-ratio "
    "--together --apart --group --calibration --outliers "
    "--model-config --model --seed --out --plot --json --quiet",
    "plan": "--hosts --ranks-per-host --hbm-gib --intra-gbps --inter-gbps --out --predict "
    "--predict-scaling --plot --gpu --hosts-per-pod --matmul-precision --batch --comm-dtype "
    "--ids-per-bag --assume --model "
    "--json --quiet",
    "data": "--rows --model-config --model --json --quiet",
    "score": "--data --out --outliers --trust-code --model-config --model --json --quiet",
    "evaluate": "--data --outliers --trust-code --model-config --model --json --quiet",
    "verify": "--data --atol --rtol --checksums --outliers --trust-code --model-config --model "
    "--json --quiet",
    "finetune": "--data --out --valid --nproc --nnodes --node-rank --rdzv-endpoint --local-addr "
    "--rdzv-timeout --max-restarts --shutdown-timeout --numa-binding --torchrun-args "
    "--epochs --max-steps --batch-size "
    "--eval-every "
    "--patience --dense-lr --table-lr --table-optimizer --initial-accumulator --warmup-steps "
    "--lr-decay --clip-norm --seed --force --dry-run --json --quiet --dense-optimizer --plan "
    "--backend --comm-dtype --dense-comm-dtype --matmul-precision "
    "--checkpoints --checkpoint-every --keep-checkpoints "
    "--async-checkpoints --checkpoint-minutes --resume --no-prefetch --timeout --log --model "
    "--teacher --teacher-weight",
    "export": "--format --out --quantize --max-auc-loss --data --pooling-input --weighted "
    "--out-of-range --request-batching --request-group --per-request --dense-per-request "
    "--copy-weights --model-name --gpu --gpus "
    "--checksums --model --json --quiet",
    "unshard": "--out --only --force --json --quiet",
    "selftest": "--nproc --quick --out --json --quiet",
}
ARGUMENTS = {
    "inspect": ["source"],
    "convert": ["source"],
    "partition": ["source"],
    "plan": ["bundle"],
    "data": ["model", "data"],
    "score": ["model"],
    "evaluate": ["model"],
    "verify": ["a", "b"],
    "finetune": ["bundle"],
    "export": ["bundle"],
    "unshard": ["source"],
    "selftest": [],
}
DMT = Path(sys.executable).with_name("dmt")


def test_every_command_is_listed(call_dmt: Callable[..., Any]) -> None:
    run = call_dmt("--help")
    assert run.code == 0
    found = re.findall(r"^│ (\w+) ", run.stdout, re.MULTILINE)
    assert [name for name in found if name in OPTIONS] == list(OPTIONS)
    assert "Exit codes: 0 done, 1 bug, 2 usage, 3 " in run.stdout


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_a_command(command: str, call_dmt: Callable[..., Any]) -> None:
    run = call_dmt(command, "--help")
    assert run.code == 0
    options = re.findall(r"^│ \*? +(--[a-z0-9-]+)", run.stdout, re.MULTILINE)
    options += re.findall(r"^│ (--[a-z0-9-]+)", run.stdout, re.MULTILINE)
    assert sorted(set(options) - {"--help"}) == sorted(["--config", *OPTIONS[command].split()])
    arguments = re.findall(r"^│ \* +([a-z]\w*) ", run.stdout, re.MULTILINE)
    assert arguments == ARGUMENTS[command]


@pytest.mark.parametrize("command", [name for name in OPTIONS if ARGUMENTS[name]])
def test_help_has_an_example_that_parses(
    command: str, call_dmt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example is a command line that gets past its options."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = call_dmt(command, "--help").stdout
    examples = re.findall(rf"dmt {command} [^\n]*", shown.split("─ Arguments")[0])
    examples = [line.strip() for line in examples if "[OPTIONS]" not in line]
    assert examples
    for example in examples:
        run = call_dmt(*example.split()[1:])
        assert run.code == 3, run  # the files of the example are not there
        assert "does not exist" in run.stderr


@pytest.mark.parametrize("command", ["", *OPTIONS])
def test_help_is_instant(command: str) -> None:
    if not DMT.exists():
        pytest.skip(f"{DMT} is not installed")
    # Help may cost a few times what its libraries cost: CPU time against CPU time, one after the
    # other, so that neither a slow machine nor a busy one decides. Measured: 1.5 to 2.2.
    libraries = [sys.executable, "-c", "import typer.rich_utils, pydantic; pydantic.BaseModel"]
    ratios = []
    for _ in range(5):
        ratios.append(_busy_seconds([DMT, *command.split(), "--help"]) / _busy_seconds(libraries))
        if ratios[-1] < 3:
            break
    assert min(ratios) < 3


def _busy_seconds(command: Sequence[str | Path]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", "--help"], ["finetune", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom dmt_convert.cli.main import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'numpy', 'matplotlib', 'pyarrow', 'yaml'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_version(call_dmt: Callable[..., Any]) -> None:
    from dmt_convert import __version__

    assert call_dmt("--version").stdout == f"dmt-convert {__version__}\n"


def test_without_arguments_help_is_shown(call_dmt: Callable[..., Any]) -> None:
    run = call_dmt()
    assert run.code == 2
    assert "Usage: dmt" in run.stdout + run.stderr


def test_the_first_help_has_an_example(call_dmt: Callable[..., Any]) -> None:
    assert "Example, to start with: dmt convert ckpt.pt --towers 16" in call_dmt("--help").stdout
