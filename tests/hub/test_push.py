import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import TOKEN, HubServer
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_pdprune.hub import export_stages, push_stages_to_hub
from hf_pdprune.hub.model_card import licence_in
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


# The endpoint is read on import: what talks to the server is a process of its own, and tells what it saw as JSON.
CLIENT = """
import hashlib, json, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
import torch
torch.set_num_threads(1)
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_pdprune.evaluation.pair_source import PairSource
from hf_pdprune.hub import load_stages, push_stages_to_hub
folder = sys.argv[1]
seen = {}
try:
    push_stages_to_hub(folder, "me/tiny", token=sys.argv[2])
except Exception as error:
    seen["interrupted"] = type(error).__name__
try:
    load_stages("me/tiny", token=sys.argv[2])
except FileNotFoundError as error:
    seen["half"] = str(error)
urls = push_stages_to_hub(folder, "me/tiny", token=sys.argv[2], commit_message="first", collection=True)
seen["urls"] = {stage: url.repo_id for stage, url in urls.items()}
push_stages_to_hub(
    folder, "me/both", subfolders=True, private=True, revision="v1", token=sys.argv[2], collection="Two Stages",
    dataset_name="me/text", tags=["mine"],
)

def digests(folder):
    folder = Path(folder)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*") if path.is_file()
    }

seen["files"] = {name: digests(snapshot_download(name)) for name in ("me/tiny-prefill", "me/tiny-decode")}
seen["both"] = digests(snapshot_download("me/both", revision="v1", token=sys.argv[2]))

def generated(source, **kwargs):
    prefill, decode = load_stages(source, **kwargs)
    ids = torch.arange(3, 15)[None]
    payload = prefill(ids, torch.ones_like(ids), do_sample=False)
    return decode.generate(payload, max_new_tokens=4, do_sample=False).tolist()

seen["generated"] = {
    "folder": generated(folder),
    "repos": generated("me/tiny"),
    "subfolders": generated("me/both", revision="v1", token=sys.argv[2]),
}
model = AutoModelForCausalLM.from_pretrained("me/tiny-decode")
tokenizer = AutoTokenizer.from_pretrained("me/tiny-decode")
seen["alone"] = [type(model).__name__, model.config.num_hidden_layers, tokenizer.decode(tokenizer("hi")["input_ids"])]
push_stages_to_hub(sys.argv[3], "me/one", token=sys.argv[2])
push_stages_to_hub(sys.argv[3], "me/one-folder", subfolders=True, token=sys.argv[2])
seen["unified"] = [generated(sys.argv[3]), generated("me/one"), generated("me/one-folder")]
seen["unified files"] = digests(snapshot_download("me/one-unified"))
places = [PairSource(name).tokenizer for name in ("me/tiny", "me/one", "me/one-folder")]
tokenizers = [AutoTokenizer.from_pretrained(place.path, subfolder=place.subfolder) for place in places]
seen["tokenizers"] = {place.name: tokenizer("hi")["input_ids"] for place, tokenizer in zip(places, tokenizers)}
push_stages_to_hub(folder, "me/one", token=sys.argv[2])
try:
    load_stages("me/one")
except ValueError as error:
    seen["two pairs"] = str(error)
print(json.dumps(seen))
"""


