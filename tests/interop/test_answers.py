"""What training learns of a conversation: answers and the ends of their turns, behind the prompts that generation is
given, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seriatim.data.conversations import Conversations
from seriatim.interop.answers import Answers, answers_of
from seriatim.interop.chat import read_template
from seriatim.interop.tokenizer import published_tokenizer
from seriatim.random import Generator
from seriatim.systems.published import load_published
from support.tiny_chat import CHATML, PHI, TEMPLATES, says, write_chat_model, write_tokenizer

transformers = pytest.importorskip("transformers")

TALK = [
    says("user", "Hi"), says("assistant", "<think>ha</think>Hello there"), says("user", "Bye?"),
    says("assistant", "Bye, then"),
]  # fmt: skip
SHORT = [says("user", "1"), says("assistant", "2")]


def prepared(folder: Path, style: str, talks, length: int = 400) -> tuple[Answers, object, object]:
    template, end = TEMPLATES[style]
    stop = write_tokenizer(folder, template, end)
    chat, tokenizer = read_template(folder), published_tokenizer(folder)
    return answers_of(Conversations(talks), chat, tokenizer, (stop,), length), chat, tokenizer


def counted(sample, tokenizer) -> list[str]:
    """The texts of the ranges that count, special tokens in them."""
    ids, counts = sample
    edges = torch.diff(counts.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    ranges = zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True)
    return [tokenizer.inner.decode(ids[a:b].tolist(), skip_special_tokens=False) for a, b in ranges]


@pytest.mark.parametrize("style", TEMPLATES)
def test_answers_and_the_ends_of_their_turns_count_and_nothing_else(style, tmp_path):
    made, _, tokenizer = prepared(tmp_path, style, [TALK, SHORT])
    end = TEMPLATES[style][1]
    head = "<|im_start|>assistant\n" if style == "bare" else ""  # its prompts leave that to the model
    want = [f"{head}<think>ha</think>Hello there{end}", f"{head}Bye, then{end}", f"{head}2{end}"]
    samples = [counted(sample, tokenizer) for sample in made.samples]
    if style == "forgets":  # a first turn that comes again otherwise is a sample of its own
        assert samples == [[text] for text in want]
    else:
        assert samples == [want[:2], want[2:]]
    assert made.whole == 2 and not made.notes


@pytest.mark.parametrize("style", TEMPLATES)
def test_what_stands_before_an_answer_is_what_generation_is_given(style, tmp_path):
    """The prompt's ids, as `chat_ids` would make them, then the answer."""
    made, chat, tokenizer = prepared(tmp_path, style, [TALK])
    prompts = [tokenizer.encode_templated(chat.render(TALK[:n])) for n in (1, 3)]
    last, counts = made.samples[-1]
    begins = ((counts[1:].int() - counts[:-1].int()) == 1).nonzero()[:, 0] + 1
    assert last[: int(begins[-1])].tolist() == prompts[1]
    first = made.samples[0][0].tolist()
    assert first[: len(prompts[0])] == prompts[0] and bool(made.samples[0][1][len(prompts[0])])


def test_a_word_that_melts_into_its_prompt_is_learned_apart_from_it(tmp_path):
    """In the next turn's prompt it has melted, so that turn is a sample of its own."""
    talk = [says("user", "you"), says("assistant", "Hello"), says("user", "go"), says("assistant", "Bye")]
    made, chat, tokenizer = prepared(tmp_path, "spaced", [talk])
    assert [counted(sample, tokenizer) for sample in made.samples] == [["Hello</s>"], ["Bye</s>"]]
    space, melted = tokenizer.encode_templated(" "), tokenizer.encode_templated(" H")
    assert len(melted) == 1 and melted[0] in made.samples[1][0] and melted[0] not in made.samples[0][0]
    ids, counts = made.samples[0]
    assert ids[~counts].tolist()[-1:] == space


@pytest.mark.parametrize("style", ["ChatML", "Llama 3"])
def test_logits_get_a_gradient_where_an_answer_is_read_and_nowhere_else(style, tmp_path, monkeypatch):
    """Several turns, samples of different lengths in a batch, padding behind the shorter one."""
    template, end = TEMPLATES[style]
    system = load_published(write_chat_model(tmp_path, template, end), torch.float32).requires_grad_(True)
    batch = system.answers(Conversations([TALK, SHORT])).take(torch.tensor([0, 1]))
    assert not batch["token"][1, -20:].any() and batch["counts"].sum() < batch["counts"].numel() / 2
    head, seen = system.model.heads["token"], []
    logits = head.logits

    def watched(*arguments):
        seen.append(logits(*arguments))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(head, "logits", watched)
    loss, count = system.losses(batch, Generator(0), 0.0)
    loss.backward()
    (said,) = seen
    touched = said.grad.abs().sum(-1) > 0
    assert torch.equal(touched, batch["counts"][:, 1:]), "slot i reads token i + 1"
    assert int(count) == int(batch["counts"].sum())
    law = torch.log_softmax(said.detach(), -1).gather(-1, batch["token"][:, 1:, None])[..., 0]
    assert torch.allclose(loss, -law[batch["counts"][:, 1:]].sum(), rtol=1e-5)


