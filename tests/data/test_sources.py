"""Reading rows: from files, folders, a hub dataset and the bundled world, with errors that help."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlhf_lib.data import sources
from rlhf_lib.data.sources import HH_SUBSETS, DataError, read_source
from rlhf_lib.settings import SettingsError


def pair(question: str) -> dict[str, str]:
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{prompt} Yes.", "rejected": f"{prompt} No."}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_file_formats_give_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [{**pair("A?"), "margin": None}, {**pair("B?"), "margin": 1.5}]
    path = write(tmp_path / name, rows)
    source = read_source(f"path:{path}")
    read = source.splits["train"]
    assert [row.number for row in read] == [1, 2]
    assert [row.values for row in read] == rows
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.files == [{"name": name, "rows": 2, "sha256": digest}]


TABLE = """\ufeffprompt,chosen,rejected,margin
A?,"Yes, ""that""
and this.",No.,1.5
B?,Yes.,,
"""


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.csv.gz", "pairs.tsv"])
def test_a_table_has_a_row_below_each_head(tmp_path: Path, name: str) -> None:
    table = TABLE.replace("Yes, ", "Yes; ").replace(",", "\t") if ".tsv" in name else TABLE
    content = table.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = read_source(f"path:{tmp_path / name}").splits["train"]
    yes = 'Yes; "that"\nand this.' if ".tsv" in name else 'Yes, "that"\nand this.'
    assert [row.values for row in rows] == [
        {"prompt": "A?", "chosen": yes, "rejected": "No.", "margin": "1.5"},
        {"prompt": "B?", "chosen": "Yes."},
    ]
    assert [row.number for row in rows] == [1, 2]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_of_objects(tmp_path: Path, indent: int | None) -> None:
    rows = [pair("A?"), pair("B?")]
    (tmp_path / "pairs.json").write_text(json.dumps(rows, indent=indent))
    read = read_source(f"path:{tmp_path / 'pairs.json'}").splits["train"]
    assert [row.values for row in read] == rows
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_source(f"path:{tmp_path / 'lines.json'}").splits["train"]) == 2


def test_a_gzip_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(gzip.compress(json.dumps(pair("A?")).encode()))
    assert len(read_source(f"path:{path}").splits["train"]) == 1
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(pair("A?")))
    assert len(read_source(f"path:{plain}").splits["train"]) == 1


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
STRANGE = {
    "a.jsonl": (json.dumps(pair("A?")).encode("utf-16"), "UTF-16"),
    "b.jsonl": (json.dumps(pair("A?")).encode("utf-16-le"), "UTF-16"),
    "c.jsonl.gz": (POINTER.encode(), "Git LFS pointer"),
    "d.parquet": (POINTER.encode(), "Git LFS pointer"),
    "e.jsonl": (b"PK\x03\x04" + b"rest" * 9, "zip archive"),
    "f.jsonl": (b"<!DOCTYPE html><html>", "a web page"),
    "g.jsonl": (b"[" * 100_000 + b"\n", "line 1: not JSON"),
    "h.jsonl": (b'[\n  {"chosen": "a"}\n]\n', r"several lines: name it \.json"),
    "i.csv": (b"chosen,rejected\na,b,c\n", "row 1: more cells than"),
    "j.csv": (b'chosen,rejected\n"a,b\n', "as a table: unexpected end"),
    "k.csv": (b"chosen,rejected\n\xff,b\n", "as a table: 'utf-8' codec"),
    "l.json": (b"[1, 2]", "row 1: a JSON int where an object"),
    "m.jsonl": (b"PAR1" + b"rest" * 9, r"is a Parquet file: name it \.parquet"),
    "n.parquet": (b'{"chosen": "a"}\n', "holds JSON, not a table"),
    "o.parquet": (gzip.compress(b"PAR1"), "is packed by gzip: unpack it"),
    "p.jsonl": (b"BZh91AY" + b"rest" * 9, "packed by bzip2"),
    "q.csv": (b'{"chosen": "a"}\n', r"holds JSON, not a table: name it \.jsonl"),
    "r.jsonl": (b"\n\n<!doctype html>", "a web page"),
    "s.jsonl": (b"<?xml version='1.0'?>", "is XML"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_file_is_named_as_what_it_is(tmp_path: Path, name: str) -> None:
    content, message = STRANGE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_source(f"path:{tmp_path / name}")
    assert str(tmp_path / name) in str(error.value)


def test_several_files_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.jsonl", "two.jsonl", "more-test.jsonl"):
        write(tmp_path / name, [pair(name)])
    (tmp_path / "three.csv").write_text("prompt,chosen,rejected\nA?,Yes.,No.\n")
    monkeypatch.chdir(tmp_path)
    source = read_source("path:one.jsonl,three.csv")
    assert [row.file for row in source.splits["train"]] == ["one.jsonl", "three.csv"]
    source = read_source(f"path:{tmp_path}/*.jsonl")
    assert [row.file for row in source.splits["train"]] == ["one.jsonl", "two.jsonl"]
    assert [row.file for row in source.splits["test"]] == ["more-test.jsonl"]
    with pytest.raises(DataError, match=r"no file matches .*\.parquet"):
        read_source("path:*.parquet")
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        read_source("path:one.jsonl,none.jsonl")


def test_a_relative_path_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook of a study computes in another folder than its user stands in."""
    write(tmp_path / "pairs.jsonl", [pair("A?")])
    monkeypatch.setenv("RLHF_FOLDER", str(tmp_path))
    assert len(read_source("path:pairs.jsonl").splits["train"]) == 1


