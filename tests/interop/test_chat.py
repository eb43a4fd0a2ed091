"""Chat templates: what transformers writes, we write; what a hostile one tries, it does not get."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from seriatim.cli.main import main
from seriatim.interop import chat
from seriatim.interop.chat import ChatTemplate, read_template
from seriatim.verbs.load import load

transformers = pytest.importorskip("transformers")

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are brief.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if tools is defined and tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
LLAMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- if not date is defined %}{% set date = strftime_now('%Y') %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nThis is ' ~ date ~ '. ' ~ system ~ '<|eot_id|>' }}
{%- for m in messages %}
    {%- if m.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- generation %}{{ m.content | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
{% endfor %}
    {% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
    {% endif %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/...') }}
    {% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{%- macro said(m) %}{{ m.content }}{% endmacro %}
{{- bos_token }}{%- set ns = namespace(turn=0, system='') %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{% set ns.turn = ns.turn + 1 %}
    {{- '[INST] ' ~ ns.system ~ said(m) ~ ' [/INST]' }}{% set ns.system = '' %}
{%- elif m['role'] == 'system' %}{% set ns.system = said(m) ~ '\n\n' %}
{%- elif m['role'] == 'assistant' %}{{ ' ' + said(m) + eos_token }}
{%- else %}{{ raise_exception('Only user, system and assistant roles are supported, not ' ~ m | tojson) }}{% endif %}
{%- endfor %}"""
STYLES = {"ChatML": CHATML, "Llama 3": LLAMA, "Gemma": GEMMA, "Mistral": MISTRAL}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]"]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = [
    [says("user", "Hello")],
    [says("system", "You are a <pirate>."), says("user", " Who's there? \n")],
    [says("user", "é ☃ 🙂"), says("assistant", '"a" & {b}'), says("user", "{{ messages }} {% raw %}")],
    [says("user", "1"), says("user", "2")],
    [says("user", "1"), says("critic", "ça")],
]
ONE = CONVERSATIONS[0]


@pytest.fixture(scope="module")
def theirs():
    """A tokenizer of transformers over bytes, which puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    """A model and its tokenizer as transformers writes them."""
    out = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    sizes = {"vocab_size": 263, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=256)
    transformers.LlamaForCausalLM(config).save_pretrained(out)
    theirs.chat_template = LLAMA
    theirs.save_pretrained(out)
    return out


def copy_of(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def failure(source: str, messages=ONE, **extra) -> str:
    with pytest.raises(ValueError) as error:
        ChatTemplate(source, {}).render(messages, **extra)
    return str(error.value)


# ---- what transformers writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_conversations_read_as_transformers_writes_them(style, theirs, tmp_path):
    """The same text, with and without the beginning of an answer, or refused by both in the template's words."""
    import jinja2

    theirs.chat_template = STYLES[style]
    theirs.save_pretrained(tmp_path)
    ours, refused = read_template(tmp_path), 0
    for messages, begun in [*((m, True) for m in CONVERSATIONS), (CONVERSATIONS[2], False)]:
        try:
            want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun)
        except jinja2.TemplateError as error:
            refused += 1
            with pytest.raises(ValueError) as said:
                ours.render(messages, begun)
            assert str(said.value) == f"the chat template fails: {error}"
        else:
            assert ours.render(messages, begun) == want
    assert refused == {"ChatML": 0, "Llama 3": 0, "Gemma": 2, "Mistral": 1}[style]


def test_variables_of_the_caller_reach_the_template(theirs):
    tools = [{"name": "é<", "parameters": {"a": [1, None, True]}}]
    source = CHATML + "{{ thinking }}{{ dict(a=1) }}{{ unheard }}"
    want = theirs.apply_chat_template(ONE, tokenize=False, chat_template=source, tools=tools, thinking=False)
    assert ChatTemplate(source, {}).render(ONE, False, tools=tools, thinking=False) == want
    assert "JSON's types" in failure(source, thinking=object())


