import json
import os
import subprocess
import sys

import pytest

from hf_pdprune.data import PYDOC_DOCSTRINGS, PYDOC_TOPICS, load_text
from hf_pdprune.data.python_text import _prose, _split_of, docstring_records, topic_records


SPLITS = ("calibration", "train", "validation")


@pytest.fixture(scope="module")
def records():
    return {split: list(docstring_records(split)) for split in SPLITS}


class TestPydocTopics:
    def test_splits_share_no_topic_and_no_paragraph(self):
        paragraphs = {}
        for split in SPLITS:
            rows = list(load_text(PYDOC_TOPICS, split)["text"])
            paragraphs[split] = [paragraph for row in rows for paragraph in row.split("\n\n")]
            assert len(set(paragraphs[split])) == len(paragraphs[split])
        for first in SPLITS:
            for second in SPLITS:
                assert first == second or not set(paragraphs[first]) & set(paragraphs[second])

        topics = {split: {where.split(",")[1] for where, _ in topic_records(split)} for split in paragraphs}
        assert len(set.union(*topics.values())) == sum(map(len, topics.values()))

    def test_nothing_but_code_and_repetition_is_lost(self):
        from pydoc_data.topics import topics

        kept = {
            paragraph
            for split in SPLITS
            for row in load_text(PYDOC_TOPICS, split)["text"]
            for paragraph in row.split("\n\n")
        }
        # What is not indented is prose, but for underlines.
        for topic in topics.values():
            for paragraph in topic.split("\n\n"):
                lines = [line for line in paragraph.strip("\n").split("\n") if set(line) - set("*=~^-")]
                text = " ".join(" ".join(lines).split())
                if lines and not lines[0].startswith(" ") and "::=" not in text and text[0] not in "+|>.":
                    assert text in kept

    def test_shares_by_characters(self):
        sizes = {split: sum(map(len, load_text(PYDOC_TOPICS, split)["text"])) for split in SPLITS}
        total = sum(sizes.values())
        assert total > 200_000
        assert sizes["calibration"] / total == pytest.approx(0.2, abs=0.05)
        assert sizes["train"] / total == pytest.approx(0.6, abs=0.05)
        assert sizes["validation"] / total == pytest.approx(0.2, abs=0.05)

    @pytest.mark.parametrize("split", SPLITS)
    def test_rows_are_prose_of_even_length(self, split):
        for row in load_text(PYDOC_TOPICS, split)["text"]:
            assert 10 <= len(row.split()) <= 700
            assert "::=" not in row and ">>>" not in row and "***" not in row
            assert all(" ".join(paragraph.split()) == paragraph for paragraph in row.split("\n\n"))
            assert sum(sign.isalpha() or sign == " " for sign in row) > 0.7 * len(row)

    def test_code_is_dropped_and_prose_kept(self):
        prose = _prose(
            'The "lambda" form\n*****************\n\n   lambda_expr ::= "lambda" [parameters] ":" expression\n\n'
            "Lambda expressions  are used\nto create functions:\n\n"
            "   def <lambda>(parameters):\n       return expression\n\n"
            "str.lower()\n\n   Return a copy of the string, with all of its characters in\n   lower case.\n\n"
            "   >>> 'A'.lower()\n   'a'\n\n   * no statements or annotations\n\n   1. first of all"
        )
        assert prose == [
            'The "lambda" form',
            "Lambda expressions are used to create functions:",
            "str.lower()",
            "Return a copy of the string, with all of its characters in lower case.",
            "* no statements or annotations",
            "1. first of all",
        ]

    def test_same_in_another_process(self):
        code = (
            "import json; from hf_pdprune.data import load_text; "
            "print(json.dumps(load_text('pydoc-topics', 'calibration')['text'][:]))"
        )
        environment = os.environ | {"PYTHONHASHSEED": "1234", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        )
        assert json.loads(done.stdout) == list(load_text(PYDOC_TOPICS, "calibration")["text"])

    def test_topics_keep_their_split(self):
        # Numbers measured on these splits are comparable only as long as this stays as it is.
        assert [_split_of(topic) for topic in ("types", "compound", "specialnames", "debugger")] == [
            "calibration",
            "train",
            "validation",
            "validation",
        ]

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="no split 'test', only calibration, train, validation"):
            load_text(PYDOC_TOPICS, "test")


class TestPydocDocstrings:
    def test_splits_share_no_module_and_no_paragraph_with_anything(self, records):
        modules = [{where.split(",")[1] for where, _ in rows} for rows in records.values()]
        assert len(set.union(*modules)) == sum(map(len, modules)) > 200
        paragraphs = [p for rows in records.values() for _, row in rows for p in row["text"].split("\n\n")]
        assert len(set(paragraphs)) == len(paragraphs)
        topics = {p for split in SPLITS for row in load_text(PYDOC_TOPICS, split)["text"] for p in row.split("\n\n")}
        assert not topics & set(paragraphs)

    def test_more_text_than_the_topics_and_mixed(self, records):
        size = sum(len(row["text"]) for _, row in records["train"])
        assert size > 3 * sum(map(len, load_text(PYDOC_TOPICS, "train")["text"]))
        first = [where.split("module ")[1] for where, _ in records["train"][:20]]
        assert len({name[0] for name in first}) > 5  # not module after module of the alphabet

    def test_prose_of_docstrings_is_there_and_tests_are_not(self, records):
        text = "\n\n".join(row["text"] for rows in records.values() for _, row in rows)
        assert "Extract, format and print information about Python stack traces." in text  # traceback's own
        assert not any(".test." in where or "idlelib" in where for rows in records.values() for where, _ in rows)

    def test_load_text_and_what_it_refuses(self, records):
        assert list(load_text(PYDOC_DOCSTRINGS, "validation")["text"]) == [r["text"] for _, r in records["validation"]]
        with pytest.raises(ValueError, match="pydoc-docstrings has no split 'test', only calibration"):
            load_text(PYDOC_DOCSTRINGS, "test")

    def test_without_sources_it_says_so(self, monkeypatch, tmp_path):
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        with pytest.raises(ValueError, match="without the source of its modules"):
            load_text(PYDOC_DOCSTRINGS, "train")
