"""A soak: pretraining on real imagery over two processes that are killed at random moments, again and again.

    MSGFM_SAMPLE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/endurance.py --kills 100

First a run that nothing disturbs, over two processes. Then the same run in many lives, each ended by `kill -9` of one
process or both at a random moment, one in six by SIGTERM; half of them read data in workers. When the run is over
before its time, another such run begins. Now and then a life finds a shard with flipped bytes, or without it, or the
newest checkpoint damaged, and one life finds the disk full; what was wrong with the data is put right for the next. At
the end of each run it compares: the sample logs (each row once per pass, nothing lost or repeated), the weights and
AdamW's moments (bit by bit), and the metrics of every step.

It prints what happened and exits with 1 if anything differs. Takes about half an hour on two cores.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

# Imported once: the processes are forked.
import msgfm_hf.train.pretrain as room
from msgfm_hf.data.sample import make_sample_shards
from msgfm_hf.data.shards import ShardSource
from msgfm_hf.train.checkpoint import find_checkpoints

WORLD = 2
SOURCES = {"naip": 4, "autzen": 2, "terramesh": 1}
# The sample recipe's model would spend the hours on products of matrices; what is tested here is everything around it.
RECIPE = {
    "name": "endurance",
    "model": {
        "embed_dim": 12,
        "depths": [1, 1, 2],
        "num_heads": [1, 1, 2],
        "window_size": 3,
        "image_size": 48,
        "mask_patch_size": 8,
        "num_experts": 2,
    },
    "batch_sizes": SOURCES,
    "learning_rate": 2e-3,
    "warmup_steps": 10,
    "logging_steps": 1,
    "eval_steps": 100_000,
    "log_samples": True,
    "save_total_limit": 3,
    "max_bad": 0,
}
CLOCKS = ("images_per_second", "input_wait")


def fork_run(recipe: Path, log: Path, room_left: int | None = None, workers: int = 0) -> list[int]:
    """Start the run in `WORLD` processes; what they say is added to the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 70
        try:
            with open(log, "a") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            if room_left is not None:
                # A disk on which no file can grow beyond this. Python ignores the signal, so a write fails.
                resource.setrlimit(resource.RLIMIT_FSIZE, (room_left, room_left))
            os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            room.main(["--recipe", str(recipe), "--resume", "--dataloader_num_workers", str(workers)])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def wait(
    children: list[int], seconds: float | None, kill: list[int], with_signal: int = signal.SIGKILL
) -> tuple[list[int | None], bool]:
    """Exit codes, and whether the children numbered in `kill` got the signal when the time was up; where one dies, the
    rest follow."""
    cut = False
    codes: list[int | None] = [None] * len(children)
    deadline = None if seconds is None else time.monotonic() + seconds
    grace = None
    while None in codes:
        for number, child in enumerate(children):
            if codes[number] is None:
                gone, status = os.waitpid(child, os.WNOHANG)
                if gone:
                    codes[number] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            deadline = None
            for number in kill if grace is None else ():
                if codes[number] is None:
                    os.kill(children[number], with_signal)
                    cut = True
        if grace is None and any(code not in (None, 0) for code in codes):
            # torchrun does this: whoever waits for a dead process would wait for long.
            grace = now + 0.3
        if grace is not None and now >= grace:
            for number, child in enumerate(children):
                if codes[number] is None:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return codes, cut


def flip(path: Path, chance: random.Random):
    """Turn one byte of a file over."""
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x55]))


def samples(run: Path) -> dict[tuple[int, int], list[dict]]:
    """{(step, rank): keys by source of each batch}."""
    found = collections.defaultdict(list)
    for file in sorted((run / "samples").glob("*.jsonl")):
        rank = int(file.stem.removeprefix("rank-"))
        for line in map(json.loads, file.read_text().splitlines()):
            found[line["step"], rank].append(line["keys"])
    return dict(found)