def test_what_is_hidden_is_no_data(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [pair("A?")])
    for name in ("._train.jsonl", ".cache/x.jsonl", "__MACOSX/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(read_source(f"path:{tmp_path}").splits["train"]) == 1


def test_of_a_clone_of_the_hh_repository_the_pairs_count(tmp_path: Path) -> None:
    for subset in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            write(tmp_path / subset / f"{split}.jsonl.gz", [pair(f"{subset} {split}?")])
    (tmp_path / "red-team-attempts").mkdir()
    (tmp_path / "red-team-attempts" / "red_team_attempts.jsonl.gz").write_bytes(
        gzip.compress(b'[\n {"transcript": "hi"}\n]')
    )
    splits = read_source(f"path:{tmp_path}").splits
    assert {s: [row.subset for row in rows] for s, rows in splits.items()} == {
        split: ["harmless-base", "helpful-base"] for split in ("train", "test")
    }


def test_conversational_parquet_keeps_its_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write(tmp_path / "pairs.parquet", [{"chosen": messages, "rejected": messages}])
    assert read_source(f"path:{path}").splits["train"][0].values["chosen"] == messages


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    text = f"\ufeff{json.dumps(pair('A?'))}\r\n\n{json.dumps(pair('B?'))}"
    path.write_bytes(text.encode())
    assert [row.number for row in read_source(f"path:{path}").splits["train"]] == [1, 3]


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    row = pair("A\u2028B\u0085C?")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [r.values for r in read_source(f"path:{path}").splits["train"]] == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"chosen": "a"}\n{"chosen": \n', "line 2: not JSON"),
        (b'{"chosen": "a"}\n{"chosen": "\xff"}\n', "line 2: not JSON"),
        (b'{"chosen": "a"}\n["b"]\n', "line 2: a JSON list where an object"),
    ],
)
def test_bad_json_lines_are_errors_with_their_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_source(f"path:{path}")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.parquet"])
@pytest.mark.parametrize("keep", [0, 20, None])
def test_damaged_files_are_errors(tmp_path: Path, name: str, keep: int | None) -> None:
    content = write(tmp_path / name, [pair("A?")]).read_bytes()
    damaged = b"no such format" if keep is None else content[:keep]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(
        DataError, match=rf"{name}( is empty| is no complete| cannot be read|, line 1: not JSON)"
    ):
        read_source(f"path:{tmp_path / name}")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "harmless-base.jsonl", [pair("A?")])
    write(tmp_path / "other.jsonl", [pair("A?")])
    with pytest.raises(DataError, match=r"does not exist.*data\.source=path.*harmless-base\.jsonl"):
        read_source(f"path:{tmp_path / 'harmles.jsonl'}")
    with pytest.raises(DataError, match="does not exist"):
        read_source(f"path:{tmp_path / 'no' / 'such' / 'folder' / 'pairs.jsonl'}")


def test_files_of_another_kind_are_errors(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("chosen,rejected\n")
    with pytest.raises(DataError, match=r"that end in \.jsonl, \.csv.*\.parquet"):
        read_source(f"path:{tmp_path / 'pairs.txt'}")
    with pytest.raises(DataError, match=r"holds no file that ends in \.jsonl"):
        read_source(f"path:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "nearest"),
    [
        ("bundeld", "'bundled'"),
        ("bundled:kontrol", "'bundled:control'"),
        ("hub:", "'hub:Anthropic/hh-rlhf'"),
        ("hubb:Anthropic/hh-rlhf", "'hub:Anthropic/hh-rlhf'"),
        ("hub:Anthropic/hh-rlhf:harmless", "'harmless-base'"),
    ],
)
def test_unknown_source_names_the_nearest(source: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=f"did you mean {nearest}"):
        read_source(source)


def test_a_path_without_its_prefix_is_understood_in_the_error(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [pair("A?")])
    with pytest.raises(SettingsError, match=f"did you mean 'path:{path}'"):
        read_source(str(path))


def test_folder_uses_the_splits_and_subsets_it_has(tmp_path: Path) -> None:
    write(tmp_path / "harmless-base" / "train.jsonl.gz", [pair("A?"), pair("B?")])
    write(tmp_path / "harmless-base" / "test.jsonl.gz", [pair("C?")])
    write(tmp_path / "extra_valid-00.parquet", [pair("D?")])
    write(tmp_path / "more.jsonl", [pair("E?")])
    (tmp_path / "LICENSE").write_text("MIT")
    splits = read_source(f"path:{tmp_path}").splits
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 3,
        "test": 1,
        "validation": 1,
    }
    assert splits["test"][0].subset == "harmless-base"
    assert splits["test"][0].place == "harmless-base/test.jsonl.gz, row 1"
    assert splits["validation"][0].subset is None


