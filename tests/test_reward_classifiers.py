"""Reward models and classifiers as sources: tokens, scores, labels, moments, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, CTRLConfig, CTRLForSequenceClassification

from rlhf_cli.data.rows import DialogueRow, Message
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.data.tokenize import encode_rows, make_encoder, row_segments
from rlhf_cli.errors import ConfigError, DataError, ModelError
from rlhf_cli.models.load import grow_embeddings
from rlhf_cli.ops.label_measures import measured
from rlhf_cli.reward import open_reward
from rlhf_cli.reward.combine import open_rewards
from rlhf_cli.reward.model import length_batches
from rlhf_cli.reward.source import ScoredText
from rlhf_cli.schema import RewardConfig, RewardSourceConfig
from tests.data_tokenizers import byte_bpe, sentencepiece_like
from tests.reward_models import word_tokenizer, write_adapter, write_decoder, write_encoder, write_policy, write_run
from tests.tiny_models import noisy

CPU = torch.device("cpu")
PROMPTS = ["What is a floor?", "Why?", "How do I make a room slippery? " * 3, "a", "Say it."]
RESPONSES = ["It is the lower side of a room.", "", "I found something.", "b" * 40, "It is so.\n"]


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits (C,) of one sequence by transformers, without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def trained_tokens(tokenizer: Any, template: str, prompt: str, response: str) -> list[int]:
    """The tokens that sft and rm train on for this row."""
    row = DialogueRow((Message("user", prompt), Message("assistant", response)), num_context=1)
    parts = row_segments(row, TEMPLATES[template], tokenizer.special_tokens_map, "auto")
    return encode_rows(make_encoder(tokenizer), [parts])[0].input_ids.tolist()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_scores_are_those_of_transformers_on_the_tokens_of_training(tmp_path: Path, arch: str) -> None:
    write_decoder(tmp_path / "rm", arch)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    scores = open_reward(tmp_path / "rm", template="hh").score(PROMPTS, RESPONSES)
    for prompt, response, score in zip(PROMPTS, RESPONSES, scores, strict=True):
        ids = trained_tokens(byte_bpe(), "hh", prompt, response)
        assert ids[-1] == byte_bpe().eos_token_id
        assert score == pytest.approx(alone(model, ids).item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batch_size_and_padding_change_nothing(tmp_path: Path, batch_size: int) -> None:
    write_decoder(tmp_path / "rm")
    one = open_reward(tmp_path / "rm", batch_size=1).score(None, RESPONSES)
    assert open_reward(tmp_path / "rm", batch_size=batch_size).score(None, RESPONSES) == pytest.approx(one, abs=1e-5)


def test_text_that_holds_the_padding_token_is_read_at_its_end(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm")
    reward, tokenizer = open_reward(tmp_path / "rm"), byte_bpe()
    text = "a<|pad|>"
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert tokenizer.pad_token_id in ids
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert reward.score(None, [text, "longer than that"])[0] == pytest.approx(alone(model, ids).item(), abs=1e-5)


def test_a_raw_text_gets_no_template_and_an_eos(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm", tokenizer=sentencepiece_like())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    tokenizer = sentencepiece_like()
    ids = [*tokenizer("a floor").input_ids, tokenizer.eos_token_id]
    assert ids[0] == tokenizer.bos_token_id
    got = open_reward(tmp_path / "rm", template="hh").score(None, ["a floor"])
    assert got == [pytest.approx(alone(model, ids).item(), abs=1e-5)]
    # sees=response: the same for whatever prompt
    blind = open_reward(tmp_path / "rm", template="hh", sees="response").score(["Why?"], ["a floor"])
    assert blind == pytest.approx(got, abs=1e-6)


def test_a_long_text_loses_its_start_and_keeps_bos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_decoder(tmp_path / "rm", tokenizer=sentencepiece_like())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    tokenizer, text = sentencepiece_like(), "a b c d e f g h a b c d"
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    reward = open_reward(tmp_path / "rm", max_length=6)
    assert reward.score(None, [text, "a", text])[0] == pytest.approx(alone(model, [ids[0], *ids[-5:]]).item(), abs=1e-5)
    assert reward.rewards.cut == 2
    assert len([r for r in caplog.records if "loses its start" in r.getMessage()]) == 1


def test_max_length_is_never_more_than_the_model_has_positions(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "rm", "gpt2")  # learnt positions: the next one would be an index error
    reward = open_reward(tmp_path / "rm", max_length=100_000)
    assert math.isfinite(reward.score(None, ["a b " * model.config.max_position_embeddings])[0])
    assert reward.rewards.cut == 1


def test_length_batches_by_hand() -> None:
    assert length_batches([3, 9, 3, 5, 9], 2, same_length=False) == [[1, 4], [3, 0], [2]]
    assert length_batches([3, 9, 3, 5, 9], 4, same_length=True) == [[1, 4], [3], [0, 2]]
    assert length_batches([], 4, same_length=False) == []


# --- labels


def test_measures_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), math.log(4.0)]])  # softmax 1/8, 3/8, 4/8
    assert measured(logits, 1, "probability").tolist() == pytest.approx([3 / 8])
    assert measured(logits, 1, "log_prob").tolist() == pytest.approx([math.log(3 / 8)])
    assert measured(logits, 1, "margin").tolist() == pytest.approx([math.log(3 / 4)])
    assert measured(logits, 2, "margin").tolist() == pytest.approx([math.log(4 / 3)])
    # each label by itself: σ(ln 3) = 3/4
    assert measured(logits, 1, "probability", multi_label=True).tolist() == pytest.approx([3 / 4])
    assert logits.tolist() == [[0.0, pytest.approx(math.log(3)), pytest.approx(math.log(4))]], "the input is left alone"


@pytest.mark.parametrize("label", ["Happy", "happy", "1"])
def test_a_label_by_name_in_any_case_or_by_number(tmp_path: Path, label: str) -> None:
    write_decoder(tmp_path / "mood", labels=["angry", "Happy", "sad"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mood")
    tokenizer = byte_bpe()
    (score,) = open_reward(tmp_path / "mood", type="classifier", label=label, measure="margin").score(None, ["so"])
    logits = alone(model, [*tokenizer("so").input_ids, tokenizer.eos_token_id])
    assert score == pytest.approx((logits[1] - max(logits[0], logits[2])).item(), abs=1e-5)


def test_labels_that_fit_not_are_told_with_the_labels_there_are(tmp_path: Path) -> None:
    write_decoder(tmp_path / "mood", labels=["angry", "happy"])
    write_decoder(tmp_path / "rm")
    with pytest.raises(ModelError, match=r"sources\[0\]\.label: is required.*0 angry, 1 happy"):
        open_reward(tmp_path / "mood")
    with pytest.raises(ModelError, match=r"no label 'glad'; choose one of: 0 angry, 1 happy"):
        open_reward(tmp_path / "mood", label="glad")
    with pytest.raises(ModelError, match="gives one score and has no labels"):
        open_reward(tmp_path / "rm", type="classifier", label="happy")


def test_the_labels_of_the_manifest_win(tmp_path: Path) -> None:
    write_decoder(tmp_path / "run" / "model", labels=["LABEL_0", "LABEL_1"])
    write_run(tmp_path / "run", reward={"labels": ["no", "yes"]})
    plain = open_reward(tmp_path / "run" / "model", label="1", measure="margin").score(None, ["so"])
    assert open_reward(tmp_path / "run", label="yes", measure="margin").score(None, ["so"]) == plain


# --- run directories


def test_template_and_moments_come_from_the_run(tmp_path: Path) -> None:
    write_decoder(tmp_path / "run" / "model")
    write_run(tmp_path / "run", template="alpaca", reward={"mean": 0.5, "std": 0.25})
    raw = open_reward(tmp_path / "run" / "model", template="alpaca").score(PROMPTS, RESPONSES)
    assert open_reward(tmp_path / "run").score(PROMPTS, RESPONSES) == raw
    got = open_reward(tmp_path / "run", normalize=True).score(PROMPTS, RESPONSES)
    assert got == pytest.approx([(r - 0.5) / 0.25 for r in raw])


def test_moments_in_the_model_config_and_of_a_label(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm", reward={"mean": 1.0, "std": 2.0})
    (raw,) = open_reward(tmp_path / "rm").score(None, ["so"])
    assert open_reward(tmp_path / "rm", normalize=True).score(None, ["so"]) == [pytest.approx((raw - 1) / 2)]
    moments = {"by_label": {"yes": {"margin": {"mean": 3.0, "std": 4.0}}}, "labels": ["no", "yes"]}
    write_decoder(tmp_path / "run" / "model", labels=["no", "yes"])
    write_run(tmp_path / "run", reward=moments)
    asked: dict[str, Any] = {"label": "yes", "measure": "margin"}
    (raw,) = open_reward(tmp_path / "run", **asked).score(None, ["so"])
    assert open_reward(tmp_path / "run", **asked, normalize=True).score(None, ["so"]) == [pytest.approx((raw - 3) / 4)]
    with pytest.raises(ModelError, match="no mean and std of the log_prob of its label yes"):
        open_reward(tmp_path / "run", label="yes", normalize=True)


@pytest.mark.parametrize(
    ("moments", "said"), [(None, "no mean and std of its scores"), ({"mean": 1, "std": 0}, "is 0")]
)
def test_nothing_to_normalise_with(tmp_path: Path, moments: Any, said: str) -> None:
    write_decoder(tmp_path / "run" / "model")
    write_run(tmp_path / "run", reward=moments)
    with pytest.raises(ModelError, match=said):
        open_reward(tmp_path / "run", normalize=True)


@pytest.mark.parametrize("labels", [None, ["angry", "happy", "sad"]])
def test_an_adapter_scores_as_it_did_when_it_was_saved(tmp_path: Path, labels: list[str] | None) -> None:
    base = write_policy(tmp_path / "base")
    wrapped = write_adapter(tmp_path / "run" / "model", base, labels)
    again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels) if labels else 1)
    grow_embeddings(again, len(byte_bpe()))
    reference = PeftModel.from_pretrained(again, tmp_path / "run" / "model").eval()
    write_run(tmp_path / "run", "adapter", reward={"labels": labels} if labels else None)
    options: dict[str, Any] = {"label": "sad", "measure": "probability"} if labels else {}
    tokenizer = byte_bpe()
    ids = [*tokenizer("so").input_ids, tokenizer.eos_token_id]
    logits = alone(reference, ids)
    expected = logits.softmax(-1)[2] if labels else logits[0]
    assert open_reward(tmp_path / "run", **options).score(None, ["so", "longer text"])[0] == pytest.approx(
        expected.item(), abs=1e-5
    )
    assert any("lora_B" in n and p.abs().max() > 0 for n, p in wrapped.named_parameters()), "for this to mean anything"


def test_adapters_that_cannot_be_used(tmp_path: Path) -> None:
    base = write_policy(tmp_path / "base")
    write_adapter(tmp_path / "run" / "model", base)
    write_run(tmp_path / "run", "adapter", base_digest="of another base")
    with pytest.raises(ModelError, match="is no longer the one that the adapter"):
        open_reward(tmp_path / "run")
    write_run(tmp_path / "run", "adapter", task="causal_lm")
    with pytest.raises(ModelError, match="holds the adapter of a policy; a reward model is needed"):
        open_reward(tmp_path / "run")
    write_run(tmp_path / "run", "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"whose base is gone .*rlhf merge-lora merge.adapter="):
        open_reward(tmp_path / "run")
    (tmp_path / "run" / "model" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled adapters are not read"):
        open_reward(tmp_path / "run")


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    write_policy(tmp_path / "sft" / "model")
    with pytest.raises(ModelError, match=r"sources\[0\]\.path: .*is a LlamaForCausalLM, no reward model"):
        open_reward(tmp_path / "sft" / "model")
    write_run(tmp_path / "sft", "policy", "causal_lm", stage="sft")
    with pytest.raises(ModelError, match=r"a run of `rlhf sft`\) holds a policy; a reward model is needed"):
        open_reward(tmp_path / "sft")
    write_run(tmp_path / "sft", status="running")
    with pytest.raises(ModelError, match="not finished"):
        open_reward(tmp_path / "sft")
    with pytest.raises(ModelError, match=r"sources\[0\]\.path: .*nowhere does not exist"):
        open_reward(tmp_path / "nowhere")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = write_decoder(tmp_path / "rm")
    (tmp_path / "rm" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "rm" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"sources\[0\]\.path: .*pickled"):
        open_reward(tmp_path / "rm")


def test_a_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    write_policy(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the weights lack 1 of the model's tensors"):
        open_reward(tmp_path / "base")


# --- encoders


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("roberta", [False, True])
def test_an_encoder_judges_prompt_and_answer_as_a_pair(tmp_path: Path, roberta: bool, batch_size: int) -> None:
    write_encoder(tmp_path / "bert", ["bad", "good"], roberta)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    tokenizer = word_tokenizer(roberta)
    prompts, responses = ["what is a floor ?", "why ?", "a"], ["low side of the room .", "no .", "b"]
    got = open_reward(tmp_path / "bert", label="good", batch_size=batch_size).score(prompts, responses)
    for prompt, response, score in zip(prompts, responses, got, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(prompt, response, return_tensors="pt")).logits[0]
        assert score == pytest.approx(logits.log_softmax(-1)[1].item(), abs=1e-5)


def test_an_encoder_loses_the_start_of_the_prompt_first(tmp_path: Path) -> None:
    write_encoder(tmp_path / "bert", ["bad", "good"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    tokenizer = word_tokenizer()

    def expected(*texts: str) -> float:
        with torch.no_grad():
            return model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)[1].item()

    reward = open_reward(tmp_path / "bert", label="good", measure="probability", max_length=8)
    # 5 + 4 words and 3 special tokens: the last word of the prompt stays
    (score,) = reward.score(["what is a floor ?"], ["low side of room"])
    assert score == pytest.approx(expected("?", "low side of room"), abs=1e-5)
    # nothing of the prompt fits: the end of the response alone, 6 words and 2 special tokens
    (score,) = reward.score(["why ?"], ["the low side of the good room yes"])
    assert score == pytest.approx(expected("side of the good room yes"), abs=1e-5)
    assert reward.rewards.cut == 2


def test_roberta_has_two_positions_less_than_its_config_says(tmp_path: Path) -> None:
    write_encoder(tmp_path / "roberta", ["bad", "good"], roberta=True, positions=20)
    assert math.isfinite(open_reward(tmp_path / "roberta", label="good").score(None, ["low " * 40])[0])


def test_a_batch_of_nothing(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm")
    rewards = open_rewards(RewardConfig(sources=[RewardSourceConfig(path=str(tmp_path / "rm"))]), CPU)
    assert rewards.score([]).total.tolist() == []
    texts = [ScoredText(None, "a"), ScoredText((), "")]
    assert len(rewards.score(texts).total) == 2


# --- tokenizers and configs as they come


def test_a_decoder_without_any_padding_token(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    config["pad_token_id"] = None
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    before = open_reward(tmp_path / "rm").score(None, RESPONSES)
    settings = json.loads((tmp_path / "rm" / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "rm" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_reward(tmp_path / "rm").score(None, RESPONSES) == pytest.approx(before, abs=1e-6)
    one = [open_reward(tmp_path / "rm", batch_size=1).score(None, [text])[0] for text in RESPONSES]
    assert one == pytest.approx(before, abs=1e-5)


def test_a_decoder_that_pools_by_itself_finds_the_padding(tmp_path: Path) -> None:
    """CTRL's head is not called `score`, so transformers' own pooling looks for the last token that is no padding."""
    tokenizer = word_tokenizer()
    config = CTRLConfig(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4, num_labels=1,
        pad_token_id=None,
    )  # fmt: skip
    noisy(CTRLForSequenceClassification(config)).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    reward = open_reward(tmp_path / "rm", template="none")
    (single,) = reward.score(["why"], ["yes"])
    beside, _ = reward.score(["why", "what is the low side of a good room"], ["yes", "the floor is the low side"])
    assert beside == pytest.approx(single, abs=1e-5)


def test_an_encoder_whose_tokenizer_cannot_pad(tmp_path: Path) -> None:
    write_encoder(tmp_path / "bert", ["bad", "good"])
    texts = ["good .", "what is a floor ?", "bad .", "why ?", "low side of the room yes no"]
    before = open_reward(tmp_path / "bert", label="good").score(None, texts)
    settings = json.loads((tmp_path / "bert" / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_reward(tmp_path / "bert", label="good").score(None, texts) == pytest.approx(before, abs=1e-5)


def test_a_template_that_refuses_names_the_row_and_the_option(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{{ raise_exception('system messages are not supported') }}"
    write_decoder(tmp_path / "rm", tokenizer=tokenizer)
    reward = open_reward(tmp_path / "rm")
    text = ScoredText((Message("user", "Why?"),), "So.", {}, "a.jsonl:3")
    with pytest.raises(
        DataError, match=r"a\.jsonl:3: .*system messages are not supported.*the reward source's `template`"
    ):
        reward.rewards.score([text])
    with pytest.raises(ModelError, match=r"sources\[0\]\.template to one of"):
        open_reward(write_run_of(tmp_path, "made_up"))


def write_run_of(root: Path, template: str) -> Path:
    write_decoder(root / "run" / "model")
    return write_run(root / "run", template=template)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_comes_close(tmp_path: Path, dtype: str) -> None:
    write_decoder(tmp_path / "rm")
    exact = open_reward(tmp_path / "rm").score(None, RESPONSES)
    low = open_reward(tmp_path / "rm", dtype=dtype).score(None, RESPONSES)
    assert low == pytest.approx(exact, abs=0.05)
    assert low != exact


def test_what_is_given_from_python_is_checked(tmp_path: Path) -> None:
    write_decoder(tmp_path / "mood", labels=["sad", "happy"])
    with pytest.raises(ConfigError, match=r"sources\[0\]\.lable: is not an option; did you mean label\?"):
        open_reward(tmp_path / "mood", lable="happy")
    with pytest.raises(ConfigError, match="measure: got 'prob'; allowed: one of log_prob, probability, margin"):
        open_reward(tmp_path / "mood", label="happy", measure="prob")
    reward = open_reward(tmp_path / "mood", label=1)
    assert reward.score(None, ["a floor"]) == open_reward(tmp_path / "mood", label="happy").score(None, ["a floor"])
    with pytest.raises(ModelError, match="has no label '²'; choose one of: 0 sad, 1 happy"):
        open_reward(tmp_path / "mood", label="²")
    ask = lambda role: reward.score([[{"role": role, "content": "Why?"}]], ["So."])
    assert ask("human") == ask("user")
    for prompts, responses, told in [
        (None, "a floor", "responses is one text, where a list of texts belongs"),
        ("Why", ["a"] * 3, "prompts is one text, where a list of texts belongs"),
        (["Why?"], [None], r"responses\[0\] is no text: None"),
        ([[{"role": "alien", "content": "Why?"}]], ["So."], r"prompts\[0\] is neither .* roles user, human, assistant"),
        (["Why \ud83d?"], ["So."], r"half a character .* in sample 0, which starts 'Why \\ud83d\?'"),
    ]:
        with pytest.raises(DataError, match=told):
            reward.score(prompts, responses)
    assert reward.score(np.array(["a", "b"]), np.array(["c", "d"])) == reward.score(["a", "b"], ["c", "d"])


def test_the_model_directory_of_a_run_is_that_run(tmp_path: Path) -> None:
    jinja = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    write_decoder(tmp_path / "rm" / "model", jinja=jinja)  # of its base; the run was trained without
    write_run(tmp_path / "rm", template="none", reward={"mean": 1.0, "std": 2.0})
    of_run = open_reward(tmp_path / "rm", normalize=True).score(PROMPTS, RESPONSES)
    assert open_reward(tmp_path / "rm" / "model", normalize=True).score(PROMPTS, RESPONSES) == of_run
    assert open_reward(tmp_path / "rm", template="tokenizer", normalize=True).score(PROMPTS, RESPONSES) != of_run
