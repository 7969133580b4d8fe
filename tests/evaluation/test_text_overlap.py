from hf_pdprune.evaluation.text_overlap import TextOverlap, shown_text


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
    first, second, third = (
        f"this is the {name} paragraph of an article in the data" for name in ("one", "two", "last")
    )
    seen = TextOverlap([{"text": second}, {"text": third}, {"text": "= A heading ="}])
    assert seen.count([f"{first}\n\n{second}\n\n{third}", first]) == 1
    assert seen.count([f"= A heading =\n\n{first}"]) == 0
    seen.add([{"text": first}])
    assert seen.count([f"{first}\n\n{second}\n\n{third}", first]) == 2


def test_what_a_row_shows():
    system = {"role": "system", "content": "You help."}
    messages = [system, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert shown_text({"messages": messages}) == "Why?" and shown_text({"messages": [system]}) == ""
    assert shown_text({"prompt": "Why?", "completion": "So."}) == "Why?"
    text = "A paragraph with some more words than a heading has."
    assert shown_text({"text": text}) == text and shown_text({"text": " = = See also = = "}) == ""
    assert TextOverlap([{"messages": messages}]).count(map(shown_text, [{"messages": messages}])) == 1
