import json
import os
from pathlib import Path

import datasets
import pytest

from hf_pdprune.data import PYDOC_TOPICS, load_text, public_name


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def no_hub(monkeypatch):
    """The Hub cannot be reached; returns what was asked of it."""
    calls = []

    def load_dataset(path, name=None, *, split):
        calls.append((path, name, split))
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture
def hub(monkeypatch):
    """A Hub with these rows; returns what was asked of it."""

    def install(rows):
        calls = []

        def load_dataset(path, name=None, *, split):
            calls.append((path, name, split))
            return datasets.Dataset.from_list(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


class TestRowFormats:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"text": "a b", "id": 3}, {"text": "a b"}),
            ({"prompt": "Q:", "completion": " A", "more": None}, {"prompt": "Q:", "completion": " A"}),
            (
                {"question": "Q:", "choices": ["x", "y", "z"], "answer": 2, "subject": "s"},
                {"prompt": "Q:", "completion": " z"},
            ),
            ({"question": "1 + 1?", "answer": "It is 2"}, {"prompt": "1 + 1?", "completion": " It is 2"}),
            (
                {
                    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
                    "prompt": "hi",
                },
                {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            ),
            ({"text": "a", "messages": [{"role": "user", "content": "hi"}]}, {"text": "a"}),
            ({"text": "ein \u2028 Zeilentrenner, 日本"}, {"text": "ein \u2028 Zeilentrenner, 日本"}),
        ],
    )
    def test_accepted(self, tmp_path, row, expected):
        dataset = load_text(write_jsonl(tmp_path / "a.jsonl", [row]), "any")
        assert dataset.column_names == list(expected)
        assert dataset[0] == expected

    def test_text_column(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
        assert load_text(path, "train", text_column="body")[0] == {"text": "yes"}
        with pytest.raises(ValueError, match=r"line 1: no column 'content', found: 'text', 'body'"):
            load_text(path, "train", text_column="content")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                {"sentence": "a", "label": 1},
                r"'sentence', 'label'; accepted: 'text'; 'prompt' and 'completion'.*text_column",
            ),
            ({}, "columns not understood: none"),
            ([1, 2], "must be a JSON object, found list"),
            ({"text": ""}, "text is empty"),
            ({"text": " \n"}, "text is empty"),
            ({"text": None}, "text must be a text, found NoneType"),
            ({"text": 3}, "text must be a text, found int"),
            ({"prompt": "", "completion": "a"}, "prompt is empty"),
            ({"prompt": "a", "completion": " "}, "completion is empty"),
            ({"prompt": "a"}, "columns not understood: 'prompt'"),
            ({"question": "a", "choices": ["x", "y"], "answer": 2}, "answer must be an index from 0 to 1, found 2"),
            ({"question": "a", "choices": ["x", "y"], "answer": -1}, "answer must be an index from 0 to 1, found -1"),
            (
                {"question": "a", "choices": ["x", "y"], "answer": "B"},
                "answer must be an index from 0 to 1, found 'B'",
            ),
            ({"question": "a", "choices": ["x", "y"], "answer": True}, "answer must be an index"),
            ({"question": "a", "choices": {"text": ["x"]}, "answer": 0}, "choices must be a list"),
            ({"question": "a", "choices": [], "answer": 0}, "choices must be a list"),
            ({"question": "a", "choices": [""], "answer": 0}, "completion is empty"),
            ({"question": "a", "answer": ""}, "completion is empty"),
            ({"question": "a", "answer": 4}, "answer must be a text, found int"),
            ({"messages": []}, "messages is empty"),
            ({"messages": "hi"}, "messages must be a list of objects"),
            ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be a text, found NoneType"),
        ],
    )
    def test_refused_with_the_line(self, tmp_path, row, message):
        path = write_jsonl(tmp_path / "a.jsonl", [row])
        path_later = tmp_path / "b.jsonl"
        path_later.write_text("\n\n" + Path(path).read_text())
        for file, line in ((path, 1), (path_later, 3)):
            with pytest.raises(ValueError, match=rf"line {line}: .*{message}") as caught:
                load_text(str(file), "train")
            assert "\n" not in str(caught.value)

    def test_half_a_surrogate_pair(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a \\ud83d b"}\n')
        with pytest.raises(ValueError, match="line 1: text holds a character that is not Unicode text"):
            load_text(str(path), "train")

    def test_mixed_rows(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"prompt": "a", "completion": "b"}])
        with pytest.raises(ValueError, match="line 2: gives prompt, completion, but the rows before it give text"):
            load_text(path, "train")


