"""Every shipped recipe through its dry run: real architectures, no weights, and the memory that its head claims."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPTJConfig, GPTNeoConfig, LlamaConfig, PretrainedConfig, RobertaConfig

from rlhf_cli.config.compose import compose_stage
from rlhf_cli.config.tree import recipes
from rlhf_cli.job import checked
from rlhf_cli.schema import STAGES, SftConfig
from tests.reward_models import word_tokenizer
from tests.test_ppo_plan import adapter_only
from tests.tiny_models import PLAY, tiny_config, tiny_tokenizer

ROOT = Path(__file__).parent.parent
GB = 10**9

Model = Callable[[], PretrainedConfig]
LLAMA_7B: Model = lambda: LlamaConfig(pad_token_id=0)  # transformers' defaults
LLAMA_13B: Model = lambda: LlamaConfig(
    hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824, pad_token_id=0
)
LLAMA_1B: Model = lambda: LlamaConfig(
    hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632,
    pad_token_id=0,
)  # fmt: skip
NEO_2_7B: Model = lambda: GPTNeoConfig(
    hidden_size=2560, num_layers=32, num_heads=20, attention_types=[[["global", "local"], 16]]
)
NEO_1_3B: Model = lambda: GPTNeoConfig()
GPT_J_6B: Model = lambda: GPTJConfig()
GPT2: Model = lambda: GPT2Config()
TINY: Model = lambda: tiny_config()


class Case(NamedTuple):
    """model: of model.path (None: the recipe makes one); data: its kind; ranks, gigabytes: what the recipe's head
    claims (None: nothing); reward: kind of the reward source that is put in; words: more of the command line."""

    model: Model | None
    data: str
    ranks: int = 1
    gigabytes: int | None = None
    reward: str = ""
    words: tuple[str, ...] = ()


SHIPPED_DATA = "shipped"  # the recipe names its data itself
CASES = {
    ("sft", "quickstart"): Case(None, SHIPPED_DATA),
    ("sft", "hh_chosen"): Case(TINY, "pairs"),
    ("sft", "hh_rlhf_llama_7b"): Case(LLAMA_7B, "pairs", 8, 40),
    ("sft", "hh_rlhf_llama_13b"): Case(LLAMA_13B, "pairs", 8, 40),
    ("sft", "shakespeare_bpe"): Case(None, "play"),
    ("sft", "shakespeare_word"): Case(None, "play"),
    ("sft", "shakespeare_56m"): Case(None, "play", 1, 8),
    ("sft", "alpaca_last_block"): Case(LLAMA_1B, "dialogues", 1, 12),
    ("sft", "alpaca_lora"): Case(LLAMA_7B, "dialogues", 1, 24),
    ("sft", "alpaca_qlora"): Case(LLAMA_7B, "dialogues", 1, 12),
    ("sft", "code_codex"): Case(NEO_2_7B, "code", 8, 40),
    ("rm", "quickstart"): Case(TINY, SHIPPED_DATA),
    ("rm", "hh_pairs"): Case(TINY, "pairs"),
    ("rm", "hh_rlhf_gpt_neo_1_3b"): Case(NEO_1_3B, "pairs", 1, 16),
    ("rm", "hh_rlhf_gpt_neo_2_7b"): Case(NEO_2_7B, "pairs", 1, 24),
    ("rm", "hh_rlhf_llama_7b"): Case(LLAMA_7B, "pairs", 8, 40),
    ("rm", "hh_rlhf_llama_13b"): Case(LLAMA_13B, "pairs", 8, 40),
    ("rm", "instructgpt_kwise"): Case(GPT_J_6B, "rankings", 8, 80),
    ("rm", "shakespeare_sentiment"): Case(TINY, "labels"),
    ("ppo", "quickstart"): Case(TINY, SHIPPED_DATA, reward="model"),
    ("ppo", "hh_pairs"): Case(TINY, "pairs", reward="model"),
    ("ppo", "hh_rlhf_llama_7b"): Case(LLAMA_7B, "pairs", 8, 40, reward="adapter", words=("reward.normalize=false",)),
    ("ppo", "instructgpt_ptx"): Case(LLAMA_1B, "prompts", 8, 80, reward="model", words=("ppo.ptx.data.path=play.txt",)),
    ("ppo", "shakespeare_happy"): Case(TINY, "play", reward="classifier"),
    ("ppo", "imdb_sentiment"): Case(GPT2, "play", 1, 12, reward="roberta"),
    ("raft", "quickstart"): Case(TINY, SHIPPED_DATA, reward="model"),
    ("raft", "hh_pairs"): Case(TINY, "pairs", reward="model"),
    ("raft", "hh_rlhf_llama_7b"): Case(LLAMA_7B, "pairs", 8, 40, reward="model"),
    ("raft", "shakespeare_happy"): Case(TINY, "play", reward="classifier"),
    ("raft", "tldr_rouge"): Case(LLAMA_1B, "dialogues", 1, 40),
}


def test_every_recipe_has_a_case() -> None:
    assert set(CASES) == {(stage.key, recipe.name) for stage in STAGES.values() for recipe in recipes(stage)}


@pytest.mark.parametrize(("stage", "name"), CASES, ids=lambda x: str(x))
def test_every_recipe_passes_its_dry_run_and_fits_what_its_head_claims(
    stage: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[stage, name]
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: case.gigabytes is not None)  # plan for the named hardware
    overrides = [f"conf={name}", *case.words]
    if case.model is not None:
        overrides.append(f"model.path={write_model(tmp_path / 'model', case.model())}")
    if case.reward:
        overrides.append(f"reward.sources=[{write_reward(tmp_path, case)}]")
    composed = compose_stage(stage, overrides)
    if case.data == SHIPPED_DATA:
        monkeypatch.chdir(ROOT)
    else:
        length = getattr(getattr(composed.config, "data", None), "max_length", 200)
        overrides.append(f"data.path={write_data(tmp_path, case.data, length)}")
        monkeypatch.chdir(tmp_path)
    config = checked(compose_stage(stage, overrides), weights_needed=False)
    assert config.launch.num_processes in ("auto", case.ranks)

    importlib.import_module(STAGES[stage].module).dry_run(config, case.ranks)

    shown = capsys.readouterr().out
    found = re.search(r"memory per rank[^\d]*([\d.]+) ([GM])iB", shown)
    assert found is not None, shown
    needed = float(found[1]) * (2**30 if found[2] == "G" else 2**20)
    if case.gigabytes is not None:
        assert needed < case.gigabytes * GB, "what the recipe's head promises"
        assert f"{case.gigabytes} GB" in hardware(stage, name) or f"{case.gigabytes}G" in hardware(stage, name)


def hardware(stage: str, name: str) -> str:
    """The second line of a recipe's head."""
    return (ROOT / "conf" / "recipe" / stage / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]


