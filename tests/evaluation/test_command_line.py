from dataclasses import dataclass, field

from hf_pdprune.evaluation.command_line import command_line


@dataclass
class Options:
    stages: str
    limit: int | None = None
    tasks: list[str] = field(default_factory=lambda: ["a"])
    note: str = ""


def test_what_is_not_default_is_said_and_places_are_not():
    options = Options("/home/me/pair", 5, ["b", "c"], "two words")
    line = command_line("recipes/x.py", options, Options("other", 7), folders=("stages",))
    assert line == (
        "accelerate launch recipes/x.py --stages <stages> --limit 5 --tasks b c --note 'two words' "
        "--stages <stages> --limit 7"
    )
    assert command_line("recipes/x.py", Options("pair")) == "accelerate launch recipes/x.py --stages pair"
