"""An outside opinion, asked on a server of our own: both orders, cache, cost and errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf_lib.data.encoding import Pair
from rlhf_lib.data.pairs import load_data
from rlhf_lib.measure import endpoint
from rlhf_lib.measure.endpoint import EndpointError, ask, points, win_rates
from rlhf_lib.models.load import load_tokenizer
from rlhf_lib.profiles import PROFILES, load_profile
from rlhf_lib.settings import DataConfig, EndpointConfig, SettingsError
from rlhf_lib.world.rewards import gold_reward


@dataclass
class Server:
    """A stand-in for the endpoint; `answer` makes its reply from what was asked."""

    url: str = ""
    asked: list[tuple[str, str, dict]] = field(default_factory=list)  # path, authorization, body
    mind: Any = None
    status: int = 200


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((self.path, self.headers["Authorization"], body))
            content = json.dumps(state.mind(body["messages"][0]["content"])).encode()
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing into the tests' output."""

    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def says(word: str) -> dict:
    usage = {"prompt_tokens": 100, "completion_tokens": 2}
    return {"choices": [{"message": {"content": word}}], "usage": usage}


def prefers_good(question: str) -> dict:
    """One that reads: "good" beats anything else."""
    first, second = question.split("[Reply A]")[1].split("[Reply B]")
    a, b = "good" in first, "good" in second
    return says("tie" if a == b else "A" if a else "**B**.")


def config(server: Server, **changes: Any) -> EndpointConfig:
    settings = {"prompts": 3, "dollars_per_million_input": 10.0, "dollars_per_million_output": 1e2}
    return EndpointConfig(url=server.url, model="judge-1", **(settings | changes))


def rows(*replies: str) -> list[dict]:
    return [{"prompt": f"Human: {i}", "response": reply} for i, reply in enumerate(replies)]


STUDY = {"sft": rows("bad", "good", "poor", "bad"), "ppo": rows("good", "good too", "bad", "good")}


def test_every_pair_is_asked_in_both_orders(server: Server, tmp_path: Path) -> None:
    server.mind = prefers_good
    asked = win_rates(config(server), STUDY, tmp_path)
    record = asked["policies"]["ppo"]
    assert record["win_rate_vs_sft"]["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3), "three prompts"
    assert record["same_in_both_orders"] == 1.0
    assert (record["unclear"], asked["model"]) == (0, "judge-1")
    assert asked["policies"].keys() == {"ppo"}
    assert len(server.asked) == 6
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer a secret")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert "Human: 0" in body["messages"][0]["content"]


def test_one_that_likes_the_first_place_sees_ties(server: Server, tmp_path: Path) -> None:
    server.mind = lambda _: says("A")
    record = win_rates(config(server), STUDY, tmp_path)["policies"]["ppo"]
    assert record["win_rate_vs_sft"]["mean"] == 0.5
    assert record["same_in_both_orders"] == 0.0


def test_what_was_asked_is_not_asked_again_and_the_cost_says_so(
    server: Server, tmp_path: Path
) -> None:
    server.mind = prefers_good
    first = win_rates(config(server), STUDY, tmp_path)
    # six requests of 100 and 2 tokens, at 10 and 100 dollars a million
    cost = {"requests": 6, "input_tokens": 600, "output_tokens": 12}
    assert first["cost"] == first["cost_now"] == cost | {"dollars": pytest.approx(0.0072)}
    server.mind = lambda _: pytest.fail("asked again")
    again = win_rates(config(server), STUDY, tmp_path)
    assert again["policies"] == first["policies"]
    assert again["cost"] == first["cost"]
    assert again["cost_now"]["requests"] == again["cost_now"]["dollars"] == 0
    assert len(server.asked) == 6
    assert "secret" not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_another_model_is_another_question(server: Server, tmp_path: Path) -> None:
    server.mind = prefers_good
    for model in ("judge-1", "judge-2", "judge-2"):
        ask(EndpointConfig(url=server.url, model=model), "p", "good", "bad", tmp_path)
    assert len(server.asked) == 2


def test_an_answer_that_names_no_side_is_counted_and_left_out(
    server: Server, tmp_path: Path
) -> None:
    server.mind = lambda question: says("I cannot" if "Human: 1" in question else "B")
    record = win_rates(config(server), STUDY, tmp_path)["policies"]["ppo"]
    assert (record["unclear"], record["win_rate_vs_sft"]["units"]) == (1, 2)
    server.mind = lambda _: says("")
    silent = win_rates(config(server, prompts=2), STUDY, tmp_path / "other")
    assert silent["policies"]["ppo"] == {"unclear": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1.0),
        (" b.", 0.0),
        ("**Tie**", 0.5),
        ("(A) is better", 1.0),
        ("Both", None),
        ("", None),
        ("Neither A nor B", None),
        ("A tie.", 0.5),
        ("A or B", None),
        ("A is worse than B. B", None),
        ("a good question: B", 0.0),
        ("B is a better reply", 0.0),
        ("Reply A.", 1.0),
    ],
)
def test_points_are_of_the_one_side_that_is_named(text: str, value: float | None) -> None:
    assert points(text) == value