def test_the_numbers_of_the_articles() -> None:
    def config(stage: str, name: str, *words: str) -> SftConfig:
        composed = compose_stage(stage, [f"conf={name}", "model.path=m", "data.path=x.jsonl", *words])
        assert composed.problems + composed.unmet == []
        return composed.config  # type: ignore[return-value]

    for size in ("gpt_neo_1_3b", "gpt_neo_2_7b", "llama_7b", "llama_13b"):  # LMFlow
        reward = config("rm", f"hh_rlhf_{size}")
        assert (reward.lora.r, reward.optim.lr, reward.data.max_length, reward.train.epochs) == (16, 3e-5, 512, 1)
        assert reward.data.validation_split_percentage == 10
    ppo: Any = config("ppo", "hh_rlhf_llama_7b", "reward.sources=[{path: r}]")
    assert (ppo.ppo.kl_coef, ppo.ppo.rollout_batch_size) == (0.001, 1024)
    raft: Any = config("raft", "hh_rlhf_llama_7b", "reward.sources=[{path: r}]")
    assert (raft.raft.batch_size, raft.raft.num_candidates, raft.optim.lr) == (1024, 8, 2e-5)
    assert (raft.raft.num_iterations, raft.optim.schedule, raft.eval.temperature) == (20, "constant", 0.3)
    rows = config("rm", "hh_rlhf_gpt_neo_1_3b").data.limit
    assert rows is not None
    assert rows - -(-rows // 10) == 10_000
    assert config("sft", "hh_rlhf_llama_13b").train.epochs == 2
    assert config("sft", "hh_rlhf_llama_7b").optim.lr == config("sft", "hh_rlhf_llama_13b").optim.lr == 2e-5
    kwise = config("rm", "instructgpt_kwise")  # arXiv 2203.02155, C.2
    assert (kwise.optim.lr, kwise.train.global_batch_size, kwise.train.epochs) == (9e-6, 64, 1)
    code = config("sft", "code_codex")
    assert code.data.filters.max_line_length == 1000
    assert all(not token.strip(" ") for token in code.model.tokenizer.extra_tokens)


@pytest.mark.parametrize(
    ("sft", "rm"), [("hh_chosen", "hh_pairs"), *((f"hh_rlhf_llama_{n}", f"hh_rlhf_llama_{n}") for n in ("7b", "13b"))]
)
def test_a_chain_holds_the_same_rows_out_of_both_its_trainings(sft: str, rm: str) -> None:
    """The last rows of a file: a reward model is judged on what the policy that it starts from has not learnt."""
    shares = {
        compose_stage(stage, [f"conf={name}"]).values["data"]["validation_split_percentage"]
        for stage, name in (("sft", sft), ("rm", rm))
    }
    assert len(shares) == 1, shares


# --- what the recipes read


def write_model(folder: Path, config: PretrainedConfig, architecture: str = "") -> Path:
    """config.json and a tokenizer; of the weights a name without content, since a reward model is refused without them
    even where nothing loads them."""
    folder.mkdir()
    family = type(config).__name__.removesuffix("Config")
    heads = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}
    config.architectures = [architecture or heads.get(family, f"{family}ForCausalLM")]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if architecture:
        save_file({}, folder / "model.safetensors")
    return folder


