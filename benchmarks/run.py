"""Measure memplan against its peers.

    python -m benchmarks.run --device cuda --systems eager,inductor,memplan --out results/ --time-limit 480

Each pair of model and system runs in a process of its own with empty caches. At most four compile at once; each then
takes its model off the device and waits, and they are measured one at a time while nothing compiles. Every result is
written when it is known, so that a run that is cut leaves a table of what it got to.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .table import markdown
from .worker import MARK

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = "eager,inductor,inductor+expandable_segments,memplan"


@dataclass
class Job:
    """One model under one system: the process, and what it said so far."""

    model: str
    system: str
    gigabytes: float
    process: subprocess.Popen[str] | None = None
    log: Path | None = None
    said: dict[str, object] = field(default_factory=dict)
    stage: str = "new"  # new, compiling, compiled, measuring, done, failed

    @property
    def key(self) -> str:
        return f"{self.model} {self.system}"


@dataclass
class Bench:
    """Runs jobs, a few at a time, and keeps the results file up to date."""

    given: argparse.Namespace
    jobs: list[Job]
    device_gigabytes: float
    out: Path
    deadline: float
    environment: dict[str, str]
    changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self) -> None:
        try:
            while not self.over():
                waiting = [j for j in self.jobs if j.stage == "compiled"]
                compiling = [j for j in self.jobs if j.stage == "compiling"]
                new = [j for j in self.jobs if j.stage == "new"]
                full = len(waiting) + len(compiling) >= self.given.batch
                if new and not full and len(compiling) < self.given.parallel and self.fits(new[0], compiling):
                    self.start(new[0])
                elif compiling:
                    self.wait()
                elif waiting:
                    for job in waiting:
                        self.measure(job)
                elif not new:
                    return
        finally:
            for job in self.jobs:
                self.end(job)
            self.write()

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def fits(self, job: Job, compiling: list[Job]) -> bool:
        """Whether the first steps of the jobs that compile have room on the device together."""
        return not compiling or sum(j.gigabytes for j in compiling) + job.gigabytes <= self.device_gigabytes

    def start(self, job: Job) -> None:
        from .systems import System

        folder = Path(tempfile.mkdtemp(prefix="memplan-bench-", dir=self.given.scratch))
        job.log = folder / "stderr.txt"
        environment = dict(os.environ)
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MEMPLAN_CACHE_DIR"):
            environment[name] = str(folder / name.split("_")[0].lower())
        threads = max(1, (os.cpu_count() or 1) // self.given.parallel)
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= System.parse(job.system).environment()
        command = [sys.executable, "-m", "benchmarks.worker", "--device", self.given.device, "--model", job.model]
        command += ["--system", job.system, "--repeats", str(self.given.repeats), "--seconds", str(self.given.seconds)]
        command += ["--optimizer"] if self.given.optimizer else []
        command += ["--profile"] if self.given.profile else []
        command += ["--alone"] if self.given.batch == 1 else []
        command += ["--threads", str(self.given.threads)] if self.given.threads else []
        job.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=job.log.open("w"),
        )  # fmt: skip
        job.stage = "compiling"
        threading.Thread(target=self.listen, args=(job,), daemon=True).start()

    def listen(self, job: Job) -> None:
        """Read what a worker says until it ends."""
        assert job.process is not None
        assert job.process.stdout is not None
        for line in job.process.stdout:
            if line.startswith(MARK):
                message = json.loads(line.removeprefix(MARK))
                with self.changed:
                    job.stage = message.pop("stage")
                    job.said |= message
                    self.changed.notify_all()
        code = job.process.wait()
        with self.changed:
            if job.stage not in ("done", "failed"):
                job.stage = "failed"
                job.said["error"] = f"ended with code {code}: {self.tail(job)}"
            self.changed.notify_all()

    def tail(self, job: Job) -> str:
        assert job.log is not None
        return job.log.read_text(errors="replace").strip()[-800:]

    def wait(self) -> None:
        before = [j.stage for j in self.jobs]
        with self.changed:
            self.changed.wait_for(lambda: [j.stage for j in self.jobs] != before, timeout=1.0)
        self.write()

    def measure(self, job: Job) -> None:
        """Let one worker go on, and wait until it is done; other runs on this machine wait at the lock."""
        if self.over() or job.stage != "compiled":
            return
        assert job.process is not None
        assert job.process.stdin is not None
        with alone():
            job.stage = "measuring"
            print(f"{time.strftime('%H:%M:%S')} {job.key}: compiled in {job.said['compile_s']:.1f} s", flush=True)
            job.process.stdin.write("go\n")
            job.process.stdin.flush()
            with self.changed:
                self.changed.wait_for(
                    lambda: job.stage != "measuring", timeout=max(0.0, self.deadline - time.monotonic())
                )
        self.end(job)
        self.write()

    def end(self, job: Job) -> None:
        if job.process is not None and job.process.poll() is None:
            if job.stage == "done":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.process.wait(timeout=20)
            if job.process.poll() is None:
                job.process.kill()
                if job.stage not in ("done", "failed"):
                    job.said.setdefault("error", f"cut by the time limit while {job.stage}")
        if job.stage == "failed":
            print(f"{job.key}: FAILED {str(job.said.get('error', ''))[:400]}", flush=True)
            job.stage = "reported"

    def write(self) -> None:
        """The results so far."""
        results = {j.key: {"model": j.model, "system": j.system, **j.said} for j in self.jobs if j.said}
        text = json.dumps({"environment": self.environment, "results": results}, indent=1)
        path = self.out / f"{self.given.device}{'-' + self.given.label if self.given.label else ''}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)
        if self.given.profile:
            return
        path.with_suffix(".md").write_text(markdown(results, self.environment))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the machine's measuring lock."""
    with (Path(tempfile.gettempdir()) / "memplan-benchmarks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def describe(device: str) -> tuple[dict[str, str], float]:
    """Versions and the machine's kind, and the device's memory in 1e9 bytes; asked in a process of its own, so that
    this one holds no device context."""
    code = (
        "import torch, json, platform\n"
        "d = {'torch': torch.__version__, 'python': platform.python_version()}\n"
        "d['threads'] = str(torch.get_num_threads())\n"
        "n = 0\n"
        "if torch.cuda.is_available():\n"
        "    d['gpu'] = torch.cuda.get_device_name(0); n = torch.cuda.mem_get_info()[0]\n"
        "try:\n"
        "    import triton; d['triton'] = triton.__version__\n"
        "except ImportError: d['triton'] = 'none'\n"
        "import transformers; d['transformers'] = transformers.__version__\n"
        "print(json.dumps([d, n]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, free = json.loads(done.stdout.splitlines()[-1])
    found["machine"] = found.pop("gpu", platform.machine()) if device == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return found, (free / 1e9 * 0.95 if device == "cuda" else 8.0)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", "--devices", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--models", default="", help="names separated by commas; all of the device's without")
    parser.add_argument("--systems", default=SYSTEMS, help=f"separated by spaces or ';' (or ','); default {SYSTEMS}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--label", default="", help="added to the names of the result files")
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds after which what runs is cut")
    parser.add_argument("--parallel", type=int, default=4, help="processes that compile at once")
    parser.add_argument("--batch", type=int, default=0, help="compiled before they are measured; 0: twice --parallel")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps, at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="no new timed step after so many")
    parser.add_argument("--optimizer", action="store_true", help="also: two accumulated passes and AdamW")
    parser.add_argument("--profile", action="store_true", help="time by kernel instead, side by side")
    parser.add_argument("--threads", type=int, default=0, help="threads of each process on a CPU")
    parser.add_argument("--scratch", default=None, help="folder for caches and logs; a temporary one without")
    return parser.parse_args()


