"""Command line: python -m benchmarks run | growth | gpu | stream | predict."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.job import STAGES

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speed and memory, measured.")
RESULTS = Path(__file__).resolve().parent / "results"
Out = Annotated[Path, typer.Option(help="the JSON file to write")]


@app.command()
def run(
    model: Annotated[str, typer.Option(help="name, folder or hub id; `random`: GPT-2's size")] = "",
    data: Annotated[str, typer.Option(help="a source, like path:FILE; empty: drawn rows")] = "",
    only: Annotated[str, typer.Option(help="stages, separated by commas")] = ",".join(STAGES),
    rounds: Annotated[int, typer.Option(help="measured rounds of each process", min=1)] = 2,
    processes: Annotated[int, typer.Option(help="fresh processes of each side", min=2)] = 3,
    threads: Annotated[int, typer.Option(help="of each side; 0: one for each core", min=0)] = 0,
    pairs: Annotated[int, typer.Option(help="pairs in a round", min=8)] = 32,
    samples: Annotated[int, typer.Option(help="samples in a round, by 16", min=16)] = 32,
    peer_python: Annotated[str, typer.Option(help="an interpreter that has TRL")] = "",
    out: Out = Path("runs/benchmarks/latest.json"),
) -> None:
    """Compare this library with its peers; prints a table and writes JSON."""
    from benchmarks import predict as predicted
    from benchmarks.compare import benchmark
    from benchmarks.prepare import default_model, make_job
    from benchmarks.text import benchmark_summary
    from rlhf_lib.runtime import set_up_process

    stages = _stages(only)
    peer = _peer(peer_python)
    set_up_process(threads)
    with tempfile.TemporaryDirectory() as folder:
        print("preparing rows and models ...", flush=True)
        job = make_job(Path(folder), model or default_model(), data, pairs)
        job = replace(job, samples=samples)
        named = {
            "model": Path(model or default_model()).name,
            "data": data.partition(":")[0] or "drawn",
        }

        def keep(results: dict) -> None:
            _write(out, results | named | {"prediction": predicted.predict(results)})

        path = Path(folder) / "job.json"
        benchmark(job, path, stages, rounds, processes, peer, _say, keep)
    print(benchmark_summary(json.loads(out.read_text(encoding="utf-8"))))


def _say(line: str) -> None:
    print(line, flush=True)


def _stages(only: str) -> list[str]:
    wanted = [name.strip().replace("-", "_") for name in only.split(",")]
    if unknown := [name for name in wanted if name not in STAGES]:
        raise typer.BadParameter(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    return wanted


def _peer(python: str) -> str:
    if python:
        return python
    if importlib.util.find_spec("trl") is None:
        raise typer.BadParameter("this interpreter has no trl: use `make bench` or --peer-python")
    return sys.executable


def _write(path: Path, results: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}")


@app.command()
def growth(
    out: Out = RESULTS / "growth.json",
    repeats: Annotated[int, typer.Option(help="the fastest of so many counts", min=1)] = 3,
) -> None:
    """How cost grows with pairs, response length, group size, batch and vocabulary."""
    from benchmarks import growth as measured
    from rlhf_lib.runtime import set_up_process

    set_up_process()
    results = measured.measure(repeats, _say)
    _write(out, results)
    measured.draw(results).savefig(out.with_suffix(".svg"), metadata={"Date": None})


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="the folder to write")] = Path("runs/gpu"),
    minutes: Annotated[float, typer.Option(help="to stop after")] = 10.0,
    only: Annotated[str, typer.Option(help="parts, separated by commas")] = "",
    small: Annotated[bool, typer.Option(help="sizes for a try on a CPU")] = False,
    peer_python: Annotated[str, typer.Option(help="an interpreter that has TRL")] = "",
) -> None:
    """What only a GPU can show: precisions, resuming, memory, decoding, speed beside TRL."""
    from benchmarks import gpu as measured

    parts = [name for name in only.split(",") if name]
    measured.run(out, minutes, small, _say, parts, peer_python or sys.executable)
    print(f"written: {out / 'gpu.json'}")


@app.command()
def stream(
    rows: Annotated[int, typer.Option(help="made-up pairs to read", min=16)] = 160_000,
    out: Out = Path("runs/benchmarks/stream.json"),
) -> None:
    """Memory and speed of loading many rows."""
    from benchmarks import stream as measured

    _write(out, measured.measure(rows, _say))


@app.command()
def predict(
    measured: Annotated[Path, typer.Argument(help="a JSON file of `run`")],
    profile: str = "full",
) -> None:
    """Time of a profile on one device: counted FLOPs over measured rates."""
    from benchmarks import predict as predicted
    from benchmarks.text import prediction_summary

    try:
        rates = predicted.predict(json.loads(measured.read_text(encoding="utf-8")), profile)
    except (OSError, ValueError, KeyError) as error:
        raise typer.BadParameter(f"{measured} is no JSON file that `run` has written") from error
    print(prediction_summary(rates))


if __name__ == "__main__":
    app()