class TestFiles:
    def test_json_lines_and_array_give_the_same(self, tmp_path):
        rows = [{"text": f"number {number}"} for number in range(5)]
        lines = write_jsonl(tmp_path / "a.jsonl", rows)
        lines_in_json = write_jsonl(tmp_path / "b.json", rows)
        array = tmp_path / "c.json"
        array.write_text(json.dumps(rows, indent=2))
        for path in (lines, lines_in_json, array):
            assert load_text(str(path), "train").to_list() == rows

    def test_byte_order_mark_blank_lines_and_line_ends(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
        assert load_text(str(path), "train")["text"][:] == ["a", "b"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b"", "a.jsonl: no rows"),
            ("a.jsonl", b"\n \n", "a.jsonl: no rows"),
            ("a.json", b"[]", "a.json: no rows"),
            ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2: broken JSON"),
            ("a.jsonl", b'{"text": "a"}\nplain\n', "line 2: broken JSON"),
            ("a.json", b'[{"text": "a"},\n {"text": ]', "line 2: broken JSON"),
            ("a.jsonl", b'{"text": "\xff"}', "not UTF-8 text, see byte 10"),
            ("a.txt", b"plain", "only .jsonl and .json files can be read"),
        ],
    )
    def test_broken(self, tmp_path, no_hub, name, content, message):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_text(str(path), "train")
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert no_hub == []

    @pytest.mark.parametrize("name", ["missing.jsonl", "missing/folder/deep", "./missing", "~/no-such-folder/x.json"])
    def test_missing(self, tmp_path, monkeypatch, no_hub, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_text(name, "train")
        assert no_hub == []

    def test_max_rows(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(number)} for number in range(9)])
        assert load_text(path, "train", max_rows=4)["text"][:] == ["0", "1", "2", "3"]
        assert len(load_text(path, "train", max_rows=100)) == 9
        for number in (0, -1):
            with pytest.raises(ValueError, match="max_rows must be at least 1"):
                load_text(path, "train", max_rows=number)


class TestFolder:
    def test_split_decides(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", [{"text": "t"}])
        write_jsonl(tmp_path / "validation.jsonl", [{"text": "v"}])
        assert load_text(str(tmp_path), "train")["text"][:] == ["t"]
        assert load_text(str(tmp_path), "validation")["text"][:] == ["v"]
        with pytest.raises(FileNotFoundError, match=r"no file \*.test.jsonl, found: train.jsonl, validation.jsonl"):
            load_text(str(tmp_path), "test")

    def test_several_files_in_turn(self, tmp_path):
        write_jsonl(tmp_path / "b.train.jsonl", [{"text": f"b{number}"} for number in range(3)])
        write_jsonl(tmp_path / "a.train.jsonl", [{"text": f"a{number}"} for number in range(2)])
        write_jsonl(tmp_path / "a.retrain.jsonl", [{"text": "another split"}])
        assert load_text(str(tmp_path), "train")["text"][:] == ["a0", "b0", "a1", "b1", "b2"]
        assert load_text(str(tmp_path), "train", max_rows=3)["text"][:] == ["a0", "b0", "a1"]
        assert load_text(str(tmp_path), "train", subset="b")["text"][:] == ["b0", "b1", "b2"]
        with pytest.raises(FileNotFoundError, match="no file c.train.jsonl"):
            load_text(str(tmp_path), "train", subset="c")

    def test_no_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="found: no .jsonl file"):
            load_text(str(tmp_path), "train")


