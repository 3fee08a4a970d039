"""Pretraining in several processes on this machine's CPU, again and again without importing torch each time.

Run as a script it is a server: it reads a job per line, forks the processes of the job, and answers when all are gone.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Ranks:
    """Runs `pretrain.py` in several processes that talk over gloo; a context manager."""

    def __enter__(self) -> "Ranks":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, *_SOURCE])}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, log: Path, *arguments: str, world: int = 2, die: tuple | None = None, spoil: tuple | None = None):
        """Run the command line in `world` processes.

        Args:
            log: a folder; each process writes what it says to `rank-N.txt` there.
            arguments: of pretrain.py; %RANK% in them is the number of the process.
            world: how many.
            die: (rank, "step" or "save", n): this process is killed at its n-th step or save.
            spoil: (rank, n): a weight's gradient is not a number in the n-th backward pass of this process.

        Returns:
            per process {"code": exit code (-9 if killed), "said": text, "weights": SHA-256 of the weights that this
            process holds at the end, "kinds": their types, "unused": whether its DDP looks for unused parameters}.
        """
        log.mkdir(parents=True, exist_ok=True)
        job = {"log": str(log), "argv": list(arguments), "world": world, "die": die, "spoil": spoil}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("`Ranks` must answer, got nothing: its server is gone. Look at its standard error.")
        results = json.loads(answer)
        for rank, result in enumerate(results):
            result["said"] = (log / f"rank-{rank}.txt").read_text()
        return results


_SOURCE = [str(Path(__file__).parents[1] / "src")]


def _serve():
    # What takes seconds is imported before the first fork. Nothing here may start a thread.
    import msgfm_hf.train.pretrain  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = {_fork(job, rank, port): rank for rank in range(job["world"])}
        codes = {}
        while len(codes) < len(children):
            child, status = os.wait()
            if child not in children:
                continue
            codes[children[child]] = os.waitstatus_to_exitcode(status)
            if codes[children[child]] != 0:
                # As torchrun does: the others would wait for the dead one. First they may notice by themselves.
                time.sleep(0.5)
                for other, rank in children.items():
                    if rank not in codes:
                        os.kill(other, signal.SIGKILL)
        results = []
        for rank in range(job["world"]):
            facts = Path(job["log"], f"rank-{rank}.json")
            found = json.loads(facts.read_text()) if facts.exists() else {}
            facts.unlink(missing_ok=True)
            results.append({"code": codes[rank], **found})
        print(json.dumps(results), flush=True)


def _fork(job: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(Path(job["log"], f"rank-{rank}.txt"), "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if job["world"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
            os.environ |= {"LOCAL_WORLD_SIZE": str(job["world"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = _pretrain(job, rank)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pretrain(job: dict, rank: int) -> int:

    from msgfm_hf.train import pretrain as room

    made = {}
    prepare = room.prepare_model

    def prepared(accelerator, model, fsdp):
        made["model"] = model
        made["prepared"] = prepare(accelerator, model, fsdp)
        if job["spoil"] and job["spoil"][0] == rank:
            _spoil(model, job["spoil"][1])
        return made["prepared"]

    room.prepare_model = prepared
    if job["die"] and job["die"][0] == rank:
        _, moment, number = job["die"]
        name = "set_learning_rate" if moment == "step" else "save_checkpoint"
        setattr(room, name, _die(getattr(room, name), number))
    code = 0
    try:
        room.main([word.replace("%RANK%", str(rank)) for word in job["argv"]])
    except SystemExit as end:
        code = end.code or 0
    if "model" in made and code == 0:
        digest = hashlib.sha256()
        for _, value in sorted(made["model"].state_dict().items()):
            digest.update(getattr(value, "to_local", lambda value=value: value)().detach().numpy().tobytes())
        kinds = {type(value).__name__ for value in made["model"].parameters()}
        facts = {"weights": digest.hexdigest(), "unused": getattr(made["prepared"], "find_unused_parameters", None)}
        facts["kinds"] = sorted(kinds)
        Path(job["log"], f"rank-{rank}.json").write_text(json.dumps(facts))
    return code


def _spoil(model, number: int):
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == number else gradient

    model.msgfm.embeddings.mask_token.register_hook(hook)


def _die(function, number: int):
    calls = []

    def until(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return until


if __name__ == "__main__":
    _serve()