def write_reward(folder: Path, case: Case) -> str:
    """A source as on the command line."""
    assert case.model is not None
    if case.reward == "adapter":
        path = adapter_only(folder / "reward", folder / "model")
        tiny_tokenizer().save_pretrained(path)
        return f"{{path: {path}}}"
    if case.reward == "roberta":
        config = RobertaConfig(
            num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            max_position_embeddings=514,
        )  # fmt: skip
        path = write_model(folder / "reward", config, "RobertaForSequenceClassification")
        word_tokenizer(roberta=True).save_pretrained(path)
        return f"{{type: classifier, path: {path}, label: POSITIVE, measure: margin}}"
    config = case.model()
    config.num_labels = 2 if case.reward == "classifier" else 1
    moments = {"type": "pairs", "mean": 0.0, "std": 1.0}
    if case.reward == "classifier":
        config.id2label, config.label2id = {0: "happy", 1: "sad"}, {"happy": 0, "sad": 1}
    else:
        config.reward = moments
    family = type(config).__name__.removesuffix("Config")
    path = write_model(folder / "reward", config, f"{family}ForSequenceClassification")
    return f"{{type: classifier, path: {path}, label: happy}}" if case.reward == "classifier" else f"{{path: {path}}}"


def write_data(folder: Path, kind: str, length: int) -> Path:
    """Rows of one kind, of which a letter is a token; the longest of them fills a sequence but for its template."""
    if kind == "play":
        path = folder / "play.txt"
        path.write_text(PLAY * 60, encoding="utf-8")
        return path
    (folder / "play.txt").write_text(PLAY * 60, encoding="utf-8")
    long = "speak, " * ((length - 150) // 7)
    rows = [dict(row(kind, i, long if i == 3 else "speak. ")) for i in range(300)]
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def row(kind: str, i: int, text: str) -> dict[str, object]:
    if kind == "pairs":
        return {"prompt": f"speak {i}?", "chosen": f"{text}{i}", "rejected": f"no {text}{i}"}
    if kind == "rankings":
        return {"prompt": f"speak {i}?", "responses": [f"{n} {text}" for n in range(9)], "ranks": list(range(9))}
    if kind == "labels":
        return {"text": f"{text}{i}", "label": ["happy", "sad"][i % 2]}
    if kind == "code":
        return {"text": f"def speak_{i}():\n    return speak(all, {i})  # {text[:80]}\n" * (1 if i != 3 else 30)}
    if kind == "prompts":
        return {"prompt": f"{text}{i}?"}
    return {"prompt": f"speak {i}?", "response": text}
