"""The evaluation harness asks this library's models and its own backend the same, and hears the same."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    place = tmp_path_factory.mktemp("published")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    inner.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"],
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=letters, special_tokens=special, show_progress=False),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(place)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=inner.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=0,
            eos_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() > 1 else 1)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def both(folder):
    from lm_eval.models.huggingface import HFLM

    from seriatim.verbs.harness import Harness

    return Harness(str(folder), batch_size=3), HFLM(str(folder), device="cpu", batch_size=3, dtype="float32")


def asked(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def test_log_likelihoods_of_continuations(both):
    pairs = asked(
        ("the quick", " brown"), ("", "fox"), ("over the ", "lazy dog"), ("a", "b"), ("the lazy " * 30, "dog jumps")
    )
    ours, theirs = (model.loglikelihood(pairs, disable_tqdm=True) for model in both)
    assert [g for _, g in ours] == [g for _, g in theirs]
    torch.testing.assert_close(
        torch.tensor([x for x, _ in ours]), torch.tensor([x for x, _ in theirs]), rtol=1e-4, atol=1e-3
    )


def test_log_likelihoods_of_whole_texts_of_one_window_and_of_many(both):
    texts = asked(("the quick brown fox",), ("jumps over the lazy dog " * 20,))
    ours, theirs = (model.loglikelihood_rolling(texts, disable_tqdm=True) for model in both)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-3)


def test_texts_up_to_a_stop_string(both):
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    plain = {"until": [], "max_gen_toks": 12, "do_sample": False}
    requests = asked(("the quick", settings), ("over", settings), ("the lazy dog", plain), ("fox " * 40, plain))
    ours, theirs = (model.generate_until(requests, disable_tqdm=True) for model in both)
    assert ours == theirs


def test_a_local_task_has_the_same_result(folder, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import seriatim.verbs.harness  # noqa: F401 (its model is registered)

    rows = [
        {"q": f"the {a}", "choices": [" fox", " dog", " lazy"], "gold": i % 3}
        for i, a in enumerate(["quick", "brown", "lazy", "over"])
    ]
    file = str(tmp_path / "rows.jsonl")
    Path(file).write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "animals", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "animals.yaml").write_text(json.dumps(task))  # JSON is YAML
    said = [
        lm_eval.simple_evaluate(
            model=name, model_args=f"pretrained={folder}", tasks=["animals"], device="cpu", bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )["results"]["animals"]["acc,none"]
        for name in ("seriatim", "hf")
    ]  # fmt: skip
    assert said[0] == said[1]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    from seriatim.verbs.harness import Harness
    from seriatim.verbs.train import train

    place = tmp_path_factory.mktemp("masked") / "run"
    tiny = {"length": 48, "width": 16, "depth": 1, "heads": 2, "steps": 2, "batch": 2}
    train("mdlm", "stdlib", out=place, settings=tiny)
    made = Harness(str(place), draws=64)
    made.place = str(place)
    return made


def test_a_model_of_any_order_is_asked_by_its_bound(masked):
    """The bound of a pair of bytes is below that of the second alone, behind what is cut of a long context, too."""
    pairs = asked(("the quick", " b"), ("", "fox"), ("the lazy " * 30, "d"))
    (two, same), (three, _), (one, _) = masked.loglikelihood(pairs, disable_tqdm=True)
    assert three < two < one < 0
    row = [*masked.tokenizer.encode("the quick"), *masked.tokenizer.encode(" b")]
    assert two == -masked.model.bound(row, len(row) - 2, 64)
    assert same == (masked.model.write("the quick", 2, replace(masked.model.sampling, temperature=0, steps=2)) == " b")
    with pytest.raises(ValueError, match="is to be scored"):
        masked.loglikelihood(asked(("a", "b" * 60)), disable_tqdm=True)


def test_by_how_many_draws_is_asked_of_the_command_and_128_are_usual(masked):
    """Draws are spread over the counts of hidden tokens: of one token there is one count, and no noise."""
    from seriatim.verbs.harness import Harness

    place = masked.place
    assert Harness(place).draws == 128
    few, many = (Harness.create_from_arg_string(f"pretrained={place},draws={n}") for n in (1, 128))
    pairs = asked(("the quick", "b"), ("the", " quick brown fox"))
    (a, x), (b, y) = (model.loglikelihood(pairs, disable_tqdm=True) for model in (few, many))
    assert a[0] == pytest.approx(b[0]) and abs(x[0] - y[0]) > 1e-4
    with pytest.raises(ValueError, match="at least 1 draw"):
        Harness(place, draws=0)


def test_steps_guidance_and_tokens_are_asked_of_the_command(masked, folder):
    from seriatim.verbs.harness import Harness

    plain = {"until": [], "max_gen_toks": 12, "do_sample": False}
    (own,) = masked.generate_until(asked(("the quick", plain)), disable_tqdm=True)
    arguments = f"pretrained={masked.place},suppress_tokens=<eos>;{ord(own[0])},steps=6,guidance=1.5,keep_tokens=116"
    model = Harness.create_from_arg_string(arguments)
    assert model.asked == {"guidance": 1.5, "keep_tokens": (116,), "steps": 6}
    (text,) = model.generate_until(asked(("the quick", plain)), disable_tqdm=True)
    want = replace(model.model.sampling, temperature=0.0, **model.asked, **model.barred)
    assert text == model.model.write("the quick", 12, want) and own[0] not in text
    other = Harness(str(folder), suppress_tokens="</s>", begin_suppress_tokens=5)
    assert other.barred == {"suppress_tokens": (1,), "begin_suppress_tokens": (5,)}
    assert len(other.generate_until(asked(("the", plain)), disable_tqdm=True)[0]) > 0
    with pytest.raises(ValueError, match="no steps and no guidance"):
        Harness(str(folder), guidance=1.0)


def test_a_model_of_any_order_writes_up_to_a_stop_string(masked):
    plain = {"until": [], "max_gen_toks": 12, "do_sample": False}
    (whole,) = masked.generate_until(asked(("the quick", plain)), disable_tqdm=True)
    assert len(whole) > 3
    (cut,) = masked.generate_until(asked(("the quick", {**plain, "until": [whole[2]]})), disable_tqdm=True)
    assert cut == whole[: whole.index(whole[2])]


def test_a_task_that_leaves_no_room_for_a_prompt_is_refused(both):
    with pytest.raises(ValueError, match="--gen_kwargs max_gen_toks=24"):
        both[0].generate_until(asked(("the quick", {"max_gen_toks": LENGTH})), disable_tqdm=True)
