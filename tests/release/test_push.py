"""Models on their way out: a folder or a hub gets what loads again, with a card that is true."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from huggingface_hub import hf_api
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lib import catalogue
from rlhf_lib.proofs import parity_trl
from rlhf_lib.release import card
from rlhf_lib.release import push as release
from rlhf_lib.settings import SettingsError, UserError
from rlhf_lib.study.stages import StudyError
from tests.conftest import train_stage

AUDIT = {
    "source": "path:/home/somebody/pairs.jsonl",
    "template": "HH format",
    "files": [{"name": "pairs.jsonl", "rows": 9, "sha256": "ab" * 32}],
    "splits": {"train": {"pairs": 8, "conversations": 7, "chosen_longer_share": 0.5}},
    "demonstrations": 6,
    "dropped": {"empty reply": {"count": 2, "first": ["pairs.jsonl, row 3"]}},
    "notes": ["7% of the tokens are unknown to this model"],
}


@pytest.fixture
def study(finished: Any, make_run: Callable, tmp_path: Path) -> Any:
    """A study whose SFT and reward model are trained, and nothing else."""
    run = make_run(tmp_path)
    missing = run.stage("ppo", run.profile.ppo, {})
    return SimpleNamespace(
        run=run,
        data=SimpleNamespace(audit=AUDIT),
        planned=lambda: {**vars(finished), "ppo": missing},
    )


@dataclass
class Hub:
    """A stand-in for the hub: what it was asked, and the files that it got."""

    url: str = ""
    asked: list[tuple[str, dict]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    refuses: int = 0


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    def answer(path: str, body: bytes) -> dict:
        if path.endswith("/repos/create"):
            state.asked.append((path, json.loads(body)))
            return {"url": f"{state.url}/me/my-ppo"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file["path"], **told} for file in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    state.files[value["path"]] = base64.b64decode(value["content"])
            return {"commitUrl": f"{state.url}/me/my-ppo/commit/0", "commitOid": "0", "oid": "0"}
        return {"warnings": [], "errors": []}  # of the card's head

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            content = json.dumps(answer(self.path.partition("?")[0], body)).encode()
            self.send_response(state.refuses or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing into the tests' output."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hf_api.constants, "HF_HUB_OFFLINE", False)  # this hub is ours
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_folder_gets_what_loads_again(study: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "sft"
    assert release.push(study, "sft", str(folder)) == str(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    release.push(study, "reward_model", f"{folder}-reward")
    AutoModelForSequenceClassification.from_pretrained(f"{folder}-reward", num_labels=1)
    with pytest.raises(UserError, match="is there already"):
        release.push(study, "sft", str(folder))


def test_what_is_not_there_is_said(study: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage ppo \(seed 3\) has not been run"):
        release.push(study, "ppo", str(tmp_path / "out"))
    with pytest.raises(SettingsError, match="no stage 'ppp', only sft, reward_model, ppo"):
        release.push(study, "ppp", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("public", [False, True])
def test_the_hub_gets_model_and_card(study: Any, hub: Hub, public: bool) -> None:
    where = release.push(study, "sft", "me/my-ppo", public)
    assert where == f"{hub.url}/me/my-ppo"
    ((_, made),) = hub.asked
    assert made["name"] == "my-ppo"
    assert made["organization"] == "me"
    assert made["visibility"] == ("public" if public else "private")
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(hub.files)
    assert b"# SFT, seed 3" in hub.files["README.md"]
    model = study.planned()["sft"].model_path / "model.safetensors"
    assert hub.files["model.safetensors"] == model.read_bytes()


def test_a_hub_that_refuses_is_one_sentence(
    study: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = 403
    with pytest.raises(UserError, match=r"the hub did not take me/my-ppo: .*403"):
        release.push(study, "sft", "me/my-ppo")
    with pytest.raises(UserError, match="the hub did not take a b"):
        release.push(study, "sft", "a b")
    monkeypatch.setattr(release, "get_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN"):
        release.push(study, "sft", "me/my-ppo")
    assert not hub.files


# ------------------------------------------------------------------------------------ the card


def written(stage: Any, name: str, results: Any = None, base: str = "tiny") -> str:
    return card.text(catalogue.record(name), stage, base, AUDIT, results, adapter=False)


def test_the_head_is_what_the_hub_reads(finished: Any) -> None:
    def head(text: str) -> dict:
        return yaml.safe_load(text.split("---")[1])

    assert head(written(finished.sft, "sft")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "rlhf_lib"],
    }
    of_hub = {**AUDIT, "source": "hub:Anthropic/hh-rlhf:helpful-base"}
    text = card.text(
        catalogue.record("reward_model"), finished.reward_model, "org/base", of_hub, None, True
    )
    assert head(text)["datasets"] == ["Anthropic/hh-rlhf"]
    assert head(text)["base_model"] == "org/base"
    assert head(text)["pipeline_tag"] == "text-classification"
    assert "adapter/" in text


CHATML = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
@pytest.mark.parametrize("template", ["HH format", "the model's chat template"])
def test_the_code_on_a_card_runs(
    name: str, template: str, study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(release.push(study, name, str(tmp_path / "out")))
    if template != "HH format":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder)
    audit = {**AUDIT, "template": template}
    stage = study.planned()[name]
    text = card.text(catalogue.record(name), stage, "tiny", audit, None, adapter=False)
    code = text.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("OWNER/NAME", str(folder)), {})
    assert capsys.readouterr().out.strip()


def test_a_card_says_data_settings_cost_and_limits(finished: Any) -> None:
    text = written(finished.sft, "sft")
    assert "`path:pairs.jsonl`" in text
    assert "somebody" not in text, "a folder is nobody's business"
    assert f"| `learning_rate` | {finished.sft.config['settings']['learning_rate']} |" in text
    assert "abababababababab…" in text
    assert "2 rows were left out." in text
    assert "7% of the tokens are unknown to this model." in text
    assert "Not evaluated" in text
    assert card.LIMITS in text
    assert finished.sft.hash[:12] in text


def interval_of(mean: float, low: float, high: float) -> dict:
    return {"mean": mean, "low": low, "high": high, "n": 5, "over": "seeds"}


RESULTS = {
    "seeds": [0, 1, 2, 3, 4],
    "deciding": "gold",
    "policies": {
        "ppo": {
            "gold": interval_of(0.72, 0.6, 0.85),
            "kl": interval_of(0.4, 0.3, 0.5),
            "gold_gain": interval_of(0.2, 0.1, 0.3),
        },
        "sft": {"gold": interval_of(0.52, 0.4, 0.6)},
    },
    "reward_model": {"accuracy": {"reward_model": interval_of(0.7, 0.65, 0.75)}},
}


def test_a_card_says_what_was_measured_with_intervals(finished: Any) -> None:
    text = written(finished.sft, "ppo", RESULTS)
    assert "| true reward | 0.72 [0.60, 0.85] | 0.52 [0.40, 0.60] |" in text
    assert "| KL to SFT | 0.40 [0.30, 0.50] | – |" in text
    assert "Gain over SFT by true reward: 0.20 [0.10, 0.30], higher." in text
    assert "All 5 seeds" in text
    text = written(finished.reward_model, "reward_model", RESULTS)
    assert "70.0% [65.0, 75.0]" in text


def test_results_of_another_training_are_not_this_models(
    study: Any, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "evaluation_folder", lambda profile, root: Path())
    for known, expected in ((finished.sft.hash, True), ("another", False)):
        results = {"stages": {"3": {"sft": known}}}
        monkeypatch.setattr(release, "load_results", lambda folder, found=results: found)
        assert (release._results(study, finished.sft) is not None) == expected

    def none(profile: Any, root: Any) -> Path:
        raise StudyError("no evaluation")

    monkeypatch.setattr(release, "evaluation_folder", none)
    assert release._results(study, finished.sft) is None


def test_adapters_go_along(study: Any, make_run: Callable, tiny_data: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = make_run(tmp_path, "model.lora_rank=2", "sft.learning_rate=1e-2")
    stage = train_stage(run, "sft", tiny_data)
    study.planned = lambda: {"sft": stage}
    release.push(study, "sft", str(tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(run.profile.model.name)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-3)
    assert "adapter/" in (tmp_path / "out" / "README.md").read_text()


def test_trl_goes_on_from_a_policy(finished: Any, tmp_path: Path) -> None:
    """A folder's name is all that its trainer is given; one step changes the weights."""
    pytest.importorskip("trl", reason="TRL is an optional dependency: pip install -e '.[parity]'")
    folder = finished.sft.model_path
    rows = [{"prompt": f"a b {w}", "chosen": "c d", "rejected": "d c"} for w in "efgh"]
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    with parity_trl.undisturbed():
        settings = parity_trl.trl_class("DPOConfig")(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[],
            use_cpu=True, bf16=False, learning_rate=1e-2, save_strategy="no",
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = parity_trl.trl_class("DPOTrainer")(
            model=str(folder), args=settings, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
        trainer.train()
        after = trainer.model.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