def split_systems(text: str) -> list[str]:
    """``eager,inductor`` or, where systems have options with commas, separated by spaces or semicolons."""
    if ";" in text or " " in text:
        return [s for s in text.replace(";", " ").split() if s]
    return [text] if ":" in text and "," in text else [s for s in text.split(",") if s]


def main() -> None:
    given = arguments()
    from .models import cases
    from .systems import System

    deadline = time.monotonic() + given.time_limit
    systems = split_systems(given.systems)
    if given.device == "cpu":
        systems = [s for s in systems if not System.parse(s).expandable_segments]
    for s in systems:
        System.parse(s)
    found = cases(given.device, [m for m in given.models.split(",") if m])
    given.out.mkdir(parents=True, exist_ok=True)
    environment, free = describe(given.device)
    if given.threads:
        environment["threads"] = str(given.threads)
    if given.device == "cpu":
        given.parallel = min(given.parallel, max(1, (os.cpu_count() or 1) // 2))
    given.batch = given.batch or 2 * given.parallel
    jobs = [Job(c.name, s, c.gigabytes) for c in found for s in systems]
    bench = Bench(given, jobs, free, given.out, deadline, environment)
    bench.run()
    results = {j.key: {"model": j.model, "system": j.system, **j.said} for j in jobs if j.said}
    if given.profile:
        print_profiles(results, given.out)
    else:
        print(markdown(results, environment))
    sys.exit(any("error" in r for r in results.values()))


def print_profiles(results: dict[str, dict[str, object]], out: Path) -> None:
    from .kernels import side_by_side

    for model in dict.fromkeys(str(r["model"]) for r in results.values()):
        rows = {str(r["system"]): r["kernels"] for r in results.values() if r["model"] == model and "kernels" in r}
        text = f"## {model}\n\n{side_by_side(rows)}" if rows else f"## {model}\n\nnothing measured\n"  # type: ignore[arg-type]
        (out / f"profile-{model}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
