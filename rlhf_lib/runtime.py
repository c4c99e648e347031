"""Where and how a run computes: device, precision, seeds, progress, memory, environment."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import logging
import os
import platform
import sys
import threading
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from rlhf_lib import processes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "scipy", "papermill",
    "nbconvert",
)  # fmt: skip


def choose_precision(wanted: str = "auto") -> str:
    """fp32 | bf16 | fp16 for this device; "auto" takes the fastest that is safe.

    bf16 needs hardware for it: a GPU from Ampere on (emulated on a T4, and slow there) or a CPU
    with AVX512-BF16 or AMX. A T4 gets fp16, with fp32 master weights and a scaled loss.
    """
    if wanted != "auto":
        if wanted not in PRECISIONS:
            raise ValueError(f"model.precision={wanted!r}: choose auto, {', '.join(PRECISIONS)}")
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if "avx512_bf16" in _cpu_flags() else "fp32"


def _cpu_flags() -> set[str]:
    # torch has no public query for AVX512-BF16; Linux says it here, other systems get fp32
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return set()
    return set(flags.split())


def no_gpu() -> str:
    """Why no GPU is seen, and the way out; empty where one is."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return (
            "No GPU is seen: this torch was built for CPUs. PyTorch's page on installing names the "
            "build for yours; or take a profile for a CPU, laptop or offline"
        )
    return (
        "No GPU is seen: torch finds none, though it was built for one. Does `nvidia-smi` show it? "
        "Else take a profile for a CPU, laptop or offline"
    )


def make_accelerator(precision: str = "auto") -> Accelerator:
    """The `accelerate` handle that runs mixed precision, and has it for itself."""
    # accelerate's handles share one state; a chapter's small model and its study differ in it
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=PRECISIONS[choose_precision(precision)])
    accelerator.state.__dict__ = dict(accelerator.state.__dict__)
    return accelerator


def set_up_process(threads: int = 0) -> None:
    """Set torch's CPU threads, and quiet the libraries' bars and advice (errors still show).

    `RLHF_THREADS` in the environment wins over `threads`; 0 means one for each core, shared out
    among the processes that were started together.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # of `datasets`, which is slow to import
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    _keep_freed_memory()
    cores = (psutil.cpu_count(logical=False) or 1) // processes.neighbours
    torch.set_num_threads(int(os.environ.get("RLHF_THREADS", 0)) or threads or max(1, cores))


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free, not hand it back to the system after each operation.

    By default every large tensor is mapped anew and its pages are zeroed at first touch; on a CPU
    that is a quarter of a training step's time. Other C libraries are left as they are.
    """
    glibc = _glibc()
    if glibc is None:
        return
    for parameter, value in (
        (M_MMAP_THRESHOLD, 1 << 30),
        (M_TRIM_THRESHOLD, 2**31 - 1),
        (M_TOP_PAD, 1 << 28),
    ):
        glibc.mallopt(parameter, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    set_seed(seed)


def peak_memory_gb() -> float:
    """The most that was allocated since `reset_peak_memory` beyond what was then, in GB (10^9
    bytes), on the device computed on. What an allocator keeps for later is not in it, nor, on a
    CPU, Python's own objects, for which it asks the system itself.
    """
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() - _sampler.start) / 1e9
    return (_sampler.peak - _sampler.start) / 1e9


def reset_peak_memory() -> None:
    """Begin a new peak, once the process has given back what it keeps of freed memory."""
    gc.collect()  # a model in circles, let go later, would hide as much of the new peak
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        _sampler.start = torch.cuda.memory_allocated()
        return
    _sampler.reset()


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h: `uordblks` bytes on its heaps, `hblkhd` mapped."""

    _names_ = (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )  # fmt: skip
    _fields_ = [(name, ctypes.c_size_t) for name in _names_]


def _allocated() -> int:
    """Bytes that this process has of malloc; what is resident where malloc is not asked so."""
    mallinfo = getattr(_glibc(), "mallinfo2", None)  # from 2.33 on
    if mallinfo is None:
        return psutil.Process().memory_info().rss
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


class _MemorySampler:
    """Peak of `_allocated`, sampled: no system keeps one."""

    interval = 0.05  # seconds

    def __init__(self) -> None:
        self.start = self.peak = 0
        self._lock = threading.Lock()  # else a look from before a reset could be noted after it
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        glibc = _glibc()
        with self._lock:
            if glibc is not None:
                glibc.malloc_trim(0)
            self.start = self.peak = _allocated()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while True:
            with self._lock:
                self.peak = max(self.peak, _allocated())
            time.sleep(self.interval)


_sampler = _MemorySampler()

T = typing.TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None, done: int = 0
             ) -> Iterator[T]:  # fmt: skip
    """Iterate with a bar and the time left: on a terminal or in a live notebook, not in batch."""
    from tqdm.auto import tqdm

    in_notebook = "ipykernel" in sys.modules
    seen = processes.first() and not os.environ.get("RLHF_BATCH")
    batch = not seen or not (in_notebook or sys.stderr.isatty())
    return iter(tqdm(items, desc=description, total=total, initial=done, disable=batch))


def computed_by() -> dict[str, str]:
    """What decides how numbers round: kind of device, torch and transformers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def environment() -> dict:
    """What a result was computed with, as JSON values; names no path and no host."""
    versions = {}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "bf16_hardware": choose_precision("auto") == "bf16",
        "packages": versions,
    }


def _cpu_name() -> str:
    """The processor, and the widest of what it multiplies with: speeds hang on both."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
            name = " ".join(next(names, "").split())
    except OSError:  # no Linux
        name = platform.processor()
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    widest = next((word for flag, word in units.items() if flag in _cpu_flags()), "")
    return ", ".join(filter(None, (name, widest))) or platform.machine()


_seconds: dict[str, float] = defaultdict(float)
_amounts: Counter[str] = Counter()
_open: list[str] = []
MEASURING = "measuring"  # the phase of what a method looks at and does not learn from
_since = 0.0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time within, or within the function it decorates, under `name`.

    What a phase inside another takes is counted there alone, so phases add up. But what is done to
    measure has no phases of its own.
    """
    _book()
    _open.append(MEASURING if MEASURING in _open else name)
    try:
        yield
    finally:
        _book()
        _open.pop()


def phase_seconds() -> dict[str, float]:
    """Seconds by phase since the process began."""
    return dict(_seconds)


def count(**amounts: float) -> None:
    """Add to what has been spent, unless it is spent on measuring."""
    if MEASURING not in _open:
        _amounts.update(amounts)


def counted() -> dict[str, float]:
    """What has been spent since the process began: `flops`, and tokens `generated`."""
    return dict(_amounts)


def _book() -> None:
    """Credit the time since the last call to the phase that was going on, if any."""
    global _since
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was asked of it may not have been done yet
    now = time.perf_counter()
    if _open:
        _seconds[_open[-1]] += now - _since
    _since = now


TIMEOUT = 5.0  # seconds


def unreachable() -> str | None:
    """Why the hub cannot be asked, in words; None when it answers."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of whichever HTTP package huggingface_hub came with
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
    return None


def shipped(folder: str) -> Path:
    """A folder that comes with the library: in a package that was installed, else in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "bundled" / Path(folder).name
    return inside if inside.is_dir() else package.parent / folder


def bundled_folder() -> Path:
    """The folder `data/`. Raises FileNotFoundError where the bundled world is not in it."""
    folder = shipped("data")
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(
            f"the bundled world is not in {folder}: install the package anew, or build the world "
            "in a checkout of the repository with `python -m tools.build_world`"
        )
    return folder
