"""
Does it lose the middle? Which prompt tokens decode receives, compared at equal bytes.

    python recipes/token_choice.py --plan outputs/demo --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --text wikitext2.validation.jsonl --output_dir outputs/token_choice

The plan's token-aware blocks, with the tokens chosen by attention and with the first and last ones, stand beside the
first and last tokens in all blocks and in as many random blocks, H2O and SnapKV: on text (KL to the dense model), on
needles and key-value pairs at several depths of the prompt, and on few-shot questions. What is chosen by attention in
the plan's blocks is what the prefill stage hands over; the baselines are selected from everything it reads. Decode
reads the prompt's last token, so that every token of an answer depends on what was handed over. Every example is a
line of `token_choice.jsonl`, kept by what it depends on: an interrupted run goes on with those that are missing, and
runs with other options can share a folder.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_pdprune import PruningPlan
from hf_pdprune.data import load_text
from hf_pdprune.evaluation.ablation_variants import AblationVariants
from hf_pdprune.evaluation.command_line import command_line
from hf_pdprune.evaluation.dense_model_of_pair import load_dense_model, load_tokenizer
from hf_pdprune.evaluation.overlap_config import OverlapConfig
from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.evaluation.row_file import RowFile
from hf_pdprune.evaluation.text_overlap import shown_text
from hf_pdprune.evaluation.token_choice_report import TOKEN_CHOICE_FILE_NAME, choice_means, choice_table
from hf_pdprune.fingerprint import model_fingerprint
from hf_pdprune.inference import DecodeStage, PrefillStage, dense_forward
from hf_pdprune.kv import QUANTIZATIONS, KVPayload, PromptWindow
from hf_pdprune.kv.prompt_attention import PromptAttention
from hf_pdprune.kv.token_choice import heavy_hitters, observed, select_per_head
from hf_pdprune.plan import KVPlan


PLACES = ("plan", "model", "output_dir")
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karla", "Louis")
ROOM_FOR_KEY = 40  # tokens that ask for one of the key-value pairs


@dataclass
class TokenChoiceArguments(OverlapConfig):
    """
    What is compared, and on what.

    Parameters:
        plan (`str`):
            Folder or repo with the plan. Blocks that it removes are left out of every choice.
        model (`str`):
            The dense model.
        output_dir (`str`):
            Folder for `token_choice.jsonl`.
        text (`str`):
            Text that is scored, and that needles are hidden in: a data set or a file of JSON lines.
        questions (`list[str]`, *optional*):
            Files of JSON lines with `question`, `choices` and `answer`; the first rows are the shots.
        num_texts (`int`, *optional*, defaults to `12`):
            Pieces of text.
        num_questions (`int`, *optional*, defaults to `12`):
            Questions per file.
        shots (`int`, *optional*, defaults to `5`):
            Examples before each question.
        prompt_tokens (`int`, *optional*, defaults to `960`):
            Length of the prompts cut out of text.
        completion_tokens (`int`, *optional*, defaults to `64`):
            Tokens that are scored after them.
        retrieval_tokens (`list[int]`, *optional*, defaults to `[400, 900]`):
            Lengths of the prompts with a needle or with key-value pairs.
        depths (`list[float]`, *optional*, defaults to `[0.1, 0.5, 0.9]`):
            Where in the prompt the needle is, from 0 to 1.
        repeats (`int`, *optional*, defaults to `2`):
            Prompts of each kind, length and depth.
        quantizations (`list[str]`, *optional*):
            `int8`, `int4` or `fp8`: payloads of the plan, by its own choice of tokens, and of all tokens are measured
            so, too.
        seed (`int`, *optional*, defaults to `0`):
            Of random blocks, needles and questions.
    """

    plan: str = field(metadata={"help": "Folder or repo with the plan."})
    model: str = field(metadata={"help": "The dense model."})
    output_dir: str = field(metadata={"help": "Folder for token_choice.jsonl."})
    text: str = field(metadata={"help": "Text that is scored, and that needles are hidden in."})
    questions: list[str] = field(
        default_factory=list, metadata={"help": "Files with question, choices and answer; first rows are the shots."}
    )
    num_texts: int = field(default=12, metadata={"help": "Pieces of text."})
    num_questions: int = field(default=12, metadata={"help": "Questions per file."})
    shots: int = field(default=5, metadata={"help": "Examples before each question."})
    prompt_tokens: int = field(default=960, metadata={"help": "Length of the prompts cut out of text."})
    completion_tokens: int = field(default=64, metadata={"help": "Tokens that are scored after them."})
    retrieval_tokens: list[int] = field(
        default_factory=lambda: [400, 900], metadata={"help": "Lengths of the prompts with something to find."}
    )
    depths: list[float] = field(
        default_factory=lambda: [0.1, 0.5, 0.9], metadata={"help": "Where in the prompt it is, from 0 to 1."}
    )
    repeats: int = field(default=2, metadata={"help": "Prompts of each kind, length and depth."})
    quantizations: list[str] = field(
        default_factory=list, metadata={"help": "int8, int4, fp8: in which payloads are measured, too."}
    )
    seed: int = field(default=0, metadata={"help": "Of random blocks, needles and questions."})

    def __post_init__(self):
        for name, least in (("num_texts", 0), ("num_questions", 0), ("shots", 0), ("repeats", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("prompt_tokens", "completion_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths must be from 0 to 1, got {self.depths}")
        if not set(self.quantizations) <= set(QUANTIZATIONS):
            raise ValueError(f"quantizations must be of {', '.join(QUANTIZATIONS)}, got {self.quantizations}")
        super().__post_init__()


@dataclass
class Example:
    """A prompt, and what may follow it: one completion, or several of which `answer` is the right one."""

    task: str
    prompt: list[int]
    completions: list[list[int]]
    answer: int = 0

    @property
    def digest(self) -> str:
        """Tells examples apart whose tokens differ."""
        content = json.dumps([self.prompt, self.completions, self.answer])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class TokenChoices:
    """
    The choices, by name, and what decode makes of each.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model.
        plan ([`PruningPlan`]): Ours; the others are given as many KV entries.
        args (`TokenChoiceArguments`): Seed and quantisations.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan, args: TokenChoiceArguments):
        self.model, self.plan, self.args = model, plan, args
        self.kv_heads = model.config.get_text_config().num_key_value_heads
        self.fingerprint = model_fingerprint(model)
        self.settings = {  # what the scores of an example depend on
            "plan": plan.digest,
            "model": args.model,
            "fingerprint": self.fingerprint,
            "seed": args.seed,
            "quantizations": args.quantizations,
        }

    def plans(self, tokens: int) -> dict[str, PruningPlan]:
        """What each choice hands over of a prompt of `tokens` tokens. All but the first have equal bytes."""
        plans = dict(AblationVariants(self.plan).caches(tokens, self.args.seed))
        every = plans["first + last, all blocks"]
        return plans | {"H2O, all blocks": every, "SnapKV, all blocks": every}

    def scores(self, example: Example) -> dict[str, dict[str, float]]:
        """See [`score`]."""
        device = self.model.device
        completions = [torch.tensor([completion], device=device) for completion in example.completions]
        return score(example, self.logits(torch.tensor([example.prompt], device=device), completions))

    @torch.no_grad()
    def logits(self, prompt: torch.LongTensor, completions: list[torch.LongTensor]) -> dict[str, list[torch.Tensor]]:
        """For the dense model and each choice, the logits that predict each completion's tokens."""
        read = [torch.cat([prompt[:, -1:], completion[:, :-1]], dim=1) for completion in completions]
        results = {"dense": [self._dense(prompt, completion) for completion in completions]}
        for name, (plan, payload) in self._payloads(prompt[:, :-1]).items():
            decode = DecodeStage(self.model, plan, fingerprint=self.fingerprint)
            results[name] = [decode.forward(payload, tokens, torch.ones_like(tokens)) for tokens in read]
        return results

    def _dense(self, prompt: torch.LongTensor, completion: torch.LongTensor) -> torch.Tensor:
        batch = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt)}
        batch |= {"completion_ids": completion, "completion_mask": torch.ones_like(completion)}
        return dense_forward(self.model, batch)

    def _payloads(self, prompt: torch.LongTensor) -> dict[str, tuple[PruningPlan, KVPayload]]:
        """Each choice's plan and payload; of the plan's own choice and of all tokens quantised ones, too."""
        plans, mask = self.plans(prompt.shape[1]), torch.ones_like(prompt)
        attention, payloads = PromptAttention(), {}
        with attention.recording(self.model, self.kv_heads):
            everything = self._prefill(plans["all tokens"]).forward(prompt, mask)
        for name, plan in plans.items():
            if plan.kv.token_choice == "attention":
                payload = self._prefill(plan).forward(prompt, mask)
            else:
                entries = self._selected(name, plan.kv, everything, attention)
                payload = replace(everything, entries=entries, plan_digest=plan.digest)
            payloads[name] = plan, payload
        ours = next(name for name in plans if name.endswith("our blocks") and plans[name] == self.plan)
        for kind in self.args.quantizations:
            for title, name in (("all tokens", "all tokens"), ("the plan", ours)):
                plan, payload = payloads[name]
                payloads[f"{title}, {kind}"] = plan, payload.quantized(kind)
        return payloads

    def _prefill(self, plan: PruningPlan) -> PrefillStage:
        return PrefillStage(self.model, plan, fingerprint=self.fingerprint)

    def _selected(
        self, name: str, kv: KVPlan, payload: KVPayload, attention: PromptAttention
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Entries of the baselines, from those of all tokens."""
        entries = dict(payload.entries)
        for block, sizes in kv.windows.items():
            window = PromptWindow.of_prompt(payload.prompt_tokens, None, *sizes)
            if window is None:
                continue
            if name.startswith("H2O"):
                columns = heavy_hitters(attention.accumulated[block], window.kept_tokens)
            elif name.startswith("SnapKV"):
                columns = observed(attention.recent[block], window.kept_tokens, attention.recent_queries)
            else:
                columns = window.columns.to(self.model.device).expand(*payload.entries[block][0].shape[:2], -1)
            entries[block] = tuple(select_per_head(states, columns) for states in payload.entries[block])
        return entries


def texts(args: TokenChoiceArguments, stream: list[int]) -> Iterator[Example]:
    """Pieces of text, evenly spread."""
    length = args.prompt_tokens + args.completion_tokens
    step = max(length, len(stream) // max(args.num_texts, 1))
    for begin in range(0, min(args.num_texts * step, len(stream) - length), step):
        piece = stream[begin : begin + length]
        yield Example("text", piece[: args.prompt_tokens], [piece[args.prompt_tokens :]])


def retrieval(args: TokenChoiceArguments, tokenizer: PreTrainedTokenizerBase, stream: list[int]) -> Iterator[Example]:
    """Needles in text, and key-value pairs, at each depth of prompts of each length."""
    rng = random.Random(args.seed)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for tokens in args.retrieval_tokens:
        for depth in args.depths:
            for _ in range(args.repeats):
                name, number = rng.choice(NAMES), str(rng.randrange(10000, 99999))
                needle = ids(f"\n\nThe secret number of {name} is {number}.\n\n")
                question = ids(f"\n\nWhat is the secret number of {name}? The secret number of {name} is")
                room = tokens - len(needle) - len(question)
                if room < 1 or tokens <= ROOM_FOR_KEY:
                    least = max(len(needle) + len(question), ROOM_FOR_KEY) + 1
                    raise ValueError(f"retrieval_tokens: {tokens} tokens are too few to hide something, give {least}")
                if room >= len(stream):
                    raise ValueError(
                        f"retrieval_tokens: {args.text} has {len(stream)} tokens, too few for a prompt of {tokens}"
                    )
                begin = rng.randrange(len(stream) - room)
                hay, place = stream[begin : begin + room], int(depth * room)
                prompt = hay[:place] + needle + hay[place:] + question
                yield Example(f"needle {tokens} {depth:g}", prompt, [ids(f" {number}.")])

                pairs = []
                while len(ids("\n".join(pairs))) < tokens - ROOM_FOR_KEY:
                    pairs.append(f"{rng.choice(NAMES)}{rng.randrange(100, 999)} -> {rng.randrange(1000, 9999)}")
                key, value = pairs[min(int(depth * len(pairs)), len(pairs) - 1)].split(" -> ")
                listing = "\n".join(pairs)
                yield Example(f"pairs {tokens} {depth:g}", ids(f"{listing}\n\nAgain:\n{key} ->"), [ids(f" {value}\n")])


def evaluated_texts(args: TokenChoiceArguments, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Iterable[str]]]:
    """What must not have been seen in search or distillation."""
    yield args.text, map(shown_text, rows)
    for path in args.questions:
        yield path, (row["question"] for row in question_rows(path)[args.shots :])


def question_rows(path: str) -> list[dict[str, Any]]:
    """Rows of a file of questions; the first are the shots. A `ValueError` that names the line which is none."""
    load_text(path, split="validation")  # names the line that is broken, or whose answer is no choice
    lines = enumerate(Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n"), 1)
    rows = {number: json.loads(line) for number, line in lines if line.strip()}
    for number, row in rows.items():
        for column in ("question", "choices", "answer"):
            if column not in row:
                raise ValueError(f"{path}, line {number}: no {column!r}; a question has question, choices and answer")
    return list(rows.values())


def questions(args: TokenChoiceArguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """Few-shot questions; the answer is the completion that is likeliest."""
    for path in args.questions:
        rows = question_rows(path)
        shots, asked = rows[: args.shots], rows[args.shots :]
        before = "".join(f"{row['question']} {row['choices'][row['answer']]}\n\n" for row in shots)
        for row in random.Random(args.seed).sample(asked, min(args.num_questions, len(asked))):
            prompt = tokenizer(before + row["question"])["input_ids"]
            choices = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in row["choices"]]
            yield Example(Path(path).name.split(".")[0], prompt[-1024:], choices, row["answer"])


def score(example: Example, logits: dict[str, list[torch.Tensor]]) -> dict[str, dict[str, float]]:
    """KL to the dense model and top-1 agreement per token of the right completion, and whether the answer is right."""
    scores = {}
    dense = logits["dense"][example.answer][0].log_softmax(dim=-1)
    targets = [torch.tensor(completion, device=dense.device) for completion in example.completions]
    for name, all_logits in logits.items():
        log_probs = [of_one[0].log_softmax(dim=-1) for of_one in all_logits]
        right = log_probs[example.answer]
        likelihoods = [lp.gather(-1, t[:, None]).sum().item() for lp, t in zip(log_probs, targets, strict=True)]
        if len(targets) > 1:
            correct = max(range(len(targets)), key=likelihoods.__getitem__) == example.answer
        else:  # greedy decoding would write exactly this
            correct = bool((right.argmax(dim=-1) == targets[0]).all())
        scores[name] = {
            "kl": (dense.exp() * (dense - right)).sum(dim=-1).mean().item(),
            "top1_agreement": (dense.argmax(dim=-1) == right.argmax(dim=-1)).float().mean().item(),
            "nll": -likelihoods[example.answer] / len(targets[example.answer]),
            "correct": float(correct),
        }
    return scores


def main(args: TokenChoiceArguments) -> None:
    plan = PruningPlan.from_pretrained(args.plan)
    rows = load_text(args.text, split="validation")
    if "text" not in rows.column_names:
        raise ValueError(f"text: {args.text} has rows of {', '.join(rows.column_names)}, and not of text")
    for path in args.questions:
        question_rows(path)
    args.check_overlap(evaluated_texts(args, rows), folders=[args.plan])
    tokenizer = load_tokenizer(args.model)
    model = load_dense_model(args.model, [args.plan], dtype="float32")
    choices = TokenChoices(model, plan, args)
    stream = [
        token for row in rows for token in tokenizer(row["text"] + "\n\n", add_special_tokens=False)["input_ids"]
    ]
    examples = [*texts(args, stream), *retrieval(args, tokenizer, stream), *questions(args, tokenizer)]
    kept, scored = RowFile(Path(args.output_dir) / TOKEN_CHOICE_FILE_NAME), []
    for example in tqdm(examples, desc="Token choice", unit="example"):
        settings = {**choices.settings, "task": example.task, "example": example.digest}
        scores = kept.get_or_make(settings, lambda example=example: choices.scores(example))
        scored.append({"settings": settings, "result": scores})
    record_command(args.output_dir, "token_choice", command_line("recipes/token_choice.py", args, folders=PLACES))
    means = choice_means(scored)
    print(choice_table(means).to_text(), "\n")
    print(choice_table(choice_means(scored, by_depth=True)).to_text(), "\n")
    print(json.dumps(means))


if __name__ == "__main__":
    run_recipe(main, TokenChoiceArguments, description=__doc__, goes_on=True)
