"""The program: a real socket, streams that come piece by piece, an orderly end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest

from seriatim.cli.main import main
from seriatim.cli.serving import sources_of
from seriatim.serving.server import listening
from support.served import loaded, running, until

MODEL = "text-draft"


def test_a_text_comes_piece_by_piece_and_going_away_frees_its_place():
    with running(pace=0.02) as (url, server), openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        ask = {"model": MODEL, "prompt": "def x(", "seed": 2, "temperature": 0.0}
        times, text = [], ""
        for chunk in client.completions.create(**ask, max_tokens=30, stream=True):
            times.append(time.monotonic())
            text += chunk.choices[0].text
        alone = loaded("zoo:text-draft").generate("def x(", max_new_tokens=30, temperature=0.0)
        assert text == alone.text and times[-1] - times[0] > 0.1
        engine = server.service.models[MODEL].engine
        stream = client.completions.create(**ask, max_tokens=150, stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: engine.counts["cancelled"] == 1)
        raw = httpx.post(
            f"{url}/v1/completions", content=b'{"model": "\xff', headers={"content-type": "application/json"}
        )
        assert raw.status_code == 400 and raw.json()["error"]["type"] == "invalid_request_error"
        with pytest.raises(openai.PermissionDeniedError):
            client.with_options(default_headers={"host": "evil.example"}).models.list()


def test_told_to_stop_it_ends_streams_with_a_word():
    with running(pace=0.05) as (url, server), httpx.Client(timeout=20) as client:
        ask = {"model": MODEL, "prompt": "x", "max_tokens": 100, "stream": True}
        with client.stream("POST", f"{url}/v1/completions", json=ask) as answer:
            lines = answer.iter_lines()
            next(lines)
            start = time.monotonic()
            server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
            assert time.monotonic() - start < 10 and rest[-1] == "data: [DONE]" and "shutting_down" in rest[-2]


@pytest.mark.slow
def test_the_program_serves_and_stops(tmp_path):
    """SIGTERM while a stream runs: an end within 10 seconds."""
    command = [
        sys.executable,
        "-m",
        "seriatim",
        "serve",
        "zoo:text-draft",
        "zoo:var",
        "--port",
        "0",
        "--max-tokens",
        "900",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "SERIATIM_API_KEY": "k"}
    ) as program:
        try:
            first = program.stderr.readline()
            assert first.startswith("text-draft, var at http://127.0.0.1:")
            assert program.stderr.readline().strip() == "ready"
            url = first.split()[3]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
            assert [m.id for m in client.models.list()] == ["text-draft", "var"]
            stream = client.completions.create(model=MODEL, prompt="x", max_tokens=900, stream=True, n=4)
            next(iter(stream))
            start = time.monotonic()
            program.send_signal(signal.SIGTERM)
            with contextlib.suppress(openai.APIError):
                list(stream)
            program.wait(10)
            assert time.monotonic() - start < 10 and "Traceback" not in program.stderr.read()
        finally:
            program.kill()


def test_a_model_that_cannot_be_loaded_ends_the_program(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"system": "nosuch"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "not known here: 'nosuch'" in said and "Traceback" not in said and "ready" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zoo:nosuch"], "the zoo has no"), (["zoo:var", "zoo:var"], "named twice"),
        (["zoo:var", "--api-key", " "], "empty"),
        (["zoo:text-draft", "--decoder", "beem"], "did you mean beam"),
        (["zoo:var", "--host", "192.0.2.1"], "cannot listen"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_is_loaded(arguments, message, capsys):
    assert main(["serve", *arguments, "--port", "0"]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(capsys):
    with listening("127.0.0.1", 0) as place:
        port = place.socket.getsockname()[1]
        assert main(["serve", "zoo:var", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "zoo:var"]) == 2
    assert "pip install 'seriatim[serve]'" in capsys.readouterr().err


def test_models_are_called_by_the_end_of_their_path(tmp_path):
    for name in ("a/model", "b/model", "c/other"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("a/model", "b/model", "c/other")]
    assert list(sources_of(["zoo:var", *paths[1:]], str)) == ["var", "model", "other"]
    assert list(sources_of(paths, str)) == [*paths[:2], "other"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom seriatim.cli.main import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'fastapi', 'uvicorn', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