def test_without_a_key_nothing_is_sent(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SettingsError, match="OPENAI_API_KEY"):
        ask(config(server), "p", "a", "b", tmp_path)
    assert not server.asked


def test_errors_name_the_endpoint_and_nothing_is_cached(server: Server, tmp_path: Path) -> None:
    server.mind, server.status = lambda _: {"error": "too many requests"}, 429
    with pytest.raises(EndpointError, match=r"chat/completions answered 429: .*too many requests"):
        ask(config(server), "p", "a", "b", tmp_path)
    server.status = 200
    for url in ("http://127.0.0.1:1/v1", "foo", "http://[::1/v1", "http://127.0.0.1/a b"):
        with pytest.raises(EndpointError, match="gave no answer"):
            ask(EndpointConfig(url=url), "p", "a", "b", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"choices": []},
        {"choices": {}},
        {"choices": [{"text": "A"}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": ["A"]}}]},
        {"choices": [{"message": {"content": 1}}]},
        {**says("A"), "usage": [1]},
        {**says("A"), "usage": {"prompt_tokens": "many"}},
        [1],
        "hi",
        None,
    ],
)
def test_an_answer_of_another_shape_is_said_and_not_kept(
    body: Any, server: Server, tmp_path: Path
) -> None:
    server.mind = lambda _: body
    with pytest.raises(EndpointError, match="answered in another shape"):
        ask(config(server), "p", "a", "b", tmp_path)
    server.mind = lambda _: says("B")
    assert ask(config(server), "p", "a", "b", tmp_path).points == 0.0, "asked again"


def test_who_says_nothing_names_no_side(server: Server, tmp_path: Path) -> None:
    refuses = {"choices": [{"message": {"refusal": "no"}}], "usage": {"prompt_tokens": None}}
    server.mind = lambda _: refuses
    assert ask(config(server), "p", "a", "b", tmp_path) == (None, 0, 0, False)


def test_it_is_off_by_default() -> None:
    assert all(not load_profile(name).endpoint.url for name in PROFILES)
    assert endpoint.KEY not in json.dumps(vars(EndpointConfig()))


# --------------------------------------------------------------------------- a judge judged


def labelled(count: int = 200) -> list[Pair]:
    """Pairs whose chosen reply is "good", and the longer one in half of them."""
    pairs = []
    for i in range(count):
        good, bad = f"good {i}" + " more" * (i % 2), f"bad {i}" + " more" * (1 - i % 2)
        pairs.append(Pair(str(i), f"Human: {i}", good, bad, [], [], []))
    return pairs