def test_company_and_padding_change_nothing(tmp_path):
    system = load_published(write_chat_model(tmp_path), torch.float32)
    examples = system.answers(Conversations([TALK, SHORT]))
    with torch.no_grad():
        both = system.losses(examples.take(torch.tensor([0, 1])), Generator(0), 0.0)
        alone = [system.losses(examples.take(torch.tensor([i])), Generator(0), 0.0) for i in (0, 1)]
    assert torch.allclose(both[0], alone[0][0] + alone[1][0], rtol=1e-5) and both[1] == alone[0][1] + alone[1][1]
    assert system.bytes_in(examples) == len("<think>ha</think>Hello there" + "Bye, then" + "2")


def test_what_is_longer_is_cut_and_said(tmp_path):
    whole, _, tokenizer = prepared(tmp_path, "ChatML", [TALK, SHORT])
    first = counted(whole.samples[0], tokenizer)[0]
    length = whole.samples[0][0].tolist().index(tokenizer.inner.token_to_id("<|im_end|>")) + 20
    cut, *_ = prepared(tmp_path, "ChatML", [TALK, SHORT], length)
    assert len(cut.samples[0][0]) == length and first.startswith(counted(cut.samples[0], tokenizer)[0])
    assert len(cut) == 2 and any("1 of 2 conversations are longer than" in note for note in cut.notes)
    late, *_ = prepared(tmp_path, "ChatML", [[says("user", "x" * 500), says("assistant", "y")], SHORT], 100)
    assert len(late) == 1 and any("only begin behind the cut" in note for note in late.notes)


def test_conversations_that_a_template_refuses_are_counted_and_all_of_them_are_an_error(tmp_path):
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + CHATML
    stop = write_tokenizer(tmp_path, refusing)
    chat, tokenizer = read_template(tmp_path), published_tokenizer(tmp_path)
    no = [says("user", "no"), says("assistant", "2")]
    begins = [says("assistant", "Hello"), says("user", "Hi")]
    some = answers_of(Conversations([no, SHORT, begins]), chat, tokenizer, (stop,), 100)
    assert len(some) == some.whole == 1
    assert "2 of 3 conversations cannot be used: the chat template fails: never" in some.notes[0]
    assert "begins with its only answer" in some.notes[0]
    with pytest.raises(ValueError, match=r"nothing to learn from in 1 conv.* the chat template fails: never"):
        answers_of(Conversations([no]), chat, tokenizer, (stop,), 100)


def test_a_template_that_writes_answers_elsewhere_is_refused(tmp_path):
    write_tokenizer(tmp_path, "{{ messages | length }}{% if add_generation_prompt %}prompt{% endif %}")
    with pytest.raises(ValueError, match="does not write an answer behind the prompt"):
        answers_of(Conversations([SHORT]), read_template(tmp_path), published_tokenizer(tmp_path), (), 100)


@pytest.mark.parametrize(("template", "want"), [(CHATML, "2<|im_end|>"), (PHI, "2<|end|>\n<|endoftext|>"), (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "assistant: 2\n")])  # fmt: skip
def test_without_a_known_end_the_last_special_token_ends_an_answer_or_else_all_counts(template, want, tmp_path):
    write_tokenizer(tmp_path, template)
    tokenizer = published_tokenizer(tmp_path)
    made = answers_of(Conversations([SHORT]), read_template(tmp_path), tokenizer, (), 100)
    assert counted(made.samples[0], tokenizer) == [want]


def test_a_model_without_a_template_says_so(tmp_path):
    system = load_published(write_chat_model(tmp_path, None))
    with pytest.raises(ValueError, match="this llama has no chat template, so conversations mean nothing to it"):
        system.answers(Conversations([SHORT]))


def test_hundreds_of_conversations_take_a_few_processes(tmp_path, monkeypatch):
    from seriatim.interop import chat as module

    calls, ask = [], module._ask_sandbox
    monkeypatch.setattr(module, "_ask_sandbox", lambda request: calls.append(1) or ask(request))
    talks = [[says("user", str(n)), says("assistant", str(-n))] for n in range(120)]
    made, _, tokenizer = prepared(tmp_path, "ChatML", talks)
    assert [counted(sample, tokenizer) for sample in made.samples] == [[f"{-n}<|im_end|>"] for n in range(120)]
    assert len(calls) == 3
