"""What cannot be merged is refused with one clear message, before anything is written."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_cli.config.freeze import freeze, standing
from rlhf_cli.config.merge_requests import check_merge
from rlhf_cli.errors import ConfigError, ModelError
from rlhf_cli.files import digest_tree, write_json
from rlhf_cli.models.adapter import HARMLESS, REFUSED, read_adapter, scale_of
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import MergeConfig, MergeLoraConfig
from rlhf_cli.stages import merge_lora
from tests.merge_cases import classifier_of, save_base, save_peft
from tests.tiny_models import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def causal(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """refused(**options) -> the message of a merge of tmp_path/adapter that must fail and leave nothing behind."""

    def run(adapter: Path | None = None, **options: Any) -> str:
        config = MergeConfig(adapter=str(adapter or tmp_path / "adapter"), **options)
        run_dir = tmp_path / "merged"
        run_dir.mkdir()
        with pytest.raises(ModelError) as caught:
            merge_lora.merge(config, run_dir, Display(io.StringIO(), "none", "merge-lora"))
        assert not list(run_dir.iterdir())
        run_dir.rmdir()
        return str(caught.value)

    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")[0]


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    save_peft(tmp_path / "adapter", causal(base), tokenizer=tiny_tokenizer(), base_path=base)
    return tmp_path / "adapter"


def change_settings(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def change_weights(adapter: Path, **changes: torch.Tensor | None) -> None:
    path = adapter / "adapter_model.safetensors"
    kept = load_file(path) | {k.replace("__", "."): v for k, v in changes.items() if v is not None}
    for name in (k.replace("__", ".") for k, v in changes.items() if v is None):
        del kept[name]
    save_file(kept, path)


# --- the adapter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only LORA"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'; allowed: CAUSAL_LM"),
        ({"use_dora": True}, "use_dora is set (DoRA"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is set"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"use_tomorrow": {"x": 1}}, "use_tomorrow={'x': 1} is a setting this version does not know"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj: lora_A (4, 32) and lora_B (32, 4) do not have the rank 3"),
    ],
)
def test_settings_that_mean_more(
    settings: dict[str, Any], message: str, adapter: Path, refused: Callable[..., str]
) -> None:
    change_settings(adapter, **settings)
    assert message in refused()


def test_every_setting_of_peft_was_looked_at(adapter: Path) -> None:
    """When PEFT learns a new one, it belongs into one of the two tables of models/adapter.py."""
    assert json.loads((adapter / "adapter_config.json").read_text()).keys() == REFUSED.keys() | HARMLESS


def test_real_adapters_of_other_kinds(tmp_path: Path, base: Path, refused: Callable[..., str]) -> None:
    save_peft(tmp_path / "adapter", causal(base), base_path=base, use_dora=True)
    assert "DoRA" in refused()
    get_peft_model(causal(base), LoHaConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "loha"))
    assert "peft_type is 'LOHA'" in refused(tmp_path / "loha", base=str(base))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model__model__lm_head__lora_magnitude_vector": torch.ones(3)}, "lora_magnitude_vector"),
        ({"model__norm__weight": torch.ones(32)}, "holds model.norm.weight, which is no part of a plain LoRA"),
        ({"base_model__model__model__norm__lora_C": torch.ones(3)}, "lora_C, which is no part"),
        (
            {"base_model__model__model__layers__0__mlp__down_proj__lora_B__weight": None},
            "down_proj: has lora_A without its partner",
        ),
        ({"base_model__model__model__layers__7__mlp__down__weight": torch.ones(3)}, "has weights for model.layers.7"),
        ({"base_model__model__model__norm__weight": torch.ones(31)}, "model.norm.weight is (32,) in the model"),
    ],
)
def test_weights_that_have_no_place(
    changes: dict[str, Any], message: str, adapter: Path, refused: Callable[..., str]
) -> None:
    change_weights(adapter, **changes)
    assert message in refused()


def test_an_empty_adapter(adapter: Path, refused: Callable[..., str]) -> None:
    save_file({}, adapter / "adapter_model.safetensors")
    assert "holds no adapter weights" in refused()


def test_a_reward_model_whose_head_was_not_saved(tmp_path: Path, base: Path, refused: Callable[..., str]) -> None:
    save_peft(tmp_path / "adapter", classifier_of(base), base_path=base, task_type="SEQ_CLS")
    change_weights(tmp_path / "adapter", base_model__model__score__weight=None)
    assert "carries no head (score.weight)" in refused()


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this pickle ran",))


def test_pickles(adapter: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"x": Explosive()}))
    assert "merge.allow_pickle=true" in refused()
    assert "holds more than tensors" in refused(allow_pickle=True)
    assert "this pickle ran" not in capsys.readouterr().out
    torch.save(["a list"], adapter / "adapter_model.bin")
    assert "is no dictionary of tensors" in refused(allow_pickle=True)


def test_unfinished_runs_and_places_without_adapter(tmp_path: Path, adapter: Path, refused: Callable[..., str]) -> None:
    run_dir = tmp_path / "run"
    output = {"kind": "adapter", "task": "causal_lm", "path": "model", "format": "peft"}
    write_json(run_dir / "manifest.json", {"stage": "sft", "status": "running", "output": None})
    assert "holds no finished adapter (stage sft, status running" in refused(run_dir)
    write_json(run_dir / "manifest.json", {"stage": "sft", "status": "complete", "output": output | {"kind": "policy"}})
    assert "kind policy" in refused(run_dir)
    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "has no adapter_config.json" in refused(tmp_path)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in refused()


# --- the base


def test_a_base_of_another_shape_kind_or_family(
    tmp_path: Path, base: Path, adapter: Path, refused: Callable[..., str]
) -> None:
    config = tiny_config()
    config.hidden_size = 40
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    assert "is (40, 48) in the model, and the adapter is for (32, 48)" in refused(base=str(tmp_path / "wide"))
    config = tiny_config(layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "short")
    assert "has weights for model.layers.1" in refused(base=str(tmp_path / "short"))
    save_base(tmp_path / "gpt2", "gpt2")
    assert "but a GPT2LMHeadModel has none" in refused(base=str(tmp_path / "gpt2"))
    classifier_of(base).save_pretrained(tmp_path / "rm")
    change_settings(adapter, task_type="CAUSAL_LM")
    assert "is a LlamaForSequenceClassification" in refused(base=str(tmp_path / "rm"))


def test_another_vocabulary(tmp_path: Path, adapter: Path, refused: Callable[..., str]) -> None:
    other = tmp_path / "other"
    save_base(other)
    vocabulary = tiny_tokenizer().get_vocab()
    text = json.loads((other / "tokenizer.json").read_text())
    names = sorted(vocabulary, key=lambda token: vocabulary[token])
    text["model"]["vocab"] = {**{n: i for i, n in enumerate(names[:3])}, **{f"{n}'": vocabulary[n] for n in names[3:]}}
    (other / "tokenizer.json").write_text(json.dumps(text))
    assert isinstance(PreTrainedTokenizerFast.from_pretrained(other), PreTrainedTokenizerFast)
    assert f"{len(names) - 3} of its {len(names)} tokens have other numbers" in refused(base=str(other))


def test_fewer_rows_than_the_adapter_was_trained_on(tmp_path: Path, base: Path, refused: Callable[..., str]) -> None:
    wide = causal(base)
    wide.resize_token_embeddings(64)
    wide.save_pretrained(tmp_path / "wide")
    save_peft(tmp_path / "adapter", causal(base), base_path=base, target_modules=["q_proj", "lm_head"])
    assert "holds a tokenizer" in refused(base=str(tmp_path / "wide"))
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    rows = len(tiny_tokenizer())
    assert f"has embeddings of 64 rows, but {tmp_path / 'adapter'} was trained on {rows}" in refused(
        base=str(tmp_path / "wide")
    )


def test_a_base_that_changed_since(tmp_path: Path, base: Path, adapter: Path, refused: Callable[..., str]) -> None:
    run_dir = tmp_path / "run"
    output = {"kind": "adapter", "task": "causal_lm", "path": "model", "format": "peft"}
    manifest = {"stage": "sft", "status": "complete", "output": output, "base_model": str(base)}
    run_dir.mkdir()
    adapter.rename(run_dir / "model")
    write_json(run_dir / "manifest.json", manifest | {"base_digest": digest_tree(base)})
    assert read_adapter(str(run_dir)).task == "causal_lm"
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "is not the model that" in refused(run_dir)
    assert "is not the model that" in refused(run_dir / "model"), "the run is found from its model, too"
    parents = [{"role": "policy", "run_dir": "/gone", "digest": "0" * 64}]
    write_json(run_dir / "manifest.json", manifest | {"parents": parents})
    assert "the run began from 000000000000" in refused(run_dir)


def test_bases_that_are_not_there_or_not_plain(
    tmp_path: Path, base: Path, adapter: Path, refused: Callable[..., str]
) -> None:
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", config | {"quantization_config": {"load_in_4bit": True}})
    assert "is quantised" in refused()
    write_json(base / "config.json", config)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "pickled weights only (pytorch_model.bin)" in refused()
    write_json(base / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model-00001.safetensors"}})
    assert "is incomplete: model-00001.safetensors" in refused()
    change_settings(adapter, base_model_name_or_path="/models/gone")
    assert "set merge.base= to where it is now" in refused()
    change_settings(adapter, base_model_name_or_path=None)
    assert "merge.base is required" in refused()
    assert "neither a run directory" in refused(base=str(tmp_path))


def test_a_base_without_all_tensors(base: Path, adapter: Path, refused: Callable[..., str]) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "lacks 1 tensors of a LlamaForCausalLM (model.norm.weight)" in refused()


# --- before any process starts


def test_the_front_names_the_same_mistakes(tmp_path: Path, base: Path, adapter: Path) -> None:
    def problems(**options: Any) -> str:
        return "\n".join(map(str, check_merge(MergeLoraConfig(merge=MergeConfig(**options)))))

    assert problems(adapter=str(adapter)) == ""
    assert problems(adapter=str(adapter), base=str(base)) == ""
    assert problems(adapter=str(adapter), base="org/model") == ""
    assert "no such directory: " in problems(adapter=str(adapter), base="/models/gone")
    assert "did you mean" in problems(adapter=str(tmp_path / "adaptor"))
    assert "it is a whole model" in problems(adapter=str(base))
    run_dir = tmp_path / "run"
    write_json(run_dir / "manifest.json", {"stage": "rm", "status": "failed", "output": None})
    assert "run of `rlhf rm` that is not finished (status: failed)" in problems(adapter=str(run_dir))
    write_json(run_dir / "manifest.json", {"stage": "rm", "status": "complete", "output": {"kind": "reward"}})
    assert "holds a reward and no adapter" in problems(adapter=str(run_dir))
    change_settings(adapter, base_model_name_or_path="/models/gone")
    assert "merge.base: is required: /models/gone" in problems(adapter=str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "merge.allow_pickle=true" in problems(adapter=str(adapter), base=str(base))
    assert problems(adapter=str(adapter), base=str(base), allow_pickle=True) == ""


# --- the scale


def test_scale_by_hand() -> None:
    assert scale_of({"lora_alpha": 32, "r": 16}, "m.q_proj", 16) == 2.0  # 32 / 16
    assert scale_of({"lora_alpha": 32, "use_rslora": True}, "m.q_proj", 16) == 8.0  # 32 / √16
    patterns = {"lora_alpha": 32, "alpha_pattern": {"q_proj": 8, r"layers\.\d+\.v_proj": 4}}
    assert scale_of(patterns, "model.layers.3.q_proj", 16) == 0.5  # 8 / 16
    assert scale_of(patterns, "model.layers.3.v_proj", 16) == 0.25  # 4 / 16
    assert scale_of(patterns, "model.layers.3.my_q_proj", 16) == 2.0  # no name ends so


def test_a_finished_merge_is_left_alone(tmp_path: Path) -> None:
    """It has no steps and no checkpoints by which other runs are known to have begun."""
    values = {"stage": "merge-lora", "merge": {"adapter": "runs/lora"}}
    freeze(tmp_path, values)
    write_json(tmp_path / "manifest.json", {"stage": "merge-lora", "status": "running"})
    assert standing(tmp_path, values, "auto").state == "new"
    write_json(tmp_path / "manifest.json", {"stage": "merge-lora", "status": "complete"})
    assert standing(tmp_path, values, "auto").state == "finished"
    with pytest.raises(ConfigError, match=r"merge\.adapter: was 'runs/lora' in this run, now 'runs/other'"):
        standing(tmp_path, {"stage": "merge-lora", "merge": {"adapter": "runs/other"}}, "auto")
