"""Files of rows: JSON, lines, compressed, tables. What is broken is named, and no more than it is lost."""

import builtins
import gzip
import json
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.tiny import picture
from tokencurric.data import MARK, ConversationDataset, read_conversations
from tokencurric.data.files import raw_rows
from tokencurric.errors import DataError, MissingDependencyError

WORDS = [{"from": "human", "value": "Hi\u2028"}, {"from": "gpt", "value": "Hello"}]
ROWS = [{"id": f"r{number}", "conversations": WORDS} for number in range(3)]


def content(kind: str) -> bytes:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    text = json.dumps(ROWS, indent=1) if kind.startswith(".json.") or kind == ".json" else lines
    plain = text.encode("utf-8-sig")
    return gzip.compress(plain) if kind.endswith(".gz") else plain


KINDS = [".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".JSONL", ".v2.jsonl.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"talk{kind}"
    path.write_bytes(content(kind.lower().removeprefix(".v2")))
    assert list(raw_rows(path)) == ROWS
    assert [row.id for row in read_conversations(path).rows] == ["r0", "r1", "r2"]


@pytest.mark.parametrize("kind", [".json", ".json.gz", ".jsonl.gz"])
def test_a_file_that_is_cut_short_is_named(tmp_path, kind):
    path = tmp_path / f"talk{kind}"
    whole = content(kind)
    path.write_bytes(whole[: len(whole) - 12])
    with pytest.raises(DataError, match=rf"a readable JSON file; got path='{path}'"):
        read_conversations(path, on_error="skip")


def test_a_file_that_is_not_compressed_is_named(tmp_path):
    path = tmp_path / "talk.jsonl.gz"
    path.write_bytes(content(".jsonl"))
    with pytest.raises(DataError, match="Not a gzipped file"):
        read_conversations(path)


@pytest.mark.parametrize("line", [b"{broken", b'{"id": "\xff"}', b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"])
def test_a_broken_line_costs_one_row(tmp_path, line):
    path = tmp_path / "talk.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\n".join([good, line, b"", good]))
    with pytest.raises(DataError, match=r"one JSON object a line; got broken JSON .* in row 1 "):
        read_conversations(path)
    file = read_conversations(path, on_error="skip")
    assert [row.index for row in file.rows] == [0, 2]
    assert [problem.index for problem in file.skipped] == [1]


def test_lines_under_the_name_of_a_list_are_explained(tmp_path):
    path = tmp_path / "talk.json"
    path.write_bytes(content(".jsonl").removeprefix(b"\xef\xbb\xbf"))
    with pytest.raises(DataError, match=r"Extra data.*name it \.jsonl"):
        read_conversations(path)


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=3), max_size=5))
def test_lines_and_lists_hold_the_same(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    listed, lines = folder / "rows.json", folder / "rows.jsonl.gz"
    listed.write_text(json.dumps(rows))
    lines.write_bytes(gzip.compress("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()))
    assert list(raw_rows(listed)) == list(raw_rows(lines)) == rows


def test_tables_need_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "talk.parquet"
    path.write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="needs pyarrow, which is not installed"):
        read_conversations(path)


def test_tables_are_read_batch_by_batch(tmp_path, monkeypatch):
    """Against a stand-in for pyarrow, which is too large to be installed for tests."""

    class ArrowError(Exception):
        pass

    class Batch:
        def __init__(self, rows):
            self.rows = rows

        def to_pylist(self):
            return self.rows

    class ParquetFile:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def iter_batches(self, batch_size):
            if "broken" in self.path.name:
                raise ArrowError("no footer")
            yield Batch(ROWS[:2])
            yield Batch(ROWS[2:])

    fake = ModuleType("pyarrow")
    fake.ArrowException, fake.parquet = ArrowError, ModuleType("pyarrow.parquet")
    fake.parquet.ParquetFile = ParquetFile
    monkeypatch.setitem(sys.modules, "pyarrow", fake)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake.parquet)
    assert [row.id for row in read_conversations(tmp_path / "talk.parquet").rows] == ["r0", "r1", "r2"]
    with pytest.raises(DataError, match=r"broken\.parquet' cannot be read: no footer"):
        read_conversations(tmp_path / "broken.parquet")


def test_real_tables(tmp_path):
    """Rows as `datasets` writes them, with the images inside, and nulls where a part has no such field."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture(40).save(tmp_path / "b.png")
    ask = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}
    tell = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    rows = [
        {"images": [{"bytes": (tmp_path / "b.png").read_bytes(), "path": None}], "messages": [ask, tell], "score": 3},
        {"images": [{"bytes": None, "path": "b.png"}], "messages": [ask, tell], "score": None},
    ]
    path = tmp_path / "talk.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    file = read_conversations(path, images=tmp_path)
    assert file.unread == {"score": 1}
    data = ConversationDataset(file)
    assert data[0].turns[0].text == f"{MARK}What?"
    assert data[0].images[0].getpixel((0, 0)) == data[1].images[0].getpixel((0, 0)) == picture(40).getpixel((0, 0))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="the Parquet file"):
        read_conversations(path)