def test_ids_are_those_of_transformers_with_one_beginning(folder, theirs):
    messages = [*CONVERSATIONS[1], says("assistant", "ok<|eot_id|>"), says("user", "go")]
    ours = load(folder)
    want = theirs.apply_chat_template(messages, chat_template=LLAMA, add_generation_prompt=True, return_dict=False)
    assert ours.chat_ids(messages) == want
    assert want.count(256) == 1 and ours.tokenizer.encode(ours.prompt_of(messages))[:2] == [256, 256]


# ---- where templates stand -------------------------------------------------------------------------------------------


def test_a_template_is_read_from_each_place_it_is_published_in(tmp_path):
    assert read_template(tmp_path) is None
    file, tokens = tmp_path / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}list"}]
    file.write_text(json.dumps({**tokens, "chat_template": several, "pad_token": None, "add_bos_token": True}))
    found = read_template(tmp_path)
    assert found == ChatTemplate("{{ bos_token }}list", {"bos_token": "<s>", "eos_token": "</s>"})
    assert found.render(ONE) == "<s>list"
    file.write_text(json.dumps({"chat_template": several[:1]}))
    assert read_template(tmp_path) is None
    file.write_text(json.dumps({"chat_template": "{{ bos_token }}text"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert read_template(tmp_path).render(ONE) == "<s>text"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}é", encoding="utf-8")
    assert read_template(tmp_path).render(ONE) == "</s>é"


def test_files_that_hold_no_template_are_named(tmp_path):
    for name, content, word in (
        ("tokenizer_config.json", b"{half", "is no JSON"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "is no text"),
        ("tokenizer_config.json", b"[" * 100_000, "is no JSON"),
        ("chat_template.jinja", b"\xff\xfe\x00", "is no text in UTF-8"),
        ("chat_template.jinja", b"x" * (chat.LENGTH + 1), "1,000,001 characters"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=word):
            read_template(tmp_path)
        (tmp_path / name).unlink()


def test_a_gguf_file_holds_its_template_and_its_tokens():
    from seriatim.interop.gguf import GGUF

    file = GGUF.__new__(GGUF)  # its metadata alone
    said = {"tokenizer.ggml.tokens": ["a", "<s>", "</s>"], "tokenizer.ggml.bos_token_id": 1}
    file.path, file.said = Path("a.gguf"), {**said, "tokenizer.ggml.eos_token_id": 9}
    assert file.chat is None
    file.said["tokenizer.chat_template"] = "{{ bos_token }}"
    assert file.chat == ChatTemplate("{{ bos_token }}", {"bos_token": "<s>"})
    file.said["tokenizer.chat_template"] = [1]
    with pytest.raises(ValueError, match=r"a\.gguf is no text"):
        _ = file.chat


# ---- at the terminal -------------------------------------------------------------------------------------------------


def test_a_prompt_is_put_as_what_a_user_says(folder, capsys):
    arguments = ["generate", str(folder), "--chat", "--prompt", "Hi", "--temperature", "0", "--max-new-tokens", "5"]
    assert main([*arguments, "--json"]) == 0
    said, ours = json.loads(capsys.readouterr().out), load(folder)
    ids = ours.chat_ids([says("user", "Hi")])
    assert said["ids"] == ours.generate(ids, temperature=0, max_new_tokens=5).ids
    assert said["ids"] != ours.generate("Hi", temperature=0, max_new_tokens=5).ids and said["prompt"] == "Hi"
    assert main(arguments) == 0
    assert capsys.readouterr().out == said["text"] + "\n", "the answer alone"


def test_asking_what_cannot_be_answered_is_told(folder, tmp_path, capsys):
    assert main(["generate", str(folder), "--chat", "--ids", "1,2"]) == 2
    assert "give it by --prompt" in capsys.readouterr().err
    (copy_of(folder, tmp_path) / "chat_template.jinja").unlink()
    assert main(["generate", str(tmp_path), "--chat", "--prompt", "Hi"]) == 2
    assert "this llama has no chat template" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="without a tokenizer"):
        load(tmp_path).chat_ids(ONE)


def test_a_run_of_ours_does_not_converse(monkeypatch, capsys):
    from seriatim.cli import generating
    from seriatim.systems.text.next_token import Config, NextToken

    monkeypatch.setattr(generating, "load", lambda *a: NextToken(Config(length=16, width=32, depth=1, heads=2)))
    assert main(["generate", "run", "--chat", "--prompt", "Hi"]) == 2
    assert "next-token has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "a conversation is a list of messages"),
        ("Hello", "a conversation is a list of messages"),
        (["Hello"], "message 0 is a str"),
        ([*ONE, {"content": "x"}], "message 1 has no role"),
        ([{}], "message 0 has no role and no content"),
        ([{"role": "user", "content": None}], "message 0: content must be text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0: content must be text"),
    ],
)
def test_messages_that_are_none_are_refused(messages, word):
    assert word in failure("x", messages)


