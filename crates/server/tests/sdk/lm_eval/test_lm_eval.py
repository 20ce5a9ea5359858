"""lm-evaluation-harness on tasks of its own: scores of prompts by completions, texts by completions and chat."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from conftest import KEY, ROOT

HERE = pathlib.Path(__file__).parent


@pytest.fixture()
def evaluate(url, tmp_path):
    def evaluate(kind, route, task, *flags):
        for name in ("sums.jsonl", f"{task}.yaml"):
            shutil.copy(HERE / name, tmp_path)
        settings = {
            "model": "abacus",
            "base_url": f"{url}/v1/{route}",
            "tokenizer": str(ROOT / "models/abacus"),
            "num_concurrent": 2,
            "max_retries": 1,
            "max_length": 1024,
            "tokenized_requests": "True" if kind == "local-completions" else "False",
        }
        command = [sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", task]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), *flags]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        env = {**os.environ, **offline, "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": KEY}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        (result,) = (tmp_path / "out").rglob("results*.json")
        return json.loads(result.read_text())["results"][task]

    return evaluate


def test_scores_of_continuations_by_completions(evaluate):
    assert "acc,none" in evaluate("local-completions", "completions", "sums_choice")


def test_texts_by_completions(evaluate):
    assert "exact_match,last-number" in evaluate("local-completions", "completions", "sums_text")


def test_texts_by_chat(evaluate):
    found = evaluate("local-chat-completions", "chat/completions", "sums_text", "--apply_chat_template")
    assert found["exact_match,last-number"] == 1.0