def tiny_llama_and_tokenizer():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 256}
    config = AutoConfig.for_model("llama", num_hidden_layers=6, initializer_range=0.2, **sizes)
    words = Tokenizer(models.WordLevel({"hi": 3, "?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", eos_token="?")
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folder of a pair whose weights take several files."""
    folder = tmp_path_factory.mktemp("pair")
    model, tokenizer = tiny_llama_and_tokenizer()
    stages = {"prefill": StagePlan((2,)), "decode": StagePlan((2, 4)), "kv": KVPlan((0, 3), 2, 4)}
    export_stages(
        model, PruningPlan.empty(model, "org/base", **stages), folder, tokenizer=tokenizer, max_shard_size="300KB"
    )
    (folder / "results.json").write_text(json.dumps({"speed": {"ttft_ratio": 0.75, "tpot_ratio": 0.5}}))
    (folder / "pruning_plan.png").write_bytes(b"a picture")
    (folder / "decode" / "secret.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def unified(tmp_path_factory):
    """Folder of a unified model."""
    folder = tmp_path_factory.mktemp("unified")
    model, tokenizer = tiny_llama_and_tokenizer()
    stages = {"prefill": StagePlan((2,)), "decode": StagePlan((2,)), "kv": KVPlan((0, 3), 2, 4)}
    plan = PruningPlan.empty(model, "org/base", **stages)
    return export_stages(model, plan, folder, tokenizer=tokenizer, layout=("unified",))


@pytest.fixture(scope="module")
def pushed(pair, unified, tmp_path_factory):
    """The server, what the client saw, all that the client wrote to its outputs, and its home."""
    home = tmp_path_factory.mktemp("home")
    done, server = run_client(CLIENT, [pair, unified], home, refuse_after=2)
    return server, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr, home


def run_client(script, folders, home, refuse_after=None):
    """Runs a script with a folder, the token and more folders as its arguments, beside a server of its own."""
    with HubServer() as server:
        server.refuse_after = refuse_after
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", script, str(folders[0]), TOKEN, *map(str, folders[1:])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done, server


def published(folder):
    """Digests of the files of a stage that the Hub should have, but for the card, which is written for the Hub."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_repo_per_stage_byte_for_byte(pair, pushed):
    server, seen, _, _ = pushed
    assert seen["urls"] == {"prefill": "me/tiny-prefill", "decode": "me/tiny-decode"}
    for stage in ("prefill", "decode"):
        expected, actual = published(pair / stage), seen["files"][f"me/tiny-{stage}"]
        assert len([name for name in expected if name.endswith(".safetensors")]) > 1
        assert {name: actual[name] for name in expected} == expected
        assert actual.keys() - expected.keys() == {"README.md", "pruning_plan.png"}
        assert not server.repos[f"me/tiny-{stage}"].private
    assert seen["generated"]["repos"] == seen["generated"]["folder"]
    assert seen["alone"] == ["LlamaForCausalLM", 4, "hi"]


def test_one_repo_with_subfolders(pair, pushed):
    server, seen, _, _ = pushed
    repo = server.repos["me/both"]
    assert repo.private and repo.branches["main"] == {}
    actual = dict(seen["both"])
    for stage in ("prefill", "decode"):
        expected = {f"{stage}/{name}": digest for name, digest in published(pair / stage).items()}
        assert {name: actual.get(name) for name in expected} == expected
    assert {"README.md", "pruning_plan.json", "prefill/README.md", "decode/pruning_plan.png"} <= actual.keys()
    assert seen["generated"]["subfolders"] == seen["generated"]["folder"]


def test_unified_model(unified, pushed):
    server, seen, _, _ = pushed
    expected = published(unified / "unified")
    assert {name: seen["unified files"][name] for name in expected} == expected
    assert seen["unified"][0] == seen["unified"][1] == seen["unified"][2]
    assert 'load_stages("me/one")' in server.repos["me/one-unified"].branches["main"]["README.md"].decode()
    assert "unified/model.safetensors" in server.repos["me/one-folder"].branches["main"]
    # One name with two pairs under it: neither is taken for the other.
    assert "prefill and unified are both for the prefill stage" in seen["two pairs"]


def test_tokenizer_of_a_pair_on_the_hub(pushed):
    _, seen, _, _ = pushed
    assert seen["tokenizers"] == dict.fromkeys(("me/tiny-prefill", "me/one-unified", "me/one-folder/unified"), [3])


def test_interrupted_push_goes_on(pushed):
    server, seen, _, _ = pushed
    assert seen["interrupted"] == "RuntimeError" and "no pair of stages" in seen["half"]
    sent = [request for request in server.requests if request.startswith("PUT /lfs/")]
    # One was refused and sent again. The server itself fails where it is sent what it has.
    assert len(sent) == len(server.blobs) + 1
    assert set(server.repos["me/tiny-decode"].commits) == {"first"}
    assert server.repos["me/both"].commits[0].startswith("Upload the stages with hf_pdprune")


def test_collections_tie_the_stages_together(pushed):
    collections = {body["title"]: body for body in pushed[0].collections.values()}
    assert [item["id"] for item in collections["tiny"]["items"]] == ["me/tiny-prefill", "me/tiny-decode"]
    assert [item["id"] for item in collections["Two Stages"]["items"]] == ["me/both"]
    assert not collections["tiny"]["private"] and collections["Two Stages"]["private"]


def test_cards_name_the_repos(pushed):
    server = pushed[0]
    card = server.repos["me/tiny-decode"].branches["main"]["README.md"].decode()
    assert 'load_stages("me/tiny")' in card and 'from_pretrained("me/tiny-decode")' in card
    assert "![What the plan does to each block](pruning_plan.png)" in card and "0.750 of the dense model's" in card
    files = server.repos["me/both"].branches["v1"]
    assert 'load_stages("me/both")' in files["README.md"].decode()
    assert 'from_pretrained("me/both", subfolder="decode")' in files["decode/README.md"].decode()
    for path in ("README.md", "decode/README.md"):
        assert "datasets:\n- me/text" in files[path].decode() and "- mine" in files[path].decode()


def test_no_token_anywhere(pair, pushed):
    server, _, output, home = pushed
    secret = TOKEN.encode()
    assert len(output) > 1000 and TOKEN not in output  # everything is logged, down to the debug level
    written = [path for folder in (pair, home) for path in folder.rglob("*") if path.is_file()]
    assert written and not [path for path in written if secret in path.read_bytes()]
    branches = [files for repo in server.repos.values() for files in repo.branches.values()]
    contents = [content for files in branches for content in files.values()]
    assert contents and not [content for content in contents if secret in content]


def test_nothing_is_pushed_that_is_no_pair(pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        push_stages_to_hub(tmp_path / "nothing", "me/x")
    with pytest.raises(ValueError, match="Repo id"):
        push_stages_to_hub(pair, "me/x/y")
    shutil.copytree(pair, tmp_path / "pair")
    config = json.loads((tmp_path / "pair" / "decode" / "config.json").read_text())
    config["pdprune"]["fingerprint"] = "0" * 32
    (tmp_path / "pair" / "decode" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not of one pair"):
        push_stages_to_hub(tmp_path / "pair", "me/x")


# Pushes, reads the cards from the Hub and runs what they say, as somebody would who has only the repo's name.
CARD_READER = """
import hashlib, json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from huggingface_hub import ModelCard, snapshot_download
from hf_pdprune.hub import push_stages_to_hub
push_stages_to_hub(sys.argv[1], "me/smollm2", token=sys.argv[2])
seen = {}
for stage in ("prefill", "decode"):
    folder = Path(snapshot_download(f"me/smollm2-{stage}"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    card = ModelCard.load(f"me/smollm2-{stage}")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    for code in re.findall(r"```python\\n(.*?)```", card.text, re.DOTALL):
        exec(code.replace("max_new_tokens=64", "max_new_tokens=8"), {})
    seen[stage] = {"files": digests, "licence": card.data.license, "base": card.data.base_model, "metrics": metrics}
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_model_comes_back_byte_for_byte(smollm2, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    stages = {"prefill": StagePlan((3, 5, 17, 25)), "decode": StagePlan((3, 4, 5, 7, 17, 25)), "kv": KVPlan((6, 8))}
    plan = PruningPlan.empty(model, base, **stages)
    folder = export_stages(model, plan, tmp_path / "pair", tokenizer=tokenizer, max_shard_size="200MB")
    (folder / "results.json").write_text(json.dumps({"quality": {"unhealed": {"perplexity": 24.9, "kl": 0.714}}}))
    done, server = run_client(CARD_READER, [folder], tmp_path)
    seen = json.loads(done.stdout.splitlines()[-1])
    licence = licence_in(smollm2 / "README.md")
    for stage in ("prefill", "decode"):
        expected = published(folder / stage)
        assert len([name for name in expected if name.endswith(".safetensors")]) > 1
        assert {name: seen[stage]["files"].get(name) for name in expected} == expected
        assert seen[stage]["base"] == base and seen[stage]["licence"] == licence
        assert seen[stage]["metrics"] == {"perplexity": 24.9, "kl": 0.714}
    assert "The capital of France is" in done.stdout
