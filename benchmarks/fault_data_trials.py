"""Trials of `faults.py` about what is trained on: bad gradients, uneven batches, broken images, resuming."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from fault_columns import CHECKPOINTS, Job
from fault_findings import STEP_TIMEOUT_S, Bench, Findings, NotRun, Row

_ON_NONFINITE = "--on_nonfinite"


def not_a_number(bench: Bench, case: str) -> Findings:
    """R12."""
    ours = bench.column.is_ours
    found = Findings(case if ours else "")
    if ours and not bench.column.knows(_ON_NONFINITE):
        raise NotRun(f"this gradsync has no {_ON_NONFINITE}")
    options = (_ON_NONFINITE, case) if ours else ()
    with bench.run(Job(fault="nan", num_epochs=2, steps_per_epoch=10, options=options)) as run:
        ending, folder = run.end(limit_s=120), bench.log.parent
        found.ended(ending, fails=case == "stop" if ours else None)
        found.saw("run goes on", ending.code == 0)
        files = [folder / "weights.pt", *(folder / CHECKPOINTS).glob("*.ckpt")]
        found.should("weights and checkpoints finite", all(_finite(path) for path in files if path.is_file()))
        found.left_nothing(run)
    return found


def _finite(path: Path) -> bool:
    content = torch.load(path, weights_only=True)
    tensors = content.get("state_dict", content)
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def uneven_batches(bench: Bench, case: str) -> Findings:
    """R14: all samples count once, or the run is refused before it has begun."""
    found, first = Findings(), bench.column.first_process
    job = Job(num_epochs=2, steps_per_epoch=10, num_fewer=3, timeout_s=STEP_TIMEOUT_S)
    with bench.run(job) as run:
        ending = run.end(limit_s=120)
        found.ended(ending, fails=None)
        steps = [run.steps(first + rank) for rank in (0, 1)]
        mixed = sum(mine.epoch != theirs.epoch for mine, theirs in zip(*steps, strict=False))
        refused = ending.code != 0 and not any(steps)
        complete = [len(mine) for mine in steps] == [20, 14]
        found.saw("refused at the start", refused)
        found.saw("trains to the end", ending.code == 0 and not ending.hung)
        found.at_most("steps that mix two epochs", mixed, 0)
        if not refused and not (complete and ending.code == 0):
            found.misses.append("neither refused at the start nor trained on all batches")
        found.left_nothing(run)
    return found


# -- images --------------------------------------------------------------------------------------------------


def write_images(root: Path, num_train: int = 16) -> Path:
    """An image folder of three classes, of random pixels."""
    from PIL import Image

    pixels = random.Random(0)
    for split, count in (("train", num_train), ("val", 3)):
        for name in ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                small = Image.frombytes("RGB", (5, 4), pixels.randbytes(60))
                small.resize((48, 40), Image.Resampling.BICUBIC).save(root / split / name / f"{number:03d}.jpg")
    return root


def _counted(folder: Path) -> int:
    """Images that could not be read, as the result file says."""
    [result] = (folder / "run").glob("results_*.json")
    return json.loads(result.read_text()).get("bad_samples", {}).get("count", 0)


def broken_image(bench: Bench, case: str) -> Findings:
    """R15: by default the run ends and says which file; or, if asked to, it goes on and counts."""
    found, folder = Findings(case), bench.new_folder()
    skips = case == "skip"
    if skips and not bench.column.is_ours:
        raise NotRun("no such option")
    path = write_images(folder / "images") / "train" / "b" / "005.jpg"
    path.write_bytes(path.read_bytes()[:400])
    options = ("--data.bad_samples", "skip") if skips else ()
    with bench.run(Job(images=folder / "images", workers=1, options=options), folder) as run:
        found.ended(run.end(limit_s=120), fails=not skips)
        if skips:
            steps = [len(run.steps(bench.column.first_process + rank)) for rank in (0, 1)]
            found.should("goes on, ranks in step", steps[0] == steps[1] > 0)
            found.should("counts it", _counted(folder) == 1)
        else:
            found.should("names the file", "b/005.jpg" in run.output)
        found.left_nothing(run)
    return found


# -- resuming ------------------------------------------------------------------------------------------------


def resumed(bench: Bench, case: str) -> Findings:
    """R17: 48 images, 2 ranks with batches of 8: 3 steps an epoch; from step 5 of 9, or all in one go."""
    found, folder = Findings(case), bench.new_folder()
    job = Job(
        images=write_images(folder / "images"), num_epochs=3, every_n_steps=5, dropout=0.2 if case == "dropout" else 0.0
    )
    with bench.run(job, folder) as run:
        if run.end(limit_s=120).code:
            raise NotRun("the run to be resumed has failed")
    [path] = [path for path in folder.rglob("*.ckpt") if "step=5" in path.name]
    again = folder / "again"
    with bench.run(Job(**{**vars(job), "ckpt_path": path}), again) as run:
        found.ended(run.end(limit_s=120), fails=False)
        whole, rest = folder / "weights.pt", again / "weights.pt"
        difference = _difference(whole, rest) if rest.exists() else float("inf")
        found.should("equal to the bit", difference == 0)
        if difference:
            found.saw("largest difference", difference)
        found.left_nothing(run)
    return found


def _difference(path: Path, other: Path) -> float:
    first, second = (torch.load(p, weights_only=True) for p in (path, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel())


DATA_ROWS = {
    "R12": Row("NaN in one rank's gradient", ("stop", "skip"), not_a_number),
    "R14": Row("one rank has fewer batches; a step may take 10 s", ("",), uneven_batches),
    "R15": Row("truncated JPEG", ("stop", "skip"), broken_image),
    "R17": Row("resume in mid-epoch", ("images", "dropout"), resumed),
}
