"""The front door: ``gradsync COMMAND``, one of ``_COMMANDS`` below."""

if not __package__:  # started as a file (`python cli.py fit ...`): run the installed package instead
    import os
    import runpy
    import sys

    sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != os.path.dirname(os.path.realpath(__file__))]
    runpy.run_module("gradsync.cli", run_name="__main__", alter_sys=True)
    sys.exit()

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from . import __version__
from .errors import StoppedBySignal
from .failures import FailureRecords
from .processes import await_children, die_with_parent, is_started_by_rank_zero, is_supervised, starts_a_run
from .supervisor import go_on_supervised
from .template import drop_template, keep_template, start_process

_CHILD_PATIENCE_S = 10.0
_CAUSE_S = 2.0
"""How long whoever lost a peer waits for it to say why: it may still be tidying up."""
_CAUSE_SUPERVISED_S = 10.0
"""The same where a supervisor tells of the failure, if nobody else does, and ends this process then."""

_COMMANDS = {
    "fit": "train, under the strategy that --trainer.strategy names",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "predict with a trained model",
    "compare": "train under several strategies, one after another, and report what each costs",
    "tune-batch-size": "find the batch size that trains most images per second in the memory there is",
    "convert": "write an image folder as Parquet shards, for fast and for remote storage",
    "doctor": "check this machine before a long run, and say what to change",
    "inspect": "list a model's parameters, how strategies would cut it, a checkpoint's tensors; nothing is trained",
    "keygen": "make the keys that a parameter server off loopback needs",
    "report": "make tables, plots, text and a page from the result files of a folder, or compare two folders",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command and end the process: code 0, 1 (it failed), 2 (wrong usage), 130 (Ctrl-C) or 143 (SIGTERM)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("--help", "-h"):
        print(_overview())
    elif command == "--version":
        print(f"gradsync {__version__}")
    elif command == "compare":
        from .compare import main as compare

        _guarded(lambda: compare(rest))
    elif command == "tune-batch-size":
        from .tune_batch_size import main as tune

        _guarded(lambda: tune(rest))
    elif command == "convert":
        from .convert import main as convert

        _guarded(lambda: convert(rest))
    elif command == "doctor":
        from .doctor import main as doctor

        _guarded(lambda: doctor(rest))
    elif command == "inspect":
        from .inspect_model import main as inspect

        _guarded(lambda: inspect(rest))
    elif command == "keygen":
        from .keys import main as keygen

        _guarded(lambda: keygen(rest))
    elif command == "report":
        from .report.command import main as report

        _guarded(lambda: report(rest))
    elif command in _COMMANDS:
        die_with_parent()
        if starts_a_run():
            _guarded(_load, leave_hard=True)  # once, for all processes of the run
            go_on_supervised()
        _guarded(lambda: _run_lightning(arguments), leave_hard=True)
    else:
        print(f"gradsync: unknown command {command!r}; there are {', '.join(_COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def _overview() -> str:
    lines = [f"  {name:15} {what}" for name, what in _COMMANDS.items()]
    return "\n".join(
        ["usage: gradsync COMMAND [options]", "", *lines, "", "`gradsync COMMAND --help` lists a command's options."]
    )


def _guarded(run: Callable[[], Any], leave_hard: bool = False) -> None:
    """Call ``run``; an error becomes one clear line, or a traceback where nobody knows better, and exit code 1.

    ``leave_hard``: skip the interpreter's teardown after an error. It takes seconds with torch loaded, in which
    the other processes would wait for this one.
    """
    records = FailureRecords()
    records.introduce()
    code = 1
    try:
        run()
        return
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):  # which Lightning turns into code 1
            raise
        code = 130
    except StoppedBySignal as stop:
        # Lightning's launcher takes another code of a child for a failure.
        code = 0 if is_started_by_rank_zero() else 128 + stop.signum
        drop_template()
        await_children(_CHILD_PATIENCE_S)
    except Exception as error:
        _tell(error, records)
    finally:
        records.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if leave_hard:
        os._exit(code)
    sys.exit(code)


def _tell(error: Exception, records: FailureRecords) -> None:
    from .explain import is_consequence, one_line

    patience_s = _CAUSE_SUPERVISED_S if is_supervised() else _CAUSE_S
    if is_consequence(error) and (first := records.first(patience_s)) is not None:
        if not is_supervised():  # torchrun may write each process's lines to a file of its own
            print(f"gradsync: another process failed first ({first})", file=sys.stderr)
        return
    text = one_line(error)
    said = text or f"{type(error).__name__}: {error}"
    is_news = is_consequence(error) or records.note(said)
    if text is None:
        traceback.print_exception(error)
    if is_news or text is None:
        print(f"gradsync: error: {said}", file=sys.stderr)


def _load() -> None:
    from . import lightning_cli  # noqa: F401


def _run_lightning(arguments: list[str]) -> Any:
    from .lightning_cli import GradsyncCLI
    from .strategy_flag import expand

    if is_supervised():
        if not is_started_by_rank_zero():
            keep_template()
        _replace_lightnings_launching()
    sys.argv = [sys.argv[0], *expand(arguments)]
    # Only noise: https://github.com/Lightning-AI/pytorch-lightning (isinstance(treespec, LeafSpec)).
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*", module="lightning")
    # A checkpoint of fit names the callbacks that wrote it; an evaluation does without them.
    warnings.filterwarnings("ignore", message=r"Be aware that when using `ckpt_path`")
    # Ours builds the network there, and does not shard it.
    warnings.filterwarnings("ignore", message=r"You're using the WeightAveraging callback with a model that overrides")
    cli = GradsyncCLI.from_command_line()
    cli.wait_for_children()
    return cli


def _replace_lightnings_launching() -> None:
    """Its launcher loads everything anew; its observer takes a failed child's status, kills this one, names nobody."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    subprocess_script._launch_process_observer = lambda child_processes: None
    subprocess_script.subprocess = SimpleNamespace(Popen=start_process)


if __name__ == "__main__":
    main()