def metrics(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def compare(run: Path, whole: Path, data: Path, steps: int) -> list[str]:
    """What differs between the disturbed run and the whole one, or is wrong with both."""
    wrong = []
    ours, theirs = (find_checkpoints(path)[0].path for path in (run, whole))
    for name in ("model.safetensors", "optimizer.pt"):
        if name == "model.safetensors":
            same = (ours / name).read_bytes() == (theirs / name).read_bytes()
        else:
            left, right = (torch.load(path / name, weights_only=True)["state"] for path in (ours, theirs))
            same = left.keys() == right.keys() and all(
                torch.equal(value, right[key][moment]) for key in left for moment, value in left[key].items()
            )
        if not same:
            wrong.append(f"{name} of step {steps} differs")
    if metrics(run) != metrics(whole):
        wrong.append("metrics differ")
    log = samples(run)
    if log != samples(whole):
        wrong.append("sample logs differ")
    for source, size in SOURCES.items():
        keys = [
            key
            for step in range(1, steps + 1)
            for rank in range(WORLD)
            for batch in log.get((step, rank), [])
            for key in batch[source]
        ]
        if len(keys) != steps * WORLD * size:
            wrong.append(f"{source}: {len(keys)} samples in the log for {steps * WORLD * size}")
        rows = sorted(row["key"] for row in ShardSource(data / source).read_metadata())
        passes = len(keys) // len(rows)
        for turn in range(passes):
            if sorted(keys[turn * len(rows) : (turn + 1) * len(rows)]) != rows:
                wrong.append(f"{source}: pass {turn} does not hold each row once")
        print(f"  {source}: {len(keys)} samples, {passes} whole passes over {len(rows)} rows")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many lives are cut short (default 100)")
    parser.add_argument("--steps", type=int, default=600, help="steps of the run (default 600)")
    parser.add_argument("--save_steps", type=int, default=5, help="steps between checkpoints (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--folder", help="where to work (default a temporary folder, removed at the end)")
    arguments = parser.parse_args()
    if "MSGFM_SAMPLE_DATA" not in os.environ:
        parser.error("MSGFM_SAMPLE_DATA must be the folder of real samples.")
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    scratch = tempfile.TemporaryDirectory() if arguments.folder is None else None
    folder = Path(arguments.folder or scratch.name)
    data = folder / "data"
    make_sample_shards(os.environ["MSGFM_SAMPLE_DATA"], data)
    for val in data.glob("*/val-*.parquet"):
        # Evaluations and pictures would only take time.
        val.unlink()

    def plan(name: str) -> tuple[Path, Path]:
        fields = RECIPE | {"max_steps": arguments.steps, "save_steps": arguments.save_steps}
        fields |= {"data": [str(data / source) for source in SOURCES], "output_dir": str(folder / name)}
        (folder / f"{name}.json.yaml").write_text(json.dumps(fields))
        return folder / f"{name}.json.yaml", folder / name

    recipe, whole = plan("whole")
    began = time.monotonic()
    codes, _ = wait(fork_run(recipe, folder / "whole.log"), None, [])
    alone = time.monotonic() - began
    assert codes == [0, 0], (folder / "whole.log").read_text()[-3000:]
    print(f"undisturbed: {arguments.steps} steps over {WORLD} processes in {alone:.0f} s", flush=True)

    rounds = 1
    recipe, run = plan(f"run-{rounds}")
    log = folder / "life.log"
    wrong = []
    happened: collections.Counter = collections.Counter()
    backup = folder / "backup"
    shutil.copytree(data, backup)
    lives = 0
    began = time.monotonic()
    # A life starts with what is set up before the first step; a cut is spread over that and the steps of a few saves.
    span = 3.0 + alone * 4 * arguments.save_steps / arguments.steps
    while happened["killed"] < arguments.kills:
        lives += 1
        trouble = {7: "damaged shard", 13: "removed shard", 17: "damaged checkpoint"}.get(lives % 20)
        if lives == 25:
            trouble = "full disk"
        shard = data / chance.choice(list(SOURCES)) / "train-00000.parquet"
        room_left = None
        if trouble == "damaged shard":
            for _ in range(40):
                flip(shard, chance)
        elif trouble == "removed shard":
            shard.unlink()
        elif trouble == "damaged checkpoint" and len(find_checkpoints(run)) > 1:
            flip(find_checkpoints(run)[0].path / chance.choice(["model.safetensors", "optimizer.pt"]), chance)
        elif trouble == "full disk":
            room_left = 20_000
        victims = chance.choice([[0], [1], [0, 1]])
        seconds = chance.uniform(0.05, span)
        log.unlink(missing_ok=True)
        kind = signal.SIGTERM if lives % 6 == 0 else signal.SIGKILL
        children = fork_run(recipe, log, room_left, chance.choice([0, 1]))
        codes, cut = wait(children, seconds if room_left is None else None, victims, kind)
        if cut:
            happened["killed" if kind == signal.SIGKILL else "stopped by SIGTERM"] += 1
            # Before training begins SIGTERM ends a process at once, and its partner says that it is gone.
            stopped = codes == [0, 0] or -signal.SIGTERM in codes
            assert kind == signal.SIGKILL or stopped, log.read_text()[-3000:]
        elif 1 in codes:
            happened[f"refused with a message: {trouble}"] += 1
            assert trouble is not None, log.read_text()[-3000:]
            # A process that lost its partner says so too.
            message = [line for line in log.read_text().splitlines() if "pretrain.py: " in line]
            message = next((line for line in message if "by peer" not in line), message[-1])
            print(f"  life {lives}, {trouble}: {message[message.index('pretrain.py: ') :][:160]}", flush=True)
        elif codes == [0, 0] and find_checkpoints(run)[0].step == arguments.steps:
            print(f"run {rounds} is over in life {lives}, after {happened['killed']} kills", flush=True)
            wrong += compare(run, whole, data, arguments.steps)
            rounds += 1
            recipe, run = plan(f"run-{rounds}")
        else:
            happened[f"exit codes {codes}"] += 1
        if trouble in ("damaged shard", "removed shard"):
            shutil.copy(backup / shard.relative_to(data), shard)
        if trouble:
            happened[trouble] += 1
        if lives % 10 == 0:
            step = max((checkpoint.step for checkpoint in find_checkpoints(run)), default=0)
            print(f"  life {lives}: {happened['killed']} kills, run {rounds} at step {step}", flush=True)
    codes, _ = wait(fork_run(recipe, log), None, [])
    print(f"disturbed: {rounds} runs in {lives + 1} lives and {time.monotonic() - began:.0f} s; {dict(happened)}")
    wrong += compare(run, whole, data, arguments.steps) if codes == [0, 0] else [f"the last life ended with {codes}"]
    for trouble in ("damaged shard", "removed shard", "full disk"):
        if arguments.kills >= 100 and not happened[f"refused with a message: {trouble}"]:
            wrong.append(f"no life met a {trouble}")
    print("\n".join(wrong) or "weights, moments, metrics and samples are those of the undisturbed run, bit by bit")
    if scratch is not None:
        scratch.cleanup()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