def biased(share: float, chooses: Callable[[str, str], str]) -> Callable[[str], dict]:
    """One that knows what is good, but in a share of the questions `chooses` by the replies."""

    def mind(question: str) -> dict:
        first, second = (part.strip() for part in question.split("[Reply A]")[1].split("[Reply B]"))
        second = second.partition("\n\nAnswer")[0]
        number = int(question.split("Human: ")[1].split()[0])
        if (number * 37 % 100) / 100 < share:
            return says(chooses(first, second))
        return says("A" if "good" in first else "B")

    return mind


def planted(server: Server, tmp_path: Path, mind: Callable[[str], dict]) -> dict:
    server.mind = mind
    return endpoint.trust(config(server, pairs=200), labelled(), None, tmp_path)


def test_a_fair_judge_shows_no_bias(server: Server, tmp_path: Path) -> None:
    found = planted(server, tmp_path, biased(0.0, lambda a, b: "A"))
    assert found["labels"]["mean"] == found["same_in_both_orders"]["mean"] == 1.0
    assert found["labels"]["low"] < 1.0
    assert found["first_place"]["mean"] == found["longer"]["mean"] == 0.0
    assert (found["pairs"], found["unclear"], found["cost"]["requests"]) == (200, 0, 400)
    assert "gold" not in found


def test_a_planted_liking_of_the_first_place_is_found(server: Server, tmp_path: Path) -> None:
    found = planted(server, tmp_path, biased(0.3, lambda a, b: "A"))
    assert found["first_place"]["low"] < 0.15 < found["first_place"]["high"]
    assert found["first_place"]["low"] > 0.05
    assert found["same_in_both_orders"]["low"] < 0.7 < found["same_in_both_orders"]["high"]
    assert found["longer"]["low"] < 0 < found["longer"]["high"]
    assert found["labels"]["low"] < 0.85 < found["labels"]["high"]


def test_a_planted_liking_of_length_is_found(server: Server, tmp_path: Path) -> None:
    longer = biased(0.4, lambda a, b: "A" if len(a) > len(b) else "B")
    found = planted(server, tmp_path, longer)
    # in half of the pairs the longer reply is the good one, whatever it likes
    assert found["longer"]["low"] < 0.2 < found["longer"]["high"]
    assert found["longer"]["low"] > 0.1
    assert found["first_place"]["mean"] == 0.0
    assert found["labels"]["low"] < 0.8 < found["labels"]["high"]


def test_a_judge_that_says_nothing_has_no_numbers(server: Server, tmp_path: Path) -> None:
    found = planted(server, tmp_path, lambda question: says("I cannot say"))
    assert (found["pairs"], found["unclear"]) == (0, 200)
    assert "labels" not in found
    with pytest.raises(SettingsError, match=r"endpoint\.url"):
        endpoint.trust(EndpointConfig(), labelled(), None, tmp_path)


def test_gold_decides_where_it_is_known(server: Server, tmp_path: Path) -> None:
    """Of the bundled world's pairs: one that follows the true reward agrees with it, always."""
    data = load_data(DataConfig(train_pairs=8, validation_pairs=1, test_pairs=60,
                                demonstrations=2, rl_prompts=2, evaluation_prompts=2),
                     load_tokenizer("tiny"))  # fmt: skip
    pairs = list(data.pairs["test"])
    worth = {
        (p.prompt_text, text): gold_reward(p.prompt_text, text).total
        for p in pairs
        for text in (p.chosen_text, p.rejected_text)
    }

    def mind(question: str) -> dict:
        asked, said = question.split("[Conversation]")[1].split("\n\n[Reply A]")
        first, second = said.split("\n\n[Reply B]")
        a, b = worth[asked, first], worth[asked, second.partition("\n\nAnswer")[0]]
        return says("tie" if a == b else "A" if a > b else "B")

    server.mind = mind
    found = endpoint.trust(config(server, pairs=60), pairs, data.truth, tmp_path)
    assert found["gold"]["mean"] == 1.0
    assert found["longer"]["mean"] == 0.0, "it likes length no more than is right"
    assert found["labels"]["mean"] < 1.0, "some labels are against the true reward"
