from hf_pdprune.evaluation.text_overlap import TextOverlap


def test_rows_of_every_kind_are_found():
    seen = TextOverlap(
        [
            {"text": "One  paragraph.\n"},
            {"prompt": "Question: why?\nAnswer:", "completion": " So."},
            {"messages": [{"role": "user", "content": "Hello there"}]},
        ]
    )
    assert len(seen) == 4
    texts = ["one paragraph.", "question: WHY? Answer:", "Question: why?\nAnswer: So.", "hello there"]
    assert [seen.count([text]) for text in texts] == [1, 1, 1, 1] and seen.count(texts) == 4
    assert seen.count(["One", "two paragraphs.", ""]) == 0


def test_a_paragraph_of_an_article_counts_once():
    seen = TextOverlap([{"text": "second"}, {"text": "third"}])
    assert seen.count(["first\n\nsecond\n\nthird", "first"]) == 1
    seen.add([{"text": "first"}])
    assert seen.count(["first\n\nsecond\n\nthird", "first"]) == 2