class TestSeveralSources:
    def test_rows_in_turn_as_long_as_they_last(self, tmp_path):
        long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": f"p{n}", "completion": "c"} for n in range(10)])
        short = write_jsonl(tmp_path / "short.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(4)])
        both = f"{long}, {short}"
        in_turn = ["p0", "q0", "p1", "q1", "p2", "q2", "p3", "q3", "p4", "p5", "p6", "p7", "p8", "p9"]
        assert load_text(both, "train")["prompt"][:] == in_turn
        assert load_text(both, "train", max_rows=10)["prompt"][:] == in_turn[:10]
        assert load_text(both, "train", max_rows=5)["prompt"][:] == ["p0", "q0", "p1", "q1", "p2"]
        assert load_text(both, "train").to_list() == load_text(both, "train").to_list()

    def test_beside_text_prompt_and_completion_become_one(self, tmp_path, caplog):
        first = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
        second = write_jsonl(
            tmp_path / "b.jsonl", [{"prompt": "p", "completion": " c"}, {"question": "q", "answer": "b"}]
        )
        assert load_text(f"{first},{second}", "train").to_list() == [{"text": "a"}, {"text": "p c"}, {"text": "q b"}]
        assert "prompt and completion become one text" in caplog.text and "b.jsonl" in caplog.text

    def test_different_columns(self, tmp_path):
        first = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
        second = write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
        with pytest.raises(ValueError, match="a.jsonl gives text; .*b.jsonl gives messages"):
            load_text(f"{first},{second}", "train")

    def test_with_the_built_in_text(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": "mine"}] * 3)
        rows = load_text(f"{path},{PYDOC_TOPICS}", "train")["text"][:]
        assert rows[:6:2] == ["mine"] * 3 and rows[6:].count("mine") == 0
        assert rows[1:6:2] == load_text(PYDOC_TOPICS, "train", max_rows=3)["text"][:]

    def test_comma_in_a_path(self, tmp_path):
        assert load_text(write_jsonl(tmp_path / "a,b.jsonl", [{"text": "a"}]), "train")["text"][:] == ["a"]

    @pytest.mark.parametrize("source", ["", " ", "a.jsonl,", ",", "a.jsonl,,b.jsonl"])
    def test_empty_name(self, tmp_path, monkeypatch, no_hub, source):
        monkeypatch.chdir(tmp_path)
        write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
        with pytest.raises(ValueError, match="holds an empty name"):
            load_text(source, "train")


class TestHub:
    def test_out_of_reach(self, no_hub):
        with pytest.raises(
            ValueError, match=r"data set 'org/name' .*split 'train' of subset 'en'.*Couldn't reach"
        ) as caught:
            load_text("org/name", "train", subset="en")
        assert isinstance(caught.value.__cause__, ConnectionError)
        assert "\n" not in str(caught.value)
        assert no_hub == [("org/name", "en", "train")]

    def test_misspelt_built_in_name(self, no_hub):
        with pytest.raises(
            ValueError,
            match="data set 'pydoc-topic' is neither 'pydoc-topics' nor 'pydoc-docstrings' nor a local path",
        ):
            load_text("pydoc-topic", "train")

    def test_rows(self, hub):
        calls = hub([{"question": "q", "choices": ["a", "b"], "answer": 1}] * 3)
        dataset = load_text("org/name", "validation", max_rows=2)
        assert dataset.to_list() == [{"prompt": "q", "completion": " b"}] * 2
        assert calls == [("org/name", None, "validation")]

    def test_empty_texts_are_left_out(self, hub):
        hub([{"text": ""}, {"text": "a"}, {"text": " \n"}, {"text": "b"}])
        assert load_text("wikitext", "test", max_rows=2)["text"][:] == ["a", "b"]
        hub([{"text": ""}])
        with pytest.raises(ValueError, match="wikitext: no rows"):
            load_text("wikitext", "test")

    def test_unknown_columns(self, hub):
        hub([{"sentence": "a"}])
        with pytest.raises(ValueError, match="data set 'org/name', row 0: columns not understood: 'sentence'"):
            load_text("org/name", "train")


def test_evaluation_samples():
    """The samples of public evaluation sets that a checkout may have beside it."""
    folder = Path(os.environ.get("HF_PDPRUNE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    files = sorted(folder.glob("*.calibration.jsonl"))
    if not files:
        pytest.skip(f"no *.calibration.jsonl in {folder}")
    for file in files:
        name = file.name.split(".")[0]
        calibration = load_text(str(folder), "calibration", subset=name)
        validation = load_text(str(folder), "validation", subset=name)
        assert len(calibration) == sum(1 for line in file.open(encoding="utf-8") if line.strip())
        assert calibration.column_names == validation.column_names
        assert calibration.column_names in (["text"], ["prompt", "completion"])
        first = calibration.column_names[0]
        assert not set(map(str, calibration.to_list())) & set(map(str, validation.to_list())), first


def test_artefacts_name_no_folders(tmp_path, monkeypatch):
    (tmp_path / "mine.calibration.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / "mine.calibration.jsonl")
    assert public_name(f"{file}, org/data,pydoc-topics") == "mine.calibration.jsonl,org/data,pydoc-topics"
    assert public_name(str(tmp_path)) == public_name(".") == tmp_path.name