# ---- broken and hostile templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("one\n{% for m in %}", "its line 2 is no jinja2"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('no ' * 10000) }}", "no no no"),
        ("{% include 'secret' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
        ("{{ lipsum.__globals__['os'].system('id') }}", "attribute '__globals__'"),
        ("{{ cycler.__init__.__globals__.os }}", "attribute '__init__'"),
        ("{{ raise_exception.__globals__ }}{{ strftime_now.__code__.co_code }}", "attribute '__code__'"),
        ("{{ '{0.__class__.__base__}'.format(1) }}", "attribute '__class__'"),
        ("{{ (messages | map('attr', '__class__') | first).mro() }}", "attribute '__class__'"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ messages.append(1) }}", "attribute 'append'"),
        ("{{ messages[0].update(role='system') }}", "attribute 'update'"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "too deeply"),
        ("{{" + "(" * 100_000, "too deeply"),
        ("{% for i in range(10 ** 12) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10 ** 11 }}", "too much memory"),
        ("{{ messages[0].content * 10 ** 10 }}", "too much memory"),
        ("{{ '%2000000000d' % 1 }}", "too much memory"),
        ("{{ '{:>2000000000}'.format(1) }}", "too much memory"),
        ("{{ 'a'.ljust(2 * 10 ** 9) | length }}", "too much memory"),
        ("{{ 'x' * 1000001 }}", "more than 1,000,000 characters"),
        ("{% for i in range(90000) %}{{ messages[0].content * 100 }}{% endfor %}", "more than 1,000,000 characters"),
    ],
)
def test_broken_and_hostile_templates_are_refused_at_once(source, word):
    start = time.perf_counter()
    said = failure(source)
    assert word in said and len(said) < 700, said
    assert time.perf_counter() - start < chat.CLOCK_SECONDS


def test_templates_that_never_end_are_stopped_in_threads_too():
    nested = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    number = "{% set n = messages | length + 6 %}{{ (n ** (n ** 11)) is odd }}"
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(failure, [nested, number]))
    assert all("was stopped" in text for text in said), said
    assert time.perf_counter() - start < 2 * chat.CLOCK_SECONDS


def test_the_sandbox_knows_no_secrets_and_leaves_messages_alone(monkeypatch):
    """Variables of the environment, and the caller's own objects, do not reach its process."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    seen = {}
    run = chat.subprocess.run

    def watched(command, **how):
        seen.update(how["env"])
        return run(command, **how)

    monkeypatch.setattr(chat.subprocess, "run", watched)
    messages = [says("user", "Hi")]
    assert ChatTemplate("{% set m = messages[0] %}{{ dict(m, role='x') }}", {}).render(messages)
    assert messages == [says("user", "Hi")] and set(seen) <= set(chat.ENVIRONMENT)


def test_a_message_of_any_characters_passes_unchanged():
    odd = "\ud800 \x00 \r\n \U0010ffff " + "x" * 900_000
    assert ChatTemplate("{{ messages[0].content }}", {}).render([says("user", odd)]) == odd
