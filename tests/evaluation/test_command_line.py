from dataclasses import dataclass, field
from enum import Enum

from hf_pdprune.evaluation.command_line import command_line


@dataclass
class Options:
    stages: str
    limit: int | None = None
    tasks: list[str] = field(default_factory=lambda: ["a"])
    note: str = ""


class Schedule(Enum):
    COSINE = "cosine"


@dataclass
class TrainingOptions:
    output_dir: str
    hub_token: str | None = None
    schedule: Schedule = Schedule.COSINE
    kwargs: dict = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    workers: int | None = None
    number: int = field(init=False, default=0)

    def __post_init__(self):
        self.workers = 4 if self.workers is None else self.workers
        self.number = 7


def test_options_as_they_are_after_post_init_and_without_secrets_and_places():
    line = command_line("recipes/x.py", TrainingOptions("here", "hf_secret"), folders=("output_dir",))
    assert line == "accelerate launch recipes/x.py --output_dir <output_dir>"
    options = TrainingOptions(
        "out", schedule=Schedule("cosine"), kwargs={"a": 1}, texts=["/my/a.jsonl", "b", "c=/my/c"], workers=2
    )
    line = command_line("recipes/x.py", options)
    assert line.endswith("""--output_dir out --kwargs '{"a": 1}' --texts <texts> b c=<texts> --workers 2""")
    options.schedule = "linear"
    assert "--schedule linear" in command_line("recipes/x.py", options)


def test_what_is_not_default_is_said_and_places_are_not():
    options = Options("/home/me/pair", 5, ["b", "c"], "two words")
    line = command_line("recipes/x.py", options, Options("other", 7), folders=("stages",))
    assert line == (
        "accelerate launch recipes/x.py --stages <stages> --limit 5 --tasks b c --note 'two words' "
        "--stages <stages> --limit 7"
    )
    assert command_line("recipes/x.py", Options("pair")) == "accelerate launch recipes/x.py --stages pair"


@dataclass
class OneOfTwo:
    stages: str | None = None
    shape: str | None = None
    sizes: list[int] = field(default_factory=lambda: [1])

    def __post_init__(self):
        if (self.stages is None) == (self.shape is None):
            raise ValueError("give either stages or shape")


def test_options_of_which_one_must_be_given():
    assert command_line("recipes/x.py", OneOfTwo(shape="8b")) == "accelerate launch recipes/x.py --shape 8b"
    assert command_line("recipes/x.py", OneOfTwo("pair", sizes=[2])).endswith("--stages pair --sizes 2")
