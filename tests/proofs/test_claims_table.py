"""The proofs hold, what they stand on is right, and the command shows them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_lib.__main__ import main
from rlhf_lib.proofs import claims, errors, parity
from rlhf_lib.proofs.claims import Proof
from rlhf_lib.proofs.enumeration import TinyPolicy
from rlhf_lib.proofs.kl import kl_of_best


@pytest.fixture(scope="module")
def everything() -> list[Proof]:
    return parity.all_proofs()


@pytest.mark.parametrize("prove", parity.PROOFS, ids=lambda prove: prove.__name__)
def test_every_claim_holds(prove: Callable[[], list[Proof]]) -> None:
    rows = prove()
    assert rows
    assert [row for row in rows if not row.holds] == []
    # what is called biased is so far beyond rounding: in degrees, or in nats of a KL of about one
    assert [row for row in rows if row.verdict == "measured" and row.error < 0.1] == []


def test_all_proofs_are_there_and_always_the_same(everything: list[Proof]) -> None:
    assert everything == [proof for prove in parity.PROOFS for proof in prove()]
    assert Counter(proof.verdict for proof in everything) == {"holds": 32, "measured": 11}
    assert len({proof.claim for proof in everything}) == 43, "no claim twice"
    assert {proof.group for proof in everything} == {"enumeration"}
    assert all(proof.source for proof in everything)


# --------------------------------------------------------------------- what the proofs stand on


def test_the_kl_of_the_best_of_three_is_that_of_all_triples() -> None:
    policy = TinyPolicy(seed=0)
    probabilities = policy.probabilities().tolist()  # the reward of a response is its number
    best = [0.0] * len(probabilities)
    for triple in itertools.product(range(len(probabilities)), repeat=3):
        best[max(triple)] += math.prod(probabilities[i] for i in triple)
    expected = sum(b * math.log(b / p) for b, p in zip(best, probabilities, strict=True))
    measured = kl_of_best(policy.probabilities().detach(), 3)
    assert measured == pytest.approx(expected, rel=1e-10)


MADE_UP = Proof("a made-up claim", 1.5, 1.0, 0.5, 1.0, "somewhere", group="parity")


def test_the_table_is_for_people() -> None:
    found = MADE_UP._replace(error=2.0, unit="standard errors")
    shown = MADE_UP._replace(tolerance=math.inf, unit="nats")
    rows = claims.table([MADE_UP, found, shown]).to_dict("records")
    first = {
        "group": "parity",
        "claim": "a made-up claim",
        "measured": "1.5",
        "expected": "1",
        "error": "0.5",
        "tolerance": "1",
        "verdict": "holds",
        "source": "somewhere",
    }
    assert rows == [
        first,
        first | {"error": "2 standard errors", "verdict": "DOES NOT HOLD"},
        first | {"error": "0.5 nats", "tolerance": "–", "verdict": "measured"},
    ]


# -------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """`command(rows, ...)`: run it on these; `of_trl`: the rows of TRL, None without it."""

    def call(rows: list[Proof], *arguments: str, of_trl: list[Proof] | None) -> SimpleNamespace:
        find = importlib.util.find_spec
        trl = None if of_trl is None else object()
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: trl if name == "trl" else find(name, *a)
        )
        monkeypatch.setattr(parity, "parity_table", lambda: of_trl)
        monkeypatch.setattr(parity, "all_proofs", lambda: list(rows))
        monkeypatch.setattr(errors, "error_rates", lambda: [])
        monkeypatch.setattr(sys, "argv", ["rlhf_lib", "proofs", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return SimpleNamespace(code=end.value.code or 0, out=capsys.readouterr().out)

    return call


def test_the_command_prints_the_table(command: Callable, everything: list[Proof]) -> None:
    result = command(everything, of_trl=None)
    assert result.code == 0
    _, *lines, empty, counts, trl = result.out.splitlines()
    for line, proof in zip(lines, everything, strict=True):
        assert line.split()[0] == "enumeration"
        assert f" {proof.claim} " in line
        assert line.endswith(proof.verdict)
    assert empty == ""
    assert counts == "32 claims hold, 0 do not; 11 figures are measured and not judged"
    assert trl == parity.NO_TRL


def test_the_command_appends_parity_where_trl_is_installed(command: Callable) -> None:
    result = command([], of_trl=[MADE_UP])
    assert result.code == 0
    row = " ".join(result.out.splitlines()[1].split())
    assert row == "parity a made-up claim 1.5 1 0.5 1 holds"
    assert "TRL is not installed" not in result.out


@pytest.mark.parametrize("where", ["enumeration", "parity"])
def test_the_command_fails_if_a_claim_does_not_hold(command: Callable, where: str) -> None:
    wrong, figure = MADE_UP._replace(error=2.0), MADE_UP._replace(tolerance=math.inf)
    rows = {"enumeration": [MADE_UP, figure], "parity": [MADE_UP]}
    rows[where] = [*rows[where], wrong]
    result = command(rows["enumeration"], of_trl=rows["parity"])
    assert result.code == 1
    last = "2 claims hold, 1 do not; 1 figures are measured and not judged"
    assert result.out.splitlines()[-1] == last


def test_the_command_writes_json_that_every_reader_can_read(
    command: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "proofs.json"
    figure = MADE_UP._replace(tolerance=math.inf)
    assert command([MADE_UP, figure], "--json", str(path), of_trl=None).code == 0
    first, second = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert first == MADE_UP._asdict() | {"verdict": "holds"}
    assert second == first | {"tolerance": None, "verdict": "measured"}
    assert list(path.parent.iterdir()) == [path], "no half-written file stays"