def test_folder_with_a_test_split_only_is_one_pool(tmp_path: Path) -> None:
    write(tmp_path / "harmless-base-test.jsonl", [pair("A?"), pair("B?")])
    assert len(read_source(f"path:{tmp_path}").splits["train"]) == 2


# ----------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder with the layout of Anthropic/hh-rlhf; `datasets` caches beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hh-rlhf"
    for subset in HH_SUBSETS[:2]:
        write(folder / subset / "train.jsonl.gz", [pair(f"{subset} {i}?") for i in range(3)])
        write(folder / subset / "test.jsonl.gz", [pair(f"{subset} test?")])
    write(folder / "red-team-attempts" / "red_team_attempts.jsonl.gz", [{"transcript": "x"}])
    return folder


def test_hub_loads_every_subset_of_pairs(hub_copy: Path) -> None:
    source = read_source(f"hub:{hub_copy}")
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 6, "test": 2}
    assert [row.subset for row in source.splits["test"]] == list(HH_SUBSETS[:2])
    assert source.splits["train"][2].values == pair("harmless-base 2?")
    assert source.splits["train"][2].place == "hh-rlhf harmless-base train, row 3"
    assert [file["rows"] for file in source.files] == [3, 1, 3, 1]


def test_hub_loads_one_subset(hub_copy: Path) -> None:
    source = read_source(f"hub:{hub_copy}:helpful-base")
    assert {row.subset for rows in source.splits.values() for row in rows} == {"helpful-base"}
    with pytest.raises(SettingsError, match="did you mean 'helpful-base'"):
        read_source(f"hub:{hub_copy}:helpful")


def test_hub_dataset_that_is_no_table_is_an_error(hub_copy: Path) -> None:
    (hub_copy / "red-team-attempts" / "red_team_attempts.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"cannot load .*, red-team-attempts: "):
        read_source(f"hub:{hub_copy}:red-team-attempts")


def test_hub_out_of_reach_names_the_ways_offline_and_does_not_wait() -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set") as error:
        read_source("hub:Anthropic/hh-rlhf")
    assert time.monotonic() - start < 15  # with retries 23; the import of `datasets` is in it
    for way in ("path:", "bundled", "HF_HUB_OFFLINE=1"):
        assert way in str(error.value)


def test_unreachable_hub_is_not_asked_again_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its cache is looked into: asking would mean half a minute of retries for each subset."""
    import datasets

    seen = []

    def load_dataset(name: str, data_dir: str | None) -> dict:
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return {"train": [pair("A?")], "test": [pair("B?")]}

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for reason in ("no answer", None):
        monkeypatch.setattr("rlhf_lib.runtime.unreachable", lambda reason=reason: reason)
        read_source("hub:someone/pairs")
    assert seen == [True, False]
    assert datasets.config.HF_HUB_OFFLINE is False


# ------------------------------------------------------------------------------------- bundled


def test_bundled_reads_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "\n\nHuman: A?\n\nAssistant:"
    for split in ("train", "validation", "test"):
        write(tmp_path / f"pairs-{split}.jsonl.gz", [pair(split)])
        write(tmp_path / f"control-{split}.jsonl.gz", [pair("control " + split)])
    for kind in ("train", "validation", "evaluation"):
        write(tmp_path / f"prompts-{kind}.jsonl.gz", [{"prompt": prompt}])
    write(tmp_path / "demonstrations.jsonl.gz", [{"prompt": prompt, "response": " Yes."}])
    monkeypatch.setattr(sources, "bundled_folder", lambda: tmp_path)
    world, control = read_source("bundled"), read_source("bundled:control")
    assert world.splits["test"][0].values == pair("test")
    assert control.splits["test"][0].values == pair("control test")
    assert list(world.demonstrations) == list(control.demonstrations)
    assert world.prompts["evaluation"][0].values == {"prompt": prompt}
    (tmp_path / "prompts-train.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"prompts-train\.jsonl\.gz does not exist"):
        read_source("bundled")
